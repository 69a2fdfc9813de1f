"""``metaembed-bench engine``: latency of a bundle on this GPU, on its TensorRT engines or in ONNX Runtime: every budget and
side, and scoring."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import chain
from math import isqrt
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from metaembed.export.route import device_here
from metaembed.runtime import layout
from metaembed.runtime.cost import language_flops, scoring_flops, vision_flops, weight_bytes_read
from metaembed.runtime.devices import Device
from metaembed.runtime.errors import MetaEmbedError, UsageError
from metaembed.runtime.gpu_kernel import KernelScorer
from metaembed.runtime.graph_maxsim import QUERIES, Scorer
from metaembed.runtime.manifest import LANGUAGE, SCORER, VISION, Bundle
from metaembed.runtime.maxsim import maxsim
from metaembed.runtime.open_sessions import open_sessions
from metaembed.runtime.session import DeviceSession, Session

from .records import append_records, check_output, make_record
from .timing import percentiles, time_interleaved

WARMUP, RUNS = 5, 50
TEXT_TOKENS = 32
CANDIDATE_MIB = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle", type=Path, help="a bundle; its engines for this GPU (metaembed-build) come before ONNX Runtime"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="items at once (default: 1)")
    parser.add_argument("--cuda-graphs", action="store_true", help="replay recorded CUDA graphs where shapes repeat")
    parser.add_argument("--runs", type=int, default=RUNS, metavar="N", help="timed runs of each (default: %(default)s)")
    parser.add_argument(
        "--candidates",
        type=int,
        default=CANDIDATE_MIB,
        metavar="MIB",
        help="of candidates to score (default: %(default)s)",
    )
    parser.add_argument("-o", "--output", type=Path, help="append the records to this JSONL file")


def work(args: argparse.Namespace) -> int:
    if min(args.batch, args.runs, args.candidates) < 1:
        raise UsageError("--batch, --runs and --candidates are at least 1")
    if args.output:
        check_output(args.output)
    bundle = Bundle.open(args.bundle)
    with ExitStack() as stack:
        sessions = _open_on_gpu(bundle, args.cuda_graphs, stack)
        scorer = stack.enter_context(Scorer.open(bundle))
        graph = None
        if isinstance(scorer, KernelScorer):
            graph = stack.enter_context(Scorer(*open_sessions(bundle, (SCORER,))))
        device = _device_here()
        encoded = measure_engines(bundle, *sessions, device=device, batch=args.batch, runs=args.runs)
        measured = chain(
            (("engine", record | {"cuda_graphs": args.cuda_graphs}) for record in encoded),
            (
                ("scoring_gpu", record)
                for record in measure_scorer(
                    bundle, scorer, graph=graph, device=device, candidate_bytes=args.candidates << 20, runs=args.runs
                )
            ),
        )
        print(
            f"{bundle.manifest.model}, {bundle.manifest.precision}, on {sessions[1].description}; scoring on {scorer.description}"
        )
        for kind, values in measured:
            print(describe(kind, values), flush=True)
            if args.output:
                append_records(args.output, [make_record(kind, values, args.bundle)])
    return 0


def describe(kind: str, values: Mapping[str, Any]) -> str:
    """One measurement as a line for people: what, median, tail, and how near the device's limit that is."""
    if kind == "scoring_gpu":
        many = f"{values['queries']} queries" if values["queries"] > 1 else "one query"
        what = f"score {values['budget']}, {many}, {values['items']:,} candidates: {values['candidates']}"
        tail = f"p95 {values['p95_ms']:>9.3f}  {values['gb_s']:>8,.1f} GB/s"
    elif values["graph"] == VISION:
        what, tail = f"image of {values['image_tokens']} tokens", f"p99 {values['p99_ms']:>9.3f}"
    else:
        what = f"{values['side']}, {values['vectors']} vectors, {values['positions']} positions"
        tail = f"p99 {values['p99_ms']:>9.3f}"
    share = (
        f"  {values['limit_ms'] / values['p50_ms']:.0%} of {values['limit_of']}'s limit" if "limit_ms" in values else ""
    )
    return f"{what:<66} {values['p50_ms']:>9.3f} ms  {tail}{share}"


