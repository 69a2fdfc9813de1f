"""``metaembed-bench engine-layouts``."""

from __future__ import annotations

import argparse
from pathlib import Path

LAYOUTS = ("shared", "profile-per-budget", "separate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="a folder that metaembed-export wrote")
    parser.add_argument("--target", action="append", metavar="DEVICE",
        help="a device that TensorRT-RTX builds for; repeatable (default: a100)")  # fmt: skip
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="repeatable (default: all)")
    parser.add_argument("--separate", action="append", metavar="R_Q,R_C", help="build the separate layout's engines for "
        "these budgets only, and compute the total from them; repeatable")  # fmt: skip
    parser.add_argument("--work", type=Path, metavar="DIR", help="where plans are written, and removed")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="add the records to this JSON lines file")


def work(args: argparse.Namespace) -> None:
    from metaembed.runtime.budget import parse_budgets
    from metaembed.runtime.devices import find_device
    from metaembed.runtime.manifest import Bundle

    from .engine_layouts import measure_layouts
    from .records import append_records, make_record

    bundle = Bundle.open(args.bundle, verify=False)
    largest = bundle.manifest.largest
    separate = parse_budgets(args.separate, largest.query, largest.candidate) if args.separate else ()
    for name in args.target or ("a100",):
        for kind, values in measure_layouts(
            bundle, find_device(name), args.layout or LAYOUTS, separate, work=args.work
        ):
            label = values["name"] if kind == "engine_build" else "in all"
            print(
                f"{values['target']} {values['precision']} {values['layout']}, {label}: {values['bytes']:,} bytes "
                f"(estimated {values['estimated_bytes']:,}), {values['seconds']} s ({values['cpu_seconds']} s of processor), "
                f"peak {values['peak_memory_bytes'] or 0:,} (estimated {values['estimated_peak_bytes']:,})",
                flush=True,
            )
            if args.output:
                append_records(args.output, [make_record(kind, values, artefact=args.bundle)])
