"""An approximate first stage: an HNSW graph over every item's first vector, derived from the index and never its truth.

    index/ann-*.usearch     the graph; the catalogue says which file, its SHA-256, and which segments it was built from

The graph only says where to look. What it finds is scored again by the exact stage, and so are all items of segments that
it was not built from: appended since, or merged (`IndexWriter.compact`, `tidy`). Its keys are (segment number, row), and neither
is ever used twice, so a key leads to the vector that was indexed or, deleted or compacted, to nothing.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .budget import is_whole
from .errors import BundleError, MetaEmbedError, UsageError
from .fork import Turn
from .index_catalogue import Catalogue, SegmentRow
from .index_layout import SEGMENTS, Layout
from .index_segment import Rows, Segment, map_randomly
from .manifest import FileRecord, sha256_of
from .maxsim import Floats, as_float32
from .staged_file import sync

if TYPE_CHECKING:
    from .ann_usearch import Graph, Keys
    from .index import Snapshot

log = logging.getLogger(__name__)
KEY = "ann"  # in the catalogue's `about`
SUFFIX = ".usearch"
PIECE = 1024  # items read and added at a time
ROW_BITS = 32  # of a key; a segment's number has the others
# Candidates that a walk keeps at least. Queries lie apart from what they look for (texts, pages): of the demo's nearest 100 of
# 100,000 a walk with 128 found 0.75, and one with 500 0.92 of the nearest 500.
LEAST_WALK = 512
# A walk for more than this share of the items takes longer than scanning them, where they are in memory: at 128 dims it took
# some 11 us for each of them, a scan 21 ns for each item (150,000 items, docs/measurements.md), and walks grow with the graph.
WORTH_WALKING = 0.001
OUTSIDE = 0.5  # a graph that lacks more than this share of the items is of little use, which is worth a warning


@dataclass(frozen=True)
class AnnRecord:
    """A graph as the catalogue knows it: its file, and the numbers of the segments whose living items it was built from."""

    name: str
    size: int
    sha256: str
    items: int
    segments: tuple[int, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> AnnRecord:
        data = json.loads(text)
        name = str(data["name"])
        if name != Path(name).name or not name.endswith(SUFFIX):
            raise ValueError(f"{name!r} is no file name")
        return cls(name, int(data["size"]), str(data["sha256"]), int(data["items"]), tuple(map(int, data["segments"])))


class AnnStage:
    """The graph of an open index: opened when first asked for, and again when another one was built.

    Attributes:
        worth_walking: the largest share of the items that a stage may keep for the graph to be walked, not the index scanned.
    """

    def __init__(self, folder: Path, catalogue: Catalogue, dims: int) -> None:
        self._folder, self._catalogue, self._dims = folder, catalogue, dims
        self._turn = Turn()
        self._text = ""  # the record, as the catalogue had it when the graph was opened
        self._opened: tuple[AnnRecord, Graph] | None = None
        self.worth_walking = WORTH_WALKING
        self._told: Snapshot | None = None

    def close(self) -> None:
        self._opened = None

    def record(self) -> AnnRecord | None:
        """What the catalogue says of the graph; None where none was built."""
        return read_record(self._folder, self._catalogue)

    def pool(self, snapshot: Snapshot, query: Floats, keep: int) -> Rows | None:
        """Positions that are worth scoring for the best `keep` of a query (d,) by inner product with first vectors.

        They are what the graph finds, and all living items that it does not hold. None: scanning everything is right, since
        it takes no longer, or because the graph does not lead to so many.

        Raises:
            UsageError: no graph was built. BundleError: its file is missing or damaged.
            MetaEmbedError: usearch is not installed.
        """
        record, graph = self._open()
        held = living_in(record, snapshot)
        outside = len(snapshot) - held
        if outside > OUTSIDE * len(snapshot) and self._told is not snapshot:
            log.warning("%d of %d items are not in the HNSW graph and are scanned; %s", outside, len(snapshot),
                        _rebuild(self._folder))  # fmt: skip
            self._told = snapshot
        wanted = keep * record.items // max(held, 1)  # the graph also finds what is gone
        while min(max(wanted, LEAST_WALK), record.items) <= self.worth_walking * record.items:
            found = _positions(snapshot, graph.search(query, wanted))
            if len(found) >= min(keep, held):
                segments = set(record.segments)
                rest = (
                    part.start + np.flatnonzero(part.alive) for part in snapshot.parts if part.number not in segments
                )
                return np.concatenate([found, *rest])
            wanted *= 2
        return None

    def _open(self) -> tuple[AnnRecord, Graph]:
        with self._turn:
            while True:
                text = self._catalogue.about().get(KEY, "")
                if self._opened is None or text != self._text:
                    try:
                        self._opened, self._text = open_graph(self._folder, text, self._dims), text
                    except BundleError:
                        if self._catalogue.about().get(KEY, "") == text:
                            raise
                        continue  # another graph took its place between the two reads
                record, graph = self._opened
                if graph.is_cut_short():
                    raise BundleError(f"{self._folder / record.name} was cut short; {_rebuild(self._folder)}")
                return record, graph


def read_record(folder: Path, catalogue: Catalogue) -> AnnRecord | None:
    """What the catalogue says of the graph; None where none was built."""
    text = catalogue.about().get(KEY, "")
    return _parse(folder, text) if text else None


def living_in(record: AnnRecord, snapshot: Snapshot) -> int:
    """How many of a snapshot's living items a graph holds."""
    segments = set(record.segments)
    return sum(int(np.count_nonzero(part.alive)) for part in snapshot.parts if part.number in segments)


