"""Judge a quantised encoder against the bundle it came from, at every budget, on inputs that set no range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaembed.runtime.budget import Budget
from metaembed.runtime.encoder import Encoder
from metaembed.runtime.golden import SIDES
from metaembed.runtime.maxsim import maxsim
from metaembed.runtime.parity import RANKS, ParityRecord, RankingRecord, Tolerance, compare, compare_rankings

from .dataset import CalibrationItem
from .observe import encode_item

Embeddings = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Verdict:
    """The worst vector of each side and the ranking at each budget; truthy when all are within the tolerance.

    Ranges are static, so a smaller budget is a prefix of a larger one here as in float: its vectors need no run of their
    own.
    """

    vectors: dict[str, ParityRecord]
    rankings: dict[Budget, RankingRecord]
    loss: float

    def __bool__(self) -> bool:
        return bool(self.vectors) and all(self.vectors.values()) and all(self.rankings.values())

    def has_margin(self, part: float) -> bool:
        """Whether all is within the tolerance, and of the cosine's no more than this part is used."""
        return bool(self) and all(
            1 - record.min_cosine <= part * (1 - record.tolerance.cosine) for record in self.vectors.values()
        )

    @property
    def worst_cosine(self) -> float:
        return float(np.nan_to_num(min(record.min_cosine for record in self.vectors.values()), nan=-1.0))

    @property
    def worst_overlap(self) -> float:
        """The smallest top-10 overlap of any budget; 1 where there were too few candidates to rank."""
        return float(np.nan_to_num(min([record.overlap for record in self.rankings.values()], default=1.0), nan=0.0))

    def __str__(self) -> str:
        return f"worst cosine {self.worst_cosine:.4f}, top-{RANKS} overlap {self.worst_overlap:.3f}"

    def to_json(self) -> dict[str, Any]:
        return {"passed": bool(self), "worst_cosine": self.worst_cosine, "worst_overlap": self.worst_overlap}


class Judge:
    """Holds the reference embeddings of its items; ``judge`` compares another encoder's with them."""

    def __init__(self, reference: Encoder, items: Sequence[CalibrationItem], tolerance: Tolerance) -> None:
        self._items = items
        self._tolerance = tolerance
        self._budgets = reference.budgets
        self._reference = self._encode(reference)

    def judge(self, encoder: Encoder) -> Verdict:
        """Encode the items and compare: vectors one by one, and the top 10 of every query at every budget."""
        found = self._encode(encoder)
        vectors = {side: compare(self._reference[side], found[side], self._tolerance) for side in SIDES}
        rankings = {}
        if len(found["candidate"]) > RANKS:
            rankings = {
                budget: compare_rankings(
                    self._scores(self._reference, budget), self._scores(found, budget), self._tolerance
                )
                for budget in self._budgets
            }
        losses = [1 - _cosines(self._reference[side], found[side]).min(axis=1) for side in SIDES]  # (n,) each
        return Verdict(vectors, rankings, float(np.nan_to_num(np.concatenate(losses), nan=2.0).mean()))

    def _encode(self, encoder: Encoder) -> Embeddings:
        return {
            side: np.concatenate([encode_item(encoder, item) for item in self._items if item.side == side])
            for side in SIDES
        }

    @staticmethod
    def _scores(embeddings: Embeddings, budget: Budget) -> NDArray[np.float32]:
        return maxsim(embeddings["query"][:, : budget.query], embeddings["candidate"][:, : budget.candidate])


def _cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n, r) from unit vectors (n, r, d); NaN where one is not finite."""
    return (a.astype(np.float64) * b).sum(-1)
