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
    parser.add_argument("--json", action="store_true", help="print the whole record as JSON")
    parser.add_common()
    return run_command(parser, run, argv)


def run(args: argparse.Namespace) -> int:
    from .check import check_bundle
    from .encoder import Encoder

    with Encoder.open(args.bundle) as encoder:
        check = check_bundle(encoder, progress=lambda work: progress(work, "replaying", quiet=args.quiet))
    if args.json:
        print(json.dumps(check.to_json(), indent=2))
    else:
        if not args.quiet:
            print(check.table())
        print(f"{args.bundle}: {'within' if check else 'OUT OF'} the {check.precision} tolerance on {check.runs_on}")
    return EXIT_DONE if check else EXIT_FAILED
