"""metaembed-export: a MetaEmbed checkpoint becomes a bundle."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from metaembed.runtime.budget import parse_budgets
from metaembed.runtime.command import Parser, run_command
from metaembed.runtime.manifest import Limits

EPILOG = """examples:
  metaembed-export --model demo --budget 8,16 -o out
  metaembed-export --model ./my-checkpoint --budget all -o out -f
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="metaembed-export", description="Export a MetaEmbed checkpoint to a bundle: ONNX graphs, one set "
                    "of weights, tokenizer and golden vectors, judged against Hugging Face before it gets its name.", epilog=EPILOG)  # fmt: skip
    add = parser.add_argument
    add("--model", required=True, help="demo, or a checkpoint folder")
    add("--budget", action="append", required=True, metavar="R_Q,R_C|all", help="vectors per query and candidate; repeatable; "
        "'all' stands for 1,1 2,4 4,8 8,16 16,64")  # fmt: skip
    add("-o", "--output", type=Path, help="the bundle's folder (default: MODEL-bundle)")
    add("-f", "--force", action="store_true", help="replace an existing bundle")
    add(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="type the graphs compute in (default: fp32)",
    )
    add(
        "--max-image-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="largest image, in visual tokens (default: 1024)",
    )
    add("--max-text-tokens", type=int, default=512, metavar="N", help="longer user text is cut (default: 512)")
    add(
        "--no-parity",
        action="store_true",
        help="skip the comparison with Hugging Face; the bundle is marked unverified",
    )
    parser.add_common()
    return run_command(parser, run, argv)


def run(args: argparse.Namespace) -> int:
    from .bundle import ExportRequest, export_bundle
    from .checkpoint import Checkpoint

    folder = Path(__file__).parent / "demo" if args.model == "demo" else Path(args.model)
    geometry = Checkpoint.open(folder).geometry
    request = ExportRequest(
        model=args.model,
        folder=folder,
        budgets=parse_budgets(args.budget, geometry.query_tokens, geometry.candidate_tokens),
        limits=Limits(args.max_image_tokens, args.max_text_tokens),
        precision=args.precision,
        parity=not args.no_parity,
    )
    output = args.output or Path(f"{folder.resolve().name}-bundle")
    check = export_bundle(request, output, force=args.force, report=lambda line: _report(line, args.quiet))
    if check is not None and not args.quiet:
        print(check.table())
    print(f"{output}: {len(request.budgets)} budget(s), {'parity passed' if check else 'UNVERIFIED (parity skipped)'}")
    return 0


def _report(line: str, quiet: bool) -> None:
    if not quiet:
        print(f"{line} ...", file=sys.stderr)
