"""``metaembed-bench demo-quality``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from metaembed.runtime.command import natural
from metaembed.runtime.errors import BundleError

SHIPPED = Path(__file__).parents[1] / "export" / "demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, default=SHIPPED, metavar="DIR", help="checkpoint folder (default: the demo's)"
    )
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="default: %(default)s")
    parser.add_argument("--seed", type=natural, required=True, help="seed of the split")
    parser.add_argument("--count", type=int, default=2000, metavar="N", help="candidate pages (default: %(default)s)")
    parser.add_argument("--name", default="MMR", help="what the records call the model (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="append the records to this JSONL file")
    parser.add_argument("--threads", type=int, help="torch threads (default: all cores)")


def work(args: argparse.Namespace) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from .demo_quality import SplitImages, measure
    from .scenes_queries import make_split
    from .train import prepare_process
    from .train_model import DemoModel

    prepare_process(args.threads)
    path, model = args.model / "model.safetensors", DemoModel(0)
    try:
        model.load_checkpoint(load_file(path))
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise BundleError(f"{path} is not a whole checkpoint of the demo model ({error})") from None
    split = make_split(args.split, args.seed, scenes=args.count)
    records = measure(split, *SplitImages(model, split).embed(model))
    command = " ".join(["metaembed-bench", *sys.argv[1:]])
    lines = [
        json.dumps(
            {
                "model": args.name,
                "split": args.split,
                "seed": args.seed,
                "candidates": args.count,
                **record,
                "command": command,
            }
        )
        for record in records
    ]
    if args.output:
        with args.output.open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
    for record in records:
        print(f"{record['budget']:>6}  {record['queries']:<28} {record['count']:>4}  nDCG@5 {record['ndcg_at_5']:.4f}")
