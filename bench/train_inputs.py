"""What the demo model reads: pages as patches, queries and candidates as prompts, both laid out for the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metaembed.runtime.layout import (
    LanguageInputs,
    VisionInputs,
    candidate_meta_tokens,
    lay_out_images,
    lay_out_prompts,
    query_meta_tokens,
)

from .demo_model import CANDIDATE_TOKENS, IMAGE_MEAN, IMAGE_STD, QUERY_TOKENS, build_config
from .demo_tokenizer import build_tokenizer
from .scenes import Scene
from .scenes_queries import Query
from .scenes_render import render

UNIT = 28  # px: a merged unit, one image embedding
VOCABULARY: int = build_config()["text_config"]["vocab_size"]
IMAGE_TOKEN: int = build_config()["image_token_id"]
TOKENIZER = build_tokenizer()

Grid = tuple[int, int]


@dataclass(frozen=True)
class Prompt:
    """Token ids, image tokens repeated, and the image's grid of patches if there is one."""

    ids: np.ndarray
    grid: Grid | None


def scene_grid(scene: Scene) -> Grid:
    """(rows, columns) of patches: Qwen rounds each side to a multiple of 28 px (no page here meets the pixel limits)."""
    return 2 * round(scene.height / UNIT), 2 * round(scene.width / UNIT)


def scene_patches(scene: Scene) -> np.ndarray:
    """Normalised pixel values [p, 1176] of the drawn page, in Qwen's patch order."""
    rows, columns = scene_grid(scene)
    page = render(scene)
    if page.size != (14 * columns, 14 * rows):
        page = page.resize((14 * columns, 14 * rows), Image.Resampling.BICUBIC)
    values = np.asarray(page, np.float32) * _SCALE + _OFFSET  # (height, width, channel)
    values = values.reshape(rows // 2, 2, 14, columns // 2, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return np.repeat(values[:, :, :, :, :, None], 2, axis=5).reshape(
        rows * columns, -1
    )  # a still image: two equal frames


_SCALE = (1 / 255 / np.array(IMAGE_STD)).astype(np.float32)
_OFFSET = (-np.array(IMAGE_MEAN) / np.array(IMAGE_STD)).astype(np.float32)


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
    image = f"<|vision_start|>{'<|image_pad|>' * units}<|vision_end|>" if units else ""
    body = f"{'Query: ' if query else ''}{'Describe the image.' if text is None else text}"
    tail = "<|endoftext|>" * 10 + "\n" if query else ""
    ids = TOKENIZER.encode(f"<|im_start|>user\n{image}{body}<|im_end|><|endoftext|>{tail}").ids
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
