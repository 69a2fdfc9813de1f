"""MaxSim, the late-interaction score: for every query vector the best candidate vector, summed.

s(q, c) = sum_i max_j <q_i, c_j>        (MetaEmbed, arXiv 2509.18095, section 3.1)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import maxsim_native
from .arrays import BFLOAT16, as_array
from .budget import Budget
from .errors import UsageError
from .int8 import Int8Vectors, dequantize_int8

Floats: TypeAlias = NDArray[np.float32]
Vectors: TypeAlias = "NDArray[Any] | Int8Vectors"

FLOAT_TYPES = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16, np.dtype(np.float64))
# Floats in one tile of converted candidates, and in one tile of similarities: 4 MiB each, whatever the number of items.
TILE_FLOATS = 1 << 20


def maxsim(queries: NDArray[Any], candidates: Vectors, budget: Budget | None = None) -> Floats:
    """Score every query against every candidate, accumulating in float32.

    Args:
        queries: (q, r_q, d), or (r_q, d) for one query; float32, float16, bfloat16 or float64.
        candidates: (n, r_c, d) of the same types, or Int8Vectors. Need not be contiguous.
        budget: use the first r_q and r_c vectors only; all of them by default.

    Returns:
        (q, n) float32, higher is better.

    Raises:
        UsageError: shapes or types that do not fit, a budget beyond the vectors given, or a similarity that is NaN
            or infinite (named by the first such candidate).
    """
    queries, candidates = prepare(queries, candidates, budget)
    return score_groups(queries, [candidates])


def score_groups(queries: Floats, groups: Sequence[Vectors], chosen: NDArray[np.int64] | None = None) -> Floats:
    """MaxSim by the fastest path for these shapes, over candidates whose vectors lie in one or more arrays.

    Args:
        queries: (q, r_q, d) float32, contiguous.
        groups: arrays (n, r_g, d) of one n and d; the vectors of item i are those of row i in all of them.
        chosen: rows to score, in this order; all n by default.

    Returns:
        (q, n) float32, or (q, len(chosen)).

    Raises:
        UsageError: a similarity is NaN or infinite.
    """
    (scores,) = score_parts(queries, [(groups, chosen)])
    if (candidate := first_not_finite(scores)) is not None:
        raise not_finite(f"candidate {candidate}")
    return scores


def score_parts(queries: Floats, parts: Sequence[maxsim_native.Part]) -> list[Floats]:
    """`score_groups` of several sets of candidates, as fast as if they were one.

    Returns:
        (q, n) for each; NaN or infinite, not refused, where a similarity or the sum is: who asks knows the candidates' names.
    """
    if maxsim_native.can_score([group for groups, _ in parts for group in groups]):
        return maxsim_native.score(queries, parts)
    return [maxsim_reference(queries, groups, chosen) for groups, chosen in parts]


def maxsim_reference(queries: Floats, groups: Sequence[Vectors], chosen: NDArray[np.int64] | None = None) -> Floats:
    """One part of `score_parts` in plain numpy, one tile of candidates at a time. It judges every faster path."""
    dims, vectors = queries.shape[2], sum(group.shape[1] for group in groups)
    scores = np.empty((len(queries), groups[0].shape[0] if chosen is None else len(chosen)), np.float32)
    for items in _tiles(scores.shape[1], vectors * dims):
        rows = items if chosen is None else chosen[items]
        tile = np.concatenate([as_float32(group, rows) for group in groups], axis=1)  # (n, r_c, d)
        for some in _tiles(len(queries), queries.shape[1] * tile.shape[0] * tile.shape[1]):
            scores[some, items] = _score_tile(queries[some], tile)
    return scores


def prepare(queries: NDArray[Any], candidates: Vectors, budget: Budget | None) -> tuple[Floats, Vectors]:
    """Check both sides, cut them to the budget, and bring the queries to float32 (q, r_q, d)."""
    queries = _checked(queries, "queries")
    if queries.ndim == 2:
        queries = queries[None]
    candidates = candidates if isinstance(candidates, Int8Vectors) else _checked(candidates, "candidates")
    for vectors, side in ((queries, "queries"), (candidates, "candidates")):
        if len(vectors.shape) != 3 or 0 in vectors.shape[1:]:
            raise UsageError(
                f"{side} have shape {vectors.shape}; (items, vectors, dims) is needed, with at least one vector"
            )
    if queries.shape[2] != candidates.shape[2]:
        raise UsageError(
            f"queries have {queries.shape[2]} dims and candidates {candidates.shape[2]}; both need the same"
        )
    if budget is not None:
        if not isinstance(budget, Budget):
            raise UsageError(f"a budget is a Budget, for example Budget(8, 16), not {budget!r}")
        budget.check_within(queries.shape[1], candidates.shape[1], owner="these have")
        queries, candidates = queries[:, : budget.query], prefix(candidates, budget.candidate)
    return np.ascontiguousarray(queries, np.float32), candidates


def prefix(candidates: Vectors, vectors: int) -> Vectors:
    """The first `vectors` vectors of every item, without a copy."""
    return candidates.prefix(vectors) if isinstance(candidates, Int8Vectors) else candidates[:, :vectors]


def take(candidates: Vectors, items: slice | NDArray[np.int64]) -> Vectors:
    """Some items; without a copy where they are a slice."""
    if isinstance(candidates, Int8Vectors):
        return Int8Vectors(candidates.codes[items], candidates.scales[items])
    return candidates[items]


def as_float32(candidates: Vectors, items: slice | NDArray[np.int64]) -> Floats:
    """A copy of some items as contiguous float32 (n, r, d)."""
    some = take(candidates, items)
    return dequantize_int8(some) if isinstance(some, Int8Vectors) else np.ascontiguousarray(some, np.float32)


def _checked(vectors: NDArray[Any], side: str) -> NDArray[Any]:
    vectors = as_array(vectors, side)
    if vectors.dtype not in FLOAT_TYPES:
        names = ", ".join(str(known) for known in FLOAT_TYPES)
        raise UsageError(f"{side} are {vectors.dtype}; MaxSim takes {names}, or Int8Vectors")
    return vectors


def _tiles(items: int, floats_per_item: int) -> Iterator[slice]:
    step = max(1, TILE_FLOATS // floats_per_item)
    return (slice(start, min(start + step, items)) for start in range(0, items, step))


def _score_tile(queries: Floats, tile: Floats) -> Floats:
    (q, r_q, d), (n, r_c, _) = queries.shape, tile.shape
    # Candidates in rows: the maximum then runs over an outer axis, which numpy vectorises (the inner one it does not).
    with np.errstate(invalid="ignore", over="ignore"):
        dots = (tile.reshape(n * r_c, d) @ queries.reshape(q * r_q, d).T).reshape(n, r_c, q * r_q)
        scores: Floats = dots.max(axis=1).reshape(n, q, r_q).sum(axis=2).T  # (q, n)
    finite = np.isfinite(dots).all(axis=1).reshape(n, q, r_q).all(axis=2).T  # a maximum hides minus infinity
    scores[~finite] = np.nan
    return scores


def first_not_finite(scores: Floats) -> int | None:
    """The first candidate with a score, of (q, n), that is NaN or infinite; then their extremes are, which take no memory."""
    extremes = (bound.reduce(scores, axis=None, initial=0) for bound in (np.minimum, np.maximum))
    if all(map(math.isfinite, extremes)):
        return None
    return int(np.argmin(np.isfinite(scores).all(axis=0)))


def not_finite(item: str) -> UsageError:
    """The refusal that every path gives to NaN and infinity."""
    return UsageError(f"{item} has a similarity that is NaN or infinite; check the embeddings of both sides")
