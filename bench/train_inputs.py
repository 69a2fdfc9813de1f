"""What the demo model reads: pages as patches, queries and candidates as prompts, both laid out for the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from metaembed.runtime.images import ImageRules, patchify, smart_resize
from metaembed.runtime.layout import (
    LanguageInputs,
    VisionInputs,
    candidate_meta_tokens,
    lay_out_images,
    lay_out_prompts,
    query_meta_tokens,
)
from metaembed.runtime.text import IMAGE_TOKEN as IMAGE_PAD
from metaembed.runtime.text import Template

from .demo_model import CANDIDATE_TOKENS, PREPROCESSOR, QUERY_TOKENS, build_config
from .demo_tokenizer import build_tokenizer
from .scenes import Scene
from .scenes_queries import Query
from .scenes_render import render

VOCABULARY: int = build_config()["text_config"]["vocab_size"]
IMAGE_TOKEN: int = build_config()["image_token_id"]
TOKENIZER, TEMPLATE, RULES = build_tokenizer(), Template(), ImageRules.from_config(PREPROCESSOR, 1024)

Grid = tuple[int, int]


@dataclass(frozen=True)
class Prompt:
    """Token ids, image tokens repeated, and the image's grid of patches if there is one."""

    ids: np.ndarray
    grid: Grid | None


def scene_grid(scene: Scene) -> Grid:
    """(rows, columns) of patches."""
    height, width = smart_resize(scene.height, scene.width, RULES)
    return height // RULES.patch_size, width // RULES.patch_size


def scene_patches(scene: Scene) -> np.ndarray:
    """Normalised pixel values [p, 1176] of the drawn page, in Qwen's patch order."""
    return patchify(render(scene), RULES).pixels


def lay_out_scenes(scenes: Sequence[Scene]) -> VisionInputs:
    return lay_out_images([scene_patches(scene) for scene in scenes], [scene_grid(scene) for scene in scenes])


def candidate_prompt(scene: Scene) -> Prompt:
    """A page as a candidate, in the template of MetaEmbed's released configuration."""
    return Prompt(_tokens(None, _units(scene), query=False), scene_grid(scene))


def query_prompt(query: Query) -> Prompt:
    """A query in the template: ten end-of-text tokens and a line end follow the chat text."""
    if query.page is None:
        return Prompt(_tokens(query.text, 0, query=True), None)
    return Prompt(_tokens(query.text, _units(query.page), query=True), scene_grid(query.page))


def _units(scene: Scene) -> int:
    rows, columns = scene_grid(scene)
    return rows * columns // 4


@lru_cache(maxsize=200_000)
def _tokens(text: str | None, units: int, *, query: bool) -> np.ndarray:
    before, after = TEMPLATE.around("query" if query else "candidate", with_image=units > 0)
    images = IMAGE_PAD * units
    ids = TOKENIZER.encode(before.replace(IMAGE_PAD, images) + (text or TEMPLATE.image_alone) + after).ids
    return np.array(ids, np.int64)


def lay_out_queries(prompts: Sequence[Prompt], budget: int = QUERY_TOKENS) -> LanguageInputs:
    return _lay_out(prompts, query_meta_tokens(VOCABULARY, budget), budget)


def lay_out_candidates(prompts: Sequence[Prompt], budget: int = CANDIDATE_TOKENS) -> LanguageInputs:
    return _lay_out(prompts, candidate_meta_tokens(VOCABULARY, QUERY_TOKENS, budget), budget)


def lay_out_plain(prompts: Sequence[Prompt]) -> LanguageInputs:
    """Prompts without Meta Tokens, every position an answer."""
    longest = max(len(prompt.ids) for prompt in prompts)
    return _lay_out(prompts, np.zeros(0, np.int64), longest)


def _lay_out(prompts: Sequence[Prompt], meta_tokens: np.ndarray, answers: int) -> LanguageInputs:
    ids, grids = [prompt.ids for prompt in prompts], [prompt.grid for prompt in prompts]
    windows = max((-(-grid[0] // 8) * -(-grid[1] // 8) for grid in grids if grid), default=0)
    return lay_out_prompts(ids, grids, meta_tokens, answers, image_token=IMAGE_TOKEN, windows=windows)


def tensors(inputs: VisionInputs | LanguageInputs) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in inputs.feeds().items()}
