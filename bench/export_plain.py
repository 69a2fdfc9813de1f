"""The plain way, for comparison: load every weight, then ``torch.onnx.export`` the modules, for one budget.

Run as a process of its own: ``python -m metaembed.bench.export_plain CHECKPOINT OUTPUT R_Q,R_C``. The modules are ours,
which compute what HF's do (tests/parity): HF's vision tower does not trace for more than one image size. As in peers'
exporters, each side is a graph, with the answer rows inside it and a file of weights beside it.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from metaembed.export.checkpoint import Checkpoint
from metaembed.export.encoder import (
    LanguageEncoder,
    VisionEncoder,
    register_constants,
    text_constants,
    vision_constants,
)
from metaembed.runtime.budget import Budget
from metaembed.runtime.layout import PATCHES
from metaembed.runtime.manifest import DEFAULT_OPSET

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class OneSide(nn.Module):
    """The language encoder with a fixed number of answers."""

    def __init__(self, encoder: LanguageEncoder, answers: int) -> None:
        super().__init__()
        self.encoder, self.answers = encoder, answers

    def forward(self, ids: Tensor, image_rows: Tensor, images: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        rows = torch.arange(ids.shape[1] - self.answers, ids.shape[1])
        return self.encoder(ids, image_rows, images, positions, mask, rows)


def load(module: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """Give a module, made without storage, its weights in their stored type."""
    weights = {}
    for name in module.state_dict():
        ref = checkpoint.tensors[name]
        data = np.array(ref.read().reshape(-1).view(np.uint8))
        weights[name] = torch.from_numpy(data).view(DTYPES[ref.dtype]).reshape(ref.shape)
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)


def load_vision(checkpoint: Checkpoint) -> nn.Module:
    with torch.device("meta"):
        module = VisionEncoder(checkpoint.geometry)
    register_constants(module, vision_constants(checkpoint.geometry.vision))
    return load(module, checkpoint)


def load_language(checkpoint: Checkpoint) -> nn.Module:
    with torch.device("meta"):
        module = LanguageEncoder(checkpoint.geometry)
    register_constants(module, text_constants(checkpoint.geometry.text))
    return load(module, checkpoint)


def export_vision(checkpoint: Checkpoint, path: Path) -> None:
    images, windows = (Dim(name, min=2) for name in ("i", "w"))
    example = (
        torch.zeros(2, 3, PATCHES, checkpoint.geometry.vision.patch_values),
        torch.zeros(2, 3, PATCHES, 2, dtype=torch.int64),
        torch.ones(2, 3, PATCHES, dtype=torch.bool),
    )
    export(load_vision(checkpoint), example, ({0: images, 1: windows},) * 3, path)


def export_side(encoder: nn.Module, checkpoint: Checkpoint, answers: int, path: Path) -> None:
    items, positions, images, rows = (Dim(name, min=2) for name in ("b", "t", "i", "m"))
    ids = torch.zeros(2, 99, dtype=torch.int64)
    embeddings = torch.zeros(3, 32, checkpoint.geometry.text.hidden, dtype=next(encoder.parameters()).dtype)
    example = (ids, ids - 1, embeddings, ids.unsqueeze(1).repeat(1, 3, 1), ids == 0)
    both = {0: items, 1: positions}
    dynamic = (both, both, {0: images, 1: rows}, {0: items, 2: positions}, both)
    export(OneSide(encoder, answers).eval(), example, dynamic, path)


def export(module: nn.Module, example: tuple[Tensor, ...], dynamic: tuple[object, ...], path: Path) -> None:
    program = torch.onnx.export(
        module, example, dynamo=True, dynamic_shapes=dynamic, opset_version=DEFAULT_OPSET, verbose=False
    )
    assert program is not None
    program.save(path, external_data=True)


def main() -> None:
    checkpoint, output, budget = Checkpoint.open(sys.argv[1]), Path(sys.argv[2]), Budget.parse(sys.argv[3])
    warnings.simplefilter("ignore")
    output.mkdir(parents=True)
    export_vision(checkpoint, output / "vision.onnx")
    encoder = load_language(checkpoint)
    export_side(encoder, checkpoint, budget.query, output / "query.onnx")
    export_side(encoder, checkpoint, budget.candidate, output / "candidate.onnx")


if __name__ == "__main__":
    main()
