"""One immutable segment of an index: a safetensors file, memory-mapped, in which every group of vectors is contiguous.

Every item has a CRC-32 per group. It is checked when the item's group is first read, so a budget touches only its own
groups, a rescoring only its survivors, and a flipped byte is found before it can change an answer.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BundleError
from .index_layout import Layout, cut
from .int8 import Int8Vectors
from .maxsim import Vectors

# Yields one group of a segment's items, in order and in pieces that fit in memory.
Source = Callable[[int], Iterator[Vectors]]
Rows = NDArray[np.int64]


def write_segment(path: Path, layout: Layout, items: int, source: Source) -> int:
    """Write a segment under a temporary name, make it durable, and rename it to `path`.

    Returns:
        The checksum by which `Segment` recognises the file.
    """
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            checksum = _write(file, layout, items, source)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise
    return checksum


def _write(file: Any, layout: Layout, items: int, source: Source) -> int:
    crcs = np.zeros((items, len(layout.ends)), np.uint32)
    scales: list[NDArray[np.float32]] = []
    file.write(header := layout.header(items))
    for group in range(len(layout.ends)):
        row = 0
        for piece in source(group):
            codes, their_scales = _parts(piece)
            file.write(codes.data.cast("B"))
            scales += [] if their_scales is None else [their_scales]
            count = len(codes)
            crcs[row : row + count, group] = [item_crc(codes, their_scales, i) for i in range(count)]
            row += count
    for block in scales:
        file.write(block.data.cast("B"))
    file.write(crcs.data.cast("B") if items else b"")
    return zlib.crc32(crcs.tobytes(), zlib.crc32(header))


def _parts(vectors: Vectors) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
    """The bytes of vectors (n, bytes per item), contiguous, and their scales."""
    values = np.ascontiguousarray(vectors.codes if isinstance(vectors, Int8Vectors) else vectors)
    scales = np.ascontiguousarray(vectors.scales) if isinstance(vectors, Int8Vectors) else None
    return values.view(np.uint8).reshape(len(values), values.itemsize * int(np.prod(values.shape[1:]))), scales


def item_crc(codes: NDArray[np.uint8], scales: NDArray[np.float32] | None, item: int) -> int:
    """CRC-32 of one item's bytes in a group."""
    crc = zlib.crc32(codes[item].data)
    return crc if scales is None else zlib.crc32(scales[item].data, crc)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Segment:
    """A segment opened for reading. The file stays readable after its removal, for as long as this object lives.

    Raises:
        BundleError: the file is missing, cut short, or not the one that was written.
    """

    def __init__(self, path: Path, layout: Layout, items: int, checksum: int, *, verify: bool = True) -> None:
        self.path, self.layout, self.items = path, layout, items
        header, blocks = layout.header(items), layout.blocks(items)
        sizes = [dtype.itemsize * int(np.prod(shape, dtype=np.int64)) for _, _, dtype, shape in blocks]
        try:
            self._bytes: NDArray[np.uint8] = np.asarray(np.memmap(path, np.uint8, "r"))
        except FileNotFoundError:
            raise BundleError(f"{path} is missing; restore it, or index its items again") from None
        except ValueError:
            raise BundleError(f"{path} is empty; restore it, or index its items again") from None
        if len(self._bytes) != len(header) + sum(sizes):
            raise BundleError(f"{path} has {len(self._bytes)} bytes instead of {len(header) + sum(sizes)}; restore it")
        starts = len(header) + np.cumsum([0, *sizes])
        self._blocks = {
            name: self._bytes[start : start + size].view(dtype).reshape(shape)
            for (name, _, dtype, shape), start, size in zip(blocks, starts, sizes, strict=False)
        }
        self._crcs = self._blocks["crc32"]
        if zlib.crc32(self._crcs.tobytes(), zlib.crc32(self._bytes[: len(header)].data)) != checksum:
            raise BundleError(f"{path} is damaged in its header or its table of checksums; restore it")
        self._checked = np.full(self._crcs.shape, not verify)

    def groups(self, vectors: int) -> list[Vectors]:
        """The arrays (items, r, d) that hold the first `vectors` vectors of every item. `check` the rows to be read."""
        last = self.layout.groups_of(vectors) - 1
        return [*map(self._group, range(last)), cut(self._group(last), 0, vectors - self.layout.starts[last])]

    def check(self, vectors: int, rows: Rows | None = None) -> Rows:
        """Rows (of those given, or of all) whose first `vectors` vectors do not match their checksums."""
        damaged = [self._check_group(group, rows) for group in range(self.layout.groups_of(vectors))]
        return np.unique(np.concatenate(damaged))

    def damage(self, rows: Rows) -> BundleError:
        """The sentence for damaged rows."""
        others = f" and {len(rows) - 1} others" if len(rows) > 1 else ""
        return BundleError(f"{self.path} is damaged in row {rows[0]}{others}; restore it, or index its items again")

    def _check_group(self, group: int, rows: Rows | None) -> Rows:
        # Rows once found good are not read again.
        todo = np.flatnonzero(~self._checked[:, group]) if rows is None else rows[~self._checked[rows, group]]
        codes, scales = _parts(self._group(group))
        crcs = np.array([item_crc(codes, scales, row) for row in todo.tolist()], np.uint32)
        good = crcs == self._crcs[todo, group]
        self._checked[todo[good], group] = True
        damaged: Rows = todo[~good]
        return damaged

    def piece(self, group: int, rows: Rows) -> Vectors:
        """A copy of some rows of one group."""
        stored = self._group(group)
        if isinstance(stored, Int8Vectors):
            return Int8Vectors(stored.codes[rows], stored.scales[rows])
        return stored[rows]

    def _name(self, group: int) -> str:
        return f"{self.layout.starts[group]}-{self.layout.ends[group] - 1}"

    def _group(self, group: int) -> Vectors:
        values = self._blocks[f"vectors.{self._name(group)}"]
        scales = self._blocks.get(f"scales.{self._name(group)}")
        return values if scales is None else Int8Vectors(values, scales)
