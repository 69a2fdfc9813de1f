"""How an index stores vectors: prefix-nested groups, each contiguous in every segment file."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .arrays import as_array
from .budget import TRAINED_GROUPS
from .errors import UsageError
from .int8 import Int8Vectors, quantize_int8
from .maxsim import Vectors, as_float32

STORAGES = {"bf16": ("BF16", np.dtype(ml_dtypes.bfloat16)), "int8": ("I8", np.dtype(np.int8))}
ALIGNMENT = 64
Blocks = list[tuple[str, str, np.dtype[Any], tuple[int, ...]]]

SEGMENTS = "segments"  # the folder of segment files in an index


@dataclass(frozen=True)
class Layout:
    """What every segment of an index has in common.

    Attributes:
        dims: of a vector.
        ends: where the groups of an item's vectors end: (1, 4, 8, 16, 64) stores 0, 1-3, 4-7, 8-15 and 16-63 apart.
        storage: ``bf16``, or ``int8`` with a scale per vector.
        screen: keep the first group in int8 as well, to pass over most items in half the bytes (see screen.py).
    """

    dims: int
    ends: tuple[int, ...]
    storage: str = "bf16"
    screen: bool = False

    def __post_init__(self) -> None:
        if self.dims < 1 or not self.ends or list(self.ends) != sorted(set(self.ends)) or self.ends[0] < 1:
            raise UsageError(f"no index of {self.dims} dims and groups ending at {self.ends}: ends rise from 1 or more")
        if self.storage not in STORAGES:
            raise UsageError(f"storage {self.storage!r} is unknown; an index stores {' or '.join(STORAGES)}")
        if self.screen and self.storage == "int8":
            raise UsageError("an int8 index needs no screen: it is one already")

    @classmethod
    def for_vectors(
        cls, dims: int, vectors: int, storage: str = "bf16", ends: Sequence[int] = (), *, screen: bool = False
    ) -> Layout:
        """The trained groups that fit into `vectors`, or those given, with the last one ending there."""
        wanted = ends or [candidate for _, candidate in TRAINED_GROUPS]
        return cls(dims, (*sorted({end for end in wanted if end < vectors}), vectors), storage, screen)

    @property
    def vectors(self) -> int:
        return self.ends[-1]

    @property
    def starts(self) -> tuple[int, ...]:
        return (0, *self.ends[:-1])

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """First vector and end of every group, and of the screen, which is written as a group of its own behind them."""
        return (*zip(self.starts, self.ends, strict=True), *([(0, self.ends[0])] if self.screen else []))

    @property
    def item_bytes(self) -> int:
        """Bytes of one item's vectors."""
        scale = 4 if self.storage == "int8" else 0
        screen = self.ends[0] * (self.dims + 4) if self.screen else 0
        return self.vectors * (self.dims * int(STORAGES[self.storage][1].itemsize) + scale) + screen

    def groups_of(self, vectors: int) -> int:
        """How many groups hold the first `vectors` vectors."""
        if not 1 <= vectors <= self.vectors:
            raise UsageError(f"{vectors} vectors per candidate were asked for; this index stores {self.vectors}")
        return bisect_left(self.ends, vectors) + 1

    def encode(self, embeddings: NDArray[Any]) -> Vectors:
        """Embeddings (n, r, d) of any real numbers as they are stored; a UsageError names the first item that is not finite."""
        values = as_array(embeddings, "embeddings")
        if values.ndim != 3 or values.shape[1:] != (self.vectors, self.dims):
            raise UsageError(f"embeddings are {values.shape}; this index takes (items, {self.vectors}, {self.dims})")
        with np.errstate(over="ignore"):
            stored = values.astype(STORAGES["bf16"][1], copy=False)
        finite = np.isfinite(as_float32(stored, slice(None))).all(axis=(1, 2))
        if not finite.all():
            raise UsageError(f"item {int(np.argmin(finite))} holds a NaN or a value beyond bf16's range")
        return quantize_int8(values) if self.storage == "int8" else stored

    def name(self, group: int) -> str:
        """Of a group in tensor names: ``1-3``; ``screen`` for the one behind the last."""
        start, end = self.spans[group]
        return "screen" if group == len(self.ends) else f"{start}-{end - 1}"

    def blocks(self, items: int) -> Blocks:
        """Name, safetensors type, dtype and shape of every tensor in a segment, in file order."""
        vectors: Blocks = []
        scales: Blocks = []
        for group, (start, end) in enumerate(self.spans):
            kind, dtype = STORAGES["int8" if group == len(self.ends) else self.storage]
            vectors.append((f"vectors.{self.name(group)}", kind, dtype, (items, end - start, self.dims)))
            if kind == "I8":
                scales.append((f"scales.{self.name(group)}", "F32", np.dtype(np.float32), (items, end - start)))
        return [*vectors, *scales, ("crc32", "U32", np.dtype(np.uint32), (items, len(self.spans)))]

    def header(self, items: int) -> bytes:
        """The safetensors header; padded so that the first group starts on a cache line. One layout, one header."""
        entries, offset = {}, 0
        for name, kind, dtype, shape in self.blocks(items):
            size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    def to_json(self) -> dict[str, Any]:
        return {"dims": self.dims, "ends": list(self.ends), "storage": self.storage, "screen": self.screen}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout:
        return cls(int(data["dims"]), tuple(map(int, data["ends"])), str(data["storage"]), bool(data["screen"]))


def cut(vectors: Vectors, start: int, end: int) -> Vectors:
    """Vectors start..end-1 of every item, without a copy."""
    if isinstance(vectors, Int8Vectors):
        return Int8Vectors(vectors.codes[:, start:end], vectors.scales[:, start:end])
    return vectors[:, start:end]
