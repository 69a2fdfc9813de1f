"""What MetaEmbed is compared with, from the same demo model's hidden states: the last token, pooled spans, and all tokens.

None of these was trained as such: the decoder learned to speak through its Meta Tokens (or, in stage 1, word by word).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from metaembed.runtime.encoder import Floats
from metaembed.runtime.errors import BundleError, UsageError

from .demo_quality import SplitImages
from .train_inputs import Prompt, candidate_prompt, lay_out_plain, query_prompt
from .train_model import DemoModel


@dataclass(frozen=True)
class Tokens:
    """Unit vectors of every prompt position (n, t, d), real ones first, and how many are real (n,)."""

    vectors: Floats
    lengths: NDArray[np.int64]


def load_demo_model(folder: Path) -> DemoModel:
    """A demo checkpoint's or bundle's weights in the modules that trained them.

    Raises:
        UsageError: the folder holds no weights.
        BundleError: they are not the demo model's.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted((folder / "weights").glob("*.safetensors"))
    if not files:
        raise UsageError(f"{folder} holds no weights (*.safetensors); give a run's model folder or a bundle")
    model = DemoModel(0)
    try:
        model.load_checkpoint({name: value for file in files for name, value in load_file(file).items()})
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise BundleError(f"{folder} is no checkpoint of the demo model ({str(error).splitlines()[0]})") from None
    return model.eval()


@torch.no_grad()
def read_tokens(model: DemoModel, images: SplitImages) -> tuple[Tokens, Tokens]:
    """All positions of the split's queries and candidates, without Meta Tokens."""
    split = images.split
    queries = _read(model, [query_prompt(query) for query in split.queries], images.query_batches, images.queries)
    candidates = _read(model, [candidate_prompt(s) for s in split.scenes], images.candidate_batches, images.candidates)
    return queries, candidates


def last_token(tokens: Tokens) -> Floats:
    """(n, 1, d): the last position's vector, the usual single-vector embedding of a causal decoder."""
    return tokens.vectors[np.arange(len(tokens.lengths)), tokens.lengths - 1][:, None]


def pooled_spans(tokens: Tokens, spans: int) -> Floats:
    """(n, spans, d): each item's positions in so many equal spans, averaged and normalised again.

    A span of an item with fewer positions than spans repeats its nearest position.
    """
    found = np.empty((len(tokens.lengths), spans, tokens.vectors.shape[2]), np.float32)
    for item, length in enumerate(tokens.lengths.tolist()):
        edges = np.linspace(0, length, spans + 1)
        for span in range(spans):
            start = int(edges[span])
            found[item, span] = tokens.vectors[item, start : max(start + 1, int(edges[span + 1]))].mean(0)
    return found / np.linalg.norm(found, axis=2, keepdims=True)


def all_tokens(queries: Tokens, candidates: Tokens) -> tuple[Floats, Floats]:
    """Both sides for MaxSim over all real positions: a query's padding is zero and adds nothing to the sum, a candidate's
    repeats its first vector and changes no maximum."""
    q, c = queries.vectors.copy(), candidates.vectors.copy()
    for item, length in enumerate(queries.lengths.tolist()):
        q[item, length:] = 0
    for item, length in enumerate(candidates.lengths.tolist()):
        c[item, length:] = c[item, 0]
    return q, c


def _read(model: DemoModel, prompts: Sequence[Prompt], batches: Sequence[Sequence[int]], images: Sequence) -> Tokens:
    lengths = np.array([len(prompt.ids) for prompt in prompts])
    vectors: Floats | None = None
    for batch, seen in zip(batches, images, strict=True):
        part = model.read(lay_out_plain([prompts[k] for k in batch]), seen).numpy()
        if vectors is None:
            vectors = np.zeros((len(prompts), lengths.max(), part.shape[2]), np.float32)
        vectors[batch, : part.shape[1]] = part
    assert vectors is not None
    return Tokens(vectors, lengths)
