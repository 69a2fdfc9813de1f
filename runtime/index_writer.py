"""Writing an index: one writer at a time, and every call durable when it returns."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import BundleError, MetaEmbedError, UsageError
from .fork import Turn
from .index import SEGMENTS
from .index_ann import KEY, SUFFIX, write_ann
from .index_catalogue import CATALOGUE, Catalogue, Place, SegmentRow, pack_dead
from .index_layout import cut
from .index_payload import check_levels, too_deep
from .index_segment import Segment, Source, write_segment
from .maxsim import Vectors

LOCK = "writer.lock"
SEGMENT_BYTES = 1 << 30  # what `compact` merges up to
PIECE_BYTES = 1 << 22  # copied at a time when merging


P = ParamSpec("P")
R = TypeVar("R")


def _in_turn(method: Callable[Concatenate[IndexWriter, P], R]) -> Callable[Concatenate[IndexWriter, P], R]:
    """What a call reads of the catalogue has to hold until it writes, whichever threads call."""

    @functools.wraps(method)
    def call(self: IndexWriter, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._turn:
            return method(self, *args, **kwargs)

    return call


class IndexWriter:
    """The one writer of an index, from opening to `close`. A context manager; threads take turns.

    Files come first and are synced, then one transaction of the catalogue makes them visible: a process killed in between
    leaves a file that nothing refers to, and the next writer removes it.

    Raises:
        UsageError: there is no index, or another process writes to it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(os.path.abspath(folder))  # the process may change its own later
        self._turn, self._pid = Turn(), os.getpid()
        if not (self.folder / CATALOGUE).is_file():
            raise UsageError(f"{self.folder} is no index: it has no {CATALOGUE}; metaembed-index makes one")
        self._lock = open(self.folder / LOCK, "a")  # noqa: SIM115 (held until close)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._catalogue = Catalogue(self.folder, write=True)
            self.about, self.layout = self._catalogue.about(), self._catalogue.layout()
            self._remove_orphans()
        except BlockingIOError:
            self._lock.close()
            raise UsageError(f"another process is writing to {self.folder}; wait for it to finish") from None
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @_in_turn
    def close(self) -> None:
        self._catalogue.close()
        if not self._lock.closed:
            if self._pid == os.getpid():  # a child would let go of its parent's
                fcntl.flock(self._lock, fcntl.LOCK_UN)  # or a child that was forked meanwhile would go on holding it
            self._lock.close()

    @_in_turn
    def known(self, ids: Sequence[str]) -> set[str]:
        """Those of the ids that are in the index."""
        return set(self._alive_places(_plain(ids)))

    @_in_turn
    def add(
        self,
        ids: Sequence[str],
        embeddings: NDArray[Any],
        payloads: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        replace: bool = False,
    ) -> None:
        """Append items; on return they are on the disk, and visible to every reader's next snapshot.

        Args:
            ids: distinct, not empty.
            embeddings: (n, r, d) with the index's r and d.
            payloads: JSON objects, or None; objects and lists lie at most 100 levels within each other.
            replace: items whose id is known are updated; without, such an id is refused.

        Raises:
            UsageError: values that do not fit, a NaN, or an id that is given twice or already there. Nothing is kept.
        """
        ids = _plain(ids)
        if not all(ids) or len(set(ids)) != len(ids):
            raise UsageError("ids are distinct texts, none of them empty")
        payloads = payloads if payloads is not None else [None] * len(ids)
        if not len(ids) == len(payloads) == len(embeddings):
            raise UsageError(
                f"{len(ids)} ids, {len(payloads)} payloads and {len(embeddings)} embeddings do not pair up"
            )
        stored = self.layout.encode(embeddings)
        texts = [_payload_text(id_, payload) for id_, payload in zip(ids, payloads, strict=True)]
        replaced = self._alive_places(ids)
        if replaced and not replace:
            raise UsageError(f"{next(iter(replaced))!r} is in the index already; replace=True updates it")
        if not ids:
            return
        spans = list(zip(self.layout.starts, self.layout.ends, strict=True))
        name, checksum = self._write(len(ids), lambda group: iter([cut(stored, *spans[group])]))
        with self._entering():
            self._bury(replaced.values())
            self._catalogue.add_segment(name, checksum, list(zip(ids, texts, strict=True)))

    @_in_turn
    def delete(self, ids: Sequence[str]) -> int:
        """Remove items and return how many there were; unknown ids are passed over. `compact` frees their space."""
        ids = _plain(ids)
        with self._catalogue.writing():
            places = self._alive_places(ids)
            self._bury(places.values())
        return len(places)

    @_in_turn
    def compact(self, segment_bytes: int = SEGMENT_BYTES) -> int:
        """Merge small segments, drop dead rows, and return the number of segments that were rewritten.

        Raises:
            BundleError: a segment to be rewritten is damaged. The index is left as it was.
        """
        rewritten: list[SegmentRow] = []
        for batch in self._batches(segment_bytes):
            self._merge(batch)
            rewritten += batch
        return len(rewritten)

    @_in_turn
    def build_ann(
        self,
        *,
        connectivity: int = 32,
        expansion_add: int = 256,
        track: Callable[[Any], Iterable[Any]] = iter,
    ) -> int:
        """Build the HNSW graph of an approximate first stage over all items, and return how many they are.

        The graph is held in memory until it is written: 2 d bytes of an item, and about 10 times the connectivity. Its
        threads come by chance, so two builds of the same items differ a little. A build that ends early changes nothing.

        Args:
            connectivity: neighbours of an item ("M"), 2 to 256.
            expansion_add: candidates for neighbours ("efConstruction"), 1 to 10,000. More of either: fewer misses, slower.

        Raises:
            UsageError: settings out of range, or no items. BundleError: a damaged vector.
            MetaEmbedError: usearch is not installed, or the disk is full.
        """
        rows = self._catalogue.segments()
        record = write_ann(
            self.folder, self.layout, rows, connectivity=connectivity, expansion_add=expansion_add, track=track
        )
        with self._entering():
            self._catalogue.set_about(KEY, record.to_json())
        self._remove_orphans()
        return record.items

    def _batches(self, segment_bytes: int) -> list[list[SegmentRow]]:
        """Segments to merge into one each: those with dead rows, and neighbours that fit together."""
        batches: list[list[SegmentRow]] = [[]]
        size = 0
        for row in self._catalogue.segments():
            weight = int(row.alive.sum()) * self.layout.item_bytes
            if batches[-1] and size + weight > segment_bytes:
                batches.append([])
                size = 0
            batches[-1].append(row)
            size += weight
        return [batch for batch in batches if len(batch) > 1 or any(row.dead for row in batch)]

    def _merge(self, batch: Sequence[SegmentRow]) -> None:
        folder = self.folder / SEGMENTS
        living = [row for row in batch if row.alive.any()]  # of the others nothing is read, be it damaged or missing
        segments = [Segment(folder / row.name, self.layout, row.items, row.checksum) for row in living]
        alive = [np.flatnonzero(row.alive) for row in living]
        for segment, rows in zip(segments, alive, strict=True):
            if len(damaged := segment.check(self.layout.vectors, rows)):
                raise segment.damage(damaged)
        items = [
            (id_, payload)
            for row, keep in zip(living, map(set, alive), strict=True)
            for place, id_, payload in self._catalogue.rows(row.number, row.items)
            if place in keep
        ]
        count = sum(map(len, alive))

        def source(group: int) -> Iterator[Vectors]:
            step = max(1, PIECE_BYTES // self.layout.item_bytes)
            for segment, rows in zip(segments, alive, strict=True):
                for start in range(0, len(rows), step):
                    yield segment.piece(group, rows[start : start + step])

        name, checksum = self._write(count, source) if count else ("", 0)
        with self._entering():
            self._catalogue.drop_segments(row.number for row in batch)
            if count:
                self._catalogue.add_segment(name, checksum, items)
        for row in batch:
            (folder / row.name).unlink(missing_ok=True)

    def _write(self, items: int, source: Source) -> tuple[str, int]:
        name = f"{uuid.uuid4().hex}.safetensors"  # never used twice: a reader may still map an older file
        return name, write_segment(self.folder / SEGMENTS / name, self.layout, items, source)

    @contextmanager
    def _entering(self) -> Iterator[None]:
        """A transaction that enters a new segment; when it fails, the file goes too."""
        try:
            with self._catalogue.writing():
                yield
        except BaseException:
            # By the catalogue's word, not by the exception: an interrupt may arrive just after the commit.
            with suppress(MetaEmbedError, OSError):
                self._remove_orphans()
            raise

    def _alive_places(self, ids: Sequence[str]) -> dict[str, Place]:
        alive = {row.number: row.alive for row in self._catalogue.segments()}
        found: dict[str, Place] = {}
        for id_, places in self._catalogue.places(ids).items():
            for number, row in places:
                if number not in alive or not 0 <= row < len(alive[number]):
                    raise BundleError(
                        f"{self.folder / CATALOGUE} puts {id_!r} where no item is; restore it, or index again"
                    )
                if alive[number][row]:
                    found[id_] = number, row
        return found

    def _bury(self, places: Iterable[Place]) -> None:
        dead: dict[int, list[int]] = {}
        for number, row in places:
            dead.setdefault(number, []).append(row)
        for segment in self._catalogue.segments() if dead else ():
            if segment.number in dead:
                alive = segment.alive
                alive[dead[segment.number]] = False
                packed = pack_dead(alive)
                self._catalogue.set_dead(
                    SegmentRow(segment.number, segment.name, segment.items, segment.checksum, packed)
                )

    def _remove_orphans(self) -> None:
        """What killed writers left: files of which the catalogue knows nothing. It was compared when it was opened."""
        known = {row.name for row in self._catalogue.segments()}
        for path in (self.folder / SEGMENTS).iterdir():
            if path.name not in known and path.suffix in (".safetensors", ".partial"):
                path.unlink()
        graph = self._catalogue.about().get(KEY, "")
        for path in self.folder.glob("ann-*"):
            if path.suffix in (SUFFIX, ".partial") and path.name not in graph:
                path.unlink()


def _plain(ids: Sequence[str]) -> list[str]:
    """Ids as plain texts, whatever kind of str they are (numpy's, an Enum's): the catalogue's checksums cover their form."""
    try:
        ids = ids if isinstance(ids, str) else list(ids)
        if isinstance(ids, str) or not all(isinstance(id_, str) for id_ in ids):
            raise UsageError("ids are a list of texts")
        return [str.__str__(id_).encode().decode() for id_ in ids]
    except UnicodeEncodeError as error:
        raise UsageError(f"the id {error.object!r} holds half a character; ids are whole Unicode texts") from None


def _payload_text(id_: str, payload: Mapping[str, Any] | None) -> str | None:
    if payload is None:
        return None
    try:
        text = json.dumps(dict(payload), ensure_ascii=False, allow_nan=False)
        text.encode()
    except RecursionError:
        raise too_deep(f"the payload of {id_!r}") from None
    except (TypeError, ValueError) as error:
        raise UsageError(f"a payload is a JSON object; {payload!r} is not ({error})") from None
    check_levels(text, f"the payload of {id_!r}")
    return text