def open_graph(folder: Path, text: str, dims: int) -> tuple[AnnRecord, Graph]:
    """Open the graph of a record, after reading its whole file once: usearch would trust a damaged one."""
    if not text:
        raise UsageError(f"{folder} has no HNSW graph; {_rebuild(folder)}")
    graph_class = _usearch().Graph
    record = _parse(folder, text)
    mapped = map_graph(folder, record)
    try:
        return record, graph_class(mapped, dims)
    except MetaEmbedError as error:
        raise BundleError(f"{folder / record.name}: {error}; {_rebuild(folder)}") from error


def map_graph(folder: Path, record: AnnRecord) -> mmap.mmap:
    """The file of a graph, mapped; a BundleError where it is missing or not the one that was written."""
    path = folder / record.name
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size != record.size or sha256_of(file) != record.sha256:
                raise BundleError(f"{path} is damaged, or not this index's; {_rebuild(folder)}")
            return map_randomly(file)
    except FileNotFoundError:
        raise BundleError(f"{path} is missing; {_rebuild(folder)}") from None


def write_ann(
    folder: Path,
    layout: Layout,
    rows: Sequence[SegmentRow],
    *,
    connectivity: int,
    expansion_add: int,
    track: Callable[[Any], Iterable[Any]],
) -> AnnRecord:
    """Build the graph of all living items in a new file, durable on return; see `IndexWriter.build_ann`."""
    whole = is_whole(connectivity) and is_whole(expansion_add)
    if not whole or not 2 <= connectivity <= 256 or not 1 <= expansion_add <= 10_000:
        raise UsageError(
            f"a graph of connectivity {connectivity!r} and expansion {expansion_add!r} cannot be built: "
            "whole numbers, 2 to 256 and 1 to 10000"
        )
    living = [row for row in rows if row.alive.any()]
    if not living:
        raise UsageError(f"{folder} holds no items; a graph needs at least one")
    usearch = _usearch()
    path = folder / f"ann-{uuid.uuid4().hex}{SUFFIX}"  # never used twice: a reader may still map an older file
    partial = path.with_suffix(".partial")
    try:
        items = usearch.write_graph(
            partial, layout.dims, _pieces(folder, layout, living, track),
            connectivity=connectivity, expansion_add=expansion_add,
        )  # fmt: skip
        file = _settle(partial)
        partial.rename(path)
        sync(folder)
    except BaseException:
        partial.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise
    return AnnRecord(path.name, file.bytes, file.sha256, items, tuple(row.number for row in living))


def _pieces(
    folder: Path, layout: Layout, rows: Sequence[SegmentRow], track: Callable[[Any], Iterable[Any]]
) -> Iterator[tuple[Keys, Floats]]:
    """Keys and first vectors (n, d) of all living items, each compared with its checksum."""
    places = [(row, start) for row in rows for start in range(0, row.items, PIECE)]
    for row, start in track(places):
        if start == 0:
            segment, alive = Segment(folder / SEGMENTS / row.name, layout, row.items, row.checksum), row.alive
        some = start + np.flatnonzero(alive[start : start + PIECE])
        if len(damaged := segment.check(1, some)):
            raise segment.damage(damaged)
        (group,) = segment.groups(1)
        if len(some):
            yield (some + (row.number << ROW_BITS)).astype(np.uint64), as_float32(group, some)[:, 0]


def _positions(snapshot: Snapshot, keys: Keys) -> Rows:
    """Where the living items among keys lie in a snapshot, rising; those that are gone are left out."""
    numbers, rows = (keys >> ROW_BITS).astype(np.int64), (keys & ((1 << ROW_BITS) - 1)).astype(np.int64)
    found: list[Rows] = [np.empty(0, np.int64)]
    wanted = set(numbers.tolist())
    for part in snapshot.parts:
        if part.number in wanted:
            mine = rows[numbers == part.number]
            found.append(np.sort(mine[part.alive[mine]]) + part.start)
    return np.concatenate(found)


def _settle(path: Path) -> FileRecord:
    """Make a file durable; its size and SHA-256."""
    sync(path)
    return FileRecord.of(path)


def _parse(folder: Path, text: str) -> AnnRecord:
    try:
        return AnnRecord.from_json(text)
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"{folder} describes its HNSW graph in a form unknown here ({error}); {_rebuild(folder)}"
        ) from None


def _rebuild(folder: Path) -> str:
    return f"metaembed-index ann {folder} builds one"


def _usearch() -> Any:
    try:
        from . import ann_usearch
    except ImportError as error:
        raise MetaEmbedError(
            f"an approximate first stage needs usearch ({error}); pip install 'metaembed-export[ann]'"
        ) from error
    return ann_usearch
