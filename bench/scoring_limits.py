"""What this machine can do at most: multiply-adds, memory reads and sgemm, with the threads that scoring uses."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from metaembed.runtime.errors import UsageError
from metaembed.runtime.maxsim_native import thread_count

from .records import Record

# Twelve chains of multiply-adds hide their latency; four sums do the same for loads. -march=native, unlike the kernels:
# a limit is what the processor has, not what we use of it.
SOURCE = r"""
#include <stdint.h>
#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
typedef float vf __attribute__((vector_size(4 * WIDTH)));
typedef uint64_t vu __attribute__((vector_size(32), aligned(8)));
double multiply_adds(int64_t rounds) {
    volatile float unknown = 1e-9f; /* or the compiler would work the sums out */
    vf a[12], x, y;
    for (int i = 0; i < WIDTH; i++) x[i] = unknown, y[i] = 1 - unknown;
    for (int i = 0; i < 12; i++) a[i] = x * (float)i;
    for (int64_t k = 0; k < rounds; k++)
        for (int i = 0; i < 12; i++) a[i] = a[i] * y + x;
    vf sum = a[0];
    for (int i = 1; i < 12; i++) sum += a[i];
    unknown = sum[0] + sum[WIDTH - 1];
    return 2.0 * 12 * WIDTH * rounds;
}
uint64_t read_memory(const char *data, int64_t bytes) {
    vu a = {0}, b = {0}, c = {0}, d = {0};
    for (int64_t i = 0; i + 128 <= bytes; i += 128) {
        __builtin_prefetch(data + i + 4096);
        a ^= *(const vu *)(data + i);
        b ^= *(const vu *)(data + i + 32);
        c ^= *(const vu *)(data + i + 64);
        d ^= *(const vu *)(data + i + 96);
    }
    a ^= b ^ c ^ d;
    return a[0] ^ a[1] ^ a[2] ^ a[3];
}
"""
READ_BYTES = 1 << 29  # far beyond every cache
ROUNDS = 7


def build_limits() -> ctypes.CDLL:
    """Compile the loops for this processor; a UsageError where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise UsageError("measuring this machine's limits needs a C compiler (cc, gcc or clang)")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "limits.c", Path(folder) / "limits.so"
        source.write_text(SOURCE)
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-ffp-contract=fast"]
        subprocess.run([compiler, *flags, str(source), "-o", str(target)], check=True)
        library = ctypes.CDLL(str(target))
    library.multiply_adds.restype, library.multiply_adds.argtypes = ctypes.c_double, [ctypes.c_int64]
    library.read_memory.restype, library.read_memory.argtypes = ctypes.c_uint64, [ctypes.c_void_p, ctypes.c_int64]
    return library


def measure_limits() -> Record:
    """GFLOP/s of multiply-adds and of sgemm, and GB/s of reads; the best of some runs, for these are limits."""
    library, threads = build_limits(), thread_count()
    memory = np.ones(READ_BYTES // 8, np.uint64)
    share = READ_BYTES // threads // 4096 * 4096
    a = np.random.default_rng(0).standard_normal((2048, 2048), np.float32)
    with ThreadPoolExecutor(threads) as pool:

        def work() -> float:
            return sum(pool.map(library.multiply_adds, [1 << 22] * threads))

        def read() -> float:
            starts = [memory.ctypes.data + i * share for i in range(threads)]
            list(pool.map(library.read_memory, starts, [share] * threads))
            return float(share * threads)

        return {
            "threads": threads,
            "peak_gflops": _best_rate(work) / 1e9,
            "read_gb_s": _best_rate(read) / 1e9,
            "sgemm_gflops": _best_rate(lambda: float((a @ a).size * 2 * len(a))) / 1e9,
        }


def _best_rate(run: Callable[[], float]) -> float:
    best = 0.0
    for _ in range(ROUNDS):
        start = time.perf_counter()
        amount = run()
        best = max(best, amount / (time.perf_counter() - start))
    return best
