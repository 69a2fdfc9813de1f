"""Random weights of a real geometry: rehearse a deployment, its memory and its speed, before having a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from metaembed.runtime.errors import UsageError
from metaembed.runtime.geometry import Geometry
from metaembed.runtime.tensors import expected_tensors

from .checkpoint import Checkpoint
from .safetensors_header import FLOAT_DTYPES
from .safetensors_writer import SHARD_BYTES, Advance, TensorSpec, write_checkpoint

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
STD = 0.02  # Qwen2.5-VL's initializer_range; norms are 1 + noise, so that activations keep their scale
# Drawing a normal costs 25 ns, a 7B model three minutes. So large tensors are windows into one block of drawn values,
# each piece at a place of its own: an engine builder stores equal tensors once, and should find none.
BLOCK_VALUES, PIECE_VALUES = 1 << 23, 1 << 20


def write_random_checkpoint(
    config: Mapping[str, Any],
    seed: int,
    folder: str | Path,
    *,
    dtype: str = "bf16",
    shard_bytes: float = SHARD_BYTES,
    advance: Advance = lambda nbytes: None,
) -> Checkpoint:
    """Write a HF checkpoint folder with random weights of the geometry that ``config`` describes.

    The same config, seed and dtype give the same bytes, whatever the shards.

    Args:
        config: a HF config.json with MetaEmbed's keys, as in runtime/known_models.py.
        advance: told the bytes written, 2 per parameter for bf16 (a progress bar's ``update``).

    Raises:
        UsageError: the folder exists, the dtype is unknown, or the geometry cannot be exported.
    """
    if dtype not in DTYPES:
        raise UsageError(f"random weights can be {', '.join(DTYPES)}, not {dtype!r}")
    kind = DTYPES[dtype]
    specs = {name: TensorSpec(shape, kind) for name, shape in expected_tensors(Geometry.from_config(config)).items()}
    block = _normals(seed, "block", BLOCK_VALUES, FLOAT_DTYPES[kind])
    pieces = partial(_pieces, specs=specs, seed=seed, block=block)
    write_checkpoint(folder, config, specs, pieces, shard_bytes=shard_bytes, advance=advance)
    return Checkpoint.open(folder)


def _pieces(name: str, *, specs: Mapping[str, TensorSpec], seed: int, block: np.ndarray) -> Iterator[np.ndarray]:
    count = prod(specs[name].shape)
    if count <= PIECE_VALUES:
        mean = 1.0 if len(specs[name].shape) == 1 and name.endswith("weight") else 0.0  # norms are the 1-d weights
        yield _normals(seed, name, count, block.dtype, mean)
        return
    places = _generator(seed, name)
    for start in range(0, count, PIECE_VALUES):
        place = places.integers(BLOCK_VALUES - PIECE_VALUES)
        yield block[place : place + min(PIECE_VALUES, count - start)]


def _normals(seed: int, name: str, count: int, dtype: np.dtype, mean: float = 0.0) -> np.ndarray:
    values = _generator(seed, name).standard_normal(count, np.float32)
    values *= STD
    values += mean
    return values.astype(dtype)


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, crc32(name.encode())])
