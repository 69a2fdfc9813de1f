"""``metaembed-bench scenes``."""

from __future__ import annotations

import argparse
from pathlib import Path

from metaembed.runtime.errors import UsageError

from .scenes import SPLITS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: %(default)s")
    parser.add_argument("--count", type=int, default=2000, metavar="N", help="pages (default: %(default)s)")
    parser.add_argument(
        "--queries", type=int, nargs=3, default=(500, 200, 200), metavar=("TEXT", "IMAGE", "BOTH"),
        help="text, image, and image+text queries (default: 500 200 200)",
    )  # fmt: skip
    parser.add_argument(
        "--varied", type=float, default=0.25, help="share of pages of varied size (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("-f", "--force", action="store_true", help="replace DIR")


def work(args: argparse.Namespace) -> None:
    from .scenes_folder import write_split  # matplotlib's font is looked up only when pages are drawn
    from .scenes_queries import make_split

    if args.count < 1 or min(args.queries) < 0 or args.seed < 0:
        raise UsageError("--count must be at least 1, and --queries and --seed at least 0")
    if not 0 <= args.varied <= 1:
        raise UsageError(f"--varied is a share between 0 and 1, not {args.varied}")
    split = make_split(args.split, args.seed, scenes=args.count, queries=args.queries, varied=args.varied)
    write_split(split, args.output, force=args.force, quiet=args.quiet)
    print(f"{len(split.scenes)} pages and {len(split.queries)} queries in {args.output}")
