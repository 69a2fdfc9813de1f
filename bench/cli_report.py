"""``metaembed-bench report``."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of records (*.jsonl), or one file of them")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="where report.html and plots/ go (default: beside the records)"
    )


def work(args: argparse.Namespace) -> None:
    from .records import as_measured, read_records
    from .report import write_report

    folder = args.folder if args.folder.is_dir() else args.folder.parent
    records = read_records([args.folder])
    with as_measured():
        print(write_report(records, args.output or folder))
