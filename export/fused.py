"""Opset 23: the decoder's attention and every RMSNorm as one operator each, for parsers that know them.

TensorRT's parser takes these from 10.15 on (release notes of onnx/onnx-tensorrt); older ones, JetPack 6's among them, need
the primitives of ``encoder.py``, which stay the default. The vision tower keeps primitive attention: ONNX Runtime refuses
an ``Attention`` mask that is broadcast over queries, and expanding it costs TensorRT 3.5 times the activations.
"""

from __future__ import annotations

from functools import partial

import onnx_ir as ir
import torch
from torch import Tensor, nn

from .encoder import Attention, RMSNorm

FUSED_OPSET = 23
FLOAT = int(ir.DataType.FLOAT)


def fuse_operators(module: nn.Module) -> None:
    """Make a module trace to ``Attention`` and ``RMSNormalization``, in place. It can then be traced but not run."""
    for part in module.modules():
        if isinstance(part, RMSNorm):
            part.forward = partial(trace_rms_norm, part)  # type: ignore[method-assign]
        elif isinstance(part, Attention):
            part.attend = trace_attention  # type: ignore[method-assign]


def trace_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """``encoder.attend``, in its shapes. A mask has the type of the queries.

    ``softmax_precision`` is left out, for TensorRT refuses it: what the softmax is computed in is then the kernel's choice.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (b, heads, positions, e)
    inputs = (q, k, v, bias.to(q.dtype))
    mixed = torch.onnx.ops.symbolic("Attention", inputs, dtype=q.dtype, shape=q.shape, version=FUSED_OPSET)
    return mixed.transpose(1, 2).flatten(2)


def trace_rms_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    """``RMSNorm.forward``: float32 in and inside, the weight's type out."""
    inputs, attributes = (x, norm.weight.float()), {"axis": -1, "epsilon": norm.eps, "stash_type": FLOAT}
    y = torch.onnx.ops.symbolic(
        "RMSNormalization", inputs, attributes, dtype=torch.float32, shape=x.shape, version=FUSED_OPSET
    )
    return y.to(norm.weight.dtype)
