"""metaembed-search: rank an index, or a folder of images, for a text, an image, or both."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from .command import EXIT_DONE, EXIT_FAILED, Parser, counted, on_one_line, progress, run_command
from .errors import UsageError

if TYPE_CHECKING:
    from .index import Hit

EPILOG = """examples:
  metaembed-search out "a red umbrella and a blue anchor" --images pages -k 5 --budget 8,16
  metaembed-search pages.index "a red umbrella" --image query.png --json
  metaembed-search pages.index "a red umbrella" --cascade 1,1:1000 4,8:100 16,64 --where "year>=2020" lang=en

A cascade scores everything with the vectors of its first stage, R_Q,R_C, and what that keeps with those of the next.
Images of a folder that cannot be read are named and left out, and the command then exits with 1.
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="metaembed-search", description="Rank an index, or a folder of images.", epilog=EPILOG)
    add = parser.add_argument
    add("source", type=Path, metavar="INDEX|BUNDLE", help="an index, or (with --images) a bundle")
    add("text", nargs="?", help="the query's text")
    add("--image", type=Path, metavar="FILE", help="the query's image, alone or beside the text")
    add("--images", type=Path, metavar="DIR", help="rank this folder of images with a bundle, without an index")
    add("-k", type=int, default=10, help="how many results (default: %(default)s)")
    add(
        "--budget",
        metavar="R_Q,R_C",
        help="vectors per query and candidate (default: all that there are; of a large index: --cascade)",
    )
    add("--cascade", nargs="+", metavar="STAGE", help="index only: R_Q,R_C:KEEP ... R_Q,R_C (default: by its size)")
    add(
        "--approximate",
        action="store_true",
        help="index only: a first stage of 1,1 scores what the HNSW graph finds (metaembed-index ann builds it)",
    )
    add(
        "--where",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="index only: conditions (= != < <= > >=), all to hold",
    )
    add("--bundle", type=Path, help="index only: the model's bundle, where it is not where it was at indexing")
    add("--skip-damaged", action="store_true", help="index only: leave damaged items out, with a warning")
    add("--json", action="store_true", help="print a list of {rank, id, score} (and payload, where there is one)")
    parser.add_common()
    return run_command(parser, run, argv)


def run(args: argparse.Namespace) -> int:
    from .index_catalogue import CATALOGUE

    if args.text is None and args.image is None:
        greedy = [flag for flag in ("cascade", "where") if getattr(args, flag)]
        hint = f" (before --{greedy[0]}, which takes every word that follows)" if greedy else ""
        raise UsageError(f"no query: give a text, or --image FILE, or both{hint}")
    if (args.source / CATALOGUE).is_file():
        (hits, note), unreadable = _search_index(args), 0
    elif not args.source.exists():
        raise UsageError(f"{args.source} is missing; name an index, or a bundle and --images DIR")
    elif args.images is None:
        raise UsageError(f"{args.source} is no index; to rank a folder with a bundle, name it with --images DIR")
    else:
        hits, note, unreadable = _rank_folder(args)
    code = EXIT_FAILED if unreadable else EXIT_DONE
    if args.json:
        utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
        rows = [_json(hit) for hit in hits]
        try:
            print(json.dumps(rows, indent=2, ensure_ascii=not utf8))
        except RecursionError:  # a deeply nested payload; without indents json takes it as deep as it was stored
            print(json.dumps(rows, ensure_ascii=not utf8))
        return code
    print(f"{'rank':>4}  {'score':>8}  id")
    for hit in hits:
        print(f"{hit.rank:>4}  {hit.score:>8.4f}  {on_one_line(hit.id)}")
    if not args.quiet:
        print(note)
    return code


def _json(hit: Hit) -> dict[str, object]:
    values = {field.name: getattr(hit, field.name) for field in fields(hit)}
    return {name: value for name, value in values.items() if value is not None}


def _rank_folder(args: argparse.Namespace) -> tuple[list[Hit], str, int]:
    if args.cascade or args.approximate or args.where or args.bundle or args.skip_damaged:
        raise UsageError(
            "--cascade, --approximate, --where, --bundle and --skip-damaged belong to an index; metaembed-index makes one"
        )

    from .budget import Budget
    from .encoder import Encoder
    from .search import find_images, rank_images

    paths = find_images(args.images)
    with Encoder.open(args.source) as encoder:
        budget = Budget.parse(args.budget) if args.budget else encoder.bundle.manifest.largest
        hits, unreadable = rank_images(encoder, paths, text=args.text, image=args.image, budget=budget, k=args.k,
                                       track=lambda work: progress(work, "encoding", quiet=args.quiet))  # fmt: skip
        note = f"{counted(len(paths), 'image')}, {unreadable} unreadable, budget {budget}, {encoder.description}"
        return hits, note, unreadable


def _search_index(args: argparse.Namespace) -> tuple[list[Hit], str]:
    if args.images is not None:
        raise UsageError(f"{args.source} is an index; --images goes with a bundle")
    if args.cascade and args.budget:
        raise UsageError("give --budget (one stage over everything) or --cascade, not both")

    from .budget import Budget
    from .cascade import Stage, default_cascade
    from .encoder import Encoder
    from .index import Index
    from .index_build import check_model
    from .manifest import MANIFEST

    stages = [Stage.parse(text) for text in args.cascade or ()]
    if args.budget:
        stages = [Stage(Budget.parse(args.budget))]
    with Index.open(args.source, skip_damaged=args.skip_damaged) as index:
        bundle = Path(args.bundle or index.bundle)
        if args.bundle is None and not index.bundle:
            raise UsageError(f"{args.source} does not name the bundle that it was made with; say where by --bundle DIR")
        if args.bundle is None and not (bundle / MANIFEST).is_file():
            raise UsageError(
                f"{args.source} was made with {bundle}, which is no longer there; say where by --bundle DIR"
            )
        with Encoder.open(bundle) as encoder:
            check_model(encoder, index.fingerprint, args.source)
            most = max((stage.budget.query for stage in stages), default=None)
            query = encoder.encode_queries([args.text], images=[args.image], budget=most)[0]
            description = encoder.description
        cascade = stages or default_cascade(len(index), Budget(len(query), index.layout.vectors), args.k)
        hits = index.search(query, args.k, cascade=cascade, where=args.where, approximate=args.approximate)
        note = f"{counted(len(index), 'item')}, {'' if stages else 'default '}cascade {' '.join(map(str, cascade))}"
        note += ", approximate first stage" if args.approximate else ""
    return hits, f"{note}, {description}"
