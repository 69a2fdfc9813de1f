"""The traced modules themselves as sessions: what a narrow graph computes, in bf16 or fp16, which ONNX Runtime's CPU cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from metaembed.export.checkpoint import Checkpoint
from metaembed.export.encoder import (
    LanguageEncoder,
    VisionEncoder,
    register_constants,
    text_constants,
    vision_constants,
)
from metaembed.export.trace import DTYPES
from metaembed.runtime.encoder import LANGUAGE_INPUTS, VISION_INPUTS, Encoder
from metaembed.runtime.manifest import Bundle
from metaembed.runtime.session import Arrays

IMAGES = "image_embeddings"


class TorchSession:
    """A module in PyTorch on the CPU. Image embeddings pass in float32, which holds every value of the narrow types."""

    def __init__(self, module: nn.Module, inputs: set[str], output: str, precision: str) -> None:
        self._module, self._output, self._dtype = module, output, DTYPES[precision]
        self._inputs = dict.fromkeys(inputs, np.dtype(np.float32))
        self.description = f"PyTorch {torch.__version__} (CPU), {precision}"

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        return self._inputs

    @property
    def max_items(self) -> int | None:
        return None

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in feeds.items()}
        if IMAGES in tensors:
            tensors[IMAGES] = tensors[IMAGES].to(self._dtype)
        with torch.inference_mode():
            return {self._output: self._module(**tensors).float().numpy()}

    def close(self) -> None:
        pass


def open_in_torch(bundle: Bundle, checkpoint: Checkpoint, precision: str) -> Encoder:
    """An encoder of the bundle's inputs that computes in PyTorch, weights rounded to ``precision``."""
    geometry = checkpoint.geometry
    vision = _load(VisionEncoder(geometry), vision_constants(geometry.vision), checkpoint, precision)
    language = _load(LanguageEncoder(geometry), text_constants(geometry.text), checkpoint, precision)
    return Encoder(
        bundle,
        TorchSession(vision, VISION_INPUTS, IMAGES, precision),
        TorchSession(language, LANGUAGE_INPUTS, "embeddings", precision),
    )


def _load(module: nn.Module, constants: dict[str, Tensor], checkpoint: Checkpoint, precision: str) -> nn.Module:
    """Constants stay float32, as in the graphs."""
    weights = {
        name: torch.from_numpy(checkpoint.read(name).astype(np.float32)).to(DTYPES[precision])
        for name in module.state_dict()
    }
    module.load_state_dict(weights, assign=True)
    register_constants(module, constants)
    return module.eval().requires_grad_(False)
