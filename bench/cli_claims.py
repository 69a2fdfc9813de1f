"""``metaembed-bench claims``."""

from __future__ import annotations

import argparse
from pathlib import Path

from metaembed.runtime.command import natural
from metaembed.runtime.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", action="append", required=True, metavar="ROLE=DIR",
        help="a trained demo model: mmr=DIR (needed), nommr=DIR, single=DIR, words=DIR; repeat a role for other seeds",
    )  # fmt: skip
    parser.add_argument(
        "--count", type=int, default=2000, metavar="N", help="pages of the test set (default: %(default)s)"
    )
    parser.add_argument("--queries", type=int, nargs=3, default=(500, 200, 200), metavar=("TEXT", "IMAGE", "BOTH"),
                        help="default: 500 200 200")  # fmt: skip
    parser.add_argument("--seed", type=natural, default=0, help="of the test set (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="torch threads (default: all cores)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="add the records to this JSON lines file")


def work(args: argparse.Namespace) -> None:
    from .claims import measure_claims
    from .records import append_records, make_record
    from .scenes_queries import make_split
    from .train import prepare_process

    models = parse_models(args.model)
    if args.count < 1 or min(args.queries) < 0 or not sum(args.queries):
        raise UsageError("--count and the sum of --queries have to be at least 1")
    prepare_process(args.threads)
    split = make_split("test", args.seed, scenes=args.count, queries=args.queries)
    points, verdicts = measure_claims(split, models)
    asked = {"test_seed": args.seed, "candidates": args.count, "queries": len(split.queries)}
    weights = next(iter(sorted(models["mmr"][0].rglob("*.safetensors"))), None)
    if args.output:
        records = [make_record("claim_point", asked | point, weights) for point in points]
        append_records(
            args.output, records + [make_record("verdict", asked | verdict, weights) for verdict in verdicts]
        )
    for point in points:
        print(
            f"{point['system']:<14} {point['budget']:>10}  nDCG@5 {point['ndcg_at_5']:.4f} "
            f"({point['ndcg_low']:.4f}-{point['ndcg_high']:.4f})  {point['index_kib_per_item']:>8.2f} KiB an item"
        )
    for verdict in verdicts:
        print(f"{verdict['verdict']:<13} {verdict['claim']} ({verdict['difference']:+.4f}, {verdict['low']:+.4f} to "
              f"{verdict['high']:+.4f})")  # fmt: skip


def parse_models(words: list[str]) -> dict[str, list[Path]]:
    """``ROLE=DIR`` by role."""
    from .claims import ROLES

    found: dict[str, list[Path]] = {}
    for word in words:
        role, equals, folder = word.partition("=")
        if role not in ROLES or not equals or not folder:
            raise UsageError(f"--model {word!r} is not ROLE=DIR with one of the roles {', '.join(ROLES)}")
        if not Path(folder).is_dir():
            raise UsageError(f"{folder} is no folder")
        found.setdefault(role, []).append(Path(folder))
    if "mmr" not in found:
        raise UsageError("the claims are about MMR: add --model mmr=DIR")
    return found
