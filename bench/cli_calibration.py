"""``metaembed-bench calibration``: quality of quantised demo bundles, and the speed of INT8 on this CPU."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from metaembed.runtime.errors import UsageError
from metaembed.runtime.manifest import Bundle

ORT_METHODS = ("MinMax", "Entropy", "Percentile")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "bundles", type=Path, nargs="+", help="the float bundle first, then bundles that metaembed-calibrate made of it"
    )
    add("--speed", action="store_true", help="time one image candidate instead of measuring quality")
    add("--graphs", type=Path, action="append", default=[], metavar="DIR", help="vision.onnx and language.onnx that another "
        "tool quantised, judged beside; repeatable")  # fmt: skip
    add("--onnxruntime", action="store_true", help="also quantise with onnxruntime's static quantisation")
    add("--count", type=int, default=500, metavar="N", help="candidate pages of the test split (default: 500)")
    add("--seed", type=int, default=0, help="seed of the test split (default: 0)")
    add("--samples", type=int, default=128, metavar="N", help="calibration items for onnxruntime (default: 128)")
    add("--rounds", type=int, default=5, metavar="N", help="timed rounds (default: 5)")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads (default: one per core)")
    add("-o", "--output", type=Path, metavar="FILE", help="append the records to this JSONL file")


def work(args: argparse.Namespace) -> int:
    if len(args.bundles) < 2 and not args.graphs and not args.onnxruntime:
        raise UsageError("name the float bundle and at least one contender")
    command = " ".join(["metaembed-bench", *sys.argv[1:]])
    for record in measure_speed(args) if args.speed else measure_contenders(args):
        line = json.dumps({**record, "command": command})
        print(line, flush=True)
        if args.output:
            with args.output.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    return 0


def measure_speed(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One image candidate at the bundle's largest image and budget, end to end."""
    from PIL import Image

    from .calibration import time_interleaved

    side = int(np.sqrt(Bundle.open(args.bundles[0], verify=False).manifest.limits.image_tokens)) * 28
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    page = Image.fromarray(noise)
    yield from time_interleaved(
        args.bundles, lambda encoder: encoder.encode_candidates(images=[page]), rounds=args.rounds, threads=args.threads
    )


def measure_contenders(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from .calibration import embed_split, exact_encoder, measure_quality, share_quantised
    from .scenes_queries import make_split

    split = make_split("test", args.seed, scenes=args.count, queries=(args.count // 4,) * 3)
    source = Bundle.open(args.bundles[0])
    with exact_encoder(source, source.folder, args.threads) as encoder:
        reference = embed_split(encoder, split)
    with tempfile.TemporaryDirectory() as scratch:
        contenders = {folder.name: folder for folder in (*args.bundles[1:], *args.graphs)}
        if args.onnxruntime:
            contenders |= _onnxruntime(source, args, Path(scratch))
        for name, folder in contenders.items():
            with exact_encoder(source, folder, args.threads) as encoder:
                found = embed_split(encoder, split)
            kind = "fp8" if "fp8" in name else "int8"
            for record in measure_quality(split, reference, found, source, kind):
                yield {"contender": name, "share_of_linear_weights": round(share_quantised(folder), 4), **record}


def _onnxruntime(source: Bundle, args: argparse.Namespace, scratch: Path) -> dict[str, Path]:
    from metaembed.calibration.cli import demo_items
    from metaembed.calibration.dataset import choose

    from .calibration import quantise_with_onnxruntime, record_feeds

    feeds = record_feeds(source, choose(demo_items(0), "demo", samples=args.samples).items, args.threads)
    found = {}
    for method in ORT_METHODS:
        for linears_only in (True, False):
            name = f"onnxruntime-{method}-{'linears' if linears_only else 'all-matmuls'}"
            quantise_with_onnxruntime(source, feeds, method, scratch / name, linears_only=linears_only)
            found[name] = scratch / name
    return found
