"""``metaembed-bench engine``: latency of a bundle's TensorRT engines on this GPU: every budget and side, and scoring."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from metaembed.export.route import device_here
from metaembed.runtime import layout
from metaembed.runtime.cost import language_flops, scoring_flops, vision_flops, weight_bytes_read
from metaembed.runtime.devices import Device
from metaembed.runtime.errors import MetaEmbedError, UsageError
from metaembed.runtime.graph_maxsim import Scorer
from metaembed.runtime.manifest import LANGUAGE, SCORER, VISION, Bundle
from metaembed.runtime.maxsim import maxsim
from metaembed.runtime.session import Session
from metaembed.runtime.session_trt import open_trt_sessions

WARM_UP, RUNS = 5, 50
TEXT_TOKENS = 32
CANDIDATE_BYTES = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="a bundle with engines for this GPU (metaembed-build)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="items at once (default: 1)")
    parser.add_argument("--cuda-graphs", action="store_true", help="replay recorded CUDA graphs where shapes repeat")
    parser.add_argument("-o", "--output", type=Path, help="append the records to this JSONL file")


def work(args: argparse.Namespace) -> int:
    bundle = Bundle.open(args.bundle)
    sessions = open_trt_sessions(bundle, (VISION, LANGUAGE), cuda_graphs=args.cuda_graphs)
    if sessions is None:
        raise MetaEmbedError(f"there is no engine for a GPU here; on the device: metaembed-build {args.bundle}")
    with ExitStack() as stack:
        for session in sessions:
            stack.callback(session.close)
        scorer = stack.enter_context(Scorer.open(bundle))
        device = _device_here()
        encoded = measure_engines(bundle, *sessions, device=device, batch=args.batch)
        measured = chain(
            (record | {"cuda_graphs": args.cuda_graphs} for record in encoded),
            measure_scorer(bundle, scorer, device=device),
        )
        for record in measured:
            print(json.dumps(record))
            if args.output:
                with args.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
    return 0


def measure_engines(
    bundle: Bundle,
    vision: Session,
    language: Session,
    *,
    device: Device | None = None,
    batch: int = 1,
    runs: int = RUNS,
) -> Iterator[dict[str, Any]]:
    """One record for the vision graph, then one for each side and number of vectors that the bundle's budgets name.

    A query is 32 text tokens; a candidate is one square image at the bundle's limit and 32 text tokens. Times include
    the copies to and from the GPU, but image embeddings stay there; each run ends when the result is on the host.
    ``limit_ms``, where the device is known: all operations at its dense peak rate or all weights read once, the slower.
    """
    geometry = bundle.manifest.geometry
    kind = (bundle.manifest.quantization or {}).get("type") or bundle.manifest.precision
    decoder = weight_bytes_read(geometry, kind, image=False)
    tower = weight_bytes_read(geometry, kind, image=True) - decoder
    grid = _square_grid(bundle)
    pixels = np.random.default_rng(0).standard_normal((grid[0] * grid[1], bundle.manifest.geometry.vision.patch_values))
    images = layout.lay_out_images([pixels.astype(np.float32)] * batch, [grid] * batch)
    common = {"runs_on": language.description, "model": bundle.manifest.model, "batch": batch, "runs": runs}

    def see() -> Any:
        return np.asarray(vision.run(images.feeds())["image_embeddings"])

    limit = _limit(device, kind, batch * vision_flops(geometry.vision, grid[0] * grid[1]), tower)
    yield {"graph": VISION, "image_tokens": grid[0] * grid[1] // 4, **common, **time_runs(see, runs), **limit}
    embedded = vision.run(images.feeds())["image_embeddings"]  # stays on the GPU, as it does when an encoder runs
    sides = {(side, getattr(budget, side)) for budget in bundle.manifest.budgets for side in ("query", "candidate")}
    for side, vectors in sorted(sides):
        feeds = _language_feeds(bundle, side, vectors, batch, grid, images.patches.shape[1], embedded)
        tokens = int(feeds["token_ids"].shape[1])
        times = time_runs(lambda feeds=feeds: language.run(feeds)["embeddings"], runs)
        limit = _limit(device, kind, batch * language_flops(geometry.text, tokens, vectors), decoder)
        yield {"graph": LANGUAGE, "side": side, "vectors": vectors, "positions": tokens, **common, **times, **limit}


def measure_scorer(
    bundle: Bundle,
    scorer: Scorer,
    *,
    device: Device | None = None,
    candidate_bytes: int = CANDIDATE_BYTES,
    runs: int = RUNS,
) -> Iterator[dict[str, Any]]:
    """One query against as many candidates as fill ``candidate_bytes``, a record for each budget and place of theirs.

    ``device``: they stay on the GPU, as ``Index.place`` keeps them; ``host``: they are copied over every time; ``cpu``:
    MaxSim on the processor. ``gb_s`` is the candidates' bytes over the median. ``limit_ms`` is the GPU's, candidates there.
    """
    dim, rng = bundle.manifest.geometry.dim, np.random.default_rng(0)
    for budget in bundle.manifest.budgets:
        items = max(1, candidate_bytes // (budget.candidate * dim * scorer.dtype.itemsize))
        query = rng.standard_normal((1, budget.query, dim), np.float32)
        values = rng.standard_normal((items, budget.candidate, dim), np.float32).astype(scorer.dtype)
        placed = scorer.place(values.__getitem__, values.shape)
        try:
            ways = {
                "device": lambda query=query, placed=placed: scorer.scores(query, placed),
                "host": lambda query=query, values=values: scorer.scores(query, values),
                "cpu": lambda query=query, values=values: maxsim(query, values),
            }
            for place, run in ways.items():
                times = time_runs(run, runs)
                rate = {"gb_s": round(values.nbytes / times["p50_ms"] / 1e6, 3)}
                common = {"budget": str(budget), "items": items, "candidates": place, "runs_on": scorer.description}
                flops = scoring_flops(bundle.manifest.geometry, budget, items)
                limit = _limit(device, bundle.manifest.precision, flops, values.nbytes) if place == "device" else {}
                yield {
                    "graph": SCORER,
                    "model": bundle.manifest.model,
                    **common,
                    "runs": runs,
                    **times,
                    **rate,
                    **limit,
                }
        finally:
            placed.free()


def _limit(device: Device | None, kind: str, flops: int, nbytes: int) -> dict[str, Any]:
    """A record's fields of the device's limit, in the type of the products; none where the device is not known."""
    if device is None:
        return {}
    return {"limit_ms": round(device.limit_ms(kind, flops, nbytes), 4), "limit_of": device.name}


def _device_here() -> Device | None:
    """The table's row of this GPU, None where it has none: there is then no limit to hold times against."""
    try:
        return device_here()
    except UsageError:
        return None


