"""Advice: which budget, cascade, placement and precision fit a device and its limits, with the arithmetic of the choice.

Times are the device's limits (all operations at peak rate, or all bytes once, whichever is slower) divided by the share of
them that one expects to reach. Nothing here is measured but the quality curve that is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .budget import Budget
from .cost import index_bytes, scoring_flops, weight_bytes_read
from .devices import Device
from .errors import UsageError
from .memory import GIB
from .plan import Plan
from .plan_device import USABLE
from .quality_curve import QualityCurve

REACHED = 0.5  # of a device's limits. FACTS from this project's kernels on a CPU: 0.5 to 0.9
# Gigabytes a second at which the survivors of a first stage reach the device when their vectors lie elsewhere: PCIe 4.0 x16
# to a card (31.5 raw), an NVMe disk of four PCIe 4.0 lanes to a board whose CPU and GPU share one memory (7.9 raw).
FETCH_GB_S = {"host memory": 25.0, "disk": 3.0}
INDEX_TYPES = ("bf16", "int8")
MODEL_TYPES = ("bf16", "fp16", "fp8", "int8")
FIRST_BUDGETS = (Budget(1, 1), Budget(2, 4), Budget(4, 8))
SURVIVORS = 1000


@dataclass(frozen=True)
class Needs:
    """What the service has to keep: a limit of None is no limit. ``reached`` is the share of the device's limits expected."""

    latency_ms: float | None = None
    memory_gib: float | None = None
    reached: float = REACHED
    survivors: int = SURVIVORS

    def __post_init__(self) -> None:
        for what, value in (("latency", self.latency_ms), ("memory", self.memory_gib)):
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"a {what} limit of {value} makes no sense; it has to be above 0")
        if not 0 < self.reached <= 1:
            raise UsageError(f"the share of the device's limits is above 0 and at most 1, not {self.reached}")
        if self.survivors < 1:
            raise UsageError(f"a first stage that keeps {self.survivors} candidates keeps none; at least 1 is needed")


@dataclass(frozen=True)
class Option:
    """One way to serve. ``first`` is the first stage's budget of a cascade, or None; bytes are on the device unless named.

    ``quality`` is the most that the curve promises, ``quality_least`` the least; see `QualityCurve.span`.
    """

    budget: Budget
    first: Budget | None
    survivors: int
    model_type: str
    index_type: str
    placement: str
    quality: float | None
    quality_least: float | None
    model_bytes: int
    index_bytes: int
    elsewhere_bytes: int
    encode_ms: float
    score_ms: float
    fetch_ms: float

    @property
    def device_bytes(self) -> int:
        return self.model_bytes + self.index_bytes

    @property
    def latency_ms(self) -> float:
        return self.encode_ms + self.score_ms + self.fetch_ms

    @property
    def cascade(self) -> str:
        return str(self.budget) if self.first is None else f"{self.first}:{self.survivors} {self.budget}"

    def to_json(self) -> dict[str, Any]:
        figures = {"device_bytes": self.device_bytes, "latency_ms": self.latency_ms, "cascade": self.cascade}
        return asdict(self) | figures | {"budget": str(self.budget), "first": self.first and str(self.first)}


@dataclass(frozen=True)
class Advice:
    """The best option within the limits, or None; and of all options the fastest and the smallest, which say what lacks."""

    device: Device
    needs: Needs
    memory_bytes: int
    chosen: Option | None
    runners_up: tuple[Option, ...]
    fastest: Option
    smallest: Option

    def to_json(self) -> dict[str, Any]:
        """The options; ``chosen`` is None where nothing fits, and the fastest and the smallest say what lacks."""
        found = {"chosen": self.chosen, "fastest": self.fastest, "smallest": self.smallest}
        return {
            "device": self.device.name,
            "memory_bytes": self.memory_bytes,
            **{name: option and option.to_json() for name, option in found.items()},
            "runners_up": [option.to_json() for option in self.runners_up],
        }


def advise(plan: Plan, device: Device, needs: Needs, curve: QualityCurve | None = None) -> Advice:
    """Choose among every budget, alone or behind a small first stage, in every precision that the device computes in.

    The highest quality within the limits wins; then the wider model type, first stage and index type, then the lower latency.

    Args:
        plan: the model, its budgets and the number of candidates.
        curve: a cascade counts as the most it can reach by it. Without a curve, more vectors count as better.

    Raises:
        UsageError: the curve lacks a budget of the plan.
    """
    missing = [str(cost.budget) for cost in plan.budgets if curve and str(cost.budget) not in curve.values]
    if missing:
        raise UsageError(f"the quality curve says nothing of budget {missing[0]}; measure it, or name other budgets")
    usable = int(USABLE * device.memory_gib * GIB)
    memory = usable if needs.memory_gib is None else int(min(usable, needs.memory_gib * GIB))
    options = sorted(_options(plan, device, needs, curve or QualityCurve({})), key=_preference)
    fitting = [option for option in options if _fits(option, memory, needs)]
    return Advice(
        device,
        needs,
        memory,
        fitting[0] if fitting else None,
        _distinct(fitting[1:], fitting[0])[:3] if fitting else (),
        min(options, key=lambda option: option.latency_ms),
        min(options, key=lambda option: option.device_bytes),
    )


