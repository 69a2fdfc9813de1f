"""``metaembed-bench calibration``: quality of quantised demo bundles, and the speed of INT8 on this CPU."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from metaembed.runtime.command import natural
from metaembed.runtime.errors import MetaEmbedError, UsageError
from metaembed.runtime.manifest import Bundle

from .rehearsal_sizes import add_rehearse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "bundles", type=Path, nargs="*", help="the float bundle first, then bundles that metaembed-calibrate made of it"
    )
    add("--speed", action="store_true", help="time one image candidate instead of measuring quality")
    add_rehearse(parser, "with --speed, and without bundles: random weights of a geometry")
    add(
        "--weights",
        action="store_true",
        help="weight bytes of INT8 against bf16 for every known size: arithmetic, no bundles",
    )
    add("--graphs", type=Path, action="append", default=[], metavar="DIR", help="vision.onnx and language.onnx that another "
        "tool quantised, judged beside; repeatable")  # fmt: skip
    add("--onnxruntime", action="store_true", help="also quantise with onnxruntime's static quantisation")
    add("--modelopt-python", type=Path, metavar="PYTHON", help="also quantise with NVIDIA ModelOpt: the Python of an "
        "environment of its own, with nvidia-modelopt[onnx]")  # fmt: skip
    add("--count", type=int, default=500, metavar="N", help="candidate pages of the test split (default: 500)")
    add(
        "--seed",
        type=natural,
        action="append",
        metavar="N",
        help="seed of a test split; repeatable, for more queries (default: 0)",
    )
    add("--samples", type=int, default=128, metavar="N", help="calibration items of the other tools (default: 128)")
    add("--rounds", type=int, default=5, metavar="N", help="timed rounds (default: 5)")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads (default: one per core)")
    add("-o", "--output", type=Path, metavar="FILE", help="append the records to this JSONL file")


def work(args: argparse.Namespace) -> int:
    from .records import append_records, make_record

    if args.weights:
        kind, measured, artefact = "int8_weights", measure_weights, None
    elif args.speed:
        kind, measured, artefact = "int8_speed", measure_speed, None
    else:
        kind, measured, artefact = "calibration", measure_contenders, args.bundles[0] if args.bundles else None
    if len(args.bundles) < 2 and not (args.weights or (args.speed and args.rehearse)):
        raise UsageError("name the float bundle and at least one bundle that metaembed-calibrate made of it")
    for values in measured(args):
        print(json.dumps(values), flush=True)
        if args.output:
            append_records(args.output, [make_record(kind, values, artefact)])
    return 0


def measure_weights(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from metaembed.export.models import resolve_model
    from metaembed.runtime.known_models import KNOWN

    from .calibration import plan_int8_weights

    for name in ("demo", *KNOWN):
        yield {"model": name, **plan_int8_weights(resolve_model(name).geometry)}


def measure_speed(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One image candidate at the bundle's largest image and budget, end to end."""
    from PIL import Image

    from .calibration import time_interleaved

    with tempfile.TemporaryDirectory(prefix="rehearsal-") as scratch:
        folders = _rehearse(Path(scratch), args) if args.rehearse else args.bundles
        side = int(np.sqrt(Bundle.open(folders[0], verify=False).manifest.limits.image_tokens)) * 28
        noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
        page = Image.fromarray(noise)
        yield from time_interleaved(
            folders, lambda encoder: encoder.encode_candidates(images=[page]), rounds=args.rounds, threads=args.threads
        )


def _rehearse(scratch: Path, args: argparse.Namespace) -> list[Path]:
    """A bundle of random weights, and its INT8 bundle: for its speed, not its quality."""
    from .rehearsal import quantise_rehearsal, write_rehearsal

    if args.bundles:
        raise UsageError("name bundles, or ask for --rehearse")
    bundle, _ = write_rehearsal(scratch, args.rehearse)
    return [bundle, quantise_rehearsal(bundle, scratch / "int8", args.threads, quiet=args.quiet)]


