"""metaembed-search: rank images for a text, an image, or both."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .command import Parser, progress, run_command
from .errors import UsageError

EPILOG = """examples:
  metaembed-search out "a red umbrella and a blue anchor" --images pages -k 5 --budget 8,16
  metaembed-search out --image query.png --images pages --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="metaembed-search", description="Rank a folder of images for a query.", epilog=EPILOG)
    add = parser.add_argument
    add("bundle", type=Path, help="a folder that metaembed-export wrote")
    add("text", nargs="?", help="the query's text")
    add("--image", type=Path, metavar="FILE", help="the query's image, alone or beside the text")
    add("--images", type=Path, metavar="DIR", required=True, help="the folder to rank")
    add("-k", type=int, default=10, help="how many results (default: 10)")
    add("--budget", metavar="R_Q,R_C", help="vectors per query and candidate (default: the largest in the bundle)")
    add("--json", action="store_true", help="print a list of {rank, id, score}")
    parser.add_common()
    return run_command(parser, run, argv)


def run(args: argparse.Namespace) -> int:
    if args.text is None and args.image is None:
        raise UsageError("no query: give a text, or --image FILE, or both")

    from .budget import Budget
    from .encoder import Encoder
    from .search import find_images, rank_images

    paths = find_images(args.images)
    with Encoder.open(args.bundle) as encoder:
        largest = encoder.bundle.manifest.largest
        budget = Budget.parse(args.budget) if args.budget else largest
        hits = rank_images(encoder, paths, text=args.text, image=args.image, budget=budget, k=args.k,
                           track=lambda work: progress(work, "encoding", quiet=args.quiet))  # fmt: skip
        note = f"{len(paths)} images, budget {budget}, {encoder.description}"
    if args.json:
        print(json.dumps([asdict(hit) for hit in hits], indent=2))
        return 0
    print(f"{'rank':>4}  {'score':>8}  image")
    for hit in hits:
        print(f"{hit.rank:>4}  {hit.score:>8.4f}  {hit.id}")
    if not args.quiet:
        print(note)
    return 0