def time_runs(run: Callable[[], object], runs: int) -> dict[str, float]:
    """Percentiles in milliseconds, after a warm-up."""
    for _ in range(WARM_UP):
        run()
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        taken.append((time.perf_counter() - start) * 1e3)
    return {f"p{rank}_ms": round(float(np.percentile(taken, rank)), 3) for rank in (50, 90, 99)}


def _square_grid(bundle: Bundle) -> tuple[int, int]:
    side = isqrt(bundle.manifest.limits.image_tokens) * layout.MERGE
    return side, side


def _language_feeds(
    bundle: Bundle, side: str, vectors: int, batch: int, grid: tuple[int, int], windows: int, embedded: Any
) -> Mapping[str, Any]:
    geometry = bundle.manifest.geometry
    text = np.random.default_rng(1).integers(0, 256, TEXT_TOKENS)
    if side == "query":
        prompt, shown = text, None
        meta = layout.query_meta_tokens(geometry.text.vocab, vectors)
        embedded = np.zeros((1, 1, geometry.text.hidden), embedded.dtype)
    else:
        prompt = np.concatenate([np.full(grid[0] * grid[1] // 4, geometry.image_token_id), text])
        shown = grid
        meta = layout.candidate_meta_tokens(geometry.text.vocab, geometry.query_tokens, vectors)
    inputs = layout.lay_out_prompts(
        [prompt] * batch, [shown] * batch, meta, vectors, image_token=geometry.image_token_id, windows=windows
    )
    return {**inputs.feeds(), "image_embeddings": embedded}
