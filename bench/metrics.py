"""Retrieval metrics with binary relevance, as trec_eval computes them (ties aside: here the lower index wins)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

Relevant = Sequence[Collection[int]]


def ndcg(scores: np.ndarray, relevant: Relevant, cutoff: int = 5) -> float:
    """Mean of ``ndcg_per_query``."""
    return float(ndcg_per_query(scores, relevant, cutoff).mean())


def ndcg_per_query(scores: np.ndarray, relevant: Relevant, cutoff: int = 5) -> np.ndarray:
    """nDCG at the cutoff, (queries,): gain 1 over log2(rank + 1), over the best possible (Jarvelin and Kekalainen, 2002).

    Args:
        scores: (queries, candidates), higher is better.
        relevant: for each query, the indexes of its relevant candidates, at least one.
    """
    discounts = 1 / np.log2(np.arange(2, cutoff + 2))
    hits, counts = _hits(scores, relevant, cutoff)
    ideal = np.array([discounts[:count].sum() for count in counts])
    return (hits * discounts[: hits.shape[1]]).sum(1) / ideal


def recall(scores: np.ndarray, relevant: Relevant, cutoff: int) -> float:
    """Mean share of a query's relevant candidates that stand among the first ``cutoff``."""
    hits, counts = _hits(scores, relevant, cutoff)
    return float((hits.sum(1) / counts).mean())


def mean_reciprocal_rank(scores: np.ndarray, relevant: Relevant) -> float:
    """Mean of 1 / rank of the first relevant candidate."""
    hits, _ = _hits(scores, relevant, scores.shape[1])
    return float((1 / (1 + hits.argmax(1))).mean())


def _hits(scores: np.ndarray, relevant: Relevant, cutoff: int) -> tuple[np.ndarray, np.ndarray]:
    """(queries, cutoff) True where the candidate of that rank is relevant; and how many each query has."""
    if len(relevant) != len(scores) or not all(relevant):
        raise ValueError(f"{len(scores)} queries need as many non-empty lists of relevant candidates")
    best = np.argsort(-scores, axis=1, kind="stable")[:, :cutoff]
    hits = np.stack([np.isin(row, list(wanted)) for row, wanted in zip(best, relevant, strict=True)])
    return hits, np.array([len(wanted) for wanted in relevant])
