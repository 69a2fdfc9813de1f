"""Hugging Face's model for weights that do not fit in memory: each layer's are read just before it runs, then dropped.

The modules are HF's own, made without storage (torch's meta device); only the token table is replaced, by one that reads
the rows it is asked for. A test holds the embeddings equal, to the bit, to those of ``from_pretrained``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from metaembed.runtime.memory import available_memory
from metaembed.runtime.tensors import TOKEN_TABLE

from .checkpoint import Checkpoint

SHARE = 0.5  # of the free memory may hold float32 weights; activations and the system want the rest


def needs_streaming(checkpoint: Checkpoint) -> bool:
    """Whether the weights in float32 would take more than half of the memory that is free now."""
    values = sum(int(np.prod(ref.shape)) for ref in checkpoint.tensors.values())
    free = available_memory()
    return free is not None and 4 * values > SHARE * free


def open_loaded(folder: Path, checkpoint: Checkpoint) -> Qwen2_5_VLModel:
    """``Qwen2_5_VLModel`` in float32, all weights in memory.

    Not by ``from_pretrained``: where ``model.*`` lies beside ``prompt_embed_tokens`` and ``custom_text_proj``, as
    training writes them, it leaves weights random and only warns (transformers 5.23). Here every name must match.
    """
    model = _open_empty(folder)
    weights = {name: _read(checkpoint, name) for name in model.state_dict()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def open_streamed(folder: Path, checkpoint: Checkpoint) -> Qwen2_5_VLModel:
    """``Qwen2_5_VLModel`` in float32 whose memory is that of its largest layer.

    Args:
        folder: has the config.json that HF reads.
        checkpoint: where each tensor lies, by the names of ``Qwen2_5_VLModel``.
    """
    model = _open_empty(folder)
    model.language_model.embed_tokens = StoredTable(checkpoint)
    for name, module in _units(model):
        _stream(module, name, checkpoint)
    return model.eval()


def _open_empty(folder: Path) -> Qwen2_5_VLModel:
    with torch.device("meta"):
        model = Qwen2_5_VLModel(Qwen2_5_VLConfig.from_pretrained(folder))
    _restore_buffers(model)
    return model


def _read(checkpoint: Checkpoint, name: str) -> Tensor:
    return torch.from_numpy(checkpoint.read(name).astype(np.float32))


class StoredTable(nn.Module):
    """The token table, left on disk: ids (b, t) -> float32 (b, t, d)."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.rows = checkpoint.read(TOKEN_TABLE)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self.rows[ids.numpy()].astype(np.float32))


def _restore_buffers(model: nn.Module) -> None:
    """Rotary frequencies are in no checkpoint: modules that own some are made again, with storage."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            model.set_submodule(name, type(module)(module.config))


def _units(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What is loaded at once: an element of a module list (a decoder layer, a vision block), or a leaf outside of them."""
    for child, module in model.named_children():
        path = f"{name}{child}"
        if isinstance(module, nn.ModuleList):
            yield from ((f"{path}.{place}", item) for place, item in enumerate(module))
        elif any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            yield path, module
        else:
            yield from _units(module, f"{path}.")


def _stream(module: nn.Module, name: str, checkpoint: Checkpoint) -> None:
    """Give a module its weights before each forward and take them away after."""
    empty = module.state_dict()

    def load(*_: object) -> None:
        module.load_state_dict({key: _read(checkpoint, f"{name}.{key}") for key in empty}, assign=True)

    def drop(*_: object) -> None:
        module.load_state_dict(empty, assign=True)

    module.register_forward_pre_hook(load)
    module.register_forward_hook(drop, always_call=True)
