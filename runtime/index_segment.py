"""One immutable segment of an index: a safetensors file, memory-mapped, in which every group of vectors is contiguous.

Every item has a CRC-32 per group. It is checked when the item's group is first read, so a budget touches only its own
groups, a rescoring only its survivors, and a flipped byte is found before it can change an answer.

A file that is cut short while it is mapped has no pages beyond its new end, and the system ends a process that reads there
(SIGBUS). So its size is asked for again whenever rows are checked, which is before every scan. What remains is a file that is cut
short in the middle of a scan, or whose disk fails to give a page.
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .errors import BundleError
from .index_layout import Layout, cut
from .int8 import Int8Vectors, quantize_int8
from .maxsim import Vectors, take
from .staged_file import sync

# Yields one group of a segment's items, in order and in pieces that fit in memory.
Source = Callable[[int], Iterator[Vectors]]
Rows = NDArray[np.int64]
NO_ROWS = np.empty(0, np.int64)
ALL = slice(None)
CHECKED = 1 << 16  # rows compared with their checksums at once


class UnreadableError(BundleError):
    """A file that this process cannot read; it may be sound."""


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
        sync(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a write does not know what it writes to
            error.filename = str(path)
        raise
    return checksum


def _write(file: Any, layout: Layout, items: int, source: Source) -> int:
    crcs = np.zeros((items, len(layout.spans)), np.uint32)
    scales: list[NDArray[np.float32]] = []
    file.write(header := layout.header(items))
    for group in range(len(layout.spans)):
        row = 0
        for piece in source(group) if group < len(layout.ends) else _screen(source(0)):
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


def _screen(pieces: Iterator[Vectors]) -> Iterator[Vectors]:
    # Of the vectors as stored: the error bound of a search holds against those.
    return (piece if isinstance(piece, Int8Vectors) else quantize_int8(piece) for piece in pieces)


def _parts(vectors: Vectors) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
    """The bytes of vectors (n, bytes per item), contiguous, and their scales."""
    values = np.ascontiguousarray(vectors.codes if isinstance(vectors, Int8Vectors) else vectors)
    scales = np.ascontiguousarray(vectors.scales) if isinstance(vectors, Int8Vectors) else None
    return values.view(np.uint8).reshape(len(values), values.itemsize * int(np.prod(values.shape[1:]))), scales


def item_crc(codes: NDArray[np.uint8], scales: NDArray[np.float32] | None, item: int) -> int:
    """CRC-32 of one item's bytes in a group."""
    crc = zlib.crc32(codes[item].data)
    return crc if scales is None else zlib.crc32(scales[item].data, crc)


def map_randomly(file: BinaryIO) -> mmap.mmap:
    """A whole open file, to read, without read-ahead, which fetches what comes next in it: other groups.

    8 MiB at every jump, where measured; a scan of 16 MiB read 48.
    """
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return mapped


