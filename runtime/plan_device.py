"""A plan on a device: what fits into its memory, and the time below which nothing on it can go."""

from __future__ import annotations

from dataclasses import dataclass

from .cost import BYTES, index_bytes, weight_bytes, weight_bytes_read
from .devices import Device
from .memory import GIB
from .plan import Plan

USABLE = 0.9  # of a device's memory: the rest is the driver's, the runtime's and, on a Jetson, the system's
WIDEST_FIRST = ("bf16", "fp16", "fp8", "int8")
# Peak memory of an engine builder over the weights: 1.6 for 3B in TensorRT-RTX, 3 to 4 as users of Jetsons report.
BUILD_FACTORS = (1.6, 4.0)


@dataclass(frozen=True)
class DeviceFit:
    """The widest precision, or the one asked for, whose weights and activation fit; what is left, and how many candidates
    fill that.

    Without such a precision it is None, and ``left_bytes``, below zero but for want of hardware, is what the smallest lacks.
    """

    device: str
    memory_gib: int
    precision: str | None
    left_bytes: int
    candidates: dict[str, int]


@dataclass(frozen=True)
class LowerBound:
    """No implementation can take less: the slower of all operations at peak rate and all bytes read once."""

    what: str
    milliseconds: float
    bound_by: str


def fit_device(plan: Plan, device: Device, precision: str | None = None, quantization: str | None = None) -> DeviceFit:
    """Which precision a device can hold, and how many candidates' bf16 vectors fit beside the model, per budget.

    With ``precision`` only that one is tried, its Linears quantised where ``quantization`` says so.
    """
    usable = int(USABLE * device.memory_gib * GIB) - plan.activation_bytes
    able = True
    if precision is None:
        left = {kind: usable - plan.weight_bytes[kind] for kind in WIDEST_FIRST if kind in device.types}
    else:
        able = {precision, quantization or precision} <= device.types
        wider = (max(2, BYTES[precision]) - 2) * plan.activation_bytes // 2  # the plan's is in 16 bits
        name = f"{quantization} over {precision}" if quantization else precision
        left = {name: usable - wider - weight_bytes(plan.geometry, precision, quantization)}
    best = next((kind for kind, rest in left.items() if able and rest >= 0), None)
    if best is None:
        return DeviceFit(device.name, device.memory_gib, None, max(left.values()), {})
    one = {str(cost.budget): index_bytes(plan.geometry, cost.budget.candidate, 1) for cost in plan.budgets}
    return DeviceFit(
        device.name, device.memory_gib, best, left[best], {budget: left[best] // size for budget, size in one.items()}
    )


def bound_times(plan: Plan, device: Device, fit: DeviceFit) -> tuple[LowerBound, ...]:
    """The least time to encode each input, one at a time, and to score one query against a 16-bit index on the device."""
    if fit.precision is None:
        return ()
    times = [
        _bound(
            f"encode {cost.name}",
            cost.flops.total / device.peak_tflops[fit.precision],
            weight_bytes_read(plan.geometry, fit.precision, image=cost.image_tokens > 0) / device.bandwidth_gb_s,
        )
        for cost in plan.inputs
    ]
    peak = device.peak_tflops["bf16" if "bf16" in device.types else "fp16"]
    for cost in plan.budgets:
        name = f"score at {cost.budget}{' (index does not fit)' if cost.index_bytes > fit.left_bytes else ''}"
        times.append(_bound(name, cost.scoring_flops / peak, cost.index_bytes / device.bandwidth_gb_s))
    return tuple(times)


def build_bytes(plan: Plan, precision: str) -> tuple[int, int]:
    """From and to: the memory that building the engines on the device itself may take."""
    low, high = (int(factor * plan.weight_bytes[precision]) for factor in BUILD_FACTORS)
    return low, high


def _bound(what: str, flops_over_tera: float, bytes_over_giga: float) -> LowerBound:
    compute, memory = flops_over_tera / 1e12, bytes_over_giga / 1e9  # seconds
    return LowerBound(what, 1e3 * max(compute, memory), "compute" if compute > memory else "memory")
