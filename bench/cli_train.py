"""``metaembed-bench train``."""

from __future__ import annotations

import argparse
from pathlib import Path

MMR_STEPS = 1800


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--groups",
        default="all",
        help="trained groups: all (MMR, default), or for example 16,64 (the twin without MMR)",
    )
    parser.add_argument("--steps", type=int, default=MMR_STEPS, help="steps of stage 2 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="torch threads (default: all cores)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in DIR")


def work(args: argparse.Namespace) -> None:
    from .train import parse_groups, prepare_process, train  # torch loads only when training is asked for

    prepare_process(args.threads)
    groups = parse_groups(args.groups)
    options = {"groups": groups, "steps": args.steps, "seed": args.seed, "resume": args.resume, "quiet": args.quiet}
    print(train(args.output, **options))
