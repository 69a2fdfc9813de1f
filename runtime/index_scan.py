"""One stage of a search: the living items of a snapshot are scored in chunks, and what may be among the best is kept.

So the memory of a search grows with what its stages keep, and not with the index.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .contenders import Contenders, Scored
from .index import Index, Part, Snapshot
from .index_device import DeviceGroups
from .index_segment import ALL, Rows
from .maxsim import Floats, score_parts
from .maxsim_native import Part as Source
from .screen import may_be_best

log = logging.getLogger(__name__)
# Scored at once, or half as many that are picked or go through the screen, which takes 28 bytes an item. One chunk of one vector of
# 128 dims takes 8.7 ms of an AVX2 core's time; a second thread added 0.04 to 0.2 a call (both on one core, on a busy machine).
CHUNK_ITEMS = 1 << 19
# Up to this share of the items, picking them row by row takes 0.4 to 0.95 of the time of scanning all, whatever the budget.
WORTH_PICKING = 0.3


@dataclass(frozen=True)
class _Range:
    """Rows of a part, of which those alive count; their scores where a device has them already."""

    part: Part
    rows: slice
    alive: NDArray[np.bool_]
    scores: Floats | None = None

    @property
    def span(self) -> int:
        return len(self.alive)

    def source(self, vectors: int) -> Source:
        segment = self.part.segment
        return segment.groups(vectors, self.rows if self.span < segment.items else ALL), None

    def add_to(self, best: Contenders, scores: Floats) -> None:
        best.add_range(self.part.start + self.rows.start, self.alive, scores)


@dataclass(frozen=True)
class _Picked:
    """Chosen rows of a part, from a span of so many."""

    part: Part
    rows: Rows
    span: int
    scores: None = None

    def source(self, vectors: int) -> Source:
        return self.part.segment.groups(vectors), self.rows

    def add_to(self, best: Contenders, scores: Floats) -> None:
        best.add(self.part.start, self.rows, scores)


_Piece = _Range | _Picked


def scan(index: Index, snapshot: Snapshot, queries: Floats, vectors: int, pool: Rows | None, keep: int) -> Scored:
    """The best `keep` of the living items of a pool (positions, rising; None: all), by so many vectors of each.

    Args:
        queries: one, (1, r_q, d).

    Raises:
        Compacted: the search starts again. BundleError: items that were to be scored are damaged.
    """
    queries = np.ascontiguousarray(queries)
    best = Contenders(index, snapshot, keep)
    for pieces in _batches(_pieces(index, snapshot, queries, vectors, pool, best)):
        found = iter(score_parts(queries, [piece.source(vectors) for piece in pieces if piece.scores is None]))
        for piece in pieces:
            piece.add_to(best, (next(found) if piece.scores is None else piece.scores)[0])
    return best.best()


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces that are scored together: threads are woken once for many small segments."""
    batch: list[_Piece] = []
    span = 0
    for piece in pieces:
        batch.append(piece)
        span += piece.span
        if span >= CHUNK_ITEMS:
            yield batch
            batch, span = [], 0
    if batch:
        yield batch


def _pieces(
    index: Index, snapshot: Snapshot, queries: Floats, vectors: int, pool: Rows | None, best: Contenders
) -> Iterator[_Piece]:
    if pool is not None and len(pool) <= WORTH_PICKING * sum(part.segment.items for part in snapshot.parts):
        yield from _pick(index, snapshot, vectors, pool)
        return
    for part in snapshot.parts:
        if (device := _device(index, vectors)) and not len(_damaged(index, part, vectors, None)):
            yield from _scan_on(device, part, queries, pool)
        else:
            yield from _scan(index, part, queries, vectors, pool, best)


def _device(index: Index, vectors: int) -> DeviceGroups | None:
    """What scans so many vectors of every item on a GPU, where the index has that."""
    return index.device if index.device and index.device.vectors == vectors else None