def _options(plan: Plan, device: Device, needs: Needs, curve: QualityCurve) -> Iterator[Option]:
    budgets = [cost.budget for cost in plan.budgets]
    for model_type in (kind for kind in MODEL_TYPES if kind in device.types):
        for index_type in INDEX_TYPES:
            for budget in budgets:
                yield _one_stage(plan, device, needs, curve, model_type, index_type, budget)
                for first in (first for first in FIRST_BUDGETS if _precedes(first, budget)):
                    for placement in ("device", "disk" if device.integrated else "host memory"):
                        yield _two_stages(plan, device, needs, curve, model_type, index_type, budget, first, placement)


def _precedes(first: Budget, budget: Budget) -> bool:
    """Whether a stage may come before a larger one: the query has its vectors, and it reads less of the index."""
    return first.query <= budget.query and first.candidate < budget.candidate


def _one_stage(
    plan: Plan,
    device: Device,
    needs: Needs,
    curve: QualityCurve,
    model_type: str,
    index_type: str,
    budget: Budget,
) -> Option:
    least, most = curve.span(budget, None, plan.candidates, plan.candidates)
    return Option(
        budget=budget,
        first=None,
        survivors=plan.candidates,
        model_type=model_type,
        index_type=index_type,
        placement="device",
        quality=most,
        quality_least=least,
        model_bytes=plan.weight_bytes[model_type] + plan.activation_bytes,
        index_bytes=index_bytes(plan.geometry, budget.candidate, plan.candidates, index_type),
        elsewhere_bytes=0,
        encode_ms=_encode_ms(plan, device, model_type) / needs.reached,
        score_ms=_score_ms(plan, device, budget, plan.candidates, index_type) / needs.reached,
        fetch_ms=0.0,
    )


def _two_stages(
    plan: Plan,
    device: Device,
    needs: Needs,
    curve: QualityCurve,
    model_type: str,
    index_type: str,
    budget: Budget,
    first: Budget,
    placement: str,
) -> Option:
    """A first stage over everything on the device; the survivors' vectors, bf16, on the device too or fetched."""
    survivors = min(needs.survivors, plan.candidates)
    whole = index_bytes(plan.geometry, budget.candidate, plan.candidates)
    ahead = index_bytes(plan.geometry, first.candidate, plan.candidates, index_type)
    together = whole if index_type == "bf16" else whole + ahead  # a bf16 first stage reads prefixes of the same vectors
    fetched = index_bytes(plan.geometry, budget.candidate, survivors)
    score = _score_ms(plan, device, first, plan.candidates, index_type) + _score_ms(
        plan, device, budget, survivors, "bf16"
    )
    least, most = curve.span(budget, first, survivors, plan.candidates)
    return Option(
        budget=budget,
        first=first,
        survivors=survivors,
        model_type=model_type,
        index_type=index_type,
        placement=placement,
        quality=most,
        quality_least=least,
        model_bytes=plan.weight_bytes[model_type] + plan.activation_bytes,
        index_bytes=together if placement == "device" else ahead,
        elsewhere_bytes=0 if placement == "device" else whole,
        encode_ms=_encode_ms(plan, device, model_type) / needs.reached,
        score_ms=score / needs.reached,
        fetch_ms=0.0 if placement == "device" else fetched / FETCH_GB_S[placement] / 1e6,
    )


def _encode_ms(plan: Plan, device: Device, model_type: str) -> float:
    """One text query at the device's limit."""
    read = weight_bytes_read(plan.geometry, model_type, image=False)
    return device.limit_ms(model_type, plan.inputs[0].flops.total, read)


def _score_ms(plan: Plan, device: Device, budget: Budget, candidates: int, index_type: str) -> float:
    """One query against so many candidates at the device's limit; int8 vectors are widened, so operations stay 16-bit."""
    compute = "bf16" if "bf16" in device.types else "fp16"
    read = index_bytes(plan.geometry, budget.candidate, candidates, index_type)
    return device.limit_ms(compute, scoring_flops(plan.geometry, budget, candidates), read)


def _fits(option: Option, memory: int, needs: Needs) -> bool:
    return option.device_bytes <= memory and (needs.latency_ms is None or option.latency_ms <= needs.latency_ms)


def _preference(option: Option) -> tuple[float, ...]:
    """Smaller is better. Of cascades with one last stage the widest first one loses least, and none loses nothing."""
    first = float("inf") if option.first is None else option.first.query * option.first.candidate
    return (
        -(option.quality or 0.0),
        -option.budget.query * option.budget.candidate,
        MODEL_TYPES.index(option.model_type),
        -first,
        INDEX_TYPES.index(option.index_type),
        option.latency_ms,
    )


def _distinct(options: Sequence[Option], chosen: Option) -> tuple[Option, ...]:
    """The best option of each other final budget."""
    best = {option.budget: option for option in reversed(options) if option.budget != chosen.budget}
    return tuple(sorted(best.values(), key=_preference))
