"""``metaembed-bench tables``."""

from __future__ import annotations

import argparse
from pathlib import Path

from metaembed.runtime.command import EXIT_FAILED
from metaembed.runtime.errors import UsageError
from metaembed.runtime.staged_file import staged_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="Markdown files with <!-- table: NAME --> blocks"
    )
    parser.add_argument(
        "--records", type=Path, required=True, metavar="DIR", help="folder of records, for example bench/results"
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 when a table differs from its records"
    )


def work(args: argparse.Namespace) -> int:
    from .records import as_measured, read_records
    from .report_tables import fill_tables

    records, stale = read_records([args.records]), []
    for path in args.files:
        if not path.is_file():
            raise UsageError(f"{path} does not exist")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not UTF-8 text ({error}); tables are written into Markdown files") from None
        with as_measured():
            filled = fill_tables(text, records)
        if filled != text:
            stale.append(path)
            if not args.check:
                with staged_file(path.resolve()) as part:
                    part.write_text(filled, encoding="utf-8")
    for path in stale:
        print(f"{path}: {'differs from the records' if args.check else 'written'}")
    return EXIT_FAILED if stale and args.check else 0