def _open_on_gpu(bundle: Bundle, cuda_graphs: bool, stack: ExitStack) -> tuple[Session, Session]:
    """Vision and language, on engines or on ONNX Runtime's provider for NVIDIA; the stack closes them."""
    graphs = (VISION, LANGUAGE)
    vision, language = open_sessions(bundle, graphs, cuda_graphs=cuda_graphs)
    for session in (vision, language):
        stack.callback(session.close)
    if not isinstance(language, DeviceSession):
        raise MetaEmbedError(
            f"nothing runs on a GPU here ({language.description}); on the device: metaembed-build {bundle.folder}, or install "
            "onnxruntime-gpu"
        )
    return vision, language


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
    yield {
        "graph": VISION,
        "image_tokens": grid[0] * grid[1] // 4,
        **common,
        **percentiles(see, rounds=runs, warmup=WARMUP),
        **limit,
    }
    embedded = vision.run(images.feeds())["image_embeddings"]  # stays on the GPU, as it does when an encoder runs
    sides = {(side, getattr(budget, side)) for budget in bundle.manifest.budgets for side in ("query", "candidate")}
    for side, vectors in sorted(sides):
        feeds = _language_feeds(bundle, side, vectors, batch, grid, images.patches.shape[1], embedded)
        tokens = int(feeds["token_ids"].shape[1])
        times = percentiles(lambda feeds=feeds: language.run(feeds)["embeddings"], rounds=runs, warmup=WARMUP)
        limit = _limit(device, kind, batch * language_flops(geometry.text, tokens, vectors), decoder)
        yield {"graph": LANGUAGE, "side": side, "vectors": vectors, "positions": tokens, **common, **times, **limit}


def measure_scorer(
    bundle: Bundle,
    scorer: Scorer,
    *,
    graph: Scorer | None = None,
    device: Device | None = None,
    candidate_bytes: int = CANDIDATE_MIB << 20,
    runs: int = RUNS,
) -> Iterator[dict[str, Any]]:
    """Queries against as many candidates as fill ``candidate_bytes``, a record for each budget and place of theirs.

    One query, and a batch of 32. ``device``: candidates stay on the GPU, as ``Index.place`` keeps them; ``graph``: so too,
    scored by ``graph``, the bundle's scorer graph where ``scorer`` is another; ``host``: they are copied over every time;
    ``cpu``: MaxSim on the processor; ``torch``: PyTorch's, candidates on the GPU, where it is installed with CUDA. ``gb_s``
    is the candidates' bytes over the median. ``limit_ms`` is the GPU's, candidates there.
    """
    dim, rng = bundle.manifest.geometry.dim, np.random.default_rng(0)
    scorers = {"device": scorer} | ({} if graph is None else {"graph": graph})
    for budget in bundle.manifest.budgets:
        items = max(1, candidate_bytes // (budget.candidate * dim * scorer.dtype.itemsize))
        values = rng.standard_normal((items, budget.candidate, dim), np.float32).astype(scorer.dtype)
        with ExitStack() as stack:
            held = [(name, one, one.place(values.__getitem__, values.shape)) for name, one in scorers.items()]
            for _, _, placed in held:
                stack.callback(placed.free)
            for count in (1, QUERIES):
                query = rng.standard_normal((count, budget.query, dim), np.float32)
                ways: dict[str, Callable[[], object]] = {
                    name: partial(one.scores, query, placed) for name, one, placed in held
                } | torch_maxsim(query, values)
                here = {"host": partial(scorer.scores, query, values), "cpu": partial(maxsim, query, values)}
                timed = time_interleaved(ways | (here if count == 1 else {}), rounds=runs, warmup=WARMUP)
                flops = count * scoring_flops(bundle.manifest.geometry, budget, items)
                for place, times in timed.items():
                    yield {
                        "graph": SCORER,
                        "model": bundle.manifest.model,
                        "budget": str(budget),
                        "queries": count,
                        "items": items,
                        "candidates": place,
                        "runs_on": scorers.get(place, scorer).description,
                        "runs": runs,
                        "p50_ms": times.median_ms,
                        "p95_ms": times.p95_ms,
                        "gb_s": round(values.nbytes / times.median_ms / 1e6, 3),
                        **(_limit(device, bundle.manifest.precision, flops, values.nbytes) if place in ways else {}),
                    }


def torch_maxsim(queries: NDArray[Any], values: NDArray[Any]) -> dict[str, Callable[[], object]]:
    """The competitor, what a person would write: one flat product, maximum, sum. Products in the candidates' type, as PyTorch
    gives them, and in float32, as ours are."""
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    bits = values.view(np.int16) if values.dtype == ml_dtypes.bfloat16 else values
    held = torch.from_numpy(bits).cuda()
    held = held.view(torch.bfloat16) if bits is not values else held
    (items, r_c, dim), (count, r_q, _) = values.shape, queries.shape

    def run(**options: Any) -> object:
        asked = torch.from_numpy(queries).cuda().to(held.dtype).view(-1, dim)
        products = torch.mm(held.view(-1, dim), asked.T, **options).view(items, r_c, count, r_q)
        return products.amax(1).float().sum(-1).T.cpu().numpy()

    ways: dict[str, Callable[[], object]] = {"torch": run}
    if held.dtype != torch.float32:
        ways["torch, float32 products"] = lambda: run(out_dtype=torch.float32)
    return ways


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
