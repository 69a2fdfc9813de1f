"""metaembed-export: a MetaEmbed checkpoint becomes a bundle."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from metaembed.runtime.budget import Budget, parse_budgets
from metaembed.runtime.command import Parser, byte_bar, natural, progress, run_command
from metaembed.runtime.devices import DEVICES, Device
from metaembed.runtime.errors import UsageError
from metaembed.runtime.frozen import frozen_graphs
from metaembed.runtime.geometry import Geometry
from metaembed.runtime.golden import SIDES
from metaembed.runtime.manifest import (
    DEFAULT_OPSET,
    LANGUAGE,
    OPSETS,
    SCORER,
    VISION,
    FileRecord,
    Limits,
    Manifest,
    cpu_graph,
)
from metaembed.runtime.plan import make_plan
from metaembed.runtime.plan_report import describe, describe_fits
from metaembed.runtime.staging import check_output, scratch_folder

from .cli_build import main as build
from .preflight import check_opset, check_types
from .route import find_targets

if TYPE_CHECKING:
    from .models import ResolvedModel

CANDIDATES = 100_000  # the corpus that a dry run sizes an index for

DESCRIPTION = """Export a MetaEmbed checkpoint to a bundle: ONNX graphs, one set of weights, tokenizer and golden vectors.
The bundle is judged against Hugging Face's model before it gets its name."""
EPILOG = """examples:
  metaembed-export --model demo --budget 8,16 -o out
  metaembed-export --model demo --budget 8,16 --precision bf16 --quantize int8 --data demo -o out8
  metaembed-export --model 7b --base ./Qwen2.5-VL-7B --adapter ./my-metaembed --budget all --precision bf16 -o out
  metaembed-export --model 7b --random-weights 0 --budget 8,16 --no-parity -o rehearsal
  metaembed-export --model 7b --budget all --dry-run
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="metaembed-export", description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("--model", required=True, help="demo, 3b, 7b, 32b, a folder, or a hub id in the local cache")
    add("--budget", action="append", metavar="R_Q,R_C|all",
        help="required: vectors per query and candidate; repeatable; 'all' stands for 1,1 2,4 4,8 8,16 16,64")  # fmt: skip
    add("-o", "--output", type=Path, help="the bundle's folder (default: MODEL-bundle)")
    add("-f", "--force", action="store_true", help="replace an existing bundle")
    add("--base", metavar="FOLDER", help="weights of the base model, for a known size or an adapter")
    add("--adapter", metavar="FOLDER", help="a PEFT LoRA adapter to merge")
    add(
        "--random-weights",
        type=natural,
        metavar="SEED",
        help="made-up weights of the model's geometry, for a rehearsal",
    )
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="type to compute in (default: fp32)")
    add("--opset", type=int, choices=OPSETS, default=DEFAULT_OPSET,
        help="20: primitive operators, for every TensorRT (default); 23: Attention and RMSNormalization")  # fmt: skip
    add(
        "--max-image-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="largest image, in visual tokens (default: 1024)",
    )
    add("--max-text-tokens", type=int, default=512, metavar="N", help="longer user text is cut (default: 512)")
    add(
        "--target",
        action="append",
        metavar="DEVICE",
        help="also build TensorRT engines: a100, orin, l4 ...; repeatable",
    )
    add("--quantize", choices=("int8", "fp8"), help="quantise the Linears, and fail unless the ranking survives")
    add("--data", metavar="DIR|FILE.jsonl|demo", help="calibration inputs for --quantize (docs/calibration.md)")
    add("--dry-run", action="store_true", help="check the request and print what it takes; write nothing")
    add("--freeze", action="append", choices=SIDES, help="also a language graph with this side's "
        "budgets built in, for a runtime of your own: metaembed-build does not read it")  # fmt: skip
    either = parser.add_mutually_exclusive_group().add_argument
    either(
        "--parity", choices=("full", "quick"), help="inputs to judge on (default: full; quick from 1e9 parameters on)"
    )
    either(
        "--no-parity", action="store_true", help="skip the comparison with Hugging Face; the bundle says 'unverified'"
    )
    parser.add_common()
    return run_command(parser, run, argv)


def run(args: argparse.Namespace) -> int:
    from .models import resolve_model

    model = resolve_model(args.model, base=args.base, adapter=args.adapter)
    geometry = model.geometry
    devices = find_targets(args.target) if args.target else []
    for device in devices:
        check_types(device, args.precision, args.quantize)
        check_opset(device, args.opset, args.precision)
    _check_options(args)
    budgets = parse_budgets(args.budget, geometry.query_tokens, geometry.candidate_tokens)
    limits = Limits(args.max_image_tokens, args.max_text_tokens)
    output = args.output or Path(f"{Path(os.path.abspath(model.name)).name}-bundle")  # of '.', the folder's name
    check_output(output, force=args.force)
    if args.random_weights is None and not args.dry_run:
        model.require_base()
    image_tokens = _check_images(model, limits, random=args.random_weights is not None)
    if devices:
        _check_targets(args, geometry, budgets, Limits(image_tokens, limits.text_tokens), output, devices)
    calibration = _read_calibration(args, limits)
    if args.dry_run:
        _check_files(model, random=args.random_weights is not None)
        plan = make_plan(model.name, geometry, budgets, CANDIDATES, max_image_tokens=image_tokens)
        found = "random weights" if args.random_weights is not None else model.base or "none were found"
        print(f"{_graphs(args, budgets)}\nweights: one set for all of them ({found})\n{describe(plan)}")
        print(describe_fits(plan, devices or DEVICES, args.precision, args.quantize))
        return 0

    from .bundle import ExportRequest, export_bundle  # torch, once the request is known to make sense

    request = ExportRequest(
        model=model,
        budgets=budgets,
        limits=limits,
        precision=args.precision,
        parity=not args.no_parity,
        random_seed=args.random_weights,
        parity_inputs=args.parity,
        freeze=args.freeze or (),
        opset=args.opset,
    )
    bars = TerminalProgress(quiet=args.quiet)
    if calibration is None:
        check = export_bundle(request, output, force=args.force, progress=bars)
        if check is not None and not args.quiet:
            print(check.table())
    else:
        from metaembed.calibration.cli import calibrate

        with scratch_folder(output) as scratch:
            check = export_bundle(request, scratch / "float", progress=bars)
            calibrate(scratch / "float", calibration, output, force=args.force, quiet=args.quiet)
    served = " ".join(map(str, budgets))
    print(f"{output}: budgets {served}; {'parity passed' if check else 'unverified (parity was skipped)'}")
    return build(_build_words(args, output, devices)) if devices else 0


def _graphs(args: argparse.Namespace, budgets: Sequence[Budget]) -> str:
    """The graphs that the export would write, for a dry run."""
    names = [VISION, LANGUAGE, *frozen_graphs(args.freeze or (), budgets)]
    twins = map(cpu_graph, names) if args.precision != "fp32" else ()
    return fill(
        ", ".join((*names, *twins, SCORER)),
        100,
        initial_indent="graphs: ",
        subsequent_indent=" " * 8,
        break_on_hyphens=False,
    )


def _build_words(args: argparse.Namespace, output: Path, devices: Sequence[Device]) -> list[str]:
    """metaembed-build's command line for the new bundle: the targets, and the flags that both commands have."""
    flags = [f"--{name}" for name in ("force", "quiet", "verbose") if getattr(args, name)]
    return [str(output), *(f"--target={device.name}" for device in devices), *flags]


