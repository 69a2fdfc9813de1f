"""MaxSim through a session on the scorer graph: candidates go through in chunks that fit a memory budget."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .session import Session


def chunk_size(memory_bytes: int, queries: int, r_q: int, r_c: int, dim: int, item_bytes: int = 2) -> int:
    """Candidates that one run may take: their vectors as stored and widened, and their dot products, in float32.

    Raises:
        UsageError: not even one candidate fits.
    """
    each = r_c * dim * (item_bytes + 4) + 4 * queries * r_q * (r_c + 1)
    count = memory_bytes // each
    if count < 1:
        raise UsageError(f"scoring {queries} queries needs {each} bytes for one candidate; {memory_bytes} are allowed")
    return count


def maxsim_by_graph(
    session: Session, queries: NDArray[Any], candidates: NDArray[Any], *, memory_bytes: int = 1 << 28
) -> NDArray[np.float32]:
    """Scores (q, n) in float32 of queries (q, r_q, d) against candidates (n, r_c, d), in the session's input type."""
    kind = session.inputs["candidates"]
    count, (r_q, dim) = len(queries), queries.shape[1:]
    chunk = chunk_size(memory_bytes, count, r_q, candidates.shape[1], dim, kind.itemsize)
    queries = np.ascontiguousarray(queries, kind)
    scores = np.empty((count, len(candidates)), np.float32)
    for start in range(0, len(candidates), chunk):
        part = np.ascontiguousarray(candidates[start : start + chunk], kind)
        scores[:, start : start + chunk] = session.run({"queries": queries, "candidates": part})["scores"]
    return scores
