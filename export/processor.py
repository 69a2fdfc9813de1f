"""What makes inputs of texts and images: tokenizer and image rules of a checkpoint, read and checked.

Apart from source.py: the reference reads that, and these are what it judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from metaembed.runtime.errors import BundleError
from metaembed.runtime.geometry import Geometry
from metaembed.runtime.images import ImageRules
from metaembed.runtime.manifest import TOKENIZER
from metaembed.runtime.text import Tokenizer

from .source import find_asset, find_image_processor


def read_processor(folders: Sequence[Path], image_tokens: int) -> ImageRules:
    """The checkpoint's image rules for images of at most ``image_tokens``.

    Raises:
        UsageError: there is none, or the model's smallest image is larger than that.
        BundleError: it is damaged, or asks for what this version does not do.
    """
    return ImageRules.from_config(find_image_processor(folders)[1], image_tokens)


def find_tokenizer(folders: Sequence[Path], geometry: Geometry) -> Path:
    """The tokenizer.json that a bundle may take as it is.

    Raises:
        UsageError: there is none.
        BundleError: it is damaged, is not Qwen2.5-VL's, or has an id that the model's token table has no row for.
    """
    path = find_asset(folders, TOKENIZER)
    token, largest = Tokenizer(path).largest_id()
    if largest >= geometry.text.vocab:
        raise BundleError(
            f"the tokenizer gives {token!r} the id {largest}, and the model's token table has {geometry.text.vocab} "
            f"rows; copy {TOKENIZER} from the base model"
        )
    return path