def _pick(index: Index, snapshot: Snapshot, vectors: int, pool: Rows) -> Iterator[_Piece]:
    """The living rows of a pool, picked one by one."""
    cuts = np.searchsorted(pool, snapshot.ends).tolist()
    for part, first, last in zip(snapshot.parts, [0, *cuts], cuts, strict=False):
        for chunk in _chunks(first, last, CHUNK_ITEMS // 2):
            rows = pool[chunk] - part.start
            yield _Picked(part, _sound(index, part, vectors, rows[part.alive[rows]]), len(rows))


def _scan_on(device: DeviceGroups, part: Part, queries: Floats, pool: Rows | None) -> Iterator[_Piece]:
    for rows, scores in device.scan(queries, part.segment, CHUNK_ITEMS):
        yield _Range(part, rows, _alive(part, rows, pool), scores)


def _scan(
    index: Index, part: Part, queries: Floats, vectors: int, pool: Rows | None, best: Contenders
) -> Iterator[_Piece]:
    """Whole ranges, or of a range what the screen leaves, or what is sound of it."""
    screened = _has_screen(index, part, vectors, best.keep)
    damaged: Rows | None = None  # of the whole part, once a range is to be scanned whole
    for rows in _chunks(0, part.segment.items, CHUNK_ITEMS // 2 if screened else CHUNK_ITEMS):
        alive = _alive(part, rows, pool)
        if not alive.any():
            continue
        likely = _screen(index, part, rows, alive, queries, best) if screened else None
        if likely is not None:
            yield _Picked(part, likely, len(alive))
            continue
        if damaged is None:
            damaged = _damaged(index, part, vectors, None)
        if len(damaged):
            yield _Picked(part, _without(damaged, np.flatnonzero(alive) + rows.start), len(alive))
        else:
            yield _Range(part, rows, alive)


def _chunks(first: int, last: int, items: int) -> Iterator[slice]:
    return (slice(start, min(start + items, last)) for start in range(first, last, items))


def _alive(part: Part, rows: slice, pool: Rows | None) -> NDArray[np.bool_]:
    """Which of some rows are alive and in the pool."""
    alive = part.alive[rows]
    if pool is None:
        return alive
    start = part.start + rows.start
    first, last = np.searchsorted(pool, (start, start + len(alive)))
    within = np.zeros(len(alive), bool)
    within[pool[first:last] - start] = True
    within &= alive
    return within


def _has_screen(index: Index, part: Part, vectors: int, keep: int) -> bool:
    """Whether the screen of a part can spare work: it is of so many vectors, sound, and few of a chunk are kept."""
    if part.segment.screen() is None or vectors != index.layout.ends[0] or _device(index, vectors):
        return False
    if keep > WORTH_PICKING * min(part.segment.items, CHUNK_ITEMS // 2):
        return False
    if len(damaged := part.segment.check_screen()):
        log.warning("scored without the screen: %s", part.segment.damage(damaged))
    return not len(damaged)


def _screen(
    index: Index, part: Part, rows: slice, alive: NDArray[np.bool_], queries: Floats, best: Contenders
) -> Rows | None:
    """Rows of a range that may be among the best; None where that says too little."""
    screen = part.segment.screen(rows)
    assert screen is not None
    found = may_be_best(queries[0], screen, np.flatnonzero(alive), best.keep, best.least) + rows.start
    if len(_damaged(index, part, index.layout.ends[0], found)):
        return None  # what was passed over for a damaged item may be among the best without it
    return found if len(found) <= WORTH_PICKING * len(alive) else None


def _sound(index: Index, part: Part, vectors: int, rows: Rows) -> Rows:
    return _without(_damaged(index, part, vectors, rows), rows)


def _without(damaged: Rows, rows: Rows) -> Rows:
    return np.setdiff1d(rows, damaged) if len(damaged) else rows


def _damaged(index: Index, part: Part, vectors: int, rows: Rows | None) -> Rows:
    damaged = part.segment.check(vectors, rows)
    if len(damaged):
        if not index.skip_damaged:
            raise part.segment.damage(damaged)
        log.warning("left out: %s", part.segment.damage(damaged))
    return damaged
