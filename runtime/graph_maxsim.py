"""MaxSim through a session on the scorer graph: candidates go through in chunks that fit a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .manifest import SCORER, Bundle
from .session import DeviceSession, Session

if TYPE_CHECKING:
    from .device_buffers import DeviceArray

QUERIES, MEMORY_BYTES = 32, 1 << 28  # in one run; engines are cut to both
QUERY_VECTORS = 16  # of a query, at most, for what is placed before queries are known


@dataclass(frozen=True)
class Placed:
    """Candidates (n, r_c, d) in a device's memory, in pieces that one run takes. Free them before their scorer."""

    pieces: list[DeviceArray]
    shape: tuple[int, int, int]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def cut(self, first: int, items: int) -> Placed:
        """The pieces from the one that begins with candidate `first`, as many as hold so many candidates; this owns them."""
        starts = np.cumsum([0, *(piece.shape[0] for piece in self.pieces)])
        begin, end = np.searchsorted(starts, (first, first + items))
        pieces = self.pieces[begin:end]
        return Placed(pieces, (sum(piece.shape[0] for piece in pieces), *self.shape[1:]))

    def free(self) -> None:
        for piece in self.pieces:
            piece.free()
        self.pieces.clear()


class Scorer:
    """MaxSim on the device that serves a bundle: our kernel on a GPU (bf16 and fp16), else the bundle's scorer graph, on its
    TensorRT engine for this GPU if there is one, else in ONNX Runtime.

    A context manager: leaving it frees the session.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    @classmethod
    def open(cls, bundle: Bundle) -> Scorer:
        """The best session here. A BundleError where the bundle is older than the scorer graph."""
        from .gpu_kernel import open_kernel
        from .open_sessions import open_sessions

        bundle.path(SCORER)
        if kernel := open_kernel(bundle):
            return kernel
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
        self, queries: NDArray[Any], candidates: NDArray[Any] | Placed, *, memory_bytes: int = MEMORY_BYTES
    ) -> NDArray[np.float32]:
        """Scores (q, n) in float32 of queries (q, r_q, d) against candidates (n, r_c, d); higher is better."""
        return maxsim_by_graph(self._session, queries, candidates, memory_bytes=memory_bytes)

    def place(self, read: Callable[[slice], NDArray[Any]], shape: tuple[int, int, int]) -> Placed:
        """Copy candidates into the memory of the device that scores them, to be given to ``scores`` many times.

        Args:
            read: gives some of the candidates; they are copied piece by piece.
            shape: of all of them, (n, r_c, d).

        Raises:
            UsageError: what scores here has no memory of its own.
        """
        if not isinstance(self._session, DeviceSession):
            raise UsageError(f"{self.description} reads candidates from host memory; only a GPU keeps them")
        items, r_c, dim = shape
        step = _step(self._session, QUERIES, QUERY_VECTORS, r_c, dim, MEMORY_BYTES)
        placed = Placed([], shape)
        try:
            for start in range(0, items, step):
                piece = np.ascontiguousarray(read(slice(start, min(start + step, items))), self.dtype)
                placed.pieces.append(self._session.place(piece))
        except BaseException:
            placed.free()
            raise
        return placed

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
    session: Session,
    queries: NDArray[Any],
    candidates: NDArray[Any] | Placed,
    *,
    memory_bytes: int = MEMORY_BYTES,
) -> NDArray[np.float32]:
    """Scores (q, n) in float32 of queries (q, r_q, d) against candidates (n, r_c, d), in the session's input type."""
    kind = session.inputs["candidates"]
    (r_q, dim), (items, r_c, _) = queries.shape[1:], candidates.shape
    scores = np.empty((len(queries), items), np.float32)
    for first in range(0, len(queries), QUERIES):
        some = np.ascontiguousarray(queries[first : first + QUERIES], kind)
        if isinstance(candidates, Placed):
            pieces: Iterable[Any] = candidates.pieces
        else:
            pieces = _pieces(candidates, _step(session, len(some), r_q, r_c, dim, memory_bytes), kind)
        start = 0
        for piece in pieces:
            columns = slice(start, start := start + piece.shape[0])
            scores[first : first + QUERIES, columns] = session.run({"queries": some, "candidates": piece})["scores"]
    return scores


def _pieces(candidates: NDArray[Any], step: int, kind: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    return (np.ascontiguousarray(candidates[row : row + step], kind) for row in range(0, len(candidates), step))


def _step(session: Session, queries: int, r_q: int, r_c: int, dim: int, memory_bytes: int) -> int:
    step = chunk_size(memory_bytes, queries, r_q, r_c, dim, session.inputs["candidates"].itemsize)
    most = session.most_items("candidates", (r_c, dim)) if isinstance(session, DeviceSession) else session.max_items
    return min(step, most or step)