def measure_contenders(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A record for each contender and budget; one that could not be made is a record with the reason."""
    from metaembed.calibration.recipe import Recipe

    from .calibration import (
        embed_split,
        exact_encoder,
        measure_quality,
        share_quantised,
        shares_of_linears,
        weight_bytes,
    )
    from .scenes_queries import make_split

    source, own = Bundle.open(args.bundles[0]), args.bundles[1:]
    recipes = [folder / "recipe.json" for folder in own if (folder / "recipe.json").is_file()]
    if not recipes:
        raise UsageError(
            "name at least one bundle that metaembed-calibrate made: its recipe says what each Linear weighs"
        )
    shares = shares_of_linears(source.folder, Recipe.load(recipes[0]))
    seeds = args.seed or [0]
    splits = [make_split("test", seed, scenes=args.count, queries=(args.count // 4,) * 3) for seed in seeds]
    relevant = [[split.relevant(query) for query in split.queries] for split in splits]
    common = {"test_seed": ", ".join(map(str, seeds)), "candidates": args.count, "queries": sum(map(len, relevant))}
    with exact_encoder(source, source.folder, args.threads) as encoder:
        reference = [embed_split(encoder, split) for split in splits]
    with tempfile.TemporaryDirectory() as scratch:
        contenders: dict[str, Path | str] = {folder.name: folder for folder in (*own, *args.graphs)}
        contenders |= _competitors(source, args, Path(scratch))
        for name, folder in contenders.items():
            recipe = (Bundle.open(folder, verify=False).manifest.quantization or {}) if folder in own else {}
            kind = recipe.get("type") or ("fp8" if "fp8" in name else "int8")
            head = {"contender": name, "type": kind, **common}
            if isinstance(folder, str):
                yield {**head, "error": folder}
                continue
            head["share_of_linear_multiplies"] = round(share_quantised(folder, shares), 4)
            if folder in own:
                head |= {"weight_bytes": weight_bytes(folder), "weight_bytes_source": weight_bytes(source.folder)}
            with exact_encoder(source, folder, args.threads) as encoder:
                found = [embed_split(encoder, split) for split in splits]
            for record in measure_quality(relevant, reference, found, source.manifest.budgets, kind):
                yield {**head, **record}


def _competitors(source: Bundle, args: argparse.Namespace, scratch: Path) -> dict[str, Path | str]:
    """Folders of graphs that other tools quantised, from the items that ours calibrates on, or why there are none."""
    if not args.onnxruntime and args.modelopt_python is None:
        return {}
    from metaembed.calibration.awkward import awkward
    from metaembed.calibration.cli import demo_items
    from metaembed.calibration.dataset import choose

    from .quantisers import (
        MODELOPT,
        ONNXRUNTIME,
        quantise_with_modelopt,
        quantise_with_onnxruntime,
        record_feeds,
        save_feeds,
        write_plain_graphs,
    )

    limits = source.manifest.limits
    chosen = choose(demo_items(0), "demo", samples=args.samples, text_tokens=limits.text_tokens).items
    feeds = record_feeds(source, [*chosen, *awkward(chosen, held_out=False)], args.threads)
    plain = scratch / "plain"
    linears = write_plain_graphs(source, plain)
    found: dict[str, Path | str] = {}
    for method in ONNXRUNTIME if args.onnxruntime else ():
        found[method.name] = folder = scratch / method.name.replace(" ", "-")
        quantise_with_onnxruntime(method, plain, linears, feeds, folder)
    if args.modelopt_python is not None:
        save_feeds(feeds, plain)
        for method in MODELOPT:
            found[method.name] = folder = scratch / method.name.replace(" ", "-")
            try:
                quantise_with_modelopt(method, args.modelopt_python, plain, linears, folder)
            except MetaEmbedError as error:
                found[method.name] = str(error)
    return found
