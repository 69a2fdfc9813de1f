"""Stage 1: learn what each image cell and each phrase says, word by word, without Meta Tokens.

The words are predicted through the (tied) token embeddings at the vision tower's output and at the decoder's, for image
cells and for the nouns of queries. Without it stage 2 hardly learns: image embeddings must speak the words' language.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from metaembed.runtime.layout import window_slots

from .demo_tokenizer import build_tokenizer
from .scenes import COLOUR_WORDS, WORDS, Pair, Scene, allowed_pairs, sample_scene
from .scenes_queries import text_query
from .train_inputs import candidate_prompt, lay_out_plain, query_prompt, scene_grid
from .train_model import DemoModel

FIXED, VARIED, PHRASES = 40, 12, 32  # pages of 112 px, or pages of varied size, and queries in a step
VARIED_EVERY = 4  # steps
UNLABELLED = -1

_TOKENIZER = build_tokenizer()
SYMBOL_IDS = torch.tensor([_TOKENIZER.token_to_id("Ġ" + word) for word in WORDS])
COLOUR_IDS = torch.tensor([_TOKENIZER.token_to_id("Ġ" + word) for word in COLOUR_WORDS])
_SYMBOL_OF = {int(token): index for index, token in enumerate(SYMBOL_IDS)}
_COLOUR_OF = {int(token): index for index, token in enumerate(COLOUR_IDS)}


def cell_labels(scene: Scene) -> np.ndarray:
    """[m, 2] symbol and colour of the item under each merged unit's centre in raster order, or UNLABELLED."""
    rows, columns = (side // 2 for side in scene_grid(scene))
    x = (np.arange(columns) + 0.5) * scene.width / columns
    y = (np.arange(rows) + 0.5) * scene.height / rows
    labels = np.full((rows, columns, 2), UNLABELLED)
    for item in scene.items:
        across = (item.left <= x) & (x < item.left + item.size)
        down = (item.top <= y) & (y < item.top + item.size)
        labels[np.ix_(down, across)] = item.pair
    return labels.reshape(-1, 2)


def noun_labels(ids: np.ndarray) -> np.ndarray:
    """[t, 2] symbol and colour where a query's token is a noun, the colour being the word before it."""
    labels = np.full((len(ids), 2), UNLABELLED)
    for place, token in enumerate(ids.tolist()):
        if token in _SYMBOL_OF:
            labels[place] = _SYMBOL_OF[token], _COLOUR_OF[int(ids[place - 1])]
    return labels


def word_loss(table: Tensor, vectors: Tensor, labels: np.ndarray) -> tuple[Tensor, float]:
    """Cross-entropy of symbol plus colour at unit vectors (n, d), and the share of labelled rows with both right."""
    wanted = torch.from_numpy(labels)
    kept = wanted[:, 0] != UNLABELLED
    scaled, wanted = vectors[kept] * vectors.shape[1] ** 0.5, wanted[kept]
    logits = [scaled @ table[ids].t() for ids in (SYMBOL_IDS, COLOUR_IDS)]
    loss = sum(F.cross_entropy(part, wanted[:, k]) for k, part in enumerate(logits))
    right = torch.stack([part.argmax(1) == wanted[:, k] for k, part in enumerate(logits)]).all(0)
    return loss, float(right.float().mean())


def word_step(model: DemoModel, rng: np.random.Generator, number: int) -> tuple[Tensor, dict[str, float]]:
    """The loss of one step over fresh pages and phrases, and the share that it got right."""
    pairs = allowed_pairs("train")
    scenes = _draw_pages(rng, pairs, varied=number % VARIED_EVERY == VARIED_EVERY - 1)
    table = model.language.language_model.embed_tokens.weight
    loss, right = torch.zeros(()), {}
    for name, (vectors, labels) in {**_pages(model, scenes), **_phrases(model, rng, pairs)}.items():
        part, right[name] = word_loss(table, vectors, labels)
        loss = loss + part
    return loss, right


def _draw_pages(rng: np.random.Generator, pairs: Sequence[Pair], *, varied: bool) -> list[Scene]:
    """Pages of 112 px, or the smaller half of twice as many varied ones: larger pages cost more and show the same."""
    if not varied:
        return [sample_scene(rng, pairs) for _ in range(FIXED)]
    return sorted((sample_scene(rng, pairs, varied=True) for _ in range(2 * VARIED)), key=lambda page: page.area)[
        :VARIED
    ]


def _pages(model: DemoModel, scenes: Sequence[Scene]) -> dict[str, tuple[Tensor, np.ndarray]]:
    """Vectors and labels of image cells, as the tower leaves them ("seen") and as the decoder does ("read")."""
    seen = model.see(scenes)  # (i, m, d)
    prompts = [candidate_prompt(scene) for scene in scenes]
    inputs = lay_out_plain(prompts)
    read = model.read(inputs, seen)  # (b, t, d)
    in_window_order = np.full((*seen.shape[:2], 2), UNLABELLED)
    for image, scene in enumerate(scenes):
        in_window_order[image, window_slots(scene_grid(scene))] = cell_labels(scene)
    flat = in_window_order.reshape(-1, 2)
    in_prompt = np.where((inputs.image_rows >= 0)[..., None], flat[inputs.image_rows.clip(0)], UNLABELLED)
    return {
        "cells_seen": (F.normalize(seen, dim=-1).flatten(0, 1), flat),
        "cells_read": (read.flatten(0, 1), in_prompt.reshape(-1, 2)),
    }


def _phrases(model: DemoModel, rng: np.random.Generator, pairs: Sequence[Pair]) -> dict[str, tuple[Tensor, np.ndarray]]:
    queries = [
        text_query([pairs[k] for k in rng.integers(len(pairs), size=rng.integers(1, 4))]) for _ in range(PHRASES)
    ]
    inputs = lay_out_plain([query_prompt(query) for query in queries])
    labels = np.concatenate([noun_labels(ids) for ids in inputs.token_ids])
    return {"phrases": (model.read(inputs).flatten(0, 1), labels)}
