"""``metaembed-bench efficiency``."""

from __future__ import annotations

import argparse
from pathlib import Path

from metaembed.runtime.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", action="append", metavar="MODEL", help="repeatable (default: demo 3b 7b 32b)")
    parser.add_argument("--rounds", type=int, default=20, help="timed runs of each budget (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="add the records to this JSON lines file")


def work(args: argparse.Namespace) -> None:
    from metaembed.runtime.command import progress

    from .efficiency import encoder_costs, measure_machine, measure_scoring, scoring_costs
    from .records import append_records, make_record

    if args.rounds < 1:
        raise UsageError(f"{args.rounds} rounds time nothing; at least 1 is needed")
    geometries = {name: _geometry(name) for name in args.model or ("demo", "3b", "7b", "32b")}
    limits = measure_machine()
    records = [make_record("machine_limits", limits)]
    print(f"this machine: {limits['gflops']:.0f} GFLOP/s (sgemm), {limits['read_gb_s']:.1f} GB/s read")
    for name, geometry in progress(geometries.items(), "scoring", quiet=args.quiet):
        records += [make_record("scoring_cost", cost) for cost in scoring_costs(name, geometry)]
        records += [make_record("encoder_cost", cost) for cost in encoder_costs(name, geometry)]
        for measured in measure_scoring(name, geometry, limits, rounds=args.rounds):
            records.append(make_record("scoring", measured))
            print(
                f"{name:>5}  {measured['budget']:>5}  {measured['candidates']:>7,} candidates  {measured['median_ms']:>8.2f} ms"
                f"  p95 {measured['p95_ms']:>8.2f}  limit {measured['limit_ms']:>7.2f} ({measured['bound_by']})"
            )
    if args.output:
        append_records(args.output, records)


def _geometry(name: str):
    from metaembed.export.models import DEMO_FOLDER
    from metaembed.runtime.plan import find_geometry

    return find_geometry(str(DEMO_FOLDER) if name == "demo" else name)
