"""``metaembed-bench quality``."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

from metaembed.runtime.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="a folder that metaembed-export wrote")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="a data set (docs/bench.md; default: the demo's test set)"
    )
    parser.add_argument("--split", default="test", help="which qrels/SPLIT.tsv (default: %(default)s)")
    parser.add_argument(
        "--budget", action="append", metavar="R_Q,R_C|all", help="repeatable (default: all that were exported)"
    )
    parser.add_argument(
        "--cascade", nargs="+", action="append", metavar="STAGE", default=[],
        help="stages R_Q,R_C:KEEP, the last without KEEP, for example 1,1:100 16,64; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--count", type=int, default=2000, metavar="N", help="pages of the demo's test set (default: 2000)"
    )
    parser.add_argument("--queries", type=int, nargs=3, default=(500, 200, 200), metavar=("TEXT", "IMAGE", "BOTH"),
                        help="queries of the demo's test set (default: 500 200 200)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the demo's test set (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="default: one a core")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="add the records to this JSON lines file")


def work(args: argparse.Namespace) -> None:
    from metaembed.runtime.encoder import Encoder

    from .dataset import demo_dataset, load_dataset
    from .quality import embed_dataset, measure_quality
    from .records import append_records, make_record

    if args.count < 1 or min(args.queries) < 0 or not sum(args.queries):
        raise UsageError("--count and the sum of --queries have to be at least 1")
    source = nullcontext(load_dataset(args.data, args.split)) if args.data else None
    with Encoder.open(args.bundle, threads=args.threads) as encoder:
        cascades = parse_cascades(args, encoder)
        with source or demo_dataset(args.count, tuple(args.queries), args.seed) as dataset:
            queries, candidates = embed_dataset(encoder, dataset)
    measured = measure_quality(dataset, queries, candidates, cascades)
    if args.output:
        append_records(args.output, [make_record("quality", values, args.bundle) for values in measured])
    print(f"{dataset.name}: {len(dataset.queries)} queries, {len(dataset.candidates)} candidates", end="")
    print(f"; {dataset.unjudged} queries without a relevant candidate left out" if dataset.unjudged else "")
    print(f"{'budget or cascade':<24}  nDCG@5  95 % interval   R@1     R@10    MRR")
    for values in measured:
        print(
            f"{values['cascade'] or values['budget']:<24}  {values['ndcg_at_5']:.4f}  {values['ndcg_low']:.4f}-"
            f"{values['ndcg_high']:.4f}  {values['recall_at_1']:.4f}  {values['recall_at_10']:.4f}  {values['mrr']:.4f}"
        )


def parse_cascades(args: argparse.Namespace, encoder) -> list[list]:
    """Each budget as a cascade of one stage, then the cascades asked for, all within what the bundle serves."""
    from metaembed.runtime.budget import parse_budgets
    from metaembed.runtime.cascade import Stage

    largest = encoder.bundle.manifest.largest
    budgets = parse_budgets(args.budget, largest.query, largest.candidate) if args.budget else encoder.budgets
    cascades = [[Stage.parse(text) for text in words] for words in args.cascade]
    for stages in cascades:
        if any(stage.keep is None for stage in stages[:-1]) or stages[-1].keep is not None:
            raise UsageError("every stage of a cascade but the last says how many it keeps: 1,1:1000 4,8:100 16,64")
        for stage in stages:
            stage.budget.check_within(largest.query, largest.candidate)
    return [[Stage(budget)] for budget in budgets] + cascades
