"""What scoring and encoding cost: arithmetic for every model and device; scoring measured here beside this machine's limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import ml_dtypes
import numpy as np

from metaembed.runtime.budget import TRAINED_GROUPS, Budget
from metaembed.runtime.cost import index_bytes, scoring_flops, weight_bytes_read
from metaembed.runtime.devices import Device, find_device
from metaembed.runtime.geometry import Geometry
from metaembed.runtime.maxsim import maxsim
from metaembed.runtime.memory import GIB
from metaembed.runtime.plan import cost_inputs

from .records import Record
from .timing import time_interleaved

CANDIDATES = 100_000
DEVICES = ("a100", "h100", "orin-64gb", "thor")
MEASURED_BYTES = 1 << 28  # of index; what is measured is scaled to CANDIDATES, and the record says so
BUDGETS = tuple(Budget(*group) for group in TRAINED_GROUPS)
LARGEST_IMAGE = 1024

# Printed in MetaEmbed (arXiv 2509.18095, table 4) for 7B on one A100 and 100,000 candidates: GFLOPs, index GiB, scoring ms.
# 6.25 ms cannot be one query that streams its index: 42.72 GiB in that time are 7.3 TB/s, and an A100 reads 2.04.
REPORTED = {"1,1": (0.71, 0.68, 1.67), "8,16": (91.75, 10.68, 1.92), "16,64": (733.89, 42.72, 6.25)}
REPORTED_MODEL = "7b"


def scoring_costs(name: str, geometry: Geometry) -> list[Record]:
    """One record a budget: operations and index bytes for CANDIDATES, and the least milliseconds on each device."""
    devices = [find_device(device) for device in DEVICES]
    return [_scoring_cost(name, geometry, budget, devices) for budget in BUDGETS]


def encoder_costs(name: str, geometry: Geometry) -> list[Record]:
    """One record an input: operations of both graphs, and the least milliseconds on each device in bf16."""
    devices = [find_device(device) for device in DEVICES]
    found = []
    for cost in cost_inputs(geometry, BUDGETS[-1], LARGEST_IMAGE):
        nbytes = weight_bytes_read(geometry, "bf16", image=cost.image_tokens > 0)
        found.append(
            {
                "model": name,
                "input": cost.name,
                "positions": cost.positions,
                "image_tokens": cost.image_tokens,
                "vision_gflop": cost.flops.vision / 1e9,
                "language_gflop": cost.flops.language / 1e9,
                "limit_ms": {device.name: device.limit_ms("bf16", cost.flops.total, nbytes) for device in devices},
            }
        )
    return found


def measure_machine(seconds: float = 1.0) -> Record:
    """This machine's own limits, as numpy's BLAS reaches them: float32 multiply-adds, and reading memory."""
    a = np.random.default_rng(0).standard_normal((2048, 2048), np.float32)
    matrix, x = np.ones((1 << 14, 1 << 13), np.float32), np.ones(1 << 13, np.float32)  # 512 MiB, beyond every cache
    return {
        "gflops": 2 * len(a) ** 3 / _fastest(lambda: a @ a, seconds) / 1e9,
        "read_gb_s": matrix.nbytes / _fastest(lambda: matrix @ x, seconds) / 1e9,
    }


def measure_scoring(name: str, geometry: Geometry, limits: Record, *, rounds: int) -> Iterator[Record]:
    """One query against a bf16 index of random unit vectors, budgets in turn, beside the machine's limit for as much work."""
    rng = np.random.default_rng(0)
    counts = {budget: _measured_count(geometry, budget) for budget in BUDGETS}
    values = max(counts[budget] * budget.candidate for budget in BUDGETS) * geometry.dim
    block = _random_bf16(rng, values)
    query = rng.standard_normal((1, BUDGETS[-1].query, geometry.dim), np.float32)
    indexes = {
        budget: block[: count * budget.candidate * geometry.dim].reshape(count, budget.candidate, geometry.dim)
        for budget, count in counts.items()
    }
    timed = time_interleaved(
        {str(budget): _scorer(query[:, : budget.query], index) for budget, index in indexes.items()}, rounds=rounds
    )
    for budget, count in counts.items():
        flops, nbytes = scoring_flops(geometry, budget, count), index_bytes(geometry, budget.candidate, count)
        compute, memory = flops / limits["gflops"] / 1e6, nbytes / limits["read_gb_s"] / 1e6
        timing = timed[str(budget)]
        yield {
            "model": name,
            "dim": geometry.dim,
            "budget": str(budget),
            "candidates": count,
            "gflop": flops / 1e9,
            "index_gib": nbytes / GIB,
            **timing.to_json(),
            "limit_ms": max(compute, memory),
            "bound_by": "compute" if compute > memory else "memory",
            "scaled_to": CANDIDATES,
            "scaled_ms": timing.median_ms * CANDIDATES / count,
        }


def _scoring_cost(name: str, geometry: Geometry, budget: Budget, devices: Sequence[Device]) -> Record:
    flops, nbytes = scoring_flops(geometry, budget, CANDIDATES), index_bytes(geometry, budget.candidate, CANDIDATES)
    reported = REPORTED.get(str(budget)) if name == REPORTED_MODEL else None
    return {
        "model": name,
        "dim": geometry.dim,
        "budget": str(budget),
        "candidates": CANDIDATES,
        "gflop": flops / 1e9,
        "index_gib": nbytes / GIB,
        "limit_ms": {device.name: device.limit_ms("bf16", flops, nbytes) for device in devices},
        "reported": dict(zip(("gflop", "index_gib", "ms"), reported, strict=True)) if reported else None,
    }


def _measured_count(geometry: Geometry, budget: Budget) -> int:
    return max(1, min(CANDIDATES, MEASURED_BYTES // index_bytes(geometry, budget.candidate, 1)))


def _random_bf16(rng: np.random.Generator, values: int) -> np.ndarray:
    """Normal values, drawn for a thousandth and repeated: their bits do not change the speed."""
    drawn = rng.standard_normal(min(values, 1 << 17), np.float32).astype(ml_dtypes.bfloat16)
    return np.resize(drawn, values)


def _scorer(query: np.ndarray, index: np.ndarray) -> Callable[[], object]:
    return lambda: maxsim(query, index)


def _fastest(run: Callable[[], object], seconds: float) -> float:
    """The least time of a run within so many seconds: a limit is what the machine can do undisturbed."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or best == float("inf"):
        run()
        best = min(best, time.perf_counter() - start)
    return best
