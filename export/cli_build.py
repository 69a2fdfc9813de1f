"""metaembed-build: a bundle's TensorRT engines for one or more targets."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from metaembed.runtime.budget import Budget, parse_budgets
from metaembed.runtime.command import EXIT_DONE, Parser, natural, run_command
from metaembed.runtime.errors import UsageError
from metaembed.runtime.manifest import ENGINES, Bundle
from metaembed.runtime.memory import GIB

from .profiles import LAYOUTS
from .route import ROUTES

if TYPE_CHECKING:
    from .build import BuildResult, CheckedTarget

EPILOG = """examples:
  metaembed-build out --target a100               plans for compute capability 8.0, built here, without a GPU
  metaembed-build out --target orin               a device kit: Orin's engines can only be built on an Orin
  metaembed-build .                               on the device itself
  metaembed-build out --target l4 --dry-run       say what would be built, and what it takes
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="metaembed-build",
        description="Build a bundle's TensorRT engines, profiles cut to its budgets. On the target itself TensorRT "
        "builds them; elsewhere TensorRT-RTX builds them ahead of time where it reaches the target, without a GPU; "
        "otherwise a device kit is written that builds them there with one command.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("bundle", type=Path, help="a folder that metaembed-export wrote")
    add("--target", action="append", metavar="DEVICE", help="a100, orin, thor, l4, h100, rtx4090 ...; repeatable; "
        "left out: this machine's GPU")  # fmt: skip
    add("--budget", action="append", metavar="R_Q,R_C|all", help="cut profiles to these (default: all of the bundle)")
    add("--flavour", choices=ROUTES, help="insist on TensorRT, on TensorRT-RTX, or on a device kit")
    add("--layout", choices=LAYOUTS, default=LAYOUTS[0], help="shared: one language engine, weights once (default); "
        "separate: one per side and size")  # fmt: skip
    add("--side", choices=("query", "candidate"), help="build for one side only")
    add("--profile-per-budget", action="store_true", help="tune a profile for every size; takes longer to build")
    add("--max-batch", type=int, metavar="N", help="most items at once (default: 8 queries, 4 candidates)")
    add("--swap", type=natural, default=0, metavar="GIB", help="swap that the device of a kit will have while it builds; "
        "this machine's own is measured")  # fmt: skip
    add("-o", "--output", type=Path, help="the device kit's folder (default: BUNDLE-kit-TARGET)")
    add("-f", "--force", action="store_true", help="replace engines, or a kit, that exist")
    add("--dry-run", action="store_true", help="check everything and print the plan; build nothing")
    parser.add_common()
    return run_command(parser, run, argv)


def run(args: argparse.Namespace) -> int:
    from .build import build_target, check_build
    from .build_options import BuildOptions
    from .route import find_targets

    bundle = Bundle.open(args.bundle, ignore=ENGINES)  # damaged engines are what -f mends
    options = BuildOptions(
        budgets=_chosen_budgets(args.budget, bundle),
        layout=args.layout,
        side=args.side,
        profile_per_budget=args.profile_per_budget,
        max_batch=args.max_batch,
        flavour=args.flavour,
    )
    targets = find_targets(args.target)
    if args.output and len(targets) > 1:
        raise UsageError("-o names one kit, and several targets were given")
    checked = [
        check_build(bundle, device, options, output=args.output, force=args.force, swap=args.swap * GIB)
        for device in targets
    ]
    if args.swap and not any(target.kit for target in checked):
        raise UsageError("--swap is for a device kit; this machine's own swap is measured")
    for target in checked:
        if args.dry_run or not args.quiet:
            print(target.preflight.table())
        if args.dry_run:
            name = target.preflight.device.name
            print(f"{args.bundle}: can be built for {name} ({target.route}); nothing was built (--dry-run)")
            continue
        with ProgressBars(args.quiet) as bars:
            result = build_target(bundle, target, force=args.force, on_event=bars.hear)
        bundle = Bundle.open(args.bundle, verify=False, ignore=ENGINES)  # bundle.json has changed
        print(_result_line(args.bundle, target, result))
    return EXIT_DONE


def _chosen_budgets(texts: list[str] | None, bundle: Bundle) -> tuple[Budget, ...]:
    """The bundle's budgets, or those asked for; each must be among the bundle's."""
    own = bundle.manifest.budgets
    if not texts or any(text.strip().lower() == "all" for text in texts):
        return own
    chosen = parse_budgets(texts, bundle.manifest.largest.query, bundle.manifest.largest.candidate)
    for budget in chosen:
        if budget not in own:
            raise UsageError(f"budget {budget} is not in this bundle; it has {'; '.join(map(str, own))}")
    return chosen


def _result_line(folder: Path, target: CheckedTarget, result: BuildResult) -> str:
    device = target.preflight.device
    if result.record is None:
        return f"{result.kit}: device kit for {device.title}; copy it there and run, inside it: {result.command}"
    engines = ", ".join(
        f"{engine['name']}.plan {engine['bytes'] / 2**20:.1f} MiB" for engine in result.record["engines"]
    )
    where = f"{folder}/engines/{device.name}: {engines}"
    if target.route == "tensorrt":
        return f"{where}; now run metaembed-check {folder}"
    return (
        f"{where}; built ahead of time without a GPU: parsing, types, shapes and size are proven, "
        f"speed and accuracy are not, until metaembed-check runs on {device.title}"
    )


class ProgressBars:
    """One bar per engine, from the builder's outermost phase; silent where stderr is no terminal."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._phase: tuple[str, str] | None = None

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def hear(self, engine: str, event: dict[str, Any]) -> None:
        """Take one event of the builder's progress monitor."""
        if event["event"] == "phase" and event["parent"] is None:
            self._close()
            self._phase = (engine, event["name"])
            what = f"{engine}: {event['name'].lower()}"
            self._bar = tqdm(desc=what, total=event["steps"], disable=True if self._quiet else None, leave=False)
        elif event["event"] == "step" and self._phase == (engine, event["name"]):
            self._bar.update(event["done"] - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
