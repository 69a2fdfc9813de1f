"""What may still be among the best of the items seen so far: a total order by score, then by id, kept within bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BundleError, UsageError
from .index import Index, Snapshot
from .index_segment import Rows
from .maxsim import Floats, first_not_finite, not_finite

BITE = 1 << 16  # scores looked at together, which stay in a core's cache
SURPLUS = 1 << 15  # items held beyond those to keep, before scores are compared, or ids, which take 5 us each to read
DESCRIBED = 1 << 12  # ids and payloads read at once


class Compacted(Exception):
    """`compact` removed rows of the snapshot meanwhile, or damaged ones are to be left out: the search starts again."""


@dataclass(frozen=True)
class Scored:
    """Positions in a snapshot, rising, and their scores."""

    positions: Rows
    scores: Floats


def describe(index: Index, snapshot: Snapshot, positions: Rows) -> list[tuple[str, Any]]:
    """`Index.describe`, which raises Compacted instead of returning None."""
    described = index.describe(snapshot, positions)
    if described is None:
        raise Compacted
    return described


class Contenders:
    """Collects items in the order of their positions, and keeps those that no `keep` others surpass.

    It holds twelve bytes an item, for 1.5 to 3 `keep` of them and some 100,000, however many tie: an equal score with a smaller
    id surpasses as a higher score does, so ties that cannot matter any more can be told at any time.

    Attributes:
        least: a score that `keep` items reach; those below it cannot be among the best.
    """

    def __init__(self, index: Index, snapshot: Snapshot, keep: int) -> None:
        self.keep, self.least = keep, np.float32(-np.inf)
        self._index, self._snapshot = index, snapshot
        self._found = [Scored(np.empty(0, np.int64), np.empty(0, np.float32))]
        self._count, self._most = 0, _room(keep)
        self._bite = max(BITE, 4 * keep)  # of fewer, the first bound would be too low to spare much

    def add(self, start: int, rows: Rows, scores: Floats) -> None:
        """Add the items at ``start + rows``; a UsageError where a score is NaN or infinite."""
        if (place := first_not_finite(scores[None])) is not None:
            raise self._refusal(start + int(rows[place]))
        for first in range(0, len(scores), self._bite):
            bite = slice(first, first + self._bite)
            some = scores[bite]
            self._raise_least(some)
            among = some >= self.least
            self._append(rows[bite][among] + start, some[among])

    def add_range(self, start: int, alive: NDArray[np.bool_], scores: Floats) -> None:
        """Add the living ones of the items from `start` on; a UsageError where a score of theirs is NaN or infinite."""
        if first_not_finite(scores[None]) is not None and (bad := alive & ~np.isfinite(scores)).any():
            raise self._refusal(start + int(np.argmax(bad)))
        for first in range(0, len(scores), self._bite):
            some, living = scores[first : first + self._bite], alive[first : first + self._bite]
            self._raise_least(some, living)
            among = some >= self.least
            among &= living
            (rows,) = among.nonzero()
            self._append(rows + (start + first), some[rows])

    def best(self) -> Scored:
        """The best `keep`; ties at the edge go by id.

        Raises:
            Compacted: a tied row was compacted away meanwhile.
        """
        scored = self._join()
        return self._decide(scored) if self._count > self.keep else scored

    def _refusal(self, position: int) -> UsageError:
        """Names the item by its id, or by its row where the catalogue is damaged there."""
        try:
            ((id_, _),) = describe(self._index, self._snapshot, np.array([position]))
        except BundleError:
            part = self._snapshot.parts[np.searchsorted(self._snapshot.ends, position, side="right")]
            return not_finite(f"row {position - part.start} of {part.segment.path}")
        return not_finite(f"item {id_!r}")

    def _raise_least(self, scores: Floats, alive: NDArray[np.bool_] | None = None) -> None:
        """Find a first bound, where there is none."""
        if self.least == -np.inf and len(scores) > self.keep:
            living = scores if alive is None or alive.all() else scores[alive]
            if len(living) > self.keep:
                self.least = _edge(living, self.keep)

    def _append(self, positions: Rows, scores: Floats) -> None:
        if not len(positions):
            return
        self._found.append(Scored(positions, scores))
        self._count += len(positions)
        if self._count > self._most:
            self._cut()

    def _cut(self) -> None:
        scored = self._join()
        self.least = _edge(scored.scores, self.keep)
        among = scored.scores >= self.least
        scored = Scored(scored.positions[among], scored.scores[among])
        if len(scored.scores) > self.keep + max(self.keep, SURPLUS):
            scored = self._decide(scored)
        self._found, self._count = [scored], len(scored.scores)
        self._most = _room(self._count)

    def _join(self) -> Scored:
        positions = np.concatenate([piece.positions for piece in self._found])
        return Scored(positions, np.concatenate([piece.scores for piece in self._found]))

    def _decide(self, scored: Scored) -> Scored:
        """The best `keep` of more."""
        edge = _edge(scored.scores, self.keep)
        chosen, tied = scored.scores > edge, np.flatnonzero(scored.scores == edge)
        places = self.keep - int(np.count_nonzero(chosen))
        chosen[tied if len(tied) == places else self._first_by_id(scored.positions, tied, places)] = True
        return Scored(scored.positions[chosen], scored.scores[chosen])

    def _first_by_id(self, positions: Rows, tied: Rows, places: int) -> list[int]:
        """Those of the tied ones that have the smallest ids, in the order of their characters."""
        first: list[tuple[str, int]] = []
        for start in range(0, len(tied), DESCRIBED):
            some = tied[start : start + DESCRIBED]
            described = describe(self._index, self._snapshot, positions[some])
            first += [(id_, i) for (id_, _), i in zip(described, some.tolist(), strict=True)]
            first = sorted(first)[:places]
        return [i for _, i in first]


def _room(count: int) -> int:
    """How many may be held before the next cut: so many more that all cuts take time in proportion to what is added."""
    return count + max(count // 2, SURPLUS)


def _edge(scores: Floats, keep: int) -> np.float32:
    """The `keep`-th best of at least so many."""
    edge: np.float32 = np.partition(scores, -keep)[-keep]
    return edge
