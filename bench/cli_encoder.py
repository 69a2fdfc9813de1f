"""``metaembed-bench encoder``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from metaembed.runtime.errors import BundleError, MetaEmbedError, UsageError

from .rehearsal_sizes import add_rehearse

INT8 = "bundle int8"
# Contestants agree to 1e-6 in float32 and to 3e-3 in half of its bits; only another model's weights differ by more.
SAME = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 2e-2}
TORCH_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, nargs="?", help="a folder that metaembed-export wrote; without --rehearse")
    parser.add_argument(
        "--checkpoint", metavar="DIR", help="what it was exported from, for PyTorch (default: the demo)"
    )
    add_rehearse(parser, "random weights of a geometry instead, and their INT8 bundle")
    parser.add_argument(
        "--precision", choices=SAME, default="fp32", help="of --rehearse; a bundle has its own (default: %(default)s)"
    )
    parser.add_argument(
        "--gpu", action="store_true", help="everything on this machine's NVIDIA GPU, in the bundle's precision"
    )
    parser.add_argument("--int8", type=Path, metavar="BUNDLE", help="its quantised bundle, one more contestant")
    parser.add_argument(
        "--skip", action="append", default=[], metavar="NAME", help="leave a contestant out; repeatable"
    )
    parser.add_argument("--only", metavar="TEXT", help="only inputs whose name holds this, for example 'text'")
    parser.add_argument("--rounds", type=int, default=20, help="timed runs of each input (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="runs before those (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="default: one a core")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="add the records to this JSON lines file")


def work(args: argparse.Namespace) -> None:
    from metaembed.runtime.manifest import Bundle

    from .encoder import CASES, race
    from .records import append_records, make_record

    if args.rounds < 1 or args.warmup < 0 or args.threads < 0:
        raise UsageError("--rounds is at least 1, --warmup and --threads at least 0")
    cases = [case for case in CASES if args.only is None or args.only in case.name]
    if not cases:
        raise UsageError(f"no input is called {args.only!r}; there are {', '.join(case.name for case in CASES)}")
    with _models(args) as (bundle, checkpoint, int8, model):
        manifest = Bundle.open(bundle, verify=False).manifest
        contestants = line_up(args, bundle, manifest.precision, checkpoint, int8)
        names = [one.name for one in contestants]
        if unknown := [name for name in args.skip if name not in (*names, INT8)]:
            raise UsageError(f"no contestant is called {unknown[0]!r}; there are {', '.join(names)}")
        contestants = [one for one in contestants if one.name not in args.skip]
        note = (lambda text: None) if args.quiet else (lambda text: print(f"{text} ...", file=sys.stderr))
        kind, common = "encoder_gpu" if args.gpu else "encoder", {"model": model, "precision": manifest.precision}
        if args.gpu:
            common["opset"] = manifest.opset
        for measured in race(contestants, cases, rounds=args.rounds, warmup=args.warmup, note=note):
            print_race(measured)
            check_same(measured, SAME[manifest.precision])
            if all("error" in values for values in measured):
                raise MetaEmbedError("no contestant could run; the lines above say why")
            if args.output:
                records = [make_record(kind, {**common, **values}, bundle) for values in measured]
                append_records(args.output, records)
    if not args.gpu:
        print("on a GPU, against PyTorch in the bundle's precision: not run; --gpu asks for it")


def check_same(measured: list[dict], most: float = SAME["fp32"]) -> None:
    """Raise BundleError when a contestant that should agree with the bundle does not: they would not do the same work."""
    if any(values.get("max_abs_difference", 0) > most for values in measured if values["contestant"] != INT8):
        raise BundleError("the contestants' vectors differ: --checkpoint is not what the bundle was exported from")


def line_up(args: argparse.Namespace, bundle: Path, precision: str, checkpoint: Path, int8: Path | None) -> list:
    """Our bundle first: the others' vectors are compared with its own."""
    from .contestants import build_bundle
    from .contestants_torch import build_hf
    from .encoder import Contestant

    hf = {"checkpoint": checkpoint, "bundle": bundle, "threads": args.threads}
    if args.gpu:
        hf |= {"device": "cuda", "dtype": TORCH_TYPES[precision]}
        return [
            Contestant(f"bundle {precision}", build_bundle, {"folder": bundle, "threads": args.threads, "gpu": True}),
            Contestant(
                f"bundle {precision}, CUDA graphs",
                build_bundle,
                {"folder": bundle, "threads": args.threads, "gpu": True, "cuda_graphs": True},
            ),
            Contestant("HF SDPA", build_hf, hf),
            Contestant("HF SDPA, 80 rows", build_hf, hf | {"all_rows": True}),
            Contestant("torch.compile", build_hf, hf | {"compiled": True}),
        ]
    contestants = [
        Contestant("bundle fp32", build_bundle, {"folder": bundle, "threads": args.threads}),
        Contestant("HF eager", build_hf, hf),
        Contestant("HF eager, 80 rows", build_hf, hf | {"all_rows": True}),
        Contestant("torch.compile", build_hf, hf | {"compiled": True}),
        Contestant("plain ONNX", build_hf, hf | {"plain_onnx": True}),
    ]
    if int8:
        contestants.insert(1, Contestant(INT8, build_bundle, {"folder": int8, "threads": args.threads}))
    return contestants


def print_race(measured: list[dict]) -> None:
    for values in measured:
        head = f"{values['input']:<22} {values['contestant']:<20}"
        if "error" in values:
            print(f"{head} could not run: {values['error']}")
            continue
        print(
            f"{head} {values['median_ms']:>9.2f} ms  p95 {values['p95_ms']:>9.2f}  {values['peak_rss_mib']:>8,.0f} MiB"
            + (f"  {values['gpu_mib']:>8,.0f} MiB on the GPU" if "gpu_mib" in values else "")
            + f"  differs by {values['max_abs_difference']:.1e}"
        )


@contextmanager
def _models(args: argparse.Namespace):
    """The bundle, its checkpoint, its INT8 bundle if there is one, and the model's name; rehearsals go to a temporary folder."""
    from metaembed.export.models import DEMO_FOLDER
    from metaembed.runtime.manifest import Bundle

    if (args.rehearse is None) == (args.bundle is None):
        raise UsageError("name a bundle, or ask for --rehearse")
    if args.gpu and (args.int8 or args.threads):
        raise UsageError("--gpu has no INT8 contestant and no CPU threads; leave --int8 and --threads out")
    if not args.rehearse and args.precision != "fp32":
        raise UsageError("--precision is of --rehearse; a bundle has its own")
    if args.rehearse and args.int8:
        raise UsageError("--rehearse makes its own INT8 bundle; leave it out with --skip 'bundle int8'")
    if not args.rehearse:
        name = Bundle.open(args.bundle).manifest.model
        if args.checkpoint is None and name != "demo":
            raise UsageError(
                f"{args.bundle} holds {name!r}; name the folder it was exported from with --checkpoint DIR"
            )
        yield args.bundle, Path(args.checkpoint or DEMO_FOLDER), args.int8, name
        return

    from .rehearsal import quantise_rehearsal, write_rehearsal

    with tempfile.TemporaryDirectory(prefix="rehearsal-") as work:
        bundle, checkpoint = write_rehearsal(Path(work), args.rehearse, args.precision)
        int8 = (
            None
            if INT8 in args.skip or args.gpu
            else quantise_rehearsal(bundle, Path(work, "int8"), args.threads, quiet=True)
        )
        yield bundle, checkpoint, int8, args.rehearse
