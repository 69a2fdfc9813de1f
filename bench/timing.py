"""Times that can be compared: contestants take turns, so that a busy minute of the machine slows all of them alike."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

WARMUP = 2
PAUSE_S = 0.1  # threads of BLAS, of ONNX Runtime and of OpenMP wait busily for a while after their work


@dataclass(frozen=True)
class Timing:
    """What remains of one contestant's runs: milliseconds, how many runs were timed, and how many came before."""

    median_ms: float
    p95_ms: float
    min_ms: float
    count: int
    warmup: int

    @classmethod
    def of(cls, seconds: Sequence[float], warmup: int) -> Timing:
        """Summarise runs; the p95 interpolates between neighbours, as numpy does."""
        if not len(seconds):
            raise ValueError("nothing was timed")
        runs = 1e3 * np.asarray(seconds)
        median, p95 = (float(round(value, 4)) for value in np.percentile(runs, [50, 95]))
        return cls(median, p95, round(float(runs.min()), 4), len(runs), warmup)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def time_interleaved(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = WARMUP,
    before: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Run every contestant once a round, in an order that turns by one each round; the first ``warmup`` rounds do not count.

    ``before`` runs ahead of each run, whoever's it is, and is not timed.
    """

    def measure(name: str) -> float:
        if before:
            before()
        return _seconds(contestants[name])

    return summarise(contestants, measure, rounds=rounds, warmup=warmup)


def summarise(
    names: Mapping[str, object] | Sequence[str], measure: Callable[[str], float], *, rounds: int, warmup: int
) -> dict[str, Timing]:
    """As ``time_interleaved``, for contestants that measure themselves: ``measure(name)`` runs one and returns seconds."""
    if rounds < 1 or warmup < 0:
        raise ValueError(f"{rounds} rounds after {warmup} to warm up: at least one round is needed")
    order, seconds = list(names), {name: [] for name in names}
    for number in range(warmup + rounds):
        turn = number % len(order)
        for name in order[turn:] + order[:turn]:
            taken = measure(name)
            if number >= warmup:
                seconds[name].append(taken)
    return {name: Timing.of(taken, warmup) for name, taken in seconds.items()}


def time_awake(run: Callable[[], object]) -> float:
    """Seconds of a run on a processor that is awake, with no other process's threads waiting busily.

    After a pause, for those to go to sleep, it runs until as long has passed; the last run counts, a long one is the only one.
    That also wakes the library's own threads, in a process that is its alone; where contestants share one, see `Limits.settle`.
    """
    time.sleep(PAUSE_S)
    begin = time.perf_counter()
    while True:
        taken = _seconds(run)
        if time.perf_counter() - begin >= PAUSE_S:
            return taken


def percentiles(run: Callable[[], object], *, rounds: int, warmup: int = WARMUP) -> dict[str, float]:
    """One contestant alone: its 50th, 90th and 99th percentile in milliseconds, as fields of a record."""
    taken = [_seconds(run) for _ in range(warmup + rounds)][warmup:]
    return {f"p{rank}_ms": round(1e3 * float(np.percentile(taken, rank)), 3) for rank in (50, 90, 99)}


def peak_rss_mib() -> float:
    """The most memory this process ever held, in MiB.

    From VmHWM where there is one: ru_maxrss of a process that was forked starts at its parent's peak.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def gpu_memory_mib() -> float | None:
    """What this process holds on NVIDIA GPUs, in MiB, as their driver counts it; None where nothing can be told."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.split(",") for line in answer.splitlines()]
    held = [float(used) for pid, used in rows if pid.strip() == str(os.getpid()) and used.strip().isdigit()]
    return sum(held) or None


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
