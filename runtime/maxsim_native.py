"""MaxSim through our C kernels (_maxsim.c), where this installation has them: few queries at the machine's limit.

Similarities are never materialised: a thread keeps the running maxima of 96 items, under 100 KB for 128 query vectors.
Threads are Python's: ctypes releases the interpreter lock while a kernel runs.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .int8 import Int8Vectors
from .maxsim_pack import BF16, F32, INT8, pack

INTERFACE = 4
# Queries scored in one pass over the candidates: more rows would no longer stay in a core's cache (43 against 76 GFLOP/s
# for 2048 rows of 3584 dims).
PASS_ROWS = 128
BLOCK_ITEMS = 96
STORAGE = {np.dtype(ml_dtypes.bfloat16): BF16, np.dtype(np.float32): F32, np.dtype(np.int8): INT8}
# Multiply-adds below which waking threads (about 50 us) costs more than it saves.
SMALL_TASK = 1 << 20
SHARES_PER_THREAD = 8  # so that a thread that was held up leaves work to the others


class _Group(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("item_stride", ctypes.c_int64),
        ("scale_stride", ctypes.c_int64),
        ("vectors", ctypes.c_int64),
    )


class _Task(ctypes.Structure):
    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("units", ctypes.c_void_p),
        ("layout", ctypes.c_int64),
        ("tile", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("vectors", ctypes.c_int64),
        ("dims", ctypes.c_int64),
        ("groups", ctypes.POINTER(_Group)),
        ("group_count", ctypes.c_int64),
        ("chosen", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
        ("score_stride", ctypes.c_int64),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where none was built or this processor has none."""
    for path in sorted(Path(__file__).parent.glob("_maxsim*.so")):
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError:  # built for another machine
            continue
        if getattr(loaded, "metaembed_interface", int)() != INTERFACE:  # left over from another version
            continue
        loaded.metaembed_maxsim.argtypes = (ctypes.c_int, ctypes.POINTER(_Task), ctypes.c_int64, ctypes.c_int64)
        if loaded.metaembed_vector_width():
            return loaded
    return None


def thread_count() -> int:
    """Threads that score: OMP_NUM_THREADS where set, else the cores this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def can_score(groups: Sequence[NDArray[Any] | Int8Vectors]) -> bool:
    """Whether the kernels take these arrays as they are: a known type, and the vectors of an item side by side."""
    kinds = {_values(group).dtype for group in groups}
    return library() is not None and len(kinds) == 1 and kinds <= STORAGE.keys() and all(map(_is_dense, groups))


def score(
    queries: NDArray[np.float32],
    groups: Sequence[NDArray[Any] | Int8Vectors],
    chosen: NDArray[np.int64] | None = None,
) -> NDArray[np.float32]:
    """MaxSim of (q, r_q, d) float32 over groups (n, r_g, d) that `can_score` takes; an item has the vectors of all.

    Args:
        chosen: the rows of the groups to score, in this order; all by default.

    Returns:
        (q, n) float32; NaN where a similarity is NaN or infinite.
    """
    n = groups[0].shape[0] if chosen is None else len(chosen)
    selection = None if chosen is None else np.ascontiguousarray(chosen, np.int64)
    structs = (_Group * len(groups))(*map(_describe, groups))
    scores = np.empty((len(queries), n), np.float32)
    step = max(1, PASS_ROWS // queries.shape[1])
    for start in range(0, len(queries), step):
        _score_pass(queries[start : start + step], groups, structs, selection, scores[start : start + step])
    return scores


def _score_pass(
    queries: NDArray[np.float32],
    groups: Sequence[NDArray[Any] | Int8Vectors],
    structs: Any,
    chosen: NDArray[np.int64] | None,
    scores: NDArray[np.float32],
) -> None:
    """One pass over the candidates with queries that stay in the cache; fills `scores` (q, n)."""
    kernels = library()
    assert kernels is not None
    (q, r_q, d), n = queries.shape, scores.shape[1]
    storage = STORAGE[_values(groups[0]).dtype]
    packed = pack(
        queries, storage, kernels.metaembed_vector_width(), dots=bool(kernels.metaembed_dots() >> storage & 1)
    )
    address = None if chosen is None else chosen.ctypes.data
    task = _Task(*packed.fields(), q, r_q, d, structs, len(groups), address, scores.ctypes.data, n)

    def run(first: int, last: int) -> int:
        return int(kernels.metaembed_maxsim(storage, ctypes.byref(task), first, last))

    work = n * packed.rows * d * sum(group.shape[1] for group in groups)
    threads = min(thread_count(), -(-work // SMALL_TASK))
    shares = min(threads * SHARES_PER_THREAD, -(-work // SMALL_TASK))
    if run(0, n) if threads <= 1 else _share_out(run, n, threads, shares):
        raise MemoryError("no memory for the work space of a MaxSim kernel")


def _share_out(run: Callable[[int, int], int], items: int, threads: int, shares: int) -> bool:
    """Run ranges of items on this thread and on others, each taking the next when it is done; True when one failed."""
    step = -(-items // (shares * BLOCK_ITEMS)) * BLOCK_ITEMS
    starts = deque(range(0, items, step))

    def take() -> bool:
        failed = False
        while True:
            try:
                start = starts.popleft()
            except IndexError:
                return failed
            failed |= bool(run(start, min(start + step, items)))

    others = [_pool(threads).submit(take) for _ in range(threads - 1)]
    failed = take()
    return any([failed, *(other.result() for other in others if not other.cancel())])


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="maxsim")


def _values(group: NDArray[Any] | Int8Vectors) -> NDArray[Any]:
    return group.codes if isinstance(group, Int8Vectors) else group


def _is_dense(group: NDArray[Any] | Int8Vectors) -> bool:
    values = _values(group)
    size, (item, vector, dim) = values.itemsize, values.strides
    dense = dim == size and vector == size * values.shape[2] and item % size == 0
    return dense and (not isinstance(group, Int8Vectors) or group.scales.strides[1] == group.scales.itemsize)


def _describe(group: NDArray[Any] | Int8Vectors) -> _Group:
    values, scales = _values(group), group.scales if isinstance(group, Int8Vectors) else None
    return _Group(
        values.ctypes.data,
        None if scales is None else scales.ctypes.data,
        values.strides[0] // values.itemsize,
        0 if scales is None else scales.strides[0] // scales.itemsize,
        values.shape[1],
    )
