"""Where each tensor of a safetensors file lies, from its header alone: strict, and nothing else is read.

Format: https://github.com/huggingface/safetensors#format. The library's own reader gives tensors, not the offsets that
ONNX external data needs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from metaembed.runtime.errors import BundleError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
FLOAT_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class TensorRef:
    """A tensor's place on disk: ``nbytes`` raw little-endian, row-major bytes at ``offset`` of ``path``.

    ``dtype`` is safetensors' name, ``F32``, ``F16`` or ``BF16`` for every weight.
    """

    path: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> np.ndarray:
        """A read-only, memory-mapped view; bf16 as ``ml_dtypes.bfloat16``."""
        return np.memmap(self.path, FLOAT_DTYPES[self.dtype], mode="r", offset=self.offset, shape=self.shape)

    def pieces(self, values: int) -> Iterator[np.ndarray]:
        """The flattened data, ``values`` at a time, each overwritten by the next.

        They are read rather than mapped, since mapped pages count as resident memory, and into one buffer: with a
        fresh one for each piece of 512 KiB the kernel takes four times as long, for it clears every page anew.
        """
        buffer = np.empty(values, FLOAT_DTYPES[self.dtype])
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            for start in range(0, self.nbytes, buffer.nbytes):
                piece = buffer[: (self.nbytes - start) // buffer.itemsize]
                _fill(file, piece.view(np.uint8), self.path)
                yield piece


def _fill(file: FileIO, piece: np.ndarray, path: Path) -> None:
    """Read until the piece is full: one call of the system may bring less."""
    done = 0
    while done < piece.size:
        got = file.readinto(piece[done:])
        if not got:
            raise _damaged(path, "it ended while it was read")
        done += got


def read_header(path: Path) -> dict[str, TensorRef]:
    """Name to place for every tensor of a safetensors file.

    Raises:
        BundleError: it is truncated, its header is malformed, or its tensors overlap, leave gaps or leave the file.
    """
    header, data_start, data_bytes = _read_json_header(path)
    refs = {name: _tensor_ref(path, name, entry, data_start) for name, entry in header.items()}
    _check_tiling(path, refs, data_start, data_bytes)
    return refs


def _read_json_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header without ``__metadata__``, where the data starts, and how many bytes of data there are."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > size - LENGTH_BYTES:
            raise _damaged(path, f"its header should have {length} bytes, the file has {size} in all")
        if length > MAX_HEADER_BYTES:
            raise _damaged(path, f"its header of {length} bytes is over the limit of {MAX_HEADER_BYTES}")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise _damaged(path, f"its header cannot be read ({error})") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not an object")
    header.pop("__metadata__", None)
    return header, LENGTH_BYTES + length, size - LENGTH_BYTES - length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice")
    return found


def _tensor_ref(path: Path, name: str, entry: Any, data_start: int) -> TensorRef:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers_ok = all(type(value) is int and value >= 0 for value in (*shape, begin, end))
        fits = numbers_ok and end - begin == prod(shape) * ITEM_BYTES[dtype]
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, f"the entry of {name} in its header is malformed") from None
    if not fits:
        raise _damaged(path, f"{name} is {dtype} of shape {shape}, which its data_offsets {[begin, end]} do not hold")
    return TensorRef(path, data_start + begin, end - begin, tuple(shape), dtype)


def _check_tiling(path: Path, refs: dict[str, TensorRef], data_start: int, data_bytes: int) -> None:
    """Tensors must lie end to end and fill the file, so that no byte has two meanings or none."""
    position = data_start
    for name, ref in sorted(refs.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if ref.offset != position:
            kind = "overlaps the tensor before it" if ref.offset < position else "leaves a gap before it"
            raise _damaged(path, f"{name} {kind}")
        position += ref.nbytes
    if position != data_start + data_bytes:
        raise _damaged(path, f"its header describes {position} bytes, the file has {data_start + data_bytes}")


def _damaged(path: Path, why: str) -> BundleError:
    return BundleError(f"{path} is damaged or cut short: {why}")
