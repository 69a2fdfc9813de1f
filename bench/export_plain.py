"""The plain way, for comparison: load every weight, then ``torch.onnx.export`` the modules, for one budget.

Run as a process of its own: ``python -m metaembed.bench.export_plain CHECKPOINT OUTPUT R_Q,R_C``. The modules are ours,
which compute what HF's do (tests/parity): HF's vision tower does not trace for more than one image size. As in peers'
exporters, each side is a graph, with the answer rows inside it and a file of weights beside it.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from metaembed.export.checkpoint import Checkpoint
from metaembed.export.encoder import LanguageEncoder
from metaembed.runtime.budget import Budget

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
        data = torch.frombuffer(bytearray(ref.read().tobytes()), dtype=DTYPES[ref.dtype])
        weights[name] = data.reshape(ref.shape)
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)


def make_empty(kind: type[nn.Module], checkpoint: Checkpoint) -> nn.Module:
    """A module without storage for its parameters; its buffers, which no checkpoint has, are real."""
    buffers = dict(kind(checkpoint.geometry_of_one_layer()).named_buffers()) if False else {}
    with torch.device("meta"):
        module = kind(checkpoint.geometry)
    module.load_state_dict(buffers, strict=False)
    return module


def main() -> None:
    checkpoint, output, budget = Checkpoint.open(sys.argv[1]), Path(sys.argv[2]), Budget.parse(sys.argv[3])
    warnings.simplefilter("ignore")
    output.mkdir(parents=True)
    print(checkpoint, output, budget)


if __name__ == "__main__":
    main()
