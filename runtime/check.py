"""Replay a bundle's golden vectors on this machine and compare: the gate of the export, and of every device after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .budget import Budget
from .encoder import Encoder
from .errors import BundleError, ParityError
from .frozen import FrozenSession, find_frozen, frozen_meta_tokens
from .golden import SIDES, GoldenItem, golden_path, read_golden
from .graph_maxsim import Scorer
from .manifest import SCORER, VISION
from .maxsim import maxsim
from .open_sessions import open_ort_sessions
from .parity import (
    RANKS,
    TOLERANCES,
    ParityRecord,
    RankingRecord,
    ScoringRecord,
    Tolerance,
    compare,
    compare_rankings,
    compare_scores,
)
from .session_trt import NoProfileError

Golden = tuple[Sequence[GoldenItem], NDArray[np.float32]]
KINDS = ("text", "image", "image + text")


@dataclass(frozen=True)
class Check:
    """All comparisons of one replay: (side, r, kind of input) -> vectors, budget -> ranking. Truthy when all passed.

    ``scorer`` has the scorer graph's scores, by budget; it is empty where the bundle is older than the graph.
    ``not_replayed`` has each (side, r) that the engines were not built for: cut to some budgets, or to one side.
    """

    runs_on: str
    precision: str
    vectors: Mapping[tuple[str, int, str], ParityRecord] = field(default_factory=dict)
    rankings: Mapping[Budget, RankingRecord] = field(default_factory=dict)
    scorer: Mapping[Budget, ScoringRecord] = field(default_factory=dict)
    not_replayed: Sequence[tuple[str, int]] = ()

    def __bool__(self) -> bool:
        records = [*self.vectors.values(), *self.rankings.values(), *self.scorer.values()]
        return bool(self.vectors) and bool(self.rankings) and all(records)

    def failures(self) -> list[str]:
        """One line for each comparison that failed, the worst value and where it is."""
        found = [f"{side} r={r}, {kind}: {record}" for (side, r, kind), record in self.vectors.items() if not record]
        found += [
            f"budget {budget}: top-{record.ranks} overlap {record.overlap:.3f} (tolerance: >= {record.tolerance.overlap})"
            for budget, record in self.rankings.items()
            if not record
        ]
        found += [
            f"scorer at {budget}: off by {record.max_abs:.1e} (tolerance: <= {record.tolerance:.0e})"
            for budget, record in self.scorer.items()
            if not record
        ]
        return found or ([] if self else ["nothing was compared"])

    def require(self) -> None:
        """Raise ParityError naming every failure."""
        if not self:
            raise ParityError(f"parity failed on {self.runs_on}: " + "; ".join(self.failures()))

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": bool(self),
            "runs_on": self.runs_on,
            "precision": self.precision,
            "vectors": [
                {"side": side, "r": r, "input": kind, **record.to_json()}
                for (side, r, kind), record in self.vectors.items()
            ],
            "rankings": [
                {"budget": [budget.query, budget.candidate], **record.to_json()}
                for budget, record in self.rankings.items()
            ],
            "scorer": [
                {"budget": [budget.query, budget.candidate], **record.to_json()}
                for budget, record in self.scorer.items()
            ],
            "not_replayed": [{"side": side, "r": r} for side, r in self.not_replayed],
        }

    def table(self) -> str:
        """For people: one row per side, budget and kind of input, then the ranking per budget."""
        width = max([13, *(len(kind) for _, _, kind in self.vectors)])
        rows = [f"{'side':<10} {'r':>3}  {'input':<{width}} {'vectors':>7}  {'worst cosine':>12}  {'max abs':>8}"]
        for (side, r, kind), record in self.vectors.items():
            mark = "" if record else "  FAILED"
            rows.append(
                f"{side:<10} {r:>3}  {kind:<{width}} {record.vectors:>7}  {record.min_cosine:>12.8f}  {record.max_abs:>8.1e}{mark}"
            )
        for budget, ranking in self.rankings.items():
            mark = "" if ranking else "  FAILED"
            rows.append(f"budget {budget!s:<8} top-{ranking.ranks} overlap {ranking.overlap:.3f}{mark}")
        for budget, scored in self.scorer.items():
            mark = "" if scored else "  FAILED"
            rows.append(f"scorer {budget!s:<8} {scored.pairs} pairs, max abs {scored.max_abs:.1e}{mark}")
        rows += [
            f"{side:<10} {r:>3}  not replayed: the engines have no profile for it" for side, r in self.not_replayed
        ]
        return "\n".join(rows)

    def coverage(self) -> str:
        """Which sides and budgets were left out, to follow a verdict; nothing when none was."""
        left_out = ", ".join(f"{side} r={r}" for side, r in self.not_replayed)
        return f"; not replayed, for lack of a profile: {left_out}" if left_out else ""


def check_bundle(encoder: Encoder, *, progress: Callable[[Any], Any] = iter) -> Check:
    """Encode the golden inputs at every exported budget and compare them with the stored reference.

    Every budget is encoded on its own, not sliced from a larger one: that the two agree is part of what is checked.

    Raises:
        BundleError: golden vectors are missing or damaged.
    """
    bundle = encoder.bundle
    goldens = {side: _read(encoder, side) for side in SIDES}
    kind = (bundle.manifest.quantization or {}).get("type", bundle.manifest.precision)
    found = replay(encoder, goldens, TOLERANCES[kind], kind, progress=progress)
    frozen = {
        (side, vectors, f"{input_kind}, frozen"): compare(*_select(goldens[side], values, input_kind), TOLERANCES[kind])
        for side, vectors, values in _replay_frozen(encoder, goldens, progress)
        for input_kind in KINDS
    }
    found = replace(found, vectors={**found.vectors, **frozen})
    if SCORER not in bundle.manifest.files:
        return found
    with Scorer.open(bundle) as scorer:
        return replace(found, scorer=replay_scorer(scorer, goldens, bundle.manifest.budgets))


def _replay_frozen(
    encoder: Encoder, goldens: Mapping[str, Golden], progress: Callable[[Any], Any]
) -> Iterator[tuple[str, int, NDArray[np.float32]]]:
    """(side, vectors, embeddings) of each frozen graph; they are no engines, so ONNX Runtime, where it is, runs them."""
    bundle = encoder.bundle
    graphs = find_frozen(bundle.manifest)
    if not graphs or find_spec("onnxruntime") is None:
        return
    for name, (side, vectors) in progress(list(graphs.items())):
        vision, language = open_ort_sessions(bundle, (VISION, name))
        meta_tokens = frozen_meta_tokens(bundle.manifest.geometry, side, vectors)
        with Encoder(bundle, vision, FrozenSession(language, meta_tokens, vectors)) as frozen:
            yield side, vectors, _encode(frozen, side, goldens[side][0], vectors)


def _read(encoder: Encoder, side: str) -> Golden:
    bundle = encoder.bundle
    if bundle.unverified and golden_path(side) not in bundle.manifest.files:
        raise BundleError(f"{bundle.folder} was exported without parity and has no golden vectors; export it again")
    items, reference = read_golden(bundle.path(golden_path(side)))
    items_needed = RANKS + 1 if side == "candidate" else 1  # a ranking compares candidates; a query is enough
    least = (items_needed, getattr(bundle.manifest.largest, side))
    if reference.shape[0] < least[0] or reference.shape[1] < least[1] or reference.shape[2] != encoder.dim:
        raise BundleError(
            f"{golden_path(side)} holds embeddings {reference.shape}; at least {least} of {encoder.dim} dims are needed"
        )
    return items, reference


def replay_scorer(
    scorer: Scorer, goldens: Mapping[str, Golden], budgets: Sequence[Budget]
) -> dict[Budget, ScoringRecord]:
    """Score the reference embeddings, in the scorer's own type, at each budget, and compare with float64."""
    queries, candidates = (goldens[side][1].astype(scorer.dtype) for side in SIDES)
    cuts = {budget: (queries[:, : budget.query], candidates[:, : budget.candidate]) for budget in budgets}
    return {budget: compare_scores(*cut, scorer.scores(*cut)) for budget, cut in cuts.items()}


