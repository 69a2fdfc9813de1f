"""Trace the encoder without its weights: torch.export under fake tensors, so that 32B traces in a few hundred MB."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from metaembed.runtime.geometry import Geometry
from metaembed.runtime.layout import PATCHES
from metaembed.runtime.manifest import DEFAULT_OPSET

from .encoder import LanguageEncoder, VisionEncoder, text_constants, vision_constants
from .fused import FUSED_OPSET, fuse_operators
from .graph import optimise
from .repeat import repeat_layers

TRACED_LAYERS = 3  # of the language model: the first, one of the middle, the last
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Arguments = dict[str, tuple[tuple[str | int, ...], torch.dtype]]

# Sizes used while tracing: all different and above 1, so that no two dynamic axes are taken for one, or for a constant.
EXAMPLE = {"i": 2, "w": 3, "b": 5, "t": 23, "p": 23, "m": 32, "r": 7}


def trace_vision(geometry: Geometry, precision: str = "fp32", opset: int = DEFAULT_OPSET) -> ir.Model:
    """The vision graph of CONTRIBUTING.md, optimised; weights carry names and shapes but no values."""
    whole = [block in geometry.vision.full_attention_blocks for block in range(geometry.vision.depth)]
    others = sorted(set(whole[1:]))
    kinds = [whole[0], *others]  # traced: the first block, then one of each kind that follows
    full = tuple(block for block, kind in enumerate(kinds) if kind)
    vision = replace(geometry.vision, depth=len(kinds), full_attention_blocks=full)
    if geometry.vision.depth <= len(kinds):
        return trace_whole_vision(geometry, precision, opset)
    model = trace_whole_vision(replace(geometry, vision=vision), precision, opset)
    repeat_layers(model, "visual.blocks", [0, *(1 + others.index(kind) for kind in whole[1:])])
    return model


def trace_language(geometry: Geometry, precision: str = "fp32", opset: int = DEFAULT_OPSET) -> ir.Model:
    """The language graph of CONTRIBUTING.md, optimised; it serves both sides and every budget."""
    return repeat_decoder(geometry, lambda shallow: trace_whole_language(shallow, precision, opset))


def repeat_decoder(geometry: Geometry, trace: Callable[[Geometry], ir.Model]) -> ir.Model:
    """Trace a shallow decoder and copy its middle layer."""
    layers = geometry.text.layers
    if layers <= TRACED_LAYERS:
        return trace(geometry)
    model = trace(replace(geometry, text=replace(geometry.text, layers=TRACED_LAYERS)))
    repeat_layers(model, "language_model.layers", [0, *[1] * (layers - 2), 2])  # the last computes the answer rows only
    return model


def trace_whole_vision(geometry: Geometry, precision: str = "fp32", opset: int = DEFAULT_OPSET) -> ir.Model:
    """As ``trace_vision``, every block traced: slow for deep models, and what judges the quick way."""
    arguments: Arguments = {
        "patches": (("i", "w", PATCHES, geometry.vision.patch_values), torch.float32),
        "patch_positions": (("i", "w", PATCHES, 2), torch.int64),
        "patch_mask": (("i", "w", PATCHES), torch.bool),
    }
    return trace_module(
        lambda: VisionEncoder(geometry),
        arguments,
        "image_embeddings",
        vision_constants(geometry.vision),
        DTYPES[precision],
        opset,
    )


def trace_whole_language(geometry: Geometry, precision: str = "fp32", opset: int = DEFAULT_OPSET) -> ir.Model:
    """As ``trace_language``, every layer traced."""
    dtype = DTYPES[precision]
    arguments: Arguments = {
        "token_ids": (("b", "t"), torch.int64),
        "image_rows": (("b", "t"), torch.int64),
        "image_embeddings": (("i", "m", geometry.text.hidden), dtype),
        "positions": (("b", 3, "t"), torch.int64),
        "mask": (("b", "t"), torch.bool),
        "rows": (("r",), torch.int64),
    }
    return trace_module(
        lambda: LanguageEncoder(geometry), arguments, "embeddings", text_constants(geometry.text), dtype, opset
    )


def trace_module(
    build: Callable[[], nn.Module],
    arguments: Arguments,
    output: str,
    constants: dict[str, Tensor],
    dtype: torch.dtype,
    opset: int,
    added: int = 0,
) -> ir.Model:
    """Trace a module under fake tensors and optimise it; the axis ``t`` is ``added`` longer than the axis ``p``."""
    axes = {axis: torch.export.Dim(axis) for shape, _ in arguments.values() for axis in shape if isinstance(axis, str)}
    if "p" in axes:
        axes["t"] = axes["p"] + added
    dynamic = {
        name: {place: axes[axis] for place, axis in enumerate(shape) if isinstance(axis, str)}
        for name, (shape, _) in arguments.items()
    }
    sizes = EXAMPLE | {"t": EXAMPLE["t"] + added}
    with _quiet(), FakeTensorMode():
        module = build().eval().requires_grad_(False)
        if opset >= FUSED_OPSET:
            fuse_operators(module)
        for parameter in module.parameters():  # not module.to(dtype), which would round the rotary frequencies
            parameter.data = parameter.data.to(dtype)
        example = tuple(
            torch.zeros([sizes.get(axis, axis) for axis in shape], dtype=kind) for shape, kind in arguments.values()
        )
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            dynamic_shapes=dynamic,
            input_names=list(arguments),
            output_names=[output],
            opset_version=opset,
            optimize=False,  # it would read the values of fake tensors
            verbose=False,
        )
    assert program is not None
    for name, value in program.model.graph.initializers.items():
        real = constants.get(name)  # weights get their bytes later, from the checkpoint
        value.const_value = None if real is None else ir.tensor(real.numpy(), name=name)
    optimise(program.model)
    return program.model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporter says of every export: axis names that coincide, torchvision's absence."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
