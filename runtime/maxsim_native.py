"""MaxSim through our C kernels (_maxsim.c), where this installation has them: few queries at the machine's limit.

Similarities are never materialised: a thread keeps the running maxima of 96 items, under 100 KB for 128 query vectors.
Threads are Python's: ctypes releases the interpreter lock while a kernel runs.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .int8 import Int8Vectors
from .maxsim_pack import BF16, F32, INT8, Packed, pack

# Candidates whose vectors lie side by side in each of some arrays (n, r_g, d), and which rows of them (None: all).
Part: TypeAlias = "tuple[Sequence[NDArray[Any] | Int8Vectors], NDArray[np.int64] | None]"

INTERFACE = 5
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


def describe_kernels() -> str:
    """The instructions that scoring uses on this processor, for records; ``numpy`` where there are no kernels."""
    kernels = library()
    if kernels is None:
        return "numpy"
    name = {4: "NEON", 8: "AVX2", 16: "AVX-512"}[kernels.metaembed_vector_width()]
    dots = kernels.metaembed_dots()
    return name + " BF16" * bool(dots >> BF16 & 1) + " VNNI" * bool(dots >> INT8 & 1)


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


def score(queries: NDArray[np.float32], parts: Sequence[Part]) -> list[NDArray[np.float32]]:
    """MaxSim of (q, r_q, d) float32 over the candidates of every part; `can_score` takes the groups of all of them together.

    The parts are shared out to threads together: a search over many small ones wakes threads once.

    Returns:
        (q, n) float32 for each part; NaN where a similarity is NaN or infinite.
    """
    counts = [groups[0].shape[0] if chosen is None else len(chosen) for groups, chosen in parts]
    selections = [None if chosen is None else np.ascontiguousarray(chosen, np.int64) for _, chosen in parts]
    structs = [(_Group * len(groups))(*map(_describe, groups)) for groups, _ in parts]
    scores = [np.empty((len(queries), count), np.float32) for count in counts]
    storage = STORAGE[_values(parts[0][0][0]).dtype] if parts else F32
    vectors = sum(n * group.shape[1] for n, (groups, _) in zip(counts, parts, strict=True) for group in groups)
    step = max(1, PASS_ROWS // queries.shape[1])
    for start in range(0, len(queries), step):  # queries that stay in the cache
        some = queries[start : start + step]
        packed = _pack(some, storage)
        tasks = [
            _Task(
                *packed.fields(), *some.shape, held, len(held), _address(rows), out[start : start + step].ctypes.data, n
            )
            for held, rows, out, n in zip(structs, selections, scores, counts, strict=True)
        ]
        arrays = packed, selections, scores, parts
        _run(storage, list(zip(tasks, counts, strict=True)), packed.rows * queries.shape[2] * vectors, arrays)
    return scores


def _pack(queries: NDArray[np.float32], storage: int) -> Packed:
    kernels = library()
    assert kernels is not None
    return pack(
        queries,
        storage,
        kernels.metaembed_vector_width(),
        dots=bool(kernels.metaembed_dots() >> storage & 1),
        pairs=bool(kernels.metaembed_pairs()),
    )


def _run(storage: int, tasks: Sequence[tuple[_Task, int]], work: int, arrays: object) -> None:
    """Run tasks over their numbers of items, by ranges, on this thread and, where so many multiply-adds are worth it, others.

    ``arrays`` own the memory that tasks name by address. Every thread holds them while it works: an interrupt ends this
    function at any point, and the others first finish the ranges that they have begun.
    """
    threads = min(thread_count(), -(-work // SMALL_TASK))
    shares = 1 if threads <= 1 else min(threads * SHARES_PER_THREAD, -(-work // SMALL_TASK))
    items = sum(count for _, count in tasks)
    step = max(1, -(-items // (shares * BLOCK_ITEMS))) * BLOCK_ITEMS
    ranges = deque((task, start, min(start + step, count)) for task, count in tasks for start in range(0, count, step))
    kernels = library()
    assert kernels is not None

    def take() -> bool:
        """Work off ranges, each taking the next when it is done; True when one failed."""
        failed = False
        _held = arrays
        while True:
            try:
                task, first, last = ranges.popleft()
            except IndexError:
                return failed
            failed |= bool(kernels.metaembed_maxsim(storage, ctypes.byref(task), first, last))

    try:
        others = [_pool().submit(take) for _ in range(threads - 1)]
        failed = take()
        failed = any([failed, *(other.result() for other in others if not other.cancel())])
    finally:
        ranges.clear()
    if failed:
        raise MemoryError("no memory for the work space of a MaxSim kernel")


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_count(), thread_name_prefix="maxsim")


if hasattr(os, "register_at_fork"):  # a forked child has none of its parent's threads, and makes its own
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _address(array: NDArray[Any] | None) -> int | None:
    return None if array is None else array.ctypes.data


def _values(group: NDArray[Any] | Int8Vectors) -> NDArray[Any]:
    return group.codes if isinstance(group, Int8Vectors) else group


def _is_dense(group: NDArray[Any] | Int8Vectors) -> bool:
    values = _values(group)
    size, (item, vector, dim) = values.itemsize, values.strides
    dense = dim == size and vector == size * values.shape[2] and item % size == 0
    if not dense or not isinstance(group, Int8Vectors):
        return dense
    size, (item, vector) = group.scales.itemsize, group.scales.strides
    return vector == size and item % size == 0


def _describe(group: NDArray[Any] | Int8Vectors) -> _Group:
    values, scales = _values(group), group.scales if isinstance(group, Int8Vectors) else None
    return _Group(
        values.ctypes.data,
        None if scales is None else scales.ctypes.data,
        values.strides[0] // values.itemsize,
        0 if scales is None else scales.strides[0] // scales.itemsize,
        values.shape[1],
    )
