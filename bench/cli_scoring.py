"""``metaembed-bench scoring``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from metaembed.runtime.errors import UsageError

PARTS = ("limits", "contest", "int8", "memory", "cascade", "opening", "scaling", "approximate", "kills")
SLOW = ("approximate", "kills")  # only when they are named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--only",
        nargs="+",
        choices=PARTS,
        default=[part for part in PARTS if part not in SLOW],
        help="which measurements (default: all but approximate and kills)",
    )
    add("--dim", type=int, action="append", metavar="D", help="repeatable (default: 3584 and 128)")
    add("--rounds", type=int, default=15, help="timed runs of each contestant (default: %(default)s)")
    add("--scale", type=float, default=1.0, help="share of the usual candidates; small for a trial (default: 1)")
    add("--bundle", type=Path, help="cascade: a bundle whose embeddings of --scenes pages set the statistics")
    add("--scenes", type=int, default=2000, metavar="N", help="pages of the demo's scenes (default: %(default)s)")
    add("--folder", type=Path, help="where indexes are made, for a while (default: the system's temporary folder)")
    add("-o", "--output", type=Path, metavar="FILE", help="add the records to this JSON lines file")


def work(args: argparse.Namespace) -> None:
    from .records import append_records, make_record

    if args.rounds < 1 or not 0 < args.scale <= 1:
        raise UsageError("--rounds is at least 1, and --scale above 0 and at most 1")
    if min(args.dim or [1]) < 1 or args.scenes < 1:
        raise UsageError("--dim and --scenes are at least 1")
    for kind, values, line in _measure(args):
        print(line, flush=True)
        if args.output:
            append_records(
                args.output, [make_record(kind, values, args.bundle if kind in ("cascade", "approximate") else None)]
            )


def _measure(args: argparse.Namespace) -> Iterator[tuple[str, dict, str]]:
    from . import scoring, scoring_index

    if "limits" in args.only or "contest" in args.only:
        yield from _contests(args)
    for dim in args.dim or (3584, 128):
        if "int8" in args.only:
            for budget in scoring.BUDGETS[:3]:
                r = scoring.measure_int8(budget, dim, rounds=args.rounds, scale=args.scale)
                yield (
                    "scoring_int8",
                    r,
                    (f"int8 D={dim} ({budget}): {r['times_bf16']:.2f}x bf16, worst error {r['worst_error']:.1e}"),
                )
        if "memory" in args.only:
            r = scoring.measure_memory(dim)
            yield "scoring_memory", r, f"memory of scoring, D={dim}: {r['mib_per_thread']:.1f} MiB a thread"
    if "memory" in args.only:
        r = scoring_index.measure_search_memory(max(1, int(3e6 * args.scale)), args.folder)
        yield (
            "search_memory",
            r,
            f"memory of a search beside an index of {r['items']:,} items: {r['mib_per_thread']:.1f} MiB a thread, "
            + ", ".join(f"{name} {mib:.1f} MiB" for name, mib in r["added_mib"].items()),
        )
    for kind, measure, items in (
        ("cascade", scoring_index.measure_cascades, 100_000),
        ("approximate", scoring_index.measure_approximate, 500_000),
    ):
        if kind not in args.only:
            continue
        for r in measure(args.bundle, args.scenes, int(items * args.scale), args.folder, args.rounds):
            built = f"; the graph was built in {r['build_s']:.0f} s" if "build_s" in r else ""
            yield (
                kind,
                r,
                (
                    f"cascade {r['cascade']} over {r['items']:,} {r['source']}: {r['median_ms']:.1f} ms, full scan "
                    f"{r['full_ms']:.1f} ms ({r['times_full']:.1f}x), recall@10 {r['recall_at_10']:.3f}{built}"
                ),
            )
    if "opening" in args.only:
        r = scoring_index.measure_opening(10 * args.scale, args.folder)
        yield (
            "index_opening",
            r,
            (
                f"opening {r['index_gib']:.2f} GiB: first (1,1) query {r['first_query_ms']:.0f} ms, read {r['read_mib']:.1f} MiB, "
                f"the (1,1) group is {r['group_mib']:.1f} MiB; the next query {r['next_query_ms']:.1f} ms"
            ),
        )
    if "scaling" in args.only:
        for r in scoring_index.measure_scaling(int(1e6 * args.scale), args.rounds):
            yield "scoring_scaling", r, f"D=128 ({r['budget']}) n={r['candidates']:>9,}: {r['median_ms']:9.2f} ms"
    if "kills" in args.only:
        r = scoring_index.measure_kills(50, 2000, args.folder)
        yield (
            "index_kills",
            r,
            (
                f"{r['kills']} kills while adding {r['items']} items: {r['lost']} lost, {r['damaged']} damaged, {r['twice']} twice"
            ),
        )


def _contests(args: argparse.Namespace) -> Iterator[tuple[str, dict, str]]:
    from metaembed.export.scorer import make_scorer

    from .scoring import BUDGETS, measure_contest
    from .scoring_limits import Limits, measure_limits

    limits = Limits.build()
    r = measure_limits(limits)
    yield (
        "scoring_limits",
        r,
        (
            f"{r['threads']} threads: {r['peak_gflops']:.0f} GFLOP/s of multiply-adds, {r['sgemm_gflops']:.0f} "
            f"of sgemm, {r['read_gb_s']:.1f} GB/s read"
        ),
    )
    if "contest" not in args.only:
        return
    for dim in args.dim or (3584, 128):
        graph = make_scorer(dim, None, "fp32").SerializeToString()
        for budget, queries in [*((budget, 1) for budget in BUDGETS), (BUDGETS[-1], 32)]:
            r = measure_contest(budget, dim, limits, graph, queries=queries, rounds=args.rounds, scale=args.scale)
            yield (
                "scoring_contest",
                r,
                (
                    f"D={dim} ({budget}) x {queries}: {r['timings']['metaembed']['median_ms']:.2f} ms, "
                    f"{r['share_of_limit']:.0%} of the limit ({r['bound_by']}), {r['share_of_sgemm']:.0%} of sgemm, "
                    f"{r['times_the_best_other']:.2f}x {r['best_other']}, "
                    f"{r['times_the_best_exact']:.2f}x {r['best_exact']} (as exact), "
                    f"worst error {r['worst_error']['metaembed']:.1e}"
                    + "".join(f"; {name} is not installed" for name in r["not_installed"])
                ),
            )
