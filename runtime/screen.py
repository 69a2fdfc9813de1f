"""An int8 first pass whose result is exact: it passes over items only where the error of their codes cannot matter."""

from __future__ import annotations

from functools import reduce

import numpy as np

from .index_segment import Rows
from .int8 import LARGEST_CODE, Int8Vectors
from .maxsim import Floats, score_parts

UNIT = 2.0**-24  # of a float32 rounding
QUERY_STEPS = 65278  # a query's largest magnitude over its rounding, where kernels carry it in 16 bits


def may_be_best(query: Floats, screen: Int8Vectors, rows: Rows, keep: int, least: float = -np.inf) -> Rows:
    """Those of `rows` that may be among the best `keep` by exact MaxSim with the vectors the screen was made of.

    Rounding moves each value by at most half a step, so it moves <q, c> by at most |q|_1 * scale / 2, and a maximum and a
    sum by no more than their terms. The screen's scores and the exact ones both err a little themselves: sums of d products in
    float32 by less than (d + r_q) units of |q|_1 times the largest value, 127 scales, in any order (Higham, Accuracy and
    Stability of Numerical Algorithms, 3.1); a query in 16 bits by half a step of its largest magnitude in each of d products.
    An item stays when its score plus its bound reaches the `keep`-th best of the scores minus their bounds, and `least`.

    Args:
        query: (r_q, d) float32.
        screen: (n, r, d).
        rows: of the n, those to look at.
        least: an exact score that `keep` items elsewhere reach.
    """
    scores = score_parts(query[None], [([screen], None)])[0][0, rows]
    if not np.isfinite(scores).all():
        # Codes overflow a little earlier than what they stand for: the exact pass decides, and names the item.
        return rows
    (r_q, d), magnitudes = query.shape, np.abs(query.astype(np.float64))
    summing = 2 * LARGEST_CODE * (d + r_q) * UNIT
    carrying = 2 * LARGEST_CODE * d / QUERY_STEPS * magnitudes.max(axis=1).sum()
    # A maximum over an inner axis of few is what numpy does slowest: half the time of a search with one vector of 128 dims.
    scales = reduce(np.maximum, screen.scales.T)
    bounds = scales[rows] * (magnitudes.sum() * (0.5 + summing) + carrying)
    if len(rows) > keep:
        lower = scores - bounds
        lower.partition(len(lower) - keep)
        least = max(least, lower[-keep])
        del lower
    found: Rows = rows[scores + bounds >= least]
    return found
