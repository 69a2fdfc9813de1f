"""Stage 2: train Meta Tokens and decoder with the nested groups, the vision tower frozen.

Its batches come from groups of scenes whose image embeddings are computed once: two groups in three share a theme of a
few symbols, so that scenes differ in how symbols and colours pair up, and a query meets near misses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .scenes import COLOURS, WORDS, Scene, allowed_pairs, sample_scene, split_generator
from .scenes_queries import Query, ask, choose_pairs
from .train_inputs import Prompt, candidate_prompt, lay_out_candidates, lay_out_queries, query_prompt
from .train_loss import Group, mmr_loss
from .train_model import DemoModel

FIXED, VARIED = 48, 16  # candidates of a step: pages of 112 px, and pages of varied size
TEXTS, PAGES = 96, 16  # queries of a step: text; and as many image as image+text queries
GROUPS_OF_SCENES = 160
THEMES = (8, 12, len(WORDS))  # symbols that a group of scenes may show
SIZE_BANDS = 3  # varied pages of a group are of like area, so that padding stays small
EASY_STEPS = 200  # for so long queries name one item, then for as long one or two

LARGEST_EVERY = 2  # the largest group joins every second step: it costs as much as all the others, and learns fastest

# Equal weights leave (1,1) behind; see the model card.
GROUP_WEIGHTS: dict[Group, float] = {(1, 1): 3.0, (2, 4): 2.0, (4, 8): 1.0, (8, 16): 1.0, (16, 64): 1.0}


@dataclass(frozen=True)
class SceneGroup:
    """Candidates and page queries whose image embeddings are kept: fixed pages first, then varied ones."""

    scenes: tuple[Scene, ...]
    page_queries: tuple[Query, ...]
    fixed: Tensor
    varied: Tensor
    pages: Tensor


class ScenePool:
    """The training scenes of stage 2, drawn from the seed and seen by the frozen tower when first used."""

    def __init__(self, model: DemoModel, seed: int) -> None:
        self.model, self.seed, self.kept = model, seed, {}

    def __getitem__(self, index: int) -> SceneGroup:
        if index not in self.kept:
            self.kept[index] = self._draw(index)
        return self.kept[index]

    def _draw(self, index: int) -> SceneGroup:
        rng = split_generator("train", self.seed * GROUPS_OF_SCENES + index)
        symbols = set(rng.permutation(len(WORDS))[: THEMES[index % len(THEMES)]].tolist())
        pairs = [pair for pair in allowed_pairs("train") if pair[0] in symbols]
        fixed = [sample_scene(rng, pairs) for _ in range(FIXED)]
        varied = sorted(
            (sample_scene(rng, pairs, varied=True) for _ in range(VARIED * SIZE_BANDS)), key=lambda scene: scene.area
        )
        band = index // len(THEMES) % SIZE_BANDS
        varied = varied[band * VARIED : (band + 1) * VARIED]
        scenes = (*fixed, *varied)
        queries = tuple(_page_query(rng, kind, scenes) for kind in ("image", "image+text") for _ in range(PAGES))
        with torch.no_grad():
            pages = self.model.see([query.page for query in queries if query.page])
            return SceneGroup(scenes, queries, self.model.see(fixed), self.model.see(varied), pages)


def _page_query(rng: np.random.Generator, kind: str, scenes: tuple[Scene, ...]) -> Query:
    scene = scenes[int(rng.integers(len(scenes)))]
    return ask(rng, kind, choose_pairs(rng, scene, int(rng.integers(2, 4))))


def mmr_step(
    model: DemoModel, pool: ScenePool, rng: np.random.Generator, number: int, weights: Mapping[Group, float]
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one step: one group of scenes, fresh text queries and the group's page queries."""
    order = np.random.default_rng([pool.seed, number // GROUPS_OF_SCENES]).permutation(GROUPS_OF_SCENES)
    group = pool[int(order[number % GROUPS_OF_SCENES])]
    most = 1 + min(2, number // EASY_STEPS)
    weights = weights if number % LARGEST_EVERY == 0 else _without_largest(weights)
    texts = [_text_query(rng, group.scenes, most) for _ in range(TEXTS)]
    r, s = (max(side) for side in zip(*weights, strict=True))
    queries = torch.cat(
        [
            model.read(lay_out_queries([query_prompt(query) for query in texts], r)),
            model.read(lay_out_queries([query_prompt(query) for query in group.page_queries], r), group.pages),
        ]
    )
    prompts = [candidate_prompt(scene) for scene in group.scenes]
    candidates = torch.cat(
        [_read(model, prompts[:FIXED], group.fixed, s), _read(model, prompts[FIXED:], group.varied, s)]
    )
    return mmr_loss(queries, candidates, relevance([*texts, *group.page_queries], group.scenes), weights), {}


def _without_largest(weights: Mapping[Group, float]) -> Mapping[Group, float]:
    """All groups but the largest, or the only one."""
    return {group: weights[group] for group in sorted(weights)[:-1] or weights}


def _read(model: DemoModel, prompts: list[Prompt], images: Tensor, budget: int) -> Tensor:
    return model.read(lay_out_candidates(prompts, budget), images)


def _text_query(rng: np.random.Generator, scenes: tuple[Scene, ...], most: int) -> Query:
    scene = scenes[int(rng.integers(len(scenes)))]
    return ask(rng, "text", choose_pairs(rng, scene, int(rng.integers(1, most + 1))))


def relevance(queries: list[Query], scenes: tuple[Scene, ...]) -> Tensor:
    """bool (n, m): the scene holds every pair that the query asks for."""
    asked, shown = (
        torch.from_numpy(np.stack([_membership(item.pairs) for item in items])) for items in (queries, scenes)
    )
    return asked @ shown.t() == asked.sum(1, keepdim=True)


def _membership(pairs: frozenset[tuple[int, int]]) -> np.ndarray:
    row = np.zeros(len(WORDS) * len(COLOURS), np.float32)
    row[[symbol * len(COLOURS) + colour for symbol, colour in pairs]] = 1
    return row