def replay(
    encoder: Encoder,
    goldens: Mapping[str, Golden],
    tolerance: Tolerance,
    precision: str,
    *,
    progress: Callable[[Any], Any] = iter,
) -> Check:
    """Compare an encoder with references [n, 16 or 64, d] of both sides, at every budget that its bundle serves.

    What its engines were not built for is named, not compared; a side that is missing at a budget is ranked with the
    reference instead. Nothing at all compared is a failure.
    """
    encoded, not_replayed = {}, []
    work = sorted({(side, getattr(budget, side)) for budget in encoder.budgets for side in SIDES})
    for side, vectors in progress(work):
        try:
            encoded[side, vectors] = _encode(encoder, side, goldens[side][0], vectors)
        except NoProfileError:
            not_replayed.append((side, vectors))
    records = {
        (side, vectors, kind): compare(*_select(goldens[side], values, kind), tolerance)
        for (side, vectors), values in encoded.items()
        for kind in KINDS
    }
    rankings = {}
    for budget in encoder.budgets:
        sizes = [(side, getattr(budget, side)) for side in SIDES]
        if encoded.keys().isdisjoint(sizes):
            continue
        references = [goldens[side][1][:, :vectors] for side, vectors in sizes]
        found = [encoded.get(size, reference) for size, reference in zip(sizes, references, strict=True)]
        rankings[budget] = compare_rankings(_score(*references), _score(*found), tolerance)
    return Check(encoder.description, precision, records, rankings, not_replayed=tuple(not_replayed))


def _encode(encoder: Encoder, side: str, items: Sequence[GoldenItem], vectors: int) -> NDArray[np.float32]:
    encode = encoder.encode_queries if side == "query" else encoder.encode_candidates
    return encode([item.text for item in items], images=[item.image for item in items], budget=vectors)


def _score(queries: NDArray[np.float32], candidates: NDArray[np.float32]) -> NDArray[np.float32]:
    """MaxSim, or NaN everywhere (a failed comparison) where it would refuse embeddings that are not finite."""
    if not (np.isfinite(queries).all() and np.isfinite(candidates).all()):
        return np.full((len(queries), len(candidates)), np.nan, np.float32)
    return maxsim(queries, candidates)


def _select(golden: Golden, encoded: NDArray[np.float32], kind: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Reference and result of the items of one kind. A kind that is absent compares nothing, and so fails."""
    items, reference = golden
    chosen = [place for place, item in enumerate(items) if item.kind == kind]
    return reference[chosen, : encoded.shape[1]], encoded[chosen]
