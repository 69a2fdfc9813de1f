"""``metaembed-bench parity``."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="a folder that metaembed-export or metaembed-calibrate wrote")
    parser.add_argument("--threads", type=int, default=0, help="default: one a core")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="add the records to this JSON lines file")


def work(args: argparse.Namespace) -> None:
    from metaembed.runtime.encoder import Encoder

    from .parity_by_size import measure_parity, read_sensitivities
    from .records import append_records, make_record

    with Encoder.open(args.bundle, threads=args.threads) as encoder:
        measured = list(measure_parity(encoder))
        costs = read_sensitivities(encoder.bundle)
    for values in measured:
        print(
            f"{values['side']:<10} {values['image_tokens']:>5} visual tokens  worst cosine {values['min_cosine']:.8f}"
        )
    for values in costs:
        print(f"{values['group']:<40} alone costs {values['cost']:.2e}")
    if args.output:
        records = [make_record("parity", values, args.bundle) for values in measured]
        append_records(args.output, records + [make_record("sensitivity", values, args.bundle) for values in costs])
