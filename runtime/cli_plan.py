"""metaembed-plan: what a model needs and where it fits, before anything is downloaded, exported or bought."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from .budget import parse_budgets
from .command import Parser, run_command
from .devices import DEVICES, Device, find_device
from .errors import UsageError
from .plan import Plan, find_geometry, make_plan
from .plan_device import GIB, bound_times, build_bytes, fit_device

EPILOG = """examples:
  metaembed-plan --model 7b --candidates 1e8
  metaembed-plan --model 3b --budget 8,16 --device orin-64gb

Everything is arithmetic on the model's geometry; nothing is measured here. Limits on a device are the data sheet's
peak rates: real engines reach a fraction of them."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="metaembed-plan",
        description="Parameters, memory, operations and index size of a model per budget, and the devices that fit.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("--model", required=True, help="3b, 7b, 32b, a bundle, or a checkpoint folder (its weights are not needed)")
    add(
        "--candidates",
        default="100000",
        metavar="N",
        help="candidates in the index, 1e8 style allowed (default: 100000)",
    )
    add(
        "--budget",
        action="append",
        metavar="R_Q,R_C|all",
        help="vectors per query and candidate; repeatable (default: all)",
    )
    add(
        "--max-image-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="largest image, in visual tokens (default: 1024)",
    )
    add("--batch", type=int, default=1, metavar="B", help="largest images encoded at a time (default: 1)")
    add("--device", metavar="NAME", help="one device, with its time limits (default: what fits on every known one)")
    add("--json", action="store_true", help="print the whole plan as JSON")
    parser.add_common()
    return run_command(parser, run, argv)


def run(args: argparse.Namespace) -> None:
    devices = [find_device(args.device)] if args.device else list(DEVICES)
    geometry = find_geometry(args.model)
    plan = make_plan(
        args.model,
        geometry,
        parse_budgets(args.budget or ["all"], geometry.query_tokens, geometry.candidate_tokens),
        parse_count(args.candidates),
        max_image_tokens=args.max_image_tokens,
        batch=args.batch,
    )
    if args.json:
        print(
            json.dumps(plan.to_json() | {"devices": [asdict(fit_device(plan, device)) for device in devices]}, indent=2)
        )
        return
    print(describe(plan))
    print(describe_limits(plan, devices[0]) if args.device else describe_fits(plan, devices))


def parse_count(text: str) -> int:
    """A whole number of at least one, ``100000`` or ``1e5``."""
    try:
        value = float(text)
        if value != int(value) or not 1 <= value < 1e15:
            raise ValueError
    except (ValueError, OverflowError):
        raise UsageError(f"--candidates {text!r} is not a whole number such as 100000 or 1e8") from None
    return int(value)


def describe(plan: Plan) -> str:
    """The part of a plan that holds on any device."""
    geometry = plan.geometry
    return "\n\n".join(
        (
            f"{plan.model}: {plan.parameters:,} parameters, {geometry.dim} dims, "
            f"{geometry.query_tokens} query and {geometry.candidate_tokens} candidate Meta Tokens",
            table(("weights", "GiB"), ((kind, gib(size)) for kind, size in plan.weight_bytes.items()))
            + f"\nactivation, {plan.batch} x {plan.max_image_tokens} image tokens: about {gib(plan.activation_bytes)} GiB",
            table(
                ("encode one", "positions", "vision TFLOP", "language TFLOP", "total TFLOP"),
                (
                    (
                        cost.name,
                        str(cost.positions),
                        *map(tera, (cost.flops.vision, cost.flops.language, cost.flops.total)),
                    )
                    for cost in plan.inputs
                ),
            ),
            table(
                (f"{plan.candidates:,} candidates", "GFLOP per query", "index GiB, bf16"),
                ((str(cost.budget), f"{cost.scoring_flops / 1e9:.2f}", gib(cost.index_bytes)) for cost in plan.budgets),
            ),
            table(
                ("image", "pixels", "tokens", "window padding"),
                ((p.name, f"{p.width} x {p.height}", str(p.image_tokens), f"x{p.ratio:.2f}") for p in plan.padding),
            )
            + "\n",
        )
    )


def describe_fits(plan: Plan, devices: Iterable[Device]) -> str:
    """One row per device: the widest precision that fits, and the candidates that fit beside the model."""
    names = [str(cost.budget) for cost in plan.budgets]
    rows = []
    for device in devices:
        fit = fit_device(plan, device)
        what = fit.precision or f"lacks {gib(-fit.left_bytes)} GiB"
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
