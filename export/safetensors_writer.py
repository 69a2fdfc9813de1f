"""Checkpoint folders written tensor by tensor, in memory that does not grow with the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from metaembed.runtime.staging import staged_folder

from .safetensors_header import FLOAT_DTYPES

SHARD_BYTES = 5_000_000_000  # what Hugging Face uses
ALIGNMENT = 8  # tensor data starts at a multiple of this, as the safetensors library writes it

Pieces = Callable[[str], Iterable[np.ndarray]]
Advance = Callable[[int], object]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written; ``dtype`` is safetensors' name, ``F32``, ``F16`` or ``BF16``."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * FLOAT_DTYPES[self.dtype].itemsize


def write_checkpoint(
    folder: str | Path,
    config: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    pieces: Pieces,
    *,
    shard_bytes: float = SHARD_BYTES,
    advance: Advance = lambda nbytes: None,
) -> None:
    """Write config.json, shards and their index into a new folder, which appears when it is complete.

    Args:
        specs: what to write, in this order but wider types first, so that every tensor is aligned to its type.
        pieces: the data of one tensor, in consecutive arrays of its dtype.
        advance: told the bytes of each piece after it is written (a progress bar's ``update``).

    Raises:
        UsageError: the folder exists already and is not empty.
    """
    ordered = sorted(specs.items(), key=lambda item: -FLOAT_DTYPES[item[1].dtype].itemsize)
    shards = split_shards(dict(ordered), shard_bytes)
    with staged_folder(Path(folder), force=False) as partial:
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name, shard in shards.items():
            _write_shard(partial / name, shard, pieces, advance)
        if len(shards) > 1:
            (partial / "model.safetensors.index.json").write_text(json.dumps(shard_index(shards), indent=2) + "\n")


def split_shards(specs: Mapping[str, TensorSpec], shard_bytes: float) -> dict[str, dict[str, TensorSpec]]:
    """File name to tensors: a new shard wherever the next tensor would exceed ``shard_bytes``."""
    shards: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{k:05}-of-{len(shards):05}.safetensors": shard for k, shard in enumerate(shards, 1)}


def shard_index(shards: Mapping[str, Mapping[str, TensorSpec]]) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    total = sum(spec.nbytes for shard in shards.values() for spec in shard.values())
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _write_shard(path: Path, specs: Mapping[str, TensorSpec], pieces: Pieces, advance: Advance) -> None:
    with path.open("wb") as file:
        file.write(shard_header(specs))
        for name, spec in specs.items():
            written = 0
            for piece in pieces(name):
                written += file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))
                advance(piece.nbytes)
            if written != spec.nbytes:
                raise ValueError(f"{name}: {written} bytes were produced for a tensor of {spec.nbytes}")


def shard_header(specs: Mapping[str, TensorSpec]) -> bytes:
    """What a safetensors file begins with; the tensors' data follow in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, spec in specs.items():
        end = begin + spec.nbytes
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
