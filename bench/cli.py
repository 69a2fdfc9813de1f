"""``metaembed-bench``: a thin dispatcher; each subcommand's work lives in its own module."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

from metaembed.runtime.command import Parser, run_command

# Subcommand -> (module with add_arguments(parser) and work(args), one line of help). Imported only when asked for.
COMMANDS = {
    "scenes": ("cli_scenes", "write symbol scenes as a folder of PNG pages with queries and relevance judgements"),
    "demo-quality": (
        "cli_demo_quality",
        "retrieval quality of a demo checkpoint on symbol scenes, at every budget",
    ),
    "quality": ("cli_quality", "retrieval quality of a bundle on any data set, per budget and per cascade"),
    "claims": ("cli_claims", "the paper's claims, tested again on trained demo models"),
    "efficiency": (
        "cli_efficiency",
        "what scoring and encoding cost: arithmetic, this machine's measurements, devices' limits",
    ),
    "scoring": ("cli_scoring", "MaxSim and the index against this machine's limits and other contestants"),
    "calibration": ("cli_calibration", "INT8 and FP8 against fp32 and other quantisers, on retrieval itself"),
    "encoder": ("cli_encoder", "a bundle's encoder against PyTorch and a plainly exported graph"),
    "engine": ("cli_engine", "TensorRT engines on this machine's GPU, against their limits"),
    "engine-layouts": ("cli_engine_layouts", "what TensorRT engines cost to build, by layout, without a GPU"),
    "parity": ("cli_parity", "a bundle's golden inputs replayed, by image size; sensitivities where it is quantised"),
    "report": ("cli_report", "records as one self-contained HTML page with plots, and the plots as PNG"),
    "tables": ("cli_tables", "the tables between <!-- table: NAME --> markers, made again from the records"),
    "export": ("cli_export", "seconds, memory and bytes of exports at real sizes; exports killed at random moments"),
    "train": ("cli_train", "train the demo model from scratch"),
}
WRITE_FOLDERS = ("scenes", "train", "report")  # where -o is a folder; of all others it is a file of records


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="metaembed-bench", description="Measurements, and the demo's data and model.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name, (module, line) in COMMANDS.items():
        command = commands.add_parser(name, help=line, description=f"{line[0].upper()}{line[1:]}.")
        import_module(f"metaembed.bench.{module}").add_arguments(command)
        command.add_common()
    return run_command(parser, _work, argv)


def _work(args: argparse.Namespace) -> int | None:
    output = getattr(args, "output", None)
    if output is not None and args.command not in WRITE_FOLDERS:
        from .records import check_output

        check_output(output)
    return import_module(f"metaembed.bench.{COMMANDS[args.command][0]}").work(args)


if __name__ == "__main__":
    raise SystemExit(main())
