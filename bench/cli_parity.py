"""``metaembed-bench parity``."""

from __future__ import annotations

import argparse
from pathlib import Path

from metaembed.runtime.errors import UsageError
from metaembed.runtime.manifest import Bundle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="a folder that metaembed-export or metaembed-calibrate wrote")
    parser.add_argument("--in-torch", choices=("fp32", "bf16", "fp16"), action="append", default=[], metavar="PRECISION",
        help="also the traced modules themselves, computed in this precision by PyTorch: what a GPU's graph computes and "
        "ONNX Runtime's CPU cannot; repeatable, needs --checkpoint")  # fmt: skip
    parser.add_argument("--checkpoint", metavar="MODEL", help="whose weights: demo, a folder, or a hub id in the cache")
    parser.add_argument("--threads", type=int, default=0, help="default: one a core")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="add the records to this JSON lines file")


def work(args: argparse.Namespace) -> None:
    from metaembed.runtime.encoder import Encoder

    from .parity_by_size import measure_parity, read_sensitivities
    from .records import append_records, make_record

    if args.in_torch and not args.checkpoint:
        raise UsageError("--in-torch computes from a checkpoint's weights; name it with --checkpoint MODEL")
    with Encoder.open(args.bundle, threads=args.threads) as encoder:
        measured = list(measure_parity(encoder))
        costs = read_sensitivities(encoder.bundle)
        for precision in args.in_torch:
            measured += _in_torch(encoder.bundle, args.checkpoint, precision)
    for values in measured:
        print(
            f"{values['runs_on']:<40} {values['precision']} {values['side']:<10} {values['image_tokens']:>5} visual tokens  "
            f"worst cosine {values['min_cosine']:.8f}"
        )
    for values in costs:
        print(f"{values['group']:<40} alone costs {values['cost']:.2e}")
    if args.output:
        records = [make_record("parity", values, args.bundle) for values in measured]
        append_records(args.output, records + [make_record("sensitivity", values, args.bundle) for values in costs])


def _in_torch(bundle: Bundle, model: str, precision: str) -> list[dict]:
    """The same inputs through the traced modules in PyTorch."""
    from metaembed.export.checkpoint import Checkpoint
    from metaembed.export.models import resolve_model

    from .parity_by_size import measure_parity
    from .torch_session import open_in_torch

    checkpoint = Checkpoint.open(resolve_model(model).require_base())
    with open_in_torch(bundle, checkpoint, precision) as encoder:
        return list(measure_parity(encoder, precision))
