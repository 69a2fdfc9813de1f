"""An int8 first pass whose result is exact: it passes over items only where the error of their codes cannot matter."""

from __future__ import annotations

import numpy as np

from .index_segment import Rows
from .int8 import Int8Vectors
from .maxsim import Floats, score_groups

# float32 accumulates with an error of its own, far below the codes': see the tolerance of maxsim's tests.
FLOAT32_ERROR = 2e-6


def may_be_best(query: Floats, screen: Int8Vectors, rows: Rows, keep: int) -> Rows:
    """Those of `rows` that may be among the best `keep` by exact MaxSim with the vectors the screen was made of.

    Rounding moves each value by at most half a step, so it moves <q, c> by at most |q|_1 * scale / 2, and a maximum and a
    sum by no more than their terms. An item stays when its score plus its bound reaches the `keep`-th best of the scores
    minus their bounds.

    Args:
        query: (r_q, d) float32.
        screen: (n, r, d).
        rows: at least `keep` of the n.
    """
    scores = score_groups(query[None], [screen])[0][rows]
    bounds = np.abs(query).sum() / 2 * screen.scales[rows].max(axis=1) + np.float32(FLOAT32_ERROR * len(query))
    certain = np.partition(scores - bounds, -keep)[-keep]
    found: Rows = rows[scores + bounds >= certain]
    return found
