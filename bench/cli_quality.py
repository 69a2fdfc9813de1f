"""``metaembed-bench quality``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from metaembed.runtime.command import natural
from metaembed.runtime.errors import UsageError

if TYPE_CHECKING:
    from metaembed.runtime.budget import Budget
    from metaembed.runtime.cascade import Stage
    from metaembed.runtime.encoder import Encoder
    from metaembed.runtime.manifest import Bundle

    from .dataset import Dataset

log = logging.getLogger(__name__)


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
    parser.add_argument("--seed", type=natural, default=0, help="of the demo's test set (default: %(default)s)")
    parser.add_argument(
        "--against", metavar="BUNDLE|MODEL", help="print its nDCG@5 beside: the float bundle's, or in float32 in PyTorch a "
        "checkpoint's, named as for metaembed-export (default for a quantised bundle of the demo: demo)"
    )  # fmt: skip
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
    with ExitStack() as stack:
        encoder = stack.enter_context(Encoder.open(args.bundle, threads=args.threads))
        cascades = parse_cascades(args, encoder)
        reference = _open_reference(args, encoder.bundle)
        if reference is not None:
            against, label = stack.enter_context(reference[0]), reference[1]
            parse_cascades(args, against, encoder.budgets)  # both have to serve them
        dataset = stack.enter_context(source or demo_dataset(args.count, tuple(args.queries), args.seed))
        measured = measure_quality(dataset, *embed_dataset(encoder, dataset), cascades)
        if reference is not None:
            beside = measure_quality(dataset, *embed_dataset(against, dataset), cascades)
            for values, other in zip(measured, beside, strict=True):
                values["ndcg_at_5_against"] = other["ndcg_at_5"]
                values["against"] = label
    if args.output:
        append_records(args.output, [make_record("quality", values, args.bundle) for values in measured])
    print_quality(measured, dataset)


def _open_reference(args: argparse.Namespace, bundle: Bundle) -> tuple[Encoder, str] | None:
    """What to compare with, and its name for people."""
    model = args.against
    if model is None and not bundle.manifest.quantization:
        return None

    from metaembed.export.checkpoint import Checkpoint
    from metaembed.export.models import DEMO, resolve_model
    from metaembed.runtime.encoder import Encoder
    from metaembed.runtime.manifest import MANIFEST

    from .records import identify
    from .torch_session import open_in_torch

    if model is None and bundle.manifest.model == DEMO:
        model = DEMO
    if model is None:
        log.warning("to see the float model's nDCG@5 beside, name its bundle or its checkpoint with --against")
        return None
    if (Path(model) / MANIFEST).is_file():
        return Encoder.open(Path(model), threads=args.threads), str(identify(Path(model))["artefact"])
    checkpoint = Checkpoint.open(resolve_model(model).require_base())
    if checkpoint.geometry != bundle.manifest.geometry:
        raise UsageError(f"{model} has another shape than the model of {args.bundle}")
    return open_in_torch(bundle, checkpoint, "fp32"), f"{model}, fp32 in PyTorch"


def print_quality(measured: list[dict], dataset: Dataset) -> None:
    print(f"{dataset.name}: {len(dataset.queries)} queries, {len(dataset.candidates)} candidates", end="")
    print(f"; {dataset.unjudged} queries without a relevant candidate left out" if dataset.unjudged else "")
    other = measured[0].get("against")
    print(f"{'budget or cascade':<24}  nDCG@5  95 % interval   R@1     R@10    MRR{f'     {other}' if other else ''}")
    for values in measured:
        beside = ""
        if other:
            beside = f"  {values['ndcg_at_5_against']:.4f} ({values['ndcg_at_5'] - values['ndcg_at_5_against']:+.4f})"
        print(
            f"{values['cascade'] or values['budget']:<24}  {values['ndcg_at_5']:.4f}  {values['ndcg_low']:.4f}-"
            f"{values['ndcg_high']:.4f}  {values['recall_at_1']:.4f}  {values['recall_at_10']:.4f}  {values['mrr']:.4f}{beside}"
        )


def parse_cascades(args: argparse.Namespace, encoder: Encoder, budgets: Sequence[Budget] = ()) -> list[list[Stage]]:
    """Each budget as a cascade of one stage, then the cascades asked for, all within what the bundle serves.

    ``budgets`` stand for those that are not named; by default all of the bundle.
    """
    from metaembed.runtime.budget import parse_budgets
    from metaembed.runtime.cascade import Stage, check_order

    largest = encoder.bundle.manifest.largest
    budgets = (
        parse_budgets(args.budget, largest.query, largest.candidate) if args.budget else budgets or encoder.budgets
    )
    for budget in budgets:
        budget.check_within(largest.query, largest.candidate)
    cascades = [[Stage.parse(text) for text in words] for words in args.cascade]
    for stages in cascades:
        if any(stage.keep is None for stage in stages[:-1]) or stages[-1].keep is not None:
            raise UsageError("every stage of a cascade but the last says how many it keeps: 1,1:1000 4,8:100 16,64")
        check_order(stages)
        for stage in stages:
            stage.budget.check_within(largest.query, largest.candidate)
    return [[Stage(budget)] for budget in budgets] + cascades
