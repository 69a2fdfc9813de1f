"""The paper's claims on the demo: the same queries asked of every system, differences with paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from metaembed.runtime.budget import TRAINED_GROUPS, Budget
from metaembed.runtime.cascade import Stage
from metaembed.runtime.encoder import Floats

from .baselines import all_tokens, last_token, load_demo_model, pooled_spans, read_tokens
from .demo_quality import SplitImages
from .quality import (
    NDCG_CUTOFF,
    PerQuery,
    Relevant,
    confidence_interval,
    judge,
    score_cascade,
    summarise_quality,
)
from .records import Record
from .scenes_queries import Split

BUDGETS = tuple(Budget(*group) for group in TRAINED_GROUPS)
SMALLEST, LARGEST = BUDGETS[0], BUDGETS[-1]
ROLES = {
    "mmr": "MMR: the nested groups trained together",
    "nommr": "NoMMR: only the largest group trained",
    "single": "one vector trained alone, group (1,1)",
    "words": "stage 1 only, before Meta Tokens: the untrained baselines read its states instead of the MMR model's",
}
BYTES_A_VALUE = 2  # bf16
HELD, FAILED, OPEN = "held", "did not hold", "not decided"


@dataclass(frozen=True)
class Point:
    """One system at one budget (None: all tokens): per-query metrics, averaged over models of several seeds."""

    system: str
    budget: Budget | None
    trained: bool
    per_model: tuple[PerQuery, ...]
    vectors: float

    @property
    def per_query(self) -> PerQuery:
        return {name: np.mean([one[name] for one in self.per_model], axis=0) for name in self.per_model[0]}

    @property
    def ndcg(self) -> NDArray[np.float64]:
        return self.per_query[f"ndcg_at_{NDCG_CUTOFF}"]

    def to_json(self, dim: int) -> Record:
        return {
            "system": self.system,
            "budget": "all tokens" if self.budget is None else str(self.budget),
            "trained": self.trained,
            "models": len(self.per_model),
            "ndcg_of_each": [round(float(one[f"ndcg_at_{NDCG_CUTOFF}"].mean()), 4) for one in self.per_model],
            "vectors": round(self.vectors, 2),
            "index_kib_per_item": round(self.vectors * dim * BYTES_A_VALUE / 1024, 3),
            **summarise_quality(self.per_query),
        }


Points = dict[tuple[str, Budget | None], Point]


def measure_claims(split: Split, models: Mapping[str, Sequence]) -> tuple[list[Record], list[Record]]:
    """Points and verdicts. ``models`` maps roles (ROLES) to folders, one a seed; ``mmr`` has to be among them."""
    relevant = [dict.fromkeys(split.relevant(query), 1.0) for query in split.queries]
    points: Points = {}
    for role, budgets, name in (
        ("mmr", BUDGETS, "MMR"),
        ("nommr", BUDGETS, "NoMMR"),
        ("single", BUDGETS[:1], "single vector"),
    ):
        embedded = [_embed(split, folder) for folder in models.get(role, ())]
        for budget in budgets if embedded else ():
            judged = tuple(_judge(queries, candidates, budget, relevant) for queries, candidates in embedded)
            points[name, budget] = Point(name, budget, True, judged, budget.candidate)
    dim = _add_untrained(points, split, models.get("words") or models["mmr"], relevant)
    return [point.to_json(dim) for point in points.values()], judge_claims(points)


def judge_claims(points: Points) -> list[Record]:
    """What the points say of each claim; a claim about systems that were not measured is left out."""
    mmr = [points["MMR", budget] for budget in BUDGETS]
    claims = [(f"quality rises from {a.budget} to {b.budget}", b, a) for a, b in pairwise(mmr)]
    for budget in BUDGETS:  # at the largest too: the paper has NoMMR slightly worse there
        claims.append((f"MMR beats NoMMR at {budget}", points["MMR", budget], points.get(("NoMMR", budget))))
    claims += [
        (f"many vectors, {LARGEST}, beat one vector trained alone", mmr[-1], points.get(("single vector", SMALLEST))),
        ("one vector of MMR is as good as one trained alone, or better", mmr[0], points.get(("single vector", SMALLEST))),
        ("pooled spans are worse than the last token (untrained)", points.get(("last token", SMALLEST)),
         points.get(("pooled spans", LARGEST))),
        (f"MMR at {LARGEST} beats pooled spans at {LARGEST} (untrained)", mmr[-1], points.get(("pooled spans", LARGEST))),
        (f"all tokens beat MMR at {LARGEST}, at their index size", points.get(("all tokens", None)), mmr[-1]),
    ]  # fmt: skip
    return [
        _verdict(claim, better, worse) for claim, better, worse in claims if better is not None and worse is not None
    ]


def _verdict(claim: str, better: Point, worse: Point) -> Record:
    """The mean of paired differences and its interval: held when all of it is above 0, not decided when it holds 0."""
    differences = better.ndcg - worse.ndcg
    low, high = confidence_interval(differences)
    return {
        "claim": claim,
        "difference": round(float(differences.mean()), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "verdict": HELD if low > 0 else FAILED if high < 0 else OPEN,
        "models": min(len(better.per_model), len(worse.per_model)),
    }


def _embed(split: Split, folder) -> tuple[Floats, Floats]:
    model = load_demo_model(folder)
    queries, candidates = SplitImages(model, split).embed(model)
    return queries.numpy(), candidates.numpy()


def _add_untrained(points: Points, split: Split, folders: Sequence, relevant: Relevant) -> int:
    """Baselines that need no training, from each model's states; returns the embeddings' dims."""
    found: dict[tuple[str, Budget | None], list[PerQuery]] = {}
    for folder in folders:
        model = load_demo_model(folder)
        queries, candidates = read_tokens(model, SplitImages(model, split))
        sides = {
            ("last token", SMALLEST): (last_token(queries), last_token(candidates)),
            **{
                ("pooled spans", budget): (
                    pooled_spans(queries, budget.query),
                    pooled_spans(candidates, budget.candidate),
                )
                for budget in BUDGETS
            },
            ("all tokens", None): all_tokens(queries, candidates),
        }
        for key, (asking, answering) in sides.items():
            judged = _judge(asking, answering, Budget(asking.shape[1], answering.shape[1]), relevant)
            found.setdefault(key, []).append(judged)
        tokens, dim = float(candidates.lengths.mean()), candidates.vectors.shape[2]
    for (name, budget), judged in found.items():
        points[name, budget] = Point(name, budget, False, tuple(judged), budget.candidate if budget else tokens)
    return dim


def _judge(queries: Floats, candidates: Floats, budget: Budget, relevant: Relevant) -> PerQuery:
    return judge(score_cascade(queries, candidates, [Stage(budget)]), relevant)
