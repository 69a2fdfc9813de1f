"""Parity: agreement of embeddings with the reference on the same input. A record knows what it measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError

RANKS = 10
NORM_ERROR = 1e-3  # a cosine does not see a vector that was not normalised; a score does


@dataclass(frozen=True)
class Tolerance:
    """How far from the reference embeddings may be, and how much of the top 10 must stay."""

    cosine: float
    overlap: float
    max_abs: float = float("inf")


# DESIGN: vectors against HF fp32, and the ranking they give. One table for the export, the check and the tests.
TOLERANCES = {
    "fp32": Tolerance(cosine=0.999999, overlap=1.0, max_abs=1e-5),
    "bf16": Tolerance(cosine=0.999, overlap=0.98),
    "fp16": Tolerance(cosine=0.999, overlap=0.98),
    "int8": Tolerance(cosine=0.98, overlap=0.95),
    "fp8": Tolerance(cosine=0.98, overlap=0.95),
}


SCORE_ERROR = 1e-5  # of a MaxSim score, for each query vector: float32 sums of products that are exact


@dataclass(frozen=True)
class ParityRecord:
    """The worst vector of a comparison and where it is; truthy when within the tolerance.

    ``worst`` is (item, vector) of the smallest cosine; ``norm_error`` the most that a candidate's norm differs from 1.
    An empty comparison and any NaN fail.
    """

    vectors: int
    max_abs: float
    min_cosine: float
    worst: tuple[int, int]
    tolerance: Tolerance
    norm_error: float = 0.0

    def __bool__(self) -> bool:
        close = self.min_cosine >= self.tolerance.cosine and self.max_abs <= self.tolerance.max_abs
        return self.vectors > 0 and close and self.norm_error <= NORM_ERROR

    def __str__(self) -> str:
        if not self.vectors:
            return "nothing was compared"
        norm = "" if self.norm_error <= NORM_ERROR else f"; a norm is off by {self.norm_error:.2e} (<= {NORM_ERROR:g})"
        limit = f", max abs <= {self.tolerance.max_abs:g}" if np.isfinite(self.tolerance.max_abs) else ""
        return (
            f"worst cosine {self.min_cosine:.7f} at item {self.worst[0]}, vector {self.worst[1]}; max abs "
            f"{self.max_abs:.2e} (tolerance: cosine >= {self.tolerance.cosine}{limit}){norm}"
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": bool(self)}


def compare(reference: NDArray[Any], candidate: NDArray[Any], tolerance: Tolerance) -> ParityRecord:
    """Compare embeddings vector by vector in float64.

    Args:
        reference, candidate: (n, r, d), of the same shape.

    Raises:
        UsageError: the shapes differ.
    """
    if reference.shape != candidate.shape or reference.ndim != 3:
        raise UsageError(f"embeddings of shapes {reference.shape} and {candidate.shape} cannot be compared")
    if not reference.size:
        return ParityRecord(0, float("nan"), float("nan"), (-1, -1), tolerance)
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    norms = np.linalg.norm(b, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * norms)  # (n, r)
    worst = int(np.argmin(np.where(np.isfinite(cosine), cosine, -np.inf)))
    item, vector = divmod(worst, reference.shape[1])
    return ParityRecord(
        vectors=cosine.size,
        max_abs=float(np.max(np.abs(a - b))),
        min_cosine=float(cosine.reshape(-1)[worst]),
        worst=(item, vector),
        tolerance=tolerance,
        norm_error=float(np.max(np.abs(norms - 1))),
    )


@dataclass(frozen=True)
class RankingRecord:
    """Mean share of each query's reference top ``ranks`` that the candidate's scores keep; truthy within tolerance."""

    queries: int
    ranks: int
    overlap: float
    tolerance: Tolerance

    def __bool__(self) -> bool:
        return self.queries > 0 and self.overlap >= self.tolerance.overlap

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": bool(self)}


def compare_rankings(
    reference: NDArray[Any], candidate: NDArray[Any], tolerance: Tolerance, ranks: int = RANKS
) -> RankingRecord:
    """Compare scores (q, n) by the candidates that they put on top. Needs more candidates than ranks.

    Raises:
        UsageError: shapes differ, or there are too few candidates for the comparison to say anything.
    """
    if reference.shape != candidate.shape or reference.ndim != 2:
        raise UsageError(f"scores of shapes {reference.shape} and {candidate.shape} cannot be compared")
    if reference.shape[1] <= ranks:
        raise UsageError(f"{reference.shape[1]} candidates are too few to compare the top {ranks}")
    if not (np.isfinite(reference).all() and np.isfinite(candidate).all()):
        return RankingRecord(len(reference), ranks, float("nan"), tolerance)
    shared = [len(_top(a, ranks) & _top(b, ranks)) / ranks for a, b in zip(reference, candidate, strict=True)]
    return RankingRecord(len(shared), ranks, float(np.mean(shared)) if shared else float("nan"), tolerance)


@dataclass(frozen=True)
class ScoringRecord:
    """The largest error of MaxSim scores, of ``pairs`` queries with candidates; truthy within ``tolerance``."""

    pairs: int
    max_abs: float
    tolerance: float

    def __bool__(self) -> bool:
        return self.pairs > 0 and self.max_abs <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": bool(self)}


def compare_scores(queries: NDArray[Any], candidates: NDArray[Any], scores: NDArray[Any]) -> ScoringRecord:
    """Compare scores (q, n) with MaxSim of the vectors (q, r_q, d) and (n, r_c, d) themselves, in float64."""
    wide = [values.astype(np.float64) for values in (queries, candidates)]
    expected = np.stack([[(query @ other.T).max(1).sum() for other in wide[1]] for query in wide[0]])
    if expected.shape != scores.shape:
        raise UsageError(f"scores of shape {scores.shape} are not those of {expected.shape} pairs")
    return ScoringRecord(expected.size, float(np.max(np.abs(expected - scores))), SCORE_ERROR * queries.shape[1])


def _top(scores: NDArray[Any], ranks: int) -> set[int]:
    return set(np.argsort(-scores, kind="stable")[:ranks].tolist())


def require(records: Sequence[tuple[str, ParityRecord | RankingRecord]]) -> list[str]:
    """The names and findings of all records that failed; an empty sequence is itself a failure."""
    if not records:
        return ["nothing was compared"]
    return [f"{name}: {record}" for name, record in records if not record]
