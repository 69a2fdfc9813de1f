"""The first vectors of an index's items in the memory of the GPU that scores them; the rest stays where it is."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .fork import Turn
from .graph_maxsim import Placed, Scorer
from .index_segment import Segment
from .maxsim import Floats, as_float32


class DeviceGroups:
    """Scores whole segments at one number of vectors, from copies on a scorer's device.

    The copies are contiguous prefixes in the scorer's type, each made when its segment is first scored.
    """

    def __init__(self, scorer: Scorer, vectors: int) -> None:
        self.vectors = vectors
        self._scorer = scorer
        self._placed: dict[Segment, Placed] = {}
        self._turn = Turn()  # one device, one scorer: threads wait for each other, and for copies being freed

    @property
    def nbytes(self) -> int:
        """Device memory that the copies take."""
        return sum(placed.nbytes for placed in self._placed.values())

    def place(self, segment: Segment) -> Placed:
        """The copy of a segment, made if there is none. Check the segment first."""
        with self._turn:
            return self._place(segment)

    def _place(self, segment: Segment) -> Placed:
        if segment not in self._placed:
            groups = segment.groups(self.vectors)

            def read(rows: slice) -> NDArray[Any]:
                return np.concatenate([as_float32(group, rows) for group in groups], axis=1)

            shape = (segment.items, self.vectors, segment.layout.dims)
            self._placed[segment] = self._scorer.place(read, shape)
        return self._placed[segment]

    def scan(self, queries: Floats, segment: Segment, items: int) -> Iterator[tuple[slice, Floats]]:
        """Scores (q, n) of queries (q, r_q, d), rounded to the scorer's type, against all rows of a segment, range by range.

        Args:
            items: of one range, about: as many pieces of the copy as hold them.

        NaN or infinite, not refused, where a similarity is.
        """
        first = 0
        while first < segment.items:
            with self._turn:
                some = self._place(segment).cut(first, items)  # another thread may have freed the copy since
                scores = self._scorer.scores(queries, some)
            yield slice(first, first + some.shape[0]), scores
            first += some.shape[0]

    def keep(self, segments: Container[Segment]) -> None:
        """Free the copies of all other segments."""
        with self._turn:
            for segment in [held for held in self._placed if held not in segments]:
                self._placed[segment].free()
                del self._placed[segment]
