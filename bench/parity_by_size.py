"""Parity records for the report: a bundle's golden inputs replayed by input size, and its recipe's sensitivities."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np

from metaembed.runtime.encoder import Encoder
from metaembed.runtime.golden import SIDES, golden_path, read_golden
from metaembed.runtime.images import load_image, patchify
from metaembed.runtime.manifest import PROCESSOR, Bundle
from metaembed.runtime.processor import read_image_rules

from .records import Record

RECIPE = "recipe.json"


def measure_parity(encoder: Encoder, precision: str | None = None) -> Iterator[Record]:
    """The worst cosine against Hugging Face at the largest budget: one record a side and number of visual tokens.

    ``precision`` is what the encoder computes in, where that is not the bundle's.
    """
    bundle, rules = encoder.bundle, read_image_rules(encoder.bundle.path(PROCESSOR))
    for side in SIDES:
        items, reference = read_golden(bundle.path(golden_path(side)))
        encode = encoder.encode_queries if side == "query" else encoder.encode_candidates
        vectors = encode([item.text for item in items], images=[item.image for item in items])
        reference = reference[:, : vectors.shape[1]]
        tokens = np.array(
            [0 if item.image is None else patchify(load_image(item.image), rules).tokens for item in items]
        )
        for count in np.unique(tokens):
            ours, theirs = vectors[tokens == count].astype(np.float64), reference[tokens == count]
            yield {
                "model": bundle.manifest.model,
                "precision": precision or (bundle.manifest.quantization or {}).get("type", bundle.manifest.precision),
                "runs_on": encoder.description,
                "side": side,
                "image_tokens": int(count),
                "items": len(ours),
                "min_cosine": float((ours * theirs).sum(2).min()),
                "max_abs": float(np.abs(ours - theirs).max()),
            }


def read_sensitivities(bundle: Bundle) -> list[Record]:
    """What each group cost when it alone was quantised, where the calibration had to find out."""
    if RECIPE not in bundle.manifest.files:
        return []
    recipe = json.loads(bundle.path(RECIPE).read_text(encoding="utf-8"))
    return [
        {
            "model": bundle.manifest.model,
            "precision": recipe["type"],
            "group": group["name"],
            "cost": group["cost"],
            "share": group["share"],
            "quantised": group["quantised"],
        }
        for group in recipe["groups"]
        if group["cost"] is not None
    ]
