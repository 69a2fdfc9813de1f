"""metaembed-plan: what a model needs and where it fits, before anything is downloaded, exported or bought."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .advise import REACHED, SURVIVORS, Needs, advise
from .advise_report import describe_advice
from .budget import parse_budgets
from .command import EXIT_DONE, EXIT_FAILED, Parser, run_command
from .devices import DEVICES, Device, find_device
from .errors import UsageError
from .plan import Plan, find_geometry, make_plan
from .plan_device import fit_device
from .plan_report import describe, describe_fits, describe_limits
from .quality_curve import read_curve

EPILOG = """examples:
  metaembed-plan --model 7b --candidates 1e8
  metaembed-plan --model 3b --budget 8,16 --device orin-64gb
  metaembed-plan --model 3b --candidates 1e6 --device orin-64gb --latency-ms 200 --quality-curve quality.jsonl

Everything is arithmetic on the model's geometry; nothing is measured here. Limits on a device are the data sheet's
peak rates: real engines reach a fraction of them. Where nothing fits, it says what lacks and exits with 1."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="metaembed-plan",
        description="Parameters, memory, operations and index size of a model per budget, and the devices that fit.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="demo, 3b, 7b, 32b, a bundle, or a checkpoint folder (its weights are not needed)",
    )
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
    add("--latency-ms", type=float, metavar="MS", help="advise on --device: the longest that one text query may take")
    add("--memory-gib", type=float, metavar="GIB", help="advise on --device: the most of its memory to use")
    add(
        "--quality-curve",
        type=Path,
        metavar="FILE",
        help="advise on --device: nDCG@5 per budget, as metaembed-bench quality -o writes it",
    )
    add("--reached", type=float, metavar="SHARE",
        help=f"advise: share of the device's limits that you expect to reach (default: {REACHED})")  # fmt: skip
    add("--survivors", type=int, metavar="K", help=f"advise: what a first stage keeps (default: {SURVIVORS})")
    add("--json", action="store_true", help="print the whole plan as JSON")
    parser.add_common()
    return run_command(parser, run, argv)


def run(args: argparse.Namespace) -> int:
    wants_advice = args.latency_ms is not None or args.memory_gib is not None or args.quality_curve is not None
    if wants_advice and not args.device:
        raise UsageError("advice needs the device it is for: add --device NAME, for example --device orin-64gb")
    if not wants_advice and (args.reached is not None or args.survivors is not None):
        raise UsageError(
            "--reached and --survivors belong to advice: add --latency-ms, --memory-gib or --quality-curve, and --device"
        )
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
    if wants_advice:
        return give_advice(plan, devices[0], args)
    fits = [fit_device(plan, device) for device in devices]
    if args.json:
        print(json.dumps(plan.to_json() | {"devices": [asdict(fit) for fit in fits]}, indent=2))
    else:
        print(describe(plan))
        print(describe_limits(plan, devices[0]) if args.device else describe_fits(plan, devices))
    return EXIT_DONE if any(fit.precision for fit in fits) else EXIT_FAILED


def give_advice(plan: Plan, device: Device, args: argparse.Namespace) -> int:
    curve = read_curve(args.quality_curve) if args.quality_curve else None
    needs = Needs(
        args.latency_ms,
        args.memory_gib,
        REACHED if args.reached is None else args.reached,
        SURVIVORS if args.survivors is None else args.survivors,
    )
    advice = advise(plan, device, needs, curve)
    if args.json:
        print(json.dumps(advice.to_json(), indent=2))
    else:
        print(describe_advice(plan, advice, curve), end="")
    return EXIT_DONE if advice.chosen else EXIT_FAILED


def parse_count(text: str) -> int:
    """A whole number of at least one, ``100000`` or ``1e5``."""
    try:
        value = float(text)
        if value != int(value) or not 1 <= value < 1e15:
            raise ValueError
    except (ValueError, OverflowError):
        raise UsageError(
            f"--candidates {text!r} is not a whole number above 0 and below 1e15, such as 100000 or 1e8"
        ) from None
    return int(value)
