"""metaembed-search: rank an index, or a folder of images, for a text, an image, or both; or an index for many of them."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from .command import EXIT_DONE, EXIT_FAILED, Parser, counted, on_one_line, progress, run_command
from .errors import UsageError

if TYPE_CHECKING:
    from .index import Hit
    from .searcher import Searcher, SearchReport

EPILOG = """examples:
  metaembed-search out "a red umbrella and a blue anchor" --images pages -k 5 --budget 8,16
  metaembed-search pages.index "a red umbrella" --image query.png --json
  metaembed-search pages.index "a red umbrella" --cascade 1,1:1000 4,8:100 16,64 --where "year>=2020" lang=en
  metaembed-search pages.index --queries queries.jsonl -k 100 -o hits.jsonl
  metaembed-search pages.index --queries queries.jsonl --trec -o run.trec --place 1 --cascade 1,1:1000 16,64

A cascade scores everything with the vectors of its first stage, R_Q,R_C, and what that keeps with those of the next.

A file of queries has one object a line: "text", "image" (a path relative to the file), or both, and "id" (default: the line's
number); other fields are ignored. Results are lines of {"query", "hits": [{"rank", "id", "score", "payload"}]}. Queries, and
images of a folder, that cannot be read are named and left out, and the command then exits with 1.
"""
INDEX_ONLY = ("queries", "cascade", "approximate", "where", "bundle", "skip_damaged", "hold", "place")


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
    add("--json", action="store_true", help="print a list of {rank, id, score} (and payload, where there is one)")
    many = parser.add_argument_group("many queries, of an index").add_argument
    many("--queries", type=Path, metavar="FILE.jsonl", help="search for all of these in one run")
    many("-o", "--output", type=Path, metavar="FILE", help="where to write their results (default: standard output)")
    many("--trec", action="store_true", help="write a run file of trec_eval's, not JSON lines")
    of_index = parser.add_argument_group("of an index").add_argument
    of_index("--cascade", nargs="+", metavar="STAGE", help="R_Q,R_C:KEEP ... R_Q,R_C (default: by its size)")
    of_index(
        "--approximate",
        action="store_true",
        help="a first stage of 1,1 scores what the HNSW graph finds (metaembed-index ann builds it)",
    )
    of_index(
        "--where",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="conditions (= != < <= > >=), all to hold",
    )
    of_index("--bundle", type=Path, help="the model's bundle, where it is not where it was at indexing")
    of_index("--skip-damaged", action="store_true", help="leave damaged items out, with a warning")
    of_index("--hold", type=_vectors, default=0, metavar="R_C",
             help="for many queries: first copy so many vectors of every item into memory, where they stay")  # fmt: skip
    of_index("--place", type=_vectors, default=0, metavar="R_C",
             help="for many queries: first copy those that the first stage scans to the GPU, and scan there")  # fmt: skip
    parser.add_common()
    return run_command(parser, run, argv)


def _vectors(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


_vectors.__name__ = "number of vectors"  # argparse prints it


def run(args: argparse.Namespace) -> int:
    from .index_catalogue import CATALOGUE

    _check_query(args)
    if (args.source / CATALOGUE).is_file():
        if args.images is not None:
            raise UsageError(f"{args.source} is an index; --images goes with a bundle")
        if args.queries:
            return _search_many(args)
        with _open(args) as searcher:
            hits, note, unreadable = searcher.search(args.text, args.image), searcher.description, 0
    elif not args.source.exists():
        raise UsageError(f"{args.source} is missing; name an index, or a bundle and --images DIR")
    elif args.images is None:
        raise UsageError(f"{args.source} is no index; to rank a folder with a bundle, name it with --images DIR")
    else:
        hits, note, unreadable = _rank_folder(args)
    _print_hits(args, hits, note)
    return EXIT_FAILED if unreadable else EXIT_DONE


def _check_query(args: argparse.Namespace) -> None:
    one = args.text is not None or args.image is not None
    if args.queries and one:
        raise UsageError("give one query (a text, --image FILE, or both) or --queries FILE, not both")
    if not args.queries and (args.trec or args.output):
        raise UsageError("--trec and -o write the results of --queries FILE")
    if args.trec and args.json:
        raise UsageError("give --trec or --json, not both; --queries writes JSON lines by itself")
    if not args.queries and not one:
        greedy = [flag for flag in ("cascade", "where") if getattr(args, flag)]
        hint = f" (before --{greedy[0]}, which takes every word that follows)" if greedy else ""
        raise UsageError(f"no query: give a text, or --image FILE, or both{hint}, or --queries FILE")


def _print_hits(args: argparse.Namespace, hits: Sequence[Hit], note: str) -> None:
    from .search_results import hit_fields

    if args.json:
        utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
        rows = [hit_fields(hit) for hit in hits]
        try:
            print(json.dumps(rows, indent=2, ensure_ascii=not utf8))
        except RecursionError:  # a deeply nested payload; without indents json takes it as deep as it was stored
            print(json.dumps(rows, ensure_ascii=not utf8))
        return
    print(f"{'rank':>4}  {'score':>8}  id")
    for hit in hits:
        print(f"{hit.rank:>4}  {hit.score:>8.4f}  {on_one_line(hit.id)}")
    if not args.quiet:
        print(note)


def _search_many(args: argparse.Namespace) -> int:
    from .items import read_queries
    from .search_results import check_trec, json_line, trec_lines

    queries = read_queries(args.queries)
    if args.trec:
        for query in queries:
            check_trec(query.id)
    lines = trec_lines if args.trec else json_line
    quiet = args.quiet or (args.output is None and sys.stdout.isatty())  # a bar among the results would be no help
    with _results(args) as file, _open(args) as searcher:
        report = searcher.search_many(queries, lambda id_, hits: file.write(lines(id_, hits)),
                                      track=lambda work: progress(work, "searching", quiet=quiet))  # fmt: skip
        file.flush()
        note = searcher.description
    if not args.quiet:
        print(f"{_describe(report)}; {note}", file=sys.stderr)
    return EXIT_FAILED if report.unreadable else EXIT_DONE


def _describe(report: SearchReport) -> str:
    if not report.queries:
        return f"no query could be read of {len(report.unreadable)}"
    count = f"{report.queries:,} {'query' if report.queries == 1 else 'queries'}"
    encoded, searched = (report.queries / seconds for seconds in (report.encode_s, report.search_s))
    return (
        f"{count}, {len(report.unreadable)} unreadable, encoded at {encoded:,.1f} a second, searched at {searched:,.1f}"
    )


@contextmanager
def _results(args: argparse.Namespace) -> Iterator[TextIO]:
    """Where the results of many queries go, in UTF-8: a file that appears whole or not at all, or standard output."""
    from .staged_file import staged_file

    if args.output is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")
        yield sys.stdout
        return
    path = args.output.resolve()
    if path.exists() and not path.is_file():
        raise UsageError(f"{args.output} is no file to write results to; without -o they go to standard output")
    if not path.parent.is_dir():
        raise UsageError(f"{args.output} cannot be written: {path.parent} is no folder")
    if path == args.queries.resolve():
        raise UsageError(f"{args.output} holds the queries; write the results to another file")
    with staged_file(path) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        yield file


def _open(args: argparse.Namespace) -> Searcher:
    if args.cascade and args.budget:
        raise UsageError("give --budget (one stage over everything) or --cascade, not both")

    from .budget import Budget
    from .cascade import Stage
    from .searcher import Searcher

    stages = [Stage.parse(text) for text in args.cascade or ()]
    if args.budget:
        stages = [Stage(Budget.parse(args.budget))]
    return Searcher(args.source, bundle=args.bundle, k=args.k, cascade=stages, where=args.where,
                    approximate=args.approximate, hold=args.hold, place=args.place, skip_damaged=args.skip_damaged)  # fmt: skip


def _rank_folder(args: argparse.Namespace) -> tuple[list[Hit], str, int]:
    if any(getattr(args, name) for name in INDEX_ONLY):
        *names, last = (f"--{name.replace('_', '-')}" for name in INDEX_ONLY)
        raise UsageError(f"{', '.join(names)} and {last} belong to an index; metaembed-index makes one")

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
