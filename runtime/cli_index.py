"""metaembed-index: make, extend, check, mend and tidy an index."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from .command import EXIT_DONE, EXIT_FAILED, Parser, counted, on_one_line, progress, run_command
from .memory import GIB

if TYPE_CHECKING:
    from .index_repair import Repair

MOST_NAMED = 20  # ids in one line; --json gives all

EPILOG = """DATA is a folder of images, or a JSONL file: one object a line with "id", "text" and "image" (a path relative to
the file; one of the two is enough); other fields are kept, returned by searches and can be filtered by.

A run that was killed continues with --resume: what it had stored is kept and not encoded again. Items that cannot be read are
named and left out, and the command then exits with 1.

examples:
  metaembed-index out --data pages -o pages.index
  metaembed-index out --data corpus.jsonl -o corpus.index --budget 16 --resume
  metaembed-index info corpus.index             what is in it, and what its groups of vectors take
  metaembed-index info corpus.index --memory-gib 8 --device a100   the --hold and --place of metaembed-search that fit
  metaembed-index verify corpus.index           read everything; exit 1 when anything is damaged
  metaembed-index repair corpus.index           mend what is damaged; says what would be lost, and --drop drops it
  metaembed-index delete corpus.index ID ...    remove items
  metaembed-index compact corpus.index          merge all small segments, free what deleted items take
  metaembed-index ann corpus.index              build the graph that metaembed-search --approximate uses
