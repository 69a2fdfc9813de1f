"""Quantised demo bundles against the float one and against other quantisers, on the demo's test split, at every budget.

Every contender runs in the exact simulation (Q/DQ computed in floating point), so that only the placement of Q/DQ and the
ranges differ. All calibrate on the same items of the training split.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from metaembed.calibration.dataset import CalibrationItem
from metaembed.calibration.linears import find_linears, load_graphs
from metaembed.calibration.observe import encode_item
from metaembed.calibration.sessions import ExactSession
from metaembed.runtime.encoder import Encoder
from metaembed.runtime.manifest import LANGUAGE, VISION, Bundle
from metaembed.runtime.maxsim import maxsim
from metaembed.runtime.parity import TOLERANCES, compare, compare_rankings
from metaembed.runtime.session import Arrays

from .metrics import ndcg
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
    split: Split, reference: Embeddings, found: Embeddings, bundle: Bundle, kind: str
) -> Iterator[dict[str, Any]]:
    """One record a budget: nDCG@5 beside the reference's, the worst vector, top-10 overlap."""
    relevant = [split.relevant(query) for query in split.queries]
    for budget in bundle.manifest.budgets:
        (qr, cr), (qf, cf) = (
            (queries[:, : budget.query], candidates[:, : budget.candidate])
            for queries, candidates in (reference, found)
        )
        wanted, scores = maxsim(qr, cr), maxsim(qf, cf)
        tolerance = TOLERANCES[kind]
        yield {
            "budget": str(budget),
            "ndcg_at_5": round(ndcg(scores, relevant), 4),
            "ndcg_at_5_fp32": round(ndcg(wanted, relevant), 4),
            "worst_cosine": round(min(compare(a, b, tolerance).min_cosine for a, b in ((qr, qf), (cr, cf))), 5),
            "top10_overlap": round(compare_rankings(wanted, scores, tolerance).overlap, 4),
        }


class Recorder:
    """A session that keeps the feeds it is given: calibration data for quantisers that read feeds."""

    def __init__(self, session: ExactSession) -> None:
        self._session = session
        self.feeds: list[Arrays] = []
        self.description, self.inputs, self.max_items = session.description, session.inputs, session.max_items

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        self.feeds.append(dict(feeds))
        return self._session.run(feeds)

    def close(self) -> None:
        self._session.close()


def record_feeds(bundle: Bundle, items: Iterable[CalibrationItem], threads: int) -> dict[str, list[Arrays]]:
    """What each graph is fed when the items are encoded at the largest budget."""
    models = load_graphs(bundle.folder)
    recorders = {
        name: Recorder(ExactSession(models[name], bundle.folder, threads=threads)) for name in (VISION, LANGUAGE)
    }
    with Encoder(bundle, *recorders.values()) as encoder:
        for item in items:
            encode_item(encoder, item)
    return {name: recorder.feeds for name, recorder in recorders.items()}


def quantise_with_onnxruntime(
    bundle: Bundle, feeds: Mapping[str, Sequence[Arrays]], method: str, folder: Path, *, linears_only: bool
) -> None:
    """onnxruntime's static quantisation: symmetric INT8, per-channel weights, ranges by MinMax, Entropy or Percentile.

    Args:
        linears_only: quantise the Linears that ours may quantise; otherwise every MatMul, as its defaults do.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    folder.mkdir(parents=True)
    for name, model in load_graphs(bundle.folder).items():
        nodes = [str(linear.matmul.name) for linear in find_linears(model)] if linears_only else None
        quantize_static(
            bundle.folder / name,
            folder / name,
            _Reader(feeds[name]),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=nodes,
            calibrate_method=getattr(CalibrationMethod, method),
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
        )


class _Reader:
    """The calibration data reader that onnxruntime asks for."""

    def __init__(self, feeds: Sequence[Arrays]) -> None:
        self._rest = iter(feeds)

    def get_next(self) -> Arrays | None:
        return next(self._rest, None)


def share_quantised(folder: Path) -> float:
    """Share of the Linears' weights, by count of elements, whose MatMul reads a DequantizeLinear."""
    sizes = {True: 0, False: 0}
    for model in load_graphs(folder).values():
        for node in model.graph:
            if node.op_type != "MatMul":
                continue
            weight, rounded = _weight_of(node)
            if weight is not None:
                sizes[rounded] += int(np.prod(weight.shape.numpy()))
    return sizes[True] / sum(sizes.values())


def _weight_of(node: ir.Node) -> tuple[ir.Value | None, bool]:
    """The initialiser (out, in) or (in, out) behind a MatMul's second input, and whether it is dequantised."""
    value, rounded = node.inputs[1], False
    while (producer := value.producer()) is not None:
        if producer.op_type not in ("Transpose", "Cast", "DequantizeLinear"):
            return None, False
        rounded |= producer.op_type == "DequantizeLinear"
        value = producer.inputs[0]
    return (value if value.is_initializer() and len(value.shape) == 2 else None), rounded


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
