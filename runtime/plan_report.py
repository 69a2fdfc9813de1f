"""A plan as text: what metaembed-plan and metaembed-export --dry-run print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .devices import Device
from .memory import GIB
from .plan import Plan
from .plan_device import bound_times, build_bytes, fit_device


def describe(plan: Plan) -> str:
    """The part of a plan that holds on any device."""
    geometry = plan.geometry
    title = (
        f"{plan.model}: {plan.parameters:,} parameters, {geometry.dim} dims, "
        f"{geometry.query_tokens} query and {geometry.candidate_tokens} candidate Meta Tokens"
    )
    return "\n\n".join((title, _weights(plan), _inputs(plan), _budgets(plan), _padding(plan))) + "\n"


def _weights(plan: Plan) -> str:
    weights = table(("weights", "GiB"), ((kind, gib(size)) for kind, size in plan.weight_bytes.items()))
    images = f"{plan.batch} x {plan.max_image_tokens} image tokens"
    return f"{weights}\nactivation, {images}: about {gib(plan.activation_bytes)} GiB"


def _inputs(plan: Plan) -> str:
    rows = (
        (cost.name, str(cost.positions), tera(cost.flops.vision), tera(cost.flops.language), tera(cost.flops.total))
        for cost in plan.inputs
    )
    return table(("encode one", "positions", "vision TFLOP", "language TFLOP", "total TFLOP"), rows)


def _budgets(plan: Plan) -> str:
    rows = ((str(cost.budget), f"{cost.scoring_flops / 1e9:.2f}", gib(cost.index_bytes)) for cost in plan.budgets)
    return table((f"{plan.candidates:,} candidates", "GFLOP per query", "index GiB, bf16"), rows)


def _padding(plan: Plan) -> str:
    rows = ((p.name, f"{p.width} x {p.height}", str(p.image_tokens), f"x{p.ratio:.2f}") for p in plan.padding)
    return table(("image", "pixels", "tokens", "window padding"), rows)


def describe_fits(
    plan: Plan, devices: Iterable[Device], precision: str | None = None, quantization: str | None = None
) -> str:
    """One row per device: the widest precision that fits, or whether the given one does, and the candidates beside it."""
    names = [str(cost.budget) for cost in plan.budgets]
    rows = []
    for device in devices:
        missing = next((kind for kind in (precision, quantization) if kind and kind not in device.types), None)
        fit = fit_device(plan, device, precision, quantization)
        what = f"no {missing}" if missing else fit.precision or f"lacks {gib(-fit.left_bytes)} GiB"
        rows.append((fit.device, str(fit.memory_gib), what, *(count(fit.candidates.get(name)) for name in names)))
    title = "candidates that fit beside the model, bf16 vectors, per budget:"
    return f"{title}\n{table(('device', 'GiB', 'fits as', *names), rows)}"


def describe_limits(plan: Plan, device: Device) -> str:
    """One device: what fits, what building there takes, and the time below which nothing can go."""
    fit = fit_device(plan, device)
    if fit.precision is None:
        return f"{device.title}: does not fit, {gib(-fit.left_bytes)} GiB too little memory"
    low, high = (gib(size) for size in build_bytes(plan, fit.precision))
    bounds = bound_times(plan, device, fit)
    rows = ((bound.what, f"{bound.milliseconds:.2f}", bound.bound_by) for bound in bounds)
    return (
        f"{device.title}: {device.memory_gib} GiB, {device.bandwidth_gb_s:g} GB/s, fits as {fit.precision}; "
        f"{gib(fit.left_bytes)} GiB left for an index\n"
        f"building its engines there takes {low} to {high} GiB\n\n"
        + table(("at the device's limit", "ms", "bound by"), rows)
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns, the first aligned left and the others right."""
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    form = "  ".join([f"{{:<{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])])
    return "\n".join(form.format(*line) for line in lines)


def gib(size: int) -> str:
    return f"{size / GIB:,.2f}"


def tera(operations: int) -> str:
    return f"{operations / 1e12:.3f}"


def count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"
