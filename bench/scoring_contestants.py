"""Who scores against whom: every contestant gets the same vectors in the form it likes best, prepared beforehand."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from metaembed.runtime.maxsim import maxsim, maxsim_reference
from metaembed.runtime.maxsim_native import thread_count

Scorer = Callable[[], NDArray[np.float32]]
CHUNK_FLOATS = 1 << 22  # candidates that a framework scores at a time: more only costs it memory
OURS, PLAIN = "metaembed", "numpy, bf16 tiles"
NUMKONG, ORT, TORCH, TORCH_BF16 = OTHERS = ("NumKong bf16", "ONNX Runtime f32", "torch f32", "torch bf16")


def contestants(queries: NDArray[np.float32], candidates: NDArray[np.generic], graph: bytes) -> dict[str, Scorer]:
    """Scorers of queries (q, r_q, d) float32 against candidates (n, r_c, d) bfloat16; of OTHERS only those that are installed.

    Args:
        graph: MaxSim as an ONNX model in float32, inputs `queries` and `candidates`.
    """
    found: dict[str, Scorer] = {
        OURS: lambda: maxsim(queries, candidates),
        PLAIN: lambda: maxsim_reference(queries, [candidates]),
    }
    wide = candidates.astype(np.float32)
    for name, make in (
        (NUMKONG, lambda: _numkong(queries, candidates)),
        (ORT, lambda: _onnxruntime(queries, wide, graph)),
        (TORCH, lambda: _torch(queries, wide, "float32")),
        (TORCH_BF16, lambda: _torch(queries, wide, "bfloat16")),
    ):
        try:
            found[name] = make()
        except ImportError:
            continue
    return found


def _numkong(queries: NDArray[np.float32], candidates: NDArray[np.generic]) -> Scorer:
    """Candidates as rows, the query packed; its rows are shared out to threads, for the library has none of its own."""
    import numkong

    (q, r_q, d), (n, r_c, _) = queries.shape, candidates.shape
    rows = candidates.reshape(n * r_c, d)
    packed = numkong.dots_pack(queries.reshape(q * r_q, d).astype(ml_dtypes.bfloat16), dtype="bf16")
    threads = thread_count()
    step = max(1, min(-(-n // threads), CHUNK_FLOATS // (q * r_q * r_c)))
    pool = ThreadPoolExecutor(threads)

    def score(start: int) -> NDArray[np.float32]:
        part = rows[start * r_c : (start + step) * r_c]
        dots = np.asarray(numkong.dots_packed(part, packed)).reshape(-1, r_c, q, r_q)
        return dots.max(axis=1).sum(axis=2).T

    return lambda: np.concatenate(list(pool.map(score, range(0, n, step))), axis=1)


def _onnxruntime(queries: NDArray[np.float32], candidates: NDArray[np.float32], graph: bytes) -> Scorer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = thread_count()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    step = max(1, CHUNK_FLOATS // candidates[0].size)

    def score(start: int) -> NDArray[np.float32]:
        return session.run(None, {"queries": queries, "candidates": candidates[start : start + step]})[0]

    return lambda: np.concatenate([score(start) for start in range(0, len(candidates), step)], axis=1)


def _torch(queries: NDArray[np.float32], candidates: NDArray[np.float32], kind: str) -> Scorer:
    import torch

    torch.set_num_threads(thread_count())
    dtype = getattr(torch, kind)
    (q, r_q, d), (_, r_c, _) = queries.shape, candidates.shape
    rows = torch.from_numpy(queries).reshape(q * r_q, d).to(dtype)
    stored = torch.from_numpy(candidates).to(dtype)
    step = max(1, CHUNK_FLOATS // (r_c * d))

    def score(part: torch.Tensor) -> torch.Tensor:
        dots = part.reshape(-1, d) @ rows.T
        return dots.reshape(-1, r_c, q, r_q).amax(1).float().sum(2).T

    return lambda: torch.cat([score(part) for part in stored.split(step)], dim=1).numpy()
