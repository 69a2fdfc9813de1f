"""MaxSim through a session on the scorer graph: candidates go through in chunks that fit a memory budget."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .manifest import SCORER, Bundle
from .session import Session

QUERIES, MEMORY_BYTES = 32, 1 << 28  # in one run; engines are cut to both


class Scorer:
    """A bundle's scorer graph, on its TensorRT engine for this GPU if there is one, else in ONNX Runtime.

    A context manager: leaving it frees the session.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    @classmethod
    def open(cls, bundle: Bundle) -> Scorer:
        """The best session here. A BundleError where the bundle is older than the scorer graph."""
        from .open_sessions import open_sessions

        bundle.path(SCORER)
        (session,) = open_sessions(bundle, (SCORER,))
        return cls(session)

    @property
    def dtype(self) -> np.dtype[Any]:
        """What vectors are converted to: float32, float16 or bfloat16."""
        return self._session.inputs["candidates"]

    @property
    def description(self) -> str:
        return self._session.description

    def scores(
        self, queries: NDArray[Any], candidates: NDArray[Any], *, memory_bytes: int = MEMORY_BYTES
    ) -> NDArray[np.float32]:
        """Scores (q, n) in float32 of queries (q, r_q, d) against candidates (n, r_c, d); higher is better."""
        return maxsim_by_graph(self._session, queries, candidates, memory_bytes=memory_bytes)

    def close(self) -> None:
        self._session.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
    session: Session, queries: NDArray[Any], candidates: NDArray[Any], *, memory_bytes: int = MEMORY_BYTES
) -> NDArray[np.float32]:
    """Scores (q, n) in float32 of queries (q, r_q, d) against candidates (n, r_c, d), in the session's input type."""
    kind = session.inputs["candidates"]
    (r_q, dim), r_c = queries.shape[1:], candidates.shape[1]
    batch = min(len(queries), QUERIES)
    chunk = chunk_size(memory_bytes, batch, r_q, r_c, dim, kind.itemsize) if batch else 1
    chunk = min(chunk, session.max_items or chunk)
    scores = np.empty((len(queries), len(candidates)), np.float32)
    for first in range(0, len(queries), QUERIES):
        rows = slice(first, first + QUERIES)
        some = np.ascontiguousarray(queries[rows], kind)
        for start in range(0, len(candidates), chunk):
            part = np.ascontiguousarray(candidates[start : start + chunk], kind)
            scores[rows, start : start + chunk] = session.run({"queries": some, "candidates": part})["scores"]
    return scores
