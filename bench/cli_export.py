"""``metaembed-bench export``."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=("3b", "7b", "32b"), action="append", help="repeatable; real sizes, no data")
    parser.add_argument("--layers", type=int, metavar="N", help="decoder layers, for less than the whole model")
    parser.add_argument(
        "--plain", action="store_true", help="also torch.onnx.export of the loaded modules (much memory)"
    )
    parser.add_argument("--freeze", action="store_true", help="also graphs frozen at one budget, one a side")
    parser.add_argument(
        "--parity", action="store_true", help="instead random weights, judged against Hugging Face's model"
    )
    parser.add_argument("--kills", type=int, metavar="N", help="instead kill N exports of the demo at random moments")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where to write bundles (default: the system's place)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="add the records to this JSON lines file")


def work(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from .export import compare_exports, model_config, write_sparse_checkpoint
    from .export_parity import measure_parity_export
    from .kill_export import kill_exports
    from .records import append_records, make_record

    def keep(kind: str, values: dict) -> None:
        print(
            " ".join(
                f"{key}={value:,.1f}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()
            )
        )
        if args.output:
            append_records(args.output, [make_record(kind, values)])

    with tempfile.TemporaryDirectory(dir=args.work) as name:
        folder = Path(name)
        if args.kills:
            keep("export-kills", asdict(kill_exports(folder, args.kills)))
            return
        for model in args.model or ("7b",):
            if args.parity:
                keep(
                    "export-parity",
                    {"model": model, **measure_parity_export(model, folder / model, layers=args.layers)},
                )
                continue
            write_sparse_checkpoint(model_config(model, args.layers), folder / model / "checkpoint")
            for values in compare_exports(
                folder / model / "checkpoint", folder / model, plain=args.plain, freeze=args.freeze
            ):
                keep("export", {"model": model, "layers": args.layers or "all", **values})
