"""Golden vectors: inputs and the reference's embeddings, stored in the bundle and replayed wherever it travels."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .errors import BundleError

SIDES = ("query", "candidate")


@dataclass(frozen=True, eq=False)
class GoldenItem:
    """One input: a text, an image, or both."""

    text: str | None = None
    image: Image.Image | None = None

    @property
    def kind(self) -> str:
        """``text``, ``image`` or ``image + text``."""
        return " + ".join(name for name, value in (("image", self.image), ("text", self.text)) if value is not None)


def golden_path(side: str) -> str:
    """Where a bundle keeps one side."""
    return f"golden/{side}.safetensors"


def write_golden(path: Path, items: Sequence[GoldenItem], embeddings: NDArray[np.float32]) -> None:
    """Store inputs (images as PNG, which is lossless) and their embeddings [n, r, d] at the largest budget."""
    tensors = {"embeddings": np.ascontiguousarray(embeddings, np.float32)}
    for place, item in enumerate(items):
        if item.image is not None:
            png = io.BytesIO()
            item.image.save(png, "PNG", optimize=True)
            tensors[f"image.{place}"] = np.frombuffer(png.getvalue(), np.uint8)
    path.parent.mkdir(exist_ok=True)
    # Not save_file, whose SafetensorError hides that the disk is full.
    path.write_bytes(save(tensors, {"texts": json.dumps([item.text for item in items], ensure_ascii=False)}))


def read_golden(path: Path) -> tuple[list[GoldenItem], NDArray[np.float32]]:
    """What ``write_golden`` stored; a BundleError when the file is damaged or empty."""
    try:
        with safe_open(path, "np") as file:
            texts: list[str | None] = json.loads((file.metadata() or {})["texts"])
            images = {
                int(name.removeprefix("image.")): Image.open(io.BytesIO(file.get_tensor(name).tobytes()))
                for name in file.keys()  # noqa: SIM118 - a safetensors file is no dict
                if name.startswith("image.")
            }
            embeddings: NDArray[np.float32] = file.get_tensor("embeddings")
    except (SafetensorError, KeyError, ValueError, TypeError, OSError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read ({error})") from None
    if not isinstance(texts, list) or not all(text is None or isinstance(text, str) for text in texts):
        raise BundleError(f"{path} does not hold a list of texts")
    if not texts or embeddings.ndim != 3 or len(texts) != len(embeddings) or embeddings.dtype != np.float32:
        raise BundleError(f"{path} holds {len(texts)} inputs and embeddings of {embeddings.dtype} {embeddings.shape}")
    return [GoldenItem(text, images.get(place)) for place, text in enumerate(texts)], embeddings
