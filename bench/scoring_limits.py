"""What this machine can do at most: multiply-adds, memory reads and sgemm, with the threads that scoring uses."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from metaembed.runtime.errors import UsageError
from metaembed.runtime.maxsim_native import thread_count

from .records import Record
from .timing import PAUSE_S, time_interleaved

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
        __builtin_prefetch(data + i + 4096 + 64);
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
FLOP = 2e10
WAKE_FLOP = 2e8
WAKE_S = 0.02  # a processor that has paused takes milliseconds to its full clock: runs of 7 ms took 10 without
ROUNDS = 9


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


@dataclass(frozen=True)
class Limits:
    """Loops that do nothing but the work that scoring cannot do without, on as many threads."""

    library: ctypes.CDLL
    threads: int
    pool: ThreadPoolExecutor

    @classmethod
    def build(cls) -> Limits:
        threads = thread_count()
        return cls(build_limits(), threads, ThreadPoolExecutor(threads))

    def multiply_add(self, flop: float) -> None:
        """So many operations (two a multiply-add) in registers."""
        rounds = max(1, round(flop / self.threads / self.library.multiply_adds(1)))
        list(self.pool.map(self.library.multiply_adds, [rounds] * self.threads))

    def settle(self) -> None:
        """Let the threads of the last run go to sleep, then bring the processor back to its full clock.

        By work that is nobody's: contestants share this process. `timing.time_awake`, in a process for each, repeats their runs.
        """
        time.sleep(PAUSE_S)
        end = time.perf_counter() + WAKE_S
        while time.perf_counter() < end:
            self.multiply_add(WAKE_FLOP)

    def read(self, memory: NDArray[np.generic]) -> None:
        """Every byte of a contiguous array, once."""
        share = memory.nbytes // self.threads // 4096 * 4096
        starts = [memory.ctypes.data + i * share for i in range(self.threads)]
        sizes = [share] * (self.threads - 1) + [memory.nbytes - share * (self.threads - 1)]
        list(self.pool.map(self.library.read_memory, starts, sizes))


def measure_limits(limits: Limits) -> Record:
    """GFLOP/s of multiply-adds and of sgemm, and GB/s of reads: medians, of loops that take turns."""
    memory = np.ones(READ_BYTES // 8, np.uint64)
    a = np.random.default_rng(0).standard_normal((2048, 2048), np.float32)
    timed = time_interleaved(
        {
            "multiply_adds": lambda: limits.multiply_add(FLOP),
            "read": lambda: limits.read(memory),
            "sgemm": lambda: a @ a,
        },
        rounds=ROUNDS,
        before=limits.settle,
    )
    return {
        "threads": limits.threads,
        "peak_gflops": FLOP / 1e6 / timed["multiply_adds"].median_ms,
        "read_gb_s": memory.nbytes / 1e6 / timed["read"].median_ms,
        "sgemm_gflops": 2 * len(a) ** 3 / 1e6 / timed["sgemm"].median_ms,
        "timings": {name: timing.to_json() for name, timing in timed.items()},
    }
