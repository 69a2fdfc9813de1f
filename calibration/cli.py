"""metaembed-calibrate: a bundle becomes an INT8 or FP8 bundle."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaembed.runtime.command import Parser, natural, progress, run_command
from metaembed.runtime.errors import MetaEmbedError, UsageError

from .dataset import SAMPLES, CalibrationItem

if TYPE_CHECKING:
    from .quantise import Request

EPILOG = """examples:
  metaembed-calibrate out --quantize int8 --data pages/ -o out8
  metaembed-calibrate out --quantize fp8 --data inputs.jsonl --samples 64 -o outf8
  metaembed-calibrate out --quantize int8 --recipe out8/recipe.json -o again

A JSONL file holds one {"text": ..., "image": ..., "side": "query"|"candidate"} a line; image paths are relative to it.
"""
TYPES, RANGES = ("int8", "fp8"), ("max", "percentile", "entropy", "mse")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="metaembed-calibrate",
        description="Quantise a bundle's Linears with explicit Q/DQ, from real inputs, and prove that the ranking survives: a "
        "bundle that fails its own check is never written.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("bundle", type=Path, help="a folder that metaembed-export wrote")
    add("--quantize", required=True, choices=TYPES, help="int8 (every GPU), or fp8 (compute capability 8.9 and up)")
    add(
        "--data",
        metavar="DIR|FILE.jsonl|demo",
        help="calibration inputs: a folder of images, a JSONL file, or the demo set",
    )
    add("--recipe", type=Path, metavar="FILE", help="quantise as an earlier recipe.json says, instead of from data")
    add("-o", "--output", type=Path, required=True, help="folder of the quantised bundle")
    add("-f", "--force", action="store_true", help="replace an existing bundle")
    add("--samples", type=int, metavar="N", help=f"inputs to draw from the data (default: {SAMPLES})")
    add("--seed", type=natural, metavar="N", help="which inputs are drawn (default: 0)")
    add("--observer", choices=RANGES, help="how activation ranges are set (default: max)")
    add("--no-smoothing", action="store_true", help="do not move outliers from activations into weights first")
    add(
        "--min-share",
        type=float,
        default=0.9,
        metavar="S",
        help="fail when less of the Linears' work can be quantised (default: 0.9)",
    )
    add(
        "--no-judge",
        action="store_true",
        help="quantise all of it and compare with nothing; the bundle says 'unverified'",
    )
    parser.add_common()
    return run_command(parser, run, argv)


def run(args: argparse.Namespace) -> int:
    from metaembed.runtime.manifest import Bundle

    from_data = {"samples": args.samples, "seed": args.seed, "observer": args.observer}
    from_data = {name: value for name, value in from_data.items() if value is not None}
    if args.no_smoothing:
        from_data["smooth"] = False
    if args.recipe is not None and from_data:
        flags = ", ".join("--no-smoothing" if name == "smooth" else f"--{name}" for name in from_data)
        raise UsageError(
            f"{flags} would say how ranges are found, and with --recipe they are in the file: leave one out"
        )
    limits = Bundle.open(args.bundle, verify=False).manifest.limits
    request = make_request(
        args.quantize,
        args.data,
        text_tokens=limits.text_tokens,
        recipe=args.recipe,
        **from_data,
        min_share=args.min_share,
        judge=not args.no_judge,
    )
    calibrate(args.bundle, request, args.output, force=args.force, quiet=args.quiet)
    return 0


def make_request(
    kind: str,
    data: str | None,
    *,
    text_tokens: int,
    samples: int = SAMPLES,
    seed: int = 0,
    recipe: Path | None = None,
    **how: Any,
) -> Request:
    """Read and choose the data, before anything that takes long. ``how`` is handed on to the request.

    Raises:
        UsageError: the data, the recipe or the request cannot be used.
        MetaEmbedError: a package is not installed.
    """
    try:
        from .dataset import choose
        from .quantise import Request
        from .recipe import Recipe
    except ImportError as error:
        raise MetaEmbedError(f"{error.name} is not installed; pip install 'metaembed-export[calibration]'") from None
    chosen = None
    if data == "":
        raise UsageError("--data is empty, perhaps an unset variable of the shell; name a folder, a file or demo")
    if data is not None:
        chosen = choose(read_data(data, seed), data, samples=samples, seed=seed, text_tokens=text_tokens)
    return Request(type=kind, data=chosen, recipe=None if recipe is None else Recipe.load(recipe), **how)


def calibrate(source: Path, request: Request, output: Path, *, force: bool, quiet: bool) -> None:
    """Quantise a bundle on the terminal: stages and bars on stderr, the check and the result on stdout."""
    from .quantise import quantise_bundle

    done = quantise_bundle(
        source,
        request,
        output,
        force=force,
        report=lambda line: None if quiet else print(f"{line} ...", file=sys.stderr),
        progress=lambda work, what: progress(work, what, quiet=quiet),
    )
    if done.check is not None and not quiet:
        print(done.check.table())
    held = "" if done.verdict is None else f"held-out {done.verdict}, "
    why = "the source has no golden vectors" if request.judge else "nothing was judged"
    checked = "check passed" if done.check else f"UNVERIFIED ({why})"
    twice = f", {len(done.recipe.twice)} group(s) in two steps" if done.recipe.twice else ""
    high = f", {len(done.recipe.high)} group(s) kept high" if done.recipe.high else ""
    print(f"{output}: {done.recipe.share:.1%} of the Linears' work in {request.type}{twice}{high}; {held}{checked}")


def read_data(data: str, seed: int) -> list[CalibrationItem]:
    """The items of ``--data``: the demo's training split, a folder or a file."""
    from .dataset import read_items

    return demo_items(seed) if data == "demo" else read_items(Path(data))


def demo_items(seed: int, scenes: int = 400) -> list[CalibrationItem]:
    """Scenes and queries of the demo's training split: pages, captions and both as candidates; all kinds of query."""
    try:
        from metaembed.bench.scenes_queries import enumerate_pairs, make_split
        from metaembed.bench.scenes_render import render
    except ImportError as error:
        raise MetaEmbedError(f"{error.name} is not installed; pip install 'metaembed-export[bench]'") from None
    split = make_split("train", seed, scenes=scenes, queries=(scenes // 4,) * 3)
    items = []
    for place, scene in enumerate(split.scenes):
        text, page = enumerate_pairs(sorted(scene.pairs)[:3]), render(scene)
        kinds = ((None, page), (None, page), (text, page), (text, None))  # pages are what the demo searches
        items.append(CalibrationItem("candidate", *kinds[place % 4], f"demo scene {place}"))
    for place, query in enumerate(split.queries):
        page = None if query.page is None else render(query.page)
        items.append(CalibrationItem("query", query.text, page, f"demo query {place}"))
    return items
