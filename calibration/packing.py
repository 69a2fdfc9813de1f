"""Gather the tensors that finished graphs refer to into new safetensors files, once, whatever graph names them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from .linears import read_tensor

SHARD_BYTES = 5_000_000_000  # what Hugging Face uses
DTYPES = {
    ir.DataType.INT8: "I8",
    ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.FLOAT: "F32",
}
Key = tuple[str, int]


def pack_weights(models: Iterable[ir.Model], folder: Path, quantised: str) -> None:
    """Write ``weights/<quantised>-NN.safetensors`` (one-byte codes) and ``weights/high-NN.safetensors`` (all else).

    Every external tensor of the models, relative to ``folder``, is copied once and its users are pointed at the copy.
    """
    (folder / "weights").mkdir(exist_ok=True)
    users: dict[Key, list[ir.Value]] = {}
    for model in models:
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                users.setdefault(_key(value.const_value), []).append(value)
    tensors = [same[0].const_value for same in users.values()]
    for name, wanted in ((quantised, True), ("high", False)):
        chosen = [tensor for tensor in tensors if (tensor.dtype.itemsize == 1) is wanted]
        chosen.sort(key=lambda tensor: -tensor.dtype.itemsize)  # so that each is aligned to its own size
        for number, shard in enumerate(_shards(chosen), 1):
            location = f"weights/{name}-{number:02}.safetensors"
            offsets = _write(folder, location, shard)
            for tensor in shard:
                for value in users[_key(tensor)]:
                    value.const_value = _moved(tensor, location, offsets[str(tensor.name)])


def _key(tensor: ir.ExternalTensor) -> Key:
    return str(tensor.location), tensor.offset or 0


def _shards(tensors: Iterable[ir.ExternalTensor]) -> Iterator[list[ir.ExternalTensor]]:
    shard: list[ir.ExternalTensor] = []
    for tensor in tensors:
        if shard and sum(x.nbytes for x in shard) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(tensor)
    if shard:
        yield shard


def _write(folder: Path, location: str, tensors: Sequence[ir.ExternalTensor]) -> dict[str, int]:
    """Write one file, tensor by tensor; returns where the bytes of each start in it.

    Format: https://github.com/huggingface/safetensors#format. The library's own writer wants all data in memory.
    """
    header: dict[str, Any] = {}
    position = 0
    for tensor in tensors:
        span = [position, position + tensor.nbytes]
        shape = tensor.shape.numpy()
        header[str(tensor.name)] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": span}
        position = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / location).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(np.ascontiguousarray(read_tensor(folder, tensor)).tobytes())
    return {name: 8 + len(text) + entry["data_offsets"][0] for name, entry in header.items()}


def _moved(tensor: ir.ExternalTensor, location: str, offset: int) -> ir.ExternalTensor:
    return ir.ExternalTensor(location, offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=tensor.name)
