"""metaembed-check: replay a bundle's golden vectors on this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from .command import EXIT_DONE, EXIT_FAILED, Parser, progress, run_command


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="metaembed-check",
        description="Replay a bundle's golden vectors with the best session here; exit 1 when out of tolerance.",
    )
    parser.add_argument("bundle", type=Path, help="a folder that metaembed-export wrote")
    parser.add_argument(
        "--structure",
        action="store_true",
        help="check files and graphs only: no golden vectors, in seconds for any size",
    )
    parser.add_argument("--json", action="store_true", help="print the whole record as JSON")
    parser.add_common()
    return run_command(parser, run, argv)


def run(args: argparse.Namespace) -> int:
    if args.structure:
        return run_structure(args)
    from .check import check_bundle
    from .encoder import Encoder

    with Encoder.open(args.bundle) as encoder:
        check = check_bundle(encoder, progress=lambda work: progress(work, "replaying", quiet=args.quiet))
    if args.json:
        print(json.dumps(check.to_json(), indent=2))
    else:
        if not args.quiet:
            print(check.table())
        verdict = f"{'within' if check else 'OUT OF'} the {check.precision} tolerance on {check.runs_on}"
        print(f"{args.bundle}: {verdict}{check.coverage()}")
    return EXIT_DONE if check else EXIT_FAILED


def run_structure(args: argparse.Namespace) -> int:
    from .manifest import Bundle
    from .structure import check_structure

    graphs = check_structure(Bundle.open(args.bundle))
    if args.json:
        print(json.dumps([graph.to_json() for graph in graphs], indent=2))
    else:
        if not args.quiet:
            print("\n".join(map(str, graphs)))
        print(f"{args.bundle}: files, graphs and weights fit together (embeddings were not compared)")
    return EXIT_DONE
