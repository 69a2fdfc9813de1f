"""Quantised demo bundles against the float one and against other quantisers, on the demo's test split, at every budget.

Every contender runs in the exact simulation (Q/DQ computed in floating point), so that only the placement of Q/DQ and the
ranges differ. All calibrate on the same items of the training split.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from metaembed.calibration.linears import HEAD, find_groups, load_graphs
from metaembed.calibration.recipe import Recipe
from metaembed.calibration.sessions import ExactSession
from metaembed.runtime.budget import Budget
from metaembed.runtime.encoder import Encoder
from metaembed.runtime.geometry import Geometry
from metaembed.runtime.manifest import Bundle
from metaembed.runtime.maxsim import maxsim
from metaembed.runtime.parity import TOLERANCES, compare, compare_rankings
from metaembed.runtime.tensors import META_TABLE, TOKEN_TABLE, expected_tensors

from .metrics import Relevant, ndcg_per_query
from .quality import confidence_interval
from .scenes_queries import Split
from .scenes_render import render

Embeddings = tuple[NDArray[np.float32], NDArray[np.float32]]  # queries (n, r, d), candidates (m, r, d)
BATCH = 16


def exact_encoder(bundle: Bundle, folder: Path, threads: int) -> Encoder:
    """The two graphs in ``folder`` with the preprocessing of ``bundle``, simulated exactly."""
    return Encoder(bundle, *(ExactSession(model, folder, threads=threads) for model in load_graphs(folder).values()))


def embed_split(encoder: Encoder, split: Split) -> Embeddings:
    """All queries and candidates of a split at the largest budget."""
    pages = [None if query.page is None else render(query.page) for query in split.queries]
    queries = encoder.encode_queries([query.text for query in split.queries], images=pages, batch_size=BATCH)
    return queries, encoder.encode_candidates(images=[render(scene) for scene in split.scenes], batch_size=BATCH)


def measure_quality(
    relevant: Sequence[Relevant],
    reference: Sequence[Embeddings],
    found: Sequence[Embeddings],
    budgets: Sequence[Budget],
    kind: str,
) -> Iterator[dict[str, Any]]:
    """One record a budget, over one or more splits: nDCG@5 beside the reference's, the worst vector, top-10 overlap.

    ``ndcg_change_low`` and ``_high`` are the 95 % bootstrap interval of the change, paired over the queries of all splits.

    Args:
        relevant: for each split and query, the indexes of its relevant candidates.
        reference: for each split, the float model's embeddings; ``found``: the quantised model's, aligned.
    """
    tolerance = TOLERANCES[kind]
    for budget in budgets:
        gained: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
        cosines, overlaps = [], []
        for wanted_first, (queries, candidates), (own_queries, own_candidates) in zip(
            relevant, reference, found, strict=True
        ):
            pairs = [
                (float_side[:, :vectors], own_side[:, :vectors])
                for float_side, own_side, vectors in (
                    (queries, own_queries, budget.query),
                    (candidates, own_candidates, budget.candidate),
                )
            ]
            wanted, scores = (maxsim(*sides) for sides in zip(*pairs, strict=True))
            gained.append((ndcg_per_query(wanted, wanted_first), ndcg_per_query(scores, wanted_first)))
            cosines += [compare(*pair, tolerance).min_cosine for pair in pairs]
            overlaps.append(compare_rankings(wanted, scores, tolerance))
        before, after = (np.concatenate(values) for values in zip(*gained, strict=True))
        low, high = confidence_interval(after - before)
        yield {
            "budget": str(budget),
            "ndcg_at_5": round(float(after.mean()), 4),
            "ndcg_at_5_fp32": round(float(before.mean()), 4),
            "ndcg_change_low": round(low, 4),
            "ndcg_change_high": round(high, 4),
            "worst_cosine": round(min(cosines), 5),
            "top10_overlap": round(
                float(np.average([o.overlap for o in overlaps], weights=[o.queries for o in overlaps])), 4
            ),
        }


def shares_of_linears(folder: Path, recipe: Recipe) -> dict[tuple[str, str], float]:
    """Share of the Linears' multiply-adds by graph and name of the MatMul, as the calibration set had it.

    Args:
        folder: of the float bundle that the recipe is for.
    """
    shares = {group.name: group.share for group in recipe.groups}
    return {
        (group.graph, str(linear.matmul.name)): shares[group.name] * linear.size / group.size
        for group in find_groups(load_graphs(folder))
        for linear in group.linears
    }


def share_quantised(folder: Path, shares: Mapping[tuple[str, str], float]) -> float:
    """Share of the Linears' multiply-adds whose MatMul reads a rounded input and a rounded weight."""
    return sum(
        shares.get((graph, str(node.name)), 0.0)
        for graph, model in load_graphs(folder).items()
        for node in model.graph
        if node.op_type == "MatMul" and all(_is_rounded(value) for value in node.inputs)
    )


def _is_rounded(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    while producer is not None and producer.op_type in ("Transpose", "Cast"):
        producer = producer.inputs[0].producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def plan_int8_weights(geometry: Geometry) -> dict[str, Any]:
    """Weight bytes of an INT8 bundle made from a bf16 one, everything quantised that may be, against that bundle's."""
    sizes = {name: (prod(shape), shape) for name, shape in expected_tensors(geometry).items()}
    matrices = {
        name: size for name, size in sizes.items() if len(size[1]) == 2 and name != META_TABLE and HEAD not in name
    }
    codes = sum(count for count, _ in matrices.values())
    scales = sum(shape[0] for _, shape in matrices.values())
    everything = sum(count for count, _ in sizes.values())
    before, after = 2 * everything, codes + 2 * scales + 2 * (everything - codes)
    return {
        "bf16_bytes": before,
        "int8_bytes": after,
        "ratio": round(after / before, 4),
        "share_of_weights_kept_high": round(1 - codes / everything, 4),
        "token_table_share": round(sizes[TOKEN_TABLE][0] / everything, 4),
    }


def weight_bytes(folder: Path) -> int:
    """Bytes of a bundle's weight files."""
    files = Bundle.open(folder, verify=False).manifest.files
    return sum(record.bytes for name, record in files.items() if name.startswith("weights/"))


def time_interleaved(
    folders: Sequence[Path], encode: Callable[[Encoder], object], *, rounds: int, threads: int
) -> list[dict[str, Any]]:
    """Seconds of ``encode`` with each bundle's own sessions, in turns in one process; the first round warms up."""
    taken: list[list[float]] = [[] for _ in folders]
    with ExitStack() as stack:
        encoders = [stack.enter_context(Encoder.open(folder, verify=False, threads=threads)) for folder in folders]
        for turn in range(rounds + 1):
            for place, encoder in enumerate(encoders):
                start = time.perf_counter()
                encode(encoder)
                if turn:
                    taken[place].append(time.perf_counter() - start)
    return [
        {
            "bundle": folder.name,
            "median_s": round(float(np.median(times)), 4),
            "best_s": round(min(times), 4),
            "rounds": rounds,
            "threads": threads,
            "speedup_over_first": round(float(np.median(taken[0]) / np.median(times)), 3),
        }
        for folder, times in zip(folders, taken, strict=True)
    ]
