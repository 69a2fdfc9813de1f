"""Retrieval quality of a demo checkpoint on symbol scenes, at every budget."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaembed.runtime.budget import TRAINED_GROUPS

from .metrics import mean_reciprocal_rank, ndcg, recall
from .scenes import FIXED_SIDE, Scene
from .scenes_queries import KINDS, Split
from .train_inputs import candidate_prompt, lay_out_candidates, lay_out_queries, query_prompt, scene_grid
from .train_loss import Group, group_scores, similarities
from .train_model import DemoModel

BATCH = 50


class SplitImages:
    """A split's image embeddings, computed once: the vision tower does not depend on the budget, nor on stage 2."""

    def __init__(self, model: DemoModel, split: Split) -> None:
        self.split = split
        self.candidate_batches = _batches([_units(scene) for scene in split.scenes])
        self.query_batches = _batches([_units(query.page) if query.page else 0 for query in split.queries])
        with torch.no_grad():
            self.candidates = [model.see([split.scenes[k] for k in batch]) for batch in self.candidate_batches]
            self.queries = [self._see_queries(model, batch) for batch in self.query_batches]

    def _see_queries(self, model: DemoModel, batch: Sequence[int]) -> Tensor | None:
        pages = [page for k in batch if (page := self.split.queries[k].page)]
        return model.see(pages) if pages else None

    @torch.no_grad()
    def embed(self, model: DemoModel) -> tuple[Tensor, Tensor]:
        """All query and candidate vectors at the full budget: (n, 16, d), (m, 64, d)."""
        prompts = [query_prompt(query) for query in self.split.queries]
        queries = [
            model.read(lay_out_queries([prompts[k] for k in batch]), images)
            for batch, images in zip(self.query_batches, self.queries, strict=True)
        ]
        prompts = [candidate_prompt(scene) for scene in self.split.scenes]
        candidates = [
            model.read(lay_out_candidates([prompts[k] for k in batch]), images)
            for batch, images in zip(self.candidate_batches, self.candidates, strict=True)
        ]
        return _restore(queries, self.query_batches), _restore(candidates, self.candidate_batches)


def _units(scene: Scene) -> int:
    rows, columns = scene_grid(scene)
    return rows * columns // 4


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indexes in batches of like length; a batch never mixes items with and without an image."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    plain = [k for k in order if lengths[k] == 0]
    pictured = [k for k in order if lengths[k]]
    return [part[k : k + BATCH] for part in (plain, pictured) for k in range(0, len(part), BATCH)]


def _restore(parts: list[Tensor], batches: list[list[int]]) -> Tensor:
    return torch.cat(parts)[torch.tensor([*chain.from_iterable(batches)]).argsort()]


def score_split(queries: Tensor, candidates: Tensor, group: Group) -> np.ndarray:
    """(n, m) mean MaxSim at a budget, queries a few at a time."""
    parts = (
        group_scores(similarities(part[:, : group[0]], candidates[:, : group[1]]), group) for part in queries.split(10)
    )
    return torch.cat(list(parts)).numpy()


def measure(
    split: Split, queries: Tensor, candidates: Tensor, groups: Sequence[Group] = TRAINED_GROUPS
) -> list[dict[str, Any]]:
    """One record for each budget and set of queries: nDCG@5, recall@1, recall@10 and MRR."""
    relevant = [split.relevant(query) for query in split.queries]
    return [
        {
            "budget": f"{group[0]},{group[1]}",
            "queries": name,
            "count": len(chosen),
            "ndcg_at_5": round(ndcg(scores[chosen], wanted), 4),
            "recall_at_1": round(recall(scores[chosen], wanted, 1), 4),
            "recall_at_10": round(recall(scores[chosen], wanted, 10), 4),
            "mrr": round(mean_reciprocal_rank(scores[chosen], wanted), 4),
        }
        for group in groups
        for scores in [score_split(queries, candidates, group)]
        for name, chosen in query_sets(split, relevant).items()
        if chosen
        for wanted in [[relevant[k] for k in chosen]]
    ]


def query_sets(split: Split, relevant: list[list[int]]) -> dict[str, list[int]]:
    """Query indexes by kind; text queries also by their answers' page size, and by whether they name an unseen pair."""
    kind = {name: [k for k, query in enumerate(split.queries) if query.kind == name] for name in KINDS}
    text = kind["text"]
    fixed = [all(_is_fixed(split.scenes[c]) for c in answers) for answers in relevant]
    varied = [not any(_is_fixed(split.scenes[c]) for c in answers) for answers in relevant]
    unseen = [bool(query.pairs & split.unseen) for query in split.queries]
    return {
        **kind,
        "text, fixed-size answers": [k for k in text if fixed[k]],
        "text, varied-size answers": [k for k in text if varied[k]],
        "text, with an unseen pair": [k for k in text if unseen[k]],
        "text, seen pairs": [k for k in text if not unseen[k]],
    }


def _is_fixed(scene: Scene) -> bool:
    return scene.width == scene.height == FIXED_SIDE
