"""MaxSim against this machine's limits and against other libraries, in the same minute, taking turns."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from metaembed.runtime import maxsim_native
from metaembed.runtime.budget import TRAINED_GROUPS, Budget
from metaembed.runtime.int8 import quantize_int8
from metaembed.runtime.maxsim import maxsim

from .records import Record
from .scoring_contestants import OTHERS, OURS, contestants
from .scoring_limits import Limits
from .timing import time_interleaved

BUDGETS = tuple(Budget(*group) for group in TRAINED_GROUPS)
# Candidates per budget at 3584 dims: 5 to 30 ms of work at the limit. Other dims get as many more.
COUNTS = {"1,1": 30_000, "2,4": 7_000, "4,8": 3_500, "8,16": 3_000, "16,64": 800}
COUNTED_DIM = 3584
SGEMM = 1536  # rows, columns and depth of the matrix product that is timed beside
TOLERANCE = 2e-6  # of a score for each query vector, against float64: what counts as exact
JUDGED = 64  # candidates whose scores are compared with float64


def unit_vectors(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """Random directions (..., d) in float32."""
    vectors = rng.standard_normal(shape, np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def stored_candidates(rng: np.random.Generator, count: int, vectors: int, dim: int) -> NDArray[np.generic]:
    """Random unit vectors (n, r_c, d) in bfloat16; a thousandth is drawn and repeated, for speed does not depend on it."""
    drawn = unit_vectors(rng, min(count, 256), vectors, dim).astype(ml_dtypes.bfloat16)
    return np.resize(drawn, (count, vectors, dim))


def measure_contest(
    budget: Budget, dim: int, limits: Limits, graph: bytes, *, queries: int = 1, rounds: int = 15, scale: float = 1.0
) -> Record:
    """Every contestant's milliseconds at one budget, the share of the limit that ours reaches, and its worst error.

    The limits take their turns with the contestants: a machine that others use is not the same from minute to minute.
    """
    rng = np.random.default_rng(0)
    count = max(96, int(scale * COUNTS[str(budget)] * COUNTED_DIM / dim / (1 if queries == 1 else 4)))
    query = unit_vectors(rng, queries, budget.query, dim)
    candidates = stored_candidates(rng, count, budget.candidate, dim)
    flop = 2 * queries * budget.query * count * budget.candidate * dim
    square = unit_vectors(rng, SGEMM, SGEMM)
    bounds = {
        "limit: reads": lambda: limits.read(candidates),
        "limit: multiply-adds": lambda: limits.multiply_add(flop),
        "sgemm": lambda: square @ square,
    }
    scorers = contestants(query, candidates, graph)
    timed = time_interleaved(scorers | bounds, rounds=rounds, before=limits.settle)
    memory_ms, compute_ms, sgemm_ms = (timed.pop(name).median_ms for name in bounds)
    sgemm_ms *= flop / (2 * SGEMM**3)
    ours = timed[OURS].median_ms
    others = {name: timing.median_ms for name, timing in timed.items() if name != OURS}
    best = min(others, key=others.__getitem__)
    exact = _float64(query, candidates[:JUDGED])
    errors = {name: float(np.abs(score()[:, :JUDGED] - exact).max()) for name, score in scorers.items()}
    as_exact = [name for name in others if errors[name] <= TOLERANCE * budget.query]
    best_exact = min(as_exact, key=others.__getitem__)
    return {
        "dim": dim,
        "budget": str(budget),
        "queries": queries,
        "candidates": count,
        "read_ms": memory_ms,
        "multiply_adds_ms": compute_ms,
        "limit_ms": max(compute_ms, memory_ms),
        "bound_by": "compute" if compute_ms > memory_ms else "memory",
        "share_of_limit": max(compute_ms, memory_ms) / ours,
        "share_of_multiply_adds": compute_ms / ours,
        "share_of_sgemm": sgemm_ms / ours,
        "best_other": best,
        "times_the_best_other": others[best] / ours,
        "best_exact": best_exact,
        "times_the_best_exact": others[best_exact] / ours,
        "worst_error": errors,
        "not_installed": [name for name in OTHERS if name not in timed],
        "timings": {name: timing.to_json() for name, timing in timed.items()},
    }


def measure_int8(budget: Budget, dim: int, *, rounds: int = 15, scale: float = 1.0) -> Record:
    """The int8 first pass beside the bf16 kernel, and its error against float64 over the unquantised vectors."""
    rng = np.random.default_rng(0)
    count = max(96, int(scale * COUNTS[str(budget)] * COUNTED_DIM / dim))
    query = unit_vectors(rng, 1, budget.query, dim)
    candidates = stored_candidates(rng, count, budget.candidate, dim)
    codes = quantize_int8(candidates)
    timed = time_interleaved(
        {"bf16": lambda: maxsim(query, candidates), "int8": lambda: maxsim(query, codes)}, rounds=rounds
    )
    exact = _float64(query, candidates[:JUDGED])
    error = float(np.abs(maxsim(query, quantize_int8(candidates[:JUDGED])) - exact).max())
    ratio = timed["bf16"].median_ms / timed["int8"].median_ms
    timings = {name: timing.to_json() for name, timing in timed.items()}
    return {"dim": dim, "budget": str(budget), "candidates": count, "times_bf16": ratio, "worst_error": error} | {
        "timings": timings
    }


def measure_memory(dim: int) -> Record:
    """The most that one scoring added to this process, in MiB, for every budget and a batch; candidates not counted."""
    rng = np.random.default_rng(0)
    peaks = {}
    for budget, queries in [*((budget, 1) for budget in BUDGETS), (BUDGETS[-1], 32)]:
        query = unit_vectors(rng, queries, budget.query, dim)
        candidates = stored_candidates(rng, COUNTS[str(budget)], budget.candidate, dim)
        peaks[f"{queries} x {budget}"] = added_mib(partial(maxsim, query, candidates))
    threads = maxsim_native.thread_count()
    return {"dim": dim, "added_mib": peaks, "threads": threads, "mib_per_thread": max(peaks.values()) / threads}


def added_mib(run: Callable[[], object]) -> float:
    """What a call adds to the memory of this process at most. Pages of files count: have them read before."""
    _give_back()
    # Writing 5 resets the peak (VmHWM) to what is resident now: proc(5).
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mib("VmRSS")
    run()
    return _status_mib("VmHWM") - before


def _give_back() -> None:
    """Have glibc return what it keeps of earlier calls, which would hide what the next one takes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def _status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def _float64(queries: NDArray[np.float32], candidates: NDArray[np.generic]) -> NDArray[np.float64]:
    dots = np.einsum("qrd,nsd->qnrs", queries.astype(np.float64), candidates.astype(np.float64))
    return dots.max(-1).sum(-1)