"""


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in VERBS:
        return _main_verb(argv[0], argv[1:])
    parser = Parser(prog="metaembed-index", description="Encode data with a bundle and store it.", epilog=EPILOG)
    add = parser.add_argument
    add(
        "bundle", type=Path, help="a folder that metaembed-export wrote, or: info, verify, repair, delete, compact, ann"
    )
    add("--data", type=Path, required=True, metavar="DIR|FILE.jsonl", help="what to index")
    add("-o", "--output", type=Path, required=True, metavar="INDEX", help="the folder to write")
    add(
        "--budget",
        type=int,
        metavar="R_C",
        help="vectors per item (default: the index's, or of a new one the largest in the bundle)",
    )
    add(
        "--storage",
        choices=("bf16", "int8"),
        help="of a new index: bf16 (default), or int8 at half the size",
    )
    add(
        "--screen",
        action="store_true",
        help="of a new bf16 index: the first vectors in int8 too, for a faster, still exact first stage",
    )
    add("--resume", action="store_true", help="continue or extend an index; known ids are passed over")
    add("--update", action="store_true", help="as --resume, but known ids are encoded anew and replaced")
    parser.add_common()
    return run_command(parser, _build, argv)


def _main_verb(verb: str, argv: Sequence[str]) -> int:
    work, description = VERBS[verb]
    parser = Parser(prog=f"metaembed-index {verb}", description=description)
    parser.add_argument("index", type=Path, metavar="INDEX")
    if verb in ("info", "verify", "repair"):
        parser.add_argument("--json", action="store_true", help="print it as JSON")
    if verb == "info":
        add = parser.add_argument
        add(
            "--memory-gib",
            type=float,
            metavar="GIB",
            help="how many first vectors of every item fit into so much memory",
        )
        add("--device", metavar="NAME", help="how many fit on this GPU (see metaembed-plan) beside the index's model")
        add("--bundle", type=Path, help="that model's bundle, where it is not where it was at indexing")
    if verb == "repair":
        parser.add_argument("--drop", action="store_true", help="drop the items that are damaged, where some are")
    if verb == "delete":
        parser.add_argument("ids", nargs="+", metavar="ID")
    if verb == "ann":
        add = parser.add_argument
        add("--connectivity", type=int, default=32, metavar="M", help="neighbours of an item (default: %(default)s)")
        add("--expansion-add", type=int, default=256, metavar="N", help="candidates for them (default: %(default)s)")
    parser.add_common()
    return run_command(parser, work, argv)


def _build(args: argparse.Namespace) -> int:
    from .encoder import Encoder
    from .index_build import build_index, open_writer
    from .items import read_data

    items = read_data(args.data)
    resume = args.resume or args.update
    with (
        Encoder.open(args.bundle) as encoder,
        open_writer(
            encoder, args.output, resume=resume, storage=args.storage, screen=args.screen, vectors=args.budget
        ) as writer,
    ):
        report = build_index(encoder, writer, items, update=args.update,
                             track=lambda work: progress(work, "indexing", quiet=args.quiet))  # fmt: skip
        description = encoder.description
    if not args.quiet:
        print(f"{counted(report.added, 'item')} added to {args.output} ({report.items_per_s:.1f} items/s, {description}), "
              f"{report.known} were there, {len(report.unreadable)} unreadable")  # fmt: skip
    return EXIT_FAILED if report.unreadable else 0


def _info(args: argparse.Namespace) -> int:
    from .index import Index
    from .index_ann import living_in
    from .index_fit import fit_index

    with Index.open(args.index) as index:
        snapshot, layout, graph = index.snapshot(), index.layout, index.ann.record()
        items, segments, held = len(snapshot), len(snapshot.parts), index.stored_items()
        fit = fit_index(index, memory_gib=args.memory_gib, device=args.device, bundle=args.bundle)
        about = {
            "items": items,
            "segments": segments,
            "deleted": held - items,
            **layout.to_json(),
            "vector_bytes": held * layout.item_bytes,
            "bundle": index.bundle,
            "graph_items": living_in(graph, snapshot) if graph else 0,
            "graph_bytes": graph.size if graph else 0,
            **fit.to_json(),
        }
    if args.json:
        print(json.dumps(about, indent=2))
    else:
        print(f"{counted(items, 'item')} in {counted(segments, 'segment')}, {about['deleted']:,} deleted")
        print(f"{layout.vectors} vectors of {layout.dims} dims ({layout.storage}), made with {index.bundle}")
        if graph:
            print(f"HNSW graph of {counted(about['graph_items'], 'item')}, {graph.size / GIB:.3f} GiB")
        print(fit.describe())
    return EXIT_FAILED if 0 in (fit.hold, fit.place) else EXIT_DONE


def _verify(args: argparse.Namespace) -> int:
    from .index import Index

    with Index.open(args.index, skip_damaged=True) as index:
        damages, items = index.verify(), len(index)
    if args.json:
        print(json.dumps({"items": items, "damages": damages}, indent=2))
    else:
        for damage in damages:
            print(damage)
        if not args.quiet:
            mend = f"metaembed-index repair {shlex.quote(str(args.index))} says what can be mended"
            print(mend if damages else f"sound: {counted(items, 'item')}")
    return EXIT_FAILED if damages else 0


def _repair(args: argparse.Namespace) -> int:
    from .index_repair import repair_index

    repair = repair_index(args.index, drop=args.drop)
    if args.json:
        print(json.dumps(asdict(repair), indent=2))
    else:
        _print_repair(repair, args)
    return 0 if repair.done else EXIT_FAILED


def _print_repair(repair: Repair, args: argparse.Namespace) -> None:
    for damage in repair.damages:
        print(damage)
    verb, index = "dropped" if repair.done else "would be dropped", shlex.quote(str(args.index))
    if repair.dropped:
        print(f"{counted(len(repair.dropped), 'item')} {verb}: {_named(repair.dropped)}")
    if repair.unnamed:
        print(f"{counted(repair.unnamed, 'item')} {verb} whose ids cannot be read")
    if repair.older:
        print(f"{counted(len(repair.older), 'older item')} {verb} of ids that are there twice: {_named(repair.older)}")
    if repair.graph_dropped and repair.done:
        print(f"HNSW graph dropped; metaembed-index ann {index} builds one")
    if not repair.done:
        print(f"nothing was changed; metaembed-index repair {index} --drop drops what is damaged and keeps "
              f"{counted(repair.items, 'item')}")  # fmt: skip
    elif not args.quiet:
        print(f"{'repaired' if repair.damages else 'sound, nothing to repair'}: {counted(repair.items, 'item')}")
        if repair.dropped or repair.unnamed:
            print(f"metaembed-index BUNDLE --data DATA -o {index} --resume encodes what was dropped again")


def _named(ids: Sequence[str]) -> str:
    return on_one_line(", ".join(ids[:MOST_NAMED])) + (", ..." if len(ids) > MOST_NAMED else "")


def _delete(args: argparse.Namespace) -> int:
    from .index_writer import IndexWriter

    with IndexWriter(args.index) as writer:
        known = writer.known(args.ids)
        missing = [id_ for id_ in args.ids if id_ not in known]
        count = writer.delete(args.ids)
    if not args.quiet:
        print(f"{counted(count, 'item')} deleted")
    for id_ in missing:
        print(f"metaembed-index delete: {id_!r} is not in {args.index}", file=sys.stderr)
    return EXIT_FAILED if missing else 0


def _compact(args: argparse.Namespace) -> int:
    from .index_writer import IndexWriter

    with IndexWriter(args.index) as writer:
        count = writer.compact()
    if not args.quiet:
        print(f"{counted(count, 'segment')} rewritten")
    return 0


def _ann(args: argparse.Namespace) -> int:
    from .index_writer import IndexWriter

    with IndexWriter(args.index) as writer:
        count = writer.build_ann(
            connectivity=args.connectivity, expansion_add=args.expansion_add,
            track=lambda work: progress(work, "building", quiet=args.quiet),
        )  # fmt: skip
    if not args.quiet:
        print(f"HNSW graph of {counted(count, 'item')} built; metaembed-search --approximate uses it")
    return 0


VERBS: dict[str, tuple[Callable[[argparse.Namespace], int], str]] = {
    "info": (_info, "What is in an index."),
    "verify": (_verify, "Read a whole index and name everything that is damaged; exit 1 when anything is."),
    "repair": (
        _repair,
        "Mend what is damaged. Where items would be lost, name them and change nothing, unless --drop is given.",
    ),
    "delete": (_delete, "Remove items by id."),
    "compact": (
        _compact,
        "Merge all segments that fit together, up to 1 GiB, and free what deleted items take. Indexing merges by itself as\n"
        "far as that is in proportion to what was added. An HNSW graph does not hold what was merged; ann builds it again.",
    ),
    "ann": (_ann, "Build the HNSW graph of an approximate first stage, from the items that are in the index now."),
}

if __name__ == "__main__":
    raise SystemExit(main())
