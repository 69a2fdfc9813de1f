"""An index on disk: append, delete, update, search, verify, compact, repair.

    index/
      catalogue.sqlite         what is in the index (see index_catalogue.py)
      segments/*.safetensors   the vectors (see index_segment.py); immutable
      ann-*.usearch            an HNSW graph, where one was built (see index_ann.py); deleting it loses nothing
      writer.lock              held by the one process that writes

A reader works on a snapshot: the segments and dead rows of one state of the catalogue. Rows are never changed in place, and
a segment that `compact` removed stays mapped, so a search that has begun ends on the state it began with.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .budget import is_whole
from .errors import BundleError, UsageError
from .fork import Turn
from .index_ann import AnnStage
from .index_catalogue import CATALOGUE, Catalogue, SegmentRow
from .index_layout import SEGMENTS, Layout
from .index_rows import SoundRows
from .index_segment import Rows, Segment
from .staging import staged_folder

if TYPE_CHECKING:
    from .cascade import AnyStage
    from .graph_maxsim import Scorer
    from .index_device import DeviceGroups
    from .index_writer import IndexWriter

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hit:
    """One result; rank 1 is the best, a higher score is better."""

    rank: int
    id: str
    score: float
    payload: Any = None


@dataclass(frozen=True)
class Part:
    """A segment within a snapshot: which rows are alive, and the position of its first row in the snapshot."""

    number: int
    segment: Segment
    alive: NDArray[np.bool_]
    start: int

    @property
    def end(self) -> int:
        return self.start + self.segment.items


class Snapshot:
    """The index in one state. Items are counted by position, through all segments, dead rows included."""

    def __init__(self, parts: Sequence[Part], damaged: Sequence[str] = ()) -> None:
        self.parts, self.damaged = tuple(parts), tuple(damaged)
        self.ends = np.array([part.end for part in self.parts], np.int64)

    def __len__(self) -> int:
        return sum(int(part.alive.sum()) for part in self.parts)

    def places(self, positions: Rows) -> list[tuple[int, int]]:
        """(segment number, row) of positions."""
        owners = np.searchsorted(self.ends, positions, side="right")
        return [
            (self.parts[owner].number, int(position) - self.parts[owner].start)
            for owner, position in zip(owners, positions, strict=True)
        ]


class Index:
    """An open index. Safe to use while another process writes, and from several threads; close it when all are done."""

    def __init__(
        self,
        folder: Path,
        catalogue: Catalogue,
        *,
        verify: bool,
        skip_damaged: bool,
        shard: tuple[int, int],
    ) -> None:
        pair = isinstance(shard, Sequence) and len(shard) == 2 and all(map(is_whole, shard))
        if not pair or not 0 <= shard[0] < shard[1]:
            raise UsageError(f"shard {shard!r} is not (i, of) with i from 0 to of - 1")
        self.folder = folder
        self.skip_damaged = skip_damaged
        self._catalogue, self._verify, self._hold, self.shard = catalogue, verify, 0, shard
        about, self.layout = catalogue.about(), catalogue.layout()
        self.fingerprint, self.bundle = about.get("fingerprint", ""), about.get("bundle", "")
        # The catalogue's version and the changes of `_rows`, of which the snapshot is.
        self._version, self._snapshot, self._turn = ((-1, -1), 0), Snapshot(()), Turn()
        self.device: DeviceGroups | None = None
        self.ann = AnnStage(folder, catalogue, self.layout.dims)
        self._rows = SoundRows(catalogue, skip_damaged=skip_damaged)

    @classmethod
    def create(cls, folder: str | Path, layout: Layout, *, fingerprint: str = "", bundle: str = "") -> None:
        """Make an empty index.

        Args:
            fingerprint: of the model whose embeddings it will hold; searches with another model are then refused.
            bundle: where that model's bundle is, for the search command.

        Raises:
            UsageError: the folder exists and is not empty.
        """
        with staged_folder(Path(folder), force=False) as staging:
            (staging / SEGMENTS).mkdir()
            Catalogue.create(staging, layout, {"fingerprint": fingerprint, "bundle": bundle})

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        verify: bool = True,
        skip_damaged: bool = False,
        hold: int = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> Index:
        """Open an index for reading.

        Args:
            verify: check every item's checksum when it is first read. Without, damage can change answers unseen.
            skip_damaged: serve what is sound and list the rest in ``snapshot().damaged``, rather than refuse. Damaged rows of
                the catalogue are found when one of them is among the results, or by a condition.
            hold: as `hold`, at once.
            shard: (i, of): serve the i-th (from 0) of so many equal ranges of rows, and open no other files. The k best
                of all ranges are among the k best of each.

        Raises:
            UsageError: there is no index. BundleError: it is damaged.
        """
        folder = Path(os.path.abspath(folder))  # the process may change its own later
        if not (folder / CATALOGUE).is_file():
            raise UsageError(f"{folder} is no index: it has no {CATALOGUE}; metaembed-index makes one")
        catalogue = Catalogue(folder)
        try:
            index = cls(folder, catalogue, verify=verify, skip_damaged=skip_damaged, shard=shard)
            index.hold(hold) if hold else index.snapshot()
        except BaseException:
            catalogue.close()
            raise
        return index

    def __len__(self) -> int:
        return len(self.snapshot())

    def __enter__(self) -> Index:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        try:
            if self.device:
                self.device.keep(())
        finally:
            self.ann.close()
            self._catalogue.close()

    def hold(self, vectors: int) -> None:
        """Copy the first so many vectors of every item into memory, and of items that appear later.

        The rest stays in mapped files, of which the system keeps what it has room for.

        Raises:
            UsageError: the index has not so many vectors. BundleError: some are damaged.
        """
        self.layout.groups_of(vectors)
        with self._turn:
            for part in self.snapshot().parts:
                part.segment.hold(vectors, skip_damaged=self.skip_damaged)
            self._hold = vectors

    def place(self, scorer: Scorer, vectors: int) -> int:
        """Copy the first so many vectors of every item to the GPU that a scorer's engine runs on.

        Stages that scan whole segments with that many candidate vectors are then scored there, the query rounded to the
        scorer's type; all others on the CPU. Segments that appear later follow when they are first scanned. Close the index
        before the scorer.

        Returns:
            bytes of device memory taken.

        Raises:
            UsageError: the scorer has no device, or the index not so many vectors. BundleError: some are damaged.
            MetaEmbedError: the GPU's memory does not suffice; nothing stays on it.
        """
        from .index_device import DeviceGroups

        self.layout.groups_of(vectors)
        if self.device:
            self.device.keep(())
        self.device, device = None, DeviceGroups(scorer, vectors)
        try:
            for part in self.snapshot().parts:
                if len(damaged := part.segment.check(vectors)) and not self.skip_damaged:
                    raise part.segment.damage(damaged)
                device.place(part.segment)
        except BaseException:
            device.keep(())
            raise
        self.device = device
        return device.nbytes

    def writer(self) -> IndexWriter:
        """Open the index for writing; a context manager. UsageError while another process writes."""
        from .index_writer import IndexWriter

        return IndexWriter(self.folder)

    def search(
        self,
        query: NDArray[Any],
        k: int = 10,
        *,
        cascade: Sequence[AnyStage] | None = None,
        where: Sequence[str] = (),
        approximate: bool = False,
    ) -> list[Hit]:
        """The k best items for one query (r_q, d), by a cascade of stages (default: `default_cascade`), each exact.

        Memory grows with what the stages keep (some 30 bytes each) and with what satisfies the conditions (15 bytes each), not
        with the index, of which a snapshot holds a byte an item, and one for each of its groups to compare checksums once.

        Args:
            cascade: stages, each a `Stage`, ``(r_q, r_c, keep)`` or ``"r_q,r_c:keep"``; the last keeps what is asked for:
                ``[(1, 1, 1000), (4, 8, 100), (16, 64)]``.
            where: conditions on payload fields that must all hold, ``year>=2020``.
            approximate: let the HNSW graph (`IndexWriter.build_ann`) choose what a first stage of (1,1) scores, which may miss
                some of what that stage would have kept. Scores stay exact. Items that were added since are all scored, and
                with conditions everything that satisfies them is, without the graph.

        Raises:
            UsageError: a stage asks for more vectors than the query or the index has; `approximate` without a graph, with
                another first stage, or on a shard. BundleError: damaged vectors, or a damaged graph.
        """
        from .cascade import search_index

        return search_index(self, query, k, cascade=cascade, where=where, approximate=approximate)

    def snapshot(self) -> Snapshot:
        """The present state; the same object until another process commits, or damaged rows are left out."""
        with self._turn:
            while True:
                with self._catalogue.reading():
                    version = self._catalogue.version(), self._rows.changes
                    rows = self._catalogue.segments() if version != self._version else None
                if rows is None:
                    return self._snapshot
                try:
                    self._snapshot, self._version = self._load(rows, version[0]), version
                    if self.device:
                        self.device.keep({part.segment for part in self._snapshot.parts})
                except BundleError:
                    if self._catalogue.version() == version[0]:
                        raise  # else a segment was compacted away between the two reads

    def stored_items(self) -> int:
        """Items that take space on the disk, deleted ones included."""
        return sum(row.items for row in self._catalogue.segments())

    def describe(self, snapshot: Snapshot, positions: Rows) -> list[tuple[str, Any]] | None:
        """Id and payload of every position.

        None when `compact` has removed some of them since the snapshot, or the next one leaves damaged ones out.
        """
        places = snapshot.places(positions)
        with self._catalogue.reading():
            try:
                found = self._catalogue.describe(places)
            except BundleError:
                if self.skip_damaged and self._rows.lack(snapshot.parts):
                    return None
                raise
        return [found[place] for place in places] if len(found) == len(set(places)) else None

    def select(self, snapshot: Snapshot, condition: str, values: Sequence[object]) -> Rows | None:
        """Positions of the rows whose payload satisfies a condition of `parse_filters`, dead ones included.

        None when `compact` has removed some segment of the snapshot since, or the next one leaves damaged rows out.

        The first time that it needs a segment it reads all its rows (2 s per million), lest damage hide some of them.
        """
        with self._catalogue.reading():
            if not {part.number for part in snapshot.parts} <= {row.number for row in self._catalogue.segments()}:
                return None
            if (self._verify or self.skip_damaged) and self._rows.lack(snapshot.parts):
                return None
            found = [
                self._catalogue.select(part.number, condition, values, self._rows.of(part.number)) + part.start
                for part in snapshot.parts
            ]
        return np.concatenate([np.empty(0, np.int64), *found])

    def verify(self) -> list[str]:
        """Read everything, and return one sentence for each thing that is damaged; empty for a sound index."""
        from .index_verify import find_damage

        while True:
            version = self._catalogue.version()
            found = find_damage(self.folder, self.layout, self._catalogue)
            if not found or self._catalogue.version() == version:
                return [damage.sentence for damage in found]
            # Another process committed meanwhile: files of one state, rows of another.

    def _load(self, rows: Sequence[SegmentRow], version: tuple[int, int]) -> Snapshot:
        """The snapshot of one version of the catalogue."""
        known = {part.number: part.segment for part in self._snapshot.parts}
        parts: list[Part] = []
        damaged: list[str] = []
        for row, alive in _in_shard(rows, *self.shard):
            if (sound := self._rows.of(row.number)) is not None:
                damaged += [f"{self.folder / CATALOGUE} is damaged in {row.items - len(sound)} rows of {row.name}"]
                alive = alive & np.isin(np.arange(row.items), sound)
            if not alive.any():  # nothing to read: whether the file is sound, or there, does not matter
                continue
            try:
                segment = known.get(row.number) or self._open_segment(row)
            except BundleError as error:
                if not self.skip_damaged or self._catalogue.version() != version:  # merged since: nothing is damaged
                    raise
                log.warning("left out, with its %d items: %s", int(alive.sum()), error)
                damaged.append(str(error))
                continue
            parts.append(Part(row.number, segment, alive, parts[-1].end if parts else 0))
        return Snapshot(parts, damaged)

    def _open_segment(self, row: SegmentRow) -> Segment:
        path = self.folder / SEGMENTS / row.name
        segment = Segment(path, self.layout, row.items, row.checksum, verify=self._verify)
        if self._hold:
            segment.hold(self._hold, skip_damaged=self.skip_damaged)
        return segment


def _in_shard(rows: Sequence[SegmentRow], i: int, of: int) -> Iterator[tuple[SegmentRow, NDArray[np.bool_]]]:
    """The segments that reach into a shard's range of rows, with the living rows that lie in it."""
    total = sum(row.items for row in rows)
    first, last = total * i // of, total * (i + 1) // of
    start = 0
    for row in rows:
        begin, end = max(first - start, 0), min(last - start, row.items)
        start += row.items
        if begin < end:
            alive = row.alive
            alive[:begin] = alive[end:] = False
            yield row, alive
