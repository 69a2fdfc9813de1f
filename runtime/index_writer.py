"""Writing an index: one writer at a time, and every call durable when it returns."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import BundleError, MetaEmbedError, UsageError
from .fork import Turn
from .index_ann import KEY, write_ann
from .index_catalogue import CATALOGUE, Catalogue, Place, SegmentRow, pack_dead
from .index_files import WriterLock, copy_rows, remove_leftovers, write_new_segment
from .index_layout import SEGMENTS, cut
from .index_payload import check_levels, too_deep
from .index_segment import Segment

SEGMENT_BYTES = 1 << 30  # what `compact` and `tidy` merge up to


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
        UsageError: there is no index, or another process writes to it. BundleError: its catalogue is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(os.path.abspath(folder))  # the process may change its own later
        self._turn = Turn()
        self._lock = WriterLock(self.folder)
        try:
            self._catalogue = Catalogue(self.folder, write=True)
            try:
                if found := self._catalogue.find_damage():
                    raise BundleError(found[0])
                self.about, self.layout = self._catalogue.about(), self._catalogue.layout()
                remove_leftovers(self.folder, self._catalogue)
            except BaseException:
                self._catalogue.close()
                raise
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
        stored = self.layout.encode(embeddings)
        if not len(ids) == len(payloads) == stored.shape[0]:
            raise UsageError(
                f"{len(ids)} ids, {len(payloads)} payloads and {stored.shape[0]} embeddings do not pair up"
            )
        texts = [_payload_text(id_, payload) for id_, payload in zip(ids, payloads, strict=True)]
        replaced = self._alive_places(ids)
        if replaced and not replace:
            raise UsageError(f"{next(iter(replaced))!r} is in the index already; replace=True updates it")
        if not ids:
            return
        spans = list(zip(self.layout.starts, self.layout.ends, strict=True))
        name, checksum = write_new_segment(
            self.folder, self.layout, len(ids), lambda group: iter([cut(stored, *spans[group])])
        )
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
    def set_bundle(self, bundle: str) -> None:
        """Say where the model's bundle is, for the search command."""
        with self._catalogue.writing():
            self._catalogue.set_about("bundle", bundle)
        self.about["bundle"] = bundle

    @_in_turn
    def compact(self, segment_bytes: int = SEGMENT_BYTES) -> int:
        """Merge all small segments, drop all dead rows, and return the number of segments that were rewritten.

        Raises:
            BundleError: a segment to be rewritten is damaged. The index is left as it was.
        """
        return self._merge_all(self._batches(segment_bytes))

    @_in_turn
    def tidy(self, segment_bytes: int = SEGMENT_BYTES) -> int:
        """`compact` as far as it costs no more than what was added or deleted since; see `_tiers`.

        What an HNSW graph was built from outlasts small additions so.
        """
        return self._merge_all(self._tiers(segment_bytes))

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
        remove_leftovers(self.folder, self._catalogue)
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

    def _tiers(self, segment_bytes: int) -> list[list[SegmentRow]]:
        """Segments to merge into one each: the smallest, where the largest of them is no larger than the others together.

        So a merge at least doubles the segment that an item is in, and what is left at least doubles from one segment to
        the next. Adding n items in any portions rewrites each of them log2(n) times at most and leaves log2(n) + 1 segments
        (and 4 for each `segment_bytes`, which no merge exceeds). A segment by itself is rewritten when half of it is dead:
        each deletion then pays for one item, and the dead take no more space than the living.
        """
        rows = self._catalogue.segments()
        sizes = np.array([row.alive.sum() for row in rows], np.int64)
        order = np.argsort(sizes, kind="stable")
        rest, sizes = [rows[i] for i in order], sizes[order]
        batches: list[list[SegmentRow]] = []
        while rest:
            totals = sizes.cumsum()
            fit = (sizes[1:] <= totals[:-1]) & (totals[1:] * self.layout.item_bytes <= segment_bytes)
            count = int(np.flatnonzero(fit).max(initial=-1)) + 2
            if count > 1 or rest[0].items >= 2 * sizes[0]:
                batches.append(rest[:count])
            rest, sizes = rest[count:], sizes[count:]
        return batches

    def _merge_all(self, batches: Sequence[Sequence[SegmentRow]]) -> int:
        for batch in batches:
            self._merge(batch)
        return sum(map(len, batches))

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
        parts = list(zip(segments, alive, strict=True))
        name, checksum = copy_rows(self.folder, self.layout, parts) if parts else ("", 0)
        with self._entering():
            self._catalogue.drop_segments(row.number for row in batch)
            if parts:
                self._catalogue.add_segment(name, checksum, items)
        for row in batch:
            (folder / row.name).unlink(missing_ok=True)

    @contextmanager
    def _entering(self) -> Iterator[None]:
        """A transaction that enters a new segment; when it fails, the file goes too."""
        try:
            with self._catalogue.writing():
                yield
        except BaseException:
            # By the catalogue's word, not by the exception: an interrupt may arrive just after the commit.
            with suppress(MetaEmbedError, OSError):
                remove_leftovers(self.folder, self._catalogue)
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


def _plain(ids: Sequence[str]) -> list[str]:
    """Ids as plain texts, whatever kind of str they are (numpy's, an Enum's): the catalogue's checksums cover their form."""
    try:
        texts: list[Any] = list(ids) if isinstance(ids, Iterable) and not isinstance(ids, str) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise UsageError("ids are a list of texts")
        return [str.__str__(text).encode().decode() for text in texts]
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
        raise UsageError(f"a payload is a JSON object; one that was given is not ({error})") from None
    check_levels(text, f"the payload of {id_!r}")
    return text
