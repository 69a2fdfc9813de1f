"""Retrieval quality of embeddings at every budget and cascade, with bootstrap confidence intervals over the queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from metaembed.runtime.cascade import Stage
from metaembed.runtime.encoder import Encoder, Floats
from metaembed.runtime.maxsim import maxsim

from .dataset import Dataset, Item
from .records import Record

NDCG_CUTOFF, RECALL_CUTOFFS = 5, (1, 10)
DRAWS, LEVEL = 1000, 0.95
INDEX_BYTES = 2  # a value of a bf16 index
QUERIES_AT_A_TIME = 32
# MaxSim of unit vectors lies within +-r_q: this lifts a later stage above everything that an earlier one scored.
STAGE_STEP = 1e6

Relevant = Sequence[Mapping[int, float]]
PerQuery = dict[str, NDArray[np.float64]]


def embed_dataset(encoder: Encoder, dataset: Dataset) -> tuple[Floats, Floats]:
    """All queries (q, r_q, d) and candidates (n, r_c, d) at the bundle's largest budget; smaller ones are prefixes."""
    return encoder.encode_queries(**_columns(dataset.queries)), encoder.encode_candidates(
        **_columns(dataset.candidates)
    )


def measure_quality(
    dataset: Dataset, queries: Floats, candidates: Floats, cascades: Sequence[Sequence[Stage]]
) -> list[Record]:
    """One record a cascade; a plain budget is a cascade of one stage."""
    return [
        {
            "dataset": dataset.name,
            "budget": str(stages[-1].budget),
            "cascade": " ".join(map(str, stages)) if len(stages) > 1 else None,
            "queries": len(dataset.queries),
            "candidates": len(dataset.candidates),
            "index_kib_per_item": stages[-1].budget.candidate * candidates.shape[2] * INDEX_BYTES / 1024,
            **summarise_quality(judge(score_cascade(queries, candidates, stages), dataset.relevant)),
        }
        for stages in cascades
    ]


def score_cascade(queries: Floats, candidates: Floats, stages: Sequence[Stage]) -> Iterator[NDArray[np.float64]]:
    """One row of scores a query, in which whatever reached a later stage stands above whatever did not."""
    for start in range(0, len(queries), QUERIES_AT_A_TIME):
        some = queries[start : start + QUERIES_AT_A_TIME]
        first = maxsim(some, candidates, stages[0].budget).astype(np.float64)
        for query, scores in zip(some, first, strict=True):
            yield _later_stages(query, candidates, scores, stages)


def _later_stages(
    query: Floats, candidates: Floats, scores: NDArray[np.float64], stages: Sequence[Stage]
) -> NDArray[np.float64]:
    for number, (before, stage) in enumerate(pairwise(stages), start=1):
        survivors = np.sort(np.argsort(-scores, kind="stable")[: before.keep])
        # float64: float32 would lose the score's digits behind the step
        later = maxsim(query, candidates[survivors], stage.budget)[0].astype(np.float64)
        scores[survivors] = later + number * STAGE_STEP
    return scores


def judge(scores: Iterator[NDArray[np.float64]], relevant: Relevant) -> PerQuery:
    """nDCG@5, recall and reciprocal rank of each query, as trec_eval defines them; of equal scores the lower index wins."""
    per_query = [
        _judge_one(rank_relevant(row, list(grades)), np.fromiter(grades.values(), np.float64))
        for row, grades in zip(scores, relevant, strict=True)
    ]
    return {name: np.array([values[name] for values in per_query]) for name in per_query[0]}


def rank_relevant(scores: NDArray[np.float64], relevant: Sequence[int]) -> NDArray[np.int64]:
    """The rank, from 1, of each relevant candidate: all that the metrics need of a ranking."""
    return np.array(
        [1 + np.count_nonzero(scores > scores[k]) + np.count_nonzero(scores[:k] == scores[k]) for k in relevant]
    )


def _judge_one(ranks: NDArray[np.int64], grades: NDArray[np.float64]) -> dict[str, float]:
    """DCG = sum of grade / log2(rank + 1) up to the cutoff, over that of the ideal order (Jarvelin and Kekalainen, 2002)."""
    ideal = np.sort(grades)[::-1][:NDCG_CUTOFF]
    best = (ideal / np.log2(np.arange(2, len(ideal) + 2))).sum()
    gained = (grades / np.log2(ranks + 1))[ranks <= NDCG_CUTOFF].sum()
    return {
        f"ndcg_at_{NDCG_CUTOFF}": float(gained / best),
        **{f"recall_at_{k}": float((ranks <= k).mean()) for k in RECALL_CUTOFFS},
        "mrr": float(1 / ranks.min()),
    }


def summarise_quality(per_query: PerQuery) -> Record:
    """Means, and the interval of nDCG's mean."""
    means = {name: round(float(values.mean()), 4) for name, values in per_query.items()}
    low, high = confidence_interval(per_query[f"ndcg_at_{NDCG_CUTOFF}"])
    return {**means, "ndcg_low": round(low, 4), "ndcg_high": round(high, 4), "confidence": LEVEL, "draws": DRAWS}


def confidence_interval(values: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """Bootstrap percentile interval of the mean: queries drawn with replacement, DRAWS times (Efron, 1979)."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(DRAWS)]
    low, high = np.percentile(means, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def _columns(items: Sequence[Item]) -> dict[str, list]:
    return {"texts": [item.text for item in items], "images": [item.image for item in items]}
