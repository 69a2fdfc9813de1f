"""Contestants of the encoder race that need no torch here: a bundle in its best session, and what every input is cut to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metaembed.runtime import layout
from metaembed.runtime.errors import MetaEmbedError
from metaembed.runtime.images import patchify
from metaembed.runtime.manifest import LANGUAGE, PROCESSOR, TOKENIZER, VISION, Bundle
from metaembed.runtime.open_sessions import open_sessions
from metaembed.runtime.processor import read_image_rules
from metaembed.runtime.session import DeviceSession
from metaembed.runtime.text import Template, Tokenizer

from .encoder import Case, Runner


@dataclass(frozen=True)
class Prepared:
    """One input as every contestant gets it: prompt ids, normalised patches in Qwen's order (p, 1176) and their grid."""

    prompt: np.ndarray
    pixels: np.ndarray | None
    grid: tuple[int, int] | None


def prepare_input(bundle: Bundle, case: Case) -> Prepared:
    """Tokenise and cut once, before the clock starts; parity tests show that this equals HF's own preprocessing."""
    tokenizer = Tokenizer(bundle.path(TOKENIZER), Template.from_json(bundle.manifest.template))
    limit = bundle.manifest.limits.text_tokens
    if case.image is None:
        return Prepared(tokenizer.prompt_ids(case.text, 0, case.side, limit), None, None)
    patches = patchify(case.image, read_image_rules(bundle.path(PROCESSOR)))
    return Prepared(tokenizer.prompt_ids(case.text, patches.tokens, case.side, limit), patches.pixels, patches.grid[1:])


def build_bundle(folder: Path, threads: int, gpu: bool = False, cuda_graphs: bool = False) -> Callable[[Case], Runner]:
    """The product: host layout and both graphs. ``gpu``: nothing but a GPU will do."""
    bundle = Bundle.open(folder, verify=False)
    geometry = bundle.manifest.geometry
    vision, language = open_sessions(bundle, (VISION, LANGUAGE), threads=threads, cuda_graphs=cuda_graphs)
    if gpu and not isinstance(language, DeviceSession):
        raise MetaEmbedError(f"the bundle got no GPU: {language.description}")
    image_token = Tokenizer(bundle.path(TOKENIZER), Template.from_json(bundle.manifest.template)).image_id
    nothing = np.zeros((1, 1, geometry.text.hidden), language.inputs["image_embeddings"])

    def prepare(case: Case) -> Runner:
        item = prepare_input(bundle, case)
        meta = (
            layout.query_meta_tokens(geometry.text.vocab, case.vectors)
            if case.side == "query"
            else layout.candidate_meta_tokens(geometry.text.vocab, geometry.query_tokens, case.vectors)
        )

        def run() -> np.ndarray:
            seen, windows = nothing, 0
            if item.pixels is not None:
                images = layout.lay_out_images([item.pixels] * case.batch, [item.grid] * case.batch)
                seen, windows = vision.run(images.feeds())["image_embeddings"], images.patches.shape[1]
            prompts = layout.lay_out_prompts(
                [item.prompt] * case.batch,
                [item.grid] * case.batch,
                meta,
                case.vectors,
                image_token=image_token,
                windows=windows,
            )
            return language.run({**prompts.feeds(), "image_embeddings": seen})["embeddings"]

        return run

    return prepare
