"""``metaembed-bench train``."""

from __future__ import annotations

import argparse
from pathlib import Path

from metaembed.runtime.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--groups",
        default="all",
        help="trained groups: all (MMR, default), or for example 16,64 (the twin without MMR)",
    )
    parser.add_argument("--steps", type=int, help="steps of stage 2 (default: 1800)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="torch threads (default: all cores)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in DIR")


def work(args: argparse.Namespace) -> None:
    from .train import MMR_STEPS, parse_groups, prepare_process, train  # torch loads only when training is asked for

    if args.seed < 0 or any(value is not None and value < 1 for value in (args.steps, args.threads)):
        raise UsageError("--steps and --threads must be at least 1, and --seed at least 0")
    prepare_process(args.threads)
    groups = parse_groups(args.groups)
    options = {
        "groups": groups,
        "steps": args.steps or MMR_STEPS,
        "seed": args.seed,
        "resume": args.resume,
        "quiet": args.quiet,
    }
    print(train(args.output, **options))