def _map_file(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return map_randomly(file)
    except FileNotFoundError:
        raise BundleError(f"{path} is missing; restore it, or index its items again") from None
    except PermissionError:
        raise UnreadableError(f"{path} may not be read by this user") from None
    except ValueError:
        raise BundleError(f"{path} is empty; restore it, or index its items again") from None


class Segment:
    """A segment opened for reading. The file stays readable after its removal, for as long as this object lives.

    Raises:
        BundleError: the file is missing, of another size, or not the one that was written.
    """

    def __init__(self, path: Path, layout: Layout, items: int, checksum: int, *, verify: bool = True) -> None:
        self.path, self.layout, self.items = path, layout, items
        header, blocks = layout.header(items), layout.blocks(items)
        sizes = [dtype.itemsize * int(np.prod(shape, dtype=np.int64)) for _, _, dtype, shape in blocks]
        self._map = _map_file(path)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._size = len(header) + sum(sizes)
        if len(self._bytes) != self._size:
            raise self._wrong_size(len(self._bytes))
        starts = len(header) + np.cumsum([0, *sizes])
        self._starts = dict(zip((name for name, *_ in blocks), starts.tolist(), strict=False))
        self._blocks = {
            name: self._bytes[start : start + size].view(dtype).reshape(shape)
            for (name, _, dtype, shape), start, size in zip(blocks, starts, sizes, strict=False)
        }
        self._crcs = self._blocks["crc32"]
        self._groups = [self._stored(group) for group in range(len(layout.spans))]
        if not self._recognise(header, checksum):
            raise BundleError(f"{path} is damaged in its header or its table of checksums; restore it")
        self._checked = np.full(self._crcs.shape, not verify)
        self._sound = [not verify] * len(layout.spans)  # groups of which all rows were found good
        self._held = 0  # groups in memory, from the first one on

    def groups(self, vectors: int, rows: slice = ALL) -> list[Vectors]:
        """The arrays (items, r, d) that hold the first `vectors` vectors of some rows. `check` those to be read."""
        last = self.layout.groups_of(vectors) - 1
        groups = [*self._groups[:last], cut(self._groups[last], 0, vectors - self.layout.starts[last])]
        return groups if rows == ALL else [take(group, rows) for group in groups]

    def screen(self, rows: slice = ALL) -> Int8Vectors | None:
        """The first group of some rows in int8; `check_screen` first. None where the index keeps none."""
        stored = take(self._groups[-1], rows) if self.layout.screen else None
        return stored if isinstance(stored, Int8Vectors) else None

    def check(self, vectors: int, rows: Rows | None = None) -> Rows:
        """Rows (of those given, or of all) whose first `vectors` vectors do not match their checksums, or cannot be read."""
        groups = self.layout.groups_of(vectors)
        if groups > self._held and self._cut_short():
            return np.arange(self.items) if rows is None else rows
        damaged = [self._check_group(group, rows) for group in range(groups)]
        return np.unique(np.concatenate(damaged)) if any(map(len, damaged)) else NO_ROWS

    def check_screen(self) -> Rows:
        """Rows whose screen does not match its checksum, or cannot be read."""
        if self.layout.screen and self._cut_short():
            return np.arange(self.items)
        return self._check_group(len(self.layout.ends), None) if self.layout.screen else NO_ROWS

    def hold(self, vectors: int, *, skip_damaged: bool = False) -> None:
        """Copy the first `vectors` vectors of every item into memory: they stay there however scarce it gets.

        Raises:
            BundleError: some of them are damaged, and not to be skipped by who reads them.
        """
        if len(damaged := self.check(vectors)) and not skip_damaged:
            raise self.damage(damaged)
        if self._cut_short():
            return  # `check` goes on leaving it out
        groups = self.layout.groups_of(vectors)
        for group in range(self._held, groups):
            for name in (f"vectors.{self.layout.name(group)}", f"scales.{self.layout.name(group)}"):
                if name in self._blocks:
                    self._blocks[name] = self._blocks[name].copy()
            self._groups[group] = self._stored(group)
        self._crcs = self._crcs.copy()
        self._held = max(self._held, groups)

    def damage(self, rows: Rows) -> BundleError:
        """The sentence for rows that `check` found."""
        if self._cut_short():
            return self._wrong_size(self._map.size())
        others = f" and {len(rows) - 1} others" if len(rows) > 1 else ""
        return BundleError(f"{self.path} is damaged in row {rows[0]}{others}; restore it, or index its items again")

    def _recognise(self, header: bytes, checksum: int) -> bool:
        return zlib.crc32(self._crcs.data, zlib.crc32(self._bytes[: len(header)].data)) == checksum

    def _cut_short(self) -> bool:
        return self._map.size() < self._size  # of the open file, wherever its name leads by now

    def _wrong_size(self, size: int) -> BundleError:
        return BundleError(
            f"{self.path} has {size} bytes instead of {self._size}; restore it, or index its items again"
        )

    def _check_group(self, group: int, rows: Rows | None) -> Rows:
        if self._sound[group]:
            return NO_ROWS
        whole = (rows is None or len(rows) == self.items) and not self._checked[:, group].any()
        if whole:
            self._advise(group, "WILLNEED")
        damaged = [self._check_rows(group, todo, announced=whole) for todo in self._unchecked(group, rows)]
        if whole:
            self._advise(group, "NORMAL")  # what was pushed out of memory since comes back by read-ahead
        self._sound[group] = rows is None and not any(map(len, damaged))
        return np.concatenate([NO_ROWS, *damaged])

    def _unchecked(self, group: int, rows: Rows | None) -> Iterator[Rows]:
        """Those rows, or of all, that were not found good yet, in pieces."""
        for start in range(0, self.items if rows is None else len(rows), CHECKED):
            piece = slice(start, start + CHECKED)
            if rows is None:
                yield start + np.flatnonzero(~self._checked[piece, group])
            else:
                yield rows[piece][~self._checked[rows[piece], group]]

    def _check_rows(self, group: int, todo: Rows, *, announced: bool) -> Rows:
        """Those of some rows that do not match their checksums."""
        if not announced:  # have the system read these rows, and nothing else
            for row in todo.tolist():
                self._advise(group, "WILLNEED", row)
        crcs = self._computed(group, todo)
        good = crcs == self._crcs[todo, group]
        self._checked[todo[good], group] = True
        damaged: Rows = todo[~good]
        return damaged

    def _computed(self, group: int, rows: Rows) -> NDArray[np.uint32]:
        codes, scales = _parts(self._groups[group])
        return np.array([item_crc(codes, scales, row) for row in rows.tolist()], np.uint32)

    def piece(self, group: int, rows: Rows) -> Vectors:
        """A copy of some rows of one group."""
        return take(self._groups[group], rows)

    def _advise(self, group: int, advice: str, row: int | None = None) -> None:
        name = f"vectors.{self.layout.name(group)}"
        start, size = self._starts[name], self._blocks[name].nbytes
        if row is not None:
            size //= self.items
            start += row * size
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        if size and hasattr(mmap, f"MADV_{advice}"):
            self._map.madvise(getattr(mmap, f"MADV_{advice}"), page, start + size - page)

    def _stored(self, group: int) -> Vectors:
        values = self._blocks[f"vectors.{self.layout.name(group)}"]
        scales = self._blocks.get(f"scales.{self.layout.name(group)}")
        return values if scales is None else Int8Vectors(values, scales)


class MendedSegment(Segment):
    """A segment whose header or table of checksums may be damaged, which loses nothing: the layout says what the header was, and
    the vectors what the table was, if with it the file is again the one that was written.
    """

    def _recognise(self, header: bytes, checksum: int) -> bool:
        if zlib.crc32(self._crcs.tobytes(), start := zlib.crc32(header)) == checksum:
            return True
        rows = np.arange(self.items)
        self._crcs = np.stack([self._computed(group, rows) for group in range(len(self._groups))], axis=1)
        return zlib.crc32(self._crcs.tobytes(), start) == checksum
