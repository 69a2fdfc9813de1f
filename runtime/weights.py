"""Weight files of a bundle: brought in by hard link, else reflink, else copy, never through a second copy; and counted."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

from .tensors import TOKEN_TABLE

FICLONE = 0x40049409  # linux/fs.h: share the extents of another file (btrfs, XFS)
BLOCK = 1 << 24
# Bytes that ONNX Runtime's CPU provider copies of each number: INT8 codes are packed as products read them, narrow numbers
# are widened once. float32 and FP8 ones stay mapped. (3B in INT8: 4.4 GiB by this, 5.3 measured, freed room included.)
COPIED = {"I8": 1, "BF16": 4, "F16": 4}


def place_file(source: Path, target: Path, on_bytes: Callable[[int], object] = lambda count: None) -> str:
    """Make ``target`` hold what ``source`` holds; returns how: ``linked``, ``reflinked`` or ``copied``.

    A symbolic link is followed first: ONNX Runtime refuses links as external data.

    Raises:
        FileExistsError: the target is there already; it is left as it is.
    """
    source = source.resolve()
    for method, attempt in (("linked", os.link), ("reflinked", _reflink)):
        try:
            attempt(source, target)
        except FileExistsError:
            raise
        except OSError:  # another file system, or one that cannot
            target.unlink(missing_ok=True)
            continue
        on_bytes(source.stat().st_size)
        return method
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(BLOCK):
            on_bytes(writer.write(block))
    return "copied"


def _reflink(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        fcntl.ioctl(writer, FICLONE, reader.fileno())


def count_values(folder: Path) -> int:
    """Numbers in a folder's safetensors, from their headers: a graph may compute in float32 over narrower stored weights."""
    return sum(prod(tensor["shape"]) for _, tensor in _tensors(folder))


def copied_bytes(folder: Path) -> int:
    """The least memory that a quantised bundle's weights take on the CPU, beside the mapped files. A token table stays mapped."""
    return sum(
        prod(tensor["shape"]) * COPIED.get(tensor["dtype"], 0)
        for name, tensor in _tensors(folder)
        if not name.startswith(TOKEN_TABLE)
    )


def _tensors(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the header's entry of every tensor of a folder's files."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        yield from ((name, entry) for name, entry in header.items() if name != "__metadata__")