def _check_options(args: argparse.Namespace) -> None:
    """What argparse cannot say. A type that a target lacks is told first: nothing else about the request matters then."""
    if not args.budget:
        raise UsageError("the following arguments are required: --budget R_Q,R_C, or --budget all")
    if args.quantize and not args.data:
        raise UsageError(f"--quantize {args.quantize} needs --data: a folder of images, a JSONL file, or demo")
    if args.data and not args.quantize:
        raise UsageError("--data is what --quantize int8 or --quantize fp8 calibrates on; give one of them too")


def _check_targets(
    args: argparse.Namespace,
    geometry: Geometry,
    budgets: tuple[Budget, ...],
    limits: Limits,
    output: Path,
    devices: Iterable[Device],
) -> None:
    """Refuse, as far as the request tells, what metaembed-build would refuse of the bundle."""
    from .build import check_before_export

    planned = Manifest(
        model=args.model,
        geometry=geometry,
        budgets=budgets,
        limits=limits,
        precision=args.precision,
        template={},
        files=dict.fromkeys((VISION, LANGUAGE, SCORER), FileRecord(0, "0" * 64)),
        quantization={"type": args.quantize, "token_table": "int8"} if args.quantize else None,
        opset=args.opset,
    )
    for device in devices:
        check_before_export(planned, output, device, force=args.force)


def _check_images(model: ResolvedModel, limits: Limits, *, random: bool) -> int:
    """Refuse limits that no image could keep to; the most tokens that one will have.

    A processor may allow less than was asked for; of a known size without weights there is none to ask.
    """
    from .golden import largest_size
    from .processor import read_processor
    from .source import asset_folders

    if not random and model.base is None:
        return limits.image_tokens
    rules = read_processor(asset_folders(model, random=random), limits.image_tokens)
    largest_size(rules)
    return rules.max_tokens


def _check_files(model: ResolvedModel, *, random: bool) -> None:
    """What the export would read of the model, as far as there is any, looked at without being loaded."""
    from .processor import find_tokenizer
    from .source import asset_folders

    if random or model.base is not None:
        find_tokenizer(asset_folders(model, random=random), model.geometry)
    if not random and model.base is not None:
        model.check()


def _read_calibration(args: argparse.Namespace, limits: Limits) -> Any:
    """The calibration request, its data read and chosen before the export's minutes; None without ``--quantize``."""
    if not args.quantize:
        return None
    from metaembed.calibration.cli import make_request

    return make_request(args.quantize, args.data, text_tokens=limits.text_tokens)


class TerminalProgress:
    """Stages as lines, weights and golden inputs as bars; all on stderr, bars on a terminal only."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self._bar: Any = None

    def stage(self, what: str) -> None:
        self._close()
        if not self.quiet:
            print(f"{what} ...", file=sys.stderr)

    def advance(self, nbytes: int) -> None:
        if self._bar is None:
            self._bar = byte_bar("weights", quiet=self.quiet)
        self._bar.update(nbytes)

    def track(self, items: Iterable[Any], what: str) -> Iterable[Any]:
        self._close()
        return progress(items, what, quiet=self.quiet)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
