"""The image rules of a checkpoint. Apart from source.py: the reference reads that, and these rules are what it judges."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from metaembed.runtime.images import ImageRules

from .checkpoint import read_json
from .source import find_asset


def read_processor(folders: Sequence[Path], image_tokens: int) -> ImageRules:
    """The rules of preprocessor_config.json for images of at most ``image_tokens``.

    Raises:
        UsageError: there is none, or the model's smallest image is larger than that.
        BundleError: it is damaged, or asks for what this version does not do.
    """
    return ImageRules.from_config(read_json(find_asset(folders, "preprocessor_config.json")), image_tokens)
