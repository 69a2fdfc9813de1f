"""How queries are laid out in memory for the C kernels of MaxSim (_maxsim.c)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

# Storage types of the candidates, and layouts of the queries, numbered as in _maxsim.c.
BF16, F32, INT8 = range(3)
MANY, FEW, DOT, PAIRS = range(4)
# As in _maxsim.c: dims in one step, the rows of a tile whose lanes are dims, and lanes of a vector of dots.
CHUNK, FEW_TALL, DOT_LANES = 32, 4, 16
# Rows (query vectors) up to which lanes are dims: 8, and 16 where vectors and registers are long. Beyond, lanes are query
# vectors, which needs no sum over lanes but candidates widened beforehand. For 16 rows of 3584 dims that is 7 % slower on
# AVX-512, 15 % faster on AVX2; at 128 dims it is faster on both. As pairs of int8, lanes that are dims are faster for 16 rows
# of 3584 dims too (1.2 times on AVX2), at 128 dims not (0.95).
FEW_ROWS, FEW_ROWS_IF_LONG, LONG, WIDE = 8, 16, 1024, 16
# Where two bfloat16 or two int8 stand for a float32: vectors of many dims. They leave an error of up to 2^-18, or half a code,
# a product, which over many dims cancels (1e-7 for a unit vector of 128 in bfloat16) but in a few may not. And magnitudes at
# which neither bfloat16 overflows nor vanishes.
SMALLEST, LARGEST, MANY_DIMS = 1e-20, 1e30, 64
CODE_STEPS = 256  # a query's 16-bit code is CODE_STEPS * high + low, both int8
LARGEST_CODE = 127 * CODE_STEPS + 127
# Pairs of 16-bit codes are added up in 8 lanes or more: with these the products of PAIR_DIMS dims, 128 times as large at most, do
# not overflow 31 bits in one of 8; of more dims the codes are smaller.
LARGEST_PAIR_CODE, PAIR_DIMS = 32767, 4096


@dataclass(frozen=True)
class Packed:
    """Queries as the kernels read them, with what the sums start from and count; `rows` includes padding."""

    layout: int
    rows: int
    values: NDArray[Any]
    tile: int = 0
    starts: NDArray[Any] | None = None
    units: NDArray[np.float32] | None = None

    def fields(self) -> tuple[int | None, ...]:
        """The first fields of the kernels' Task."""
        addresses = [None if a is None else a.ctypes.data for a in (self.values, self.starts, self.units)]
        return (*addresses, self.layout, self.tile, self.rows)


def pack(queries: NDArray[np.float32], storage: int, width: int, *, dots: bool, pairs: bool) -> Packed:
    """Lay out queries (q, r_q, d), zero-padded, for candidates of a storage type.

    Args:
        width: floats in a register of the kernels.
        dots: whether the processor multiplies this storage type by an instruction of its own.
        pairs: whether it multiplies int8 faster as pairs of 16-bit integers than in float32.
    """
    count, dims = queries.shape[0] * queries.shape[1], queries.shape[2]
    rows = queries.reshape(count, dims)
    if dots and storage == INT8 and dims >= MANY_DIMS:
        return _pack_codes(rows)
    if pairs and storage == INT8 and dims >= (MANY_DIMS if count <= FEW_ROWS else LONG):
        return _pack_pairs(rows, width)
    largest = float(np.abs(rows).max(initial=0.0))
    if dots and storage == BF16 and dims >= MANY_DIMS and SMALLEST < largest < LARGEST:  # False for NaN
        return _pack_halves(rows)
    few = count <= (FEW_ROWS_IF_LONG if dims >= LONG and width >= WIDE else FEW_ROWS)
    tall = _tall(count)
    rows = _padded(rows, tall if few else width)
    if storage == BF16:  # two dims in a word: the even ones of a chunk come first
        rows = rows.reshape(len(rows), -1, CHUNK // 2, 2).swapaxes(2, 3).reshape(len(rows), -1)
    if few:
        return Packed(FEW, len(rows), _few_order(rows, tall))
    return Packed(MANY, len(rows), _aligned_copy(rows.reshape(len(rows) // width, width, -1).swapaxes(1, 2)))


def _pack_halves(rows: NDArray[np.float32]) -> Packed:
    """Each value as the sum of two bfloat16."""
    tile = _dot_tile(len(rows))
    rows = _padded(rows, tile)
    high = rows.astype(ml_dtypes.bfloat16)
    low = (rows - high.astype(np.float32)).astype(ml_dtypes.bfloat16)
    starts = np.zeros((len(rows) // tile, DOT_LANES), np.float32)
    return Packed(DOT, len(rows), _dot_order(high, low, tile), tile, _aligned_copy(starts))


def _pack_codes(rows: NDArray[np.float32]) -> Packed:
    """Each value as a 16-bit code in two int8; the sums start from what candidate codes + 128 add too much."""
    tile = _dot_tile(len(rows))
    rows = _padded(rows, tile)
    codes, units = _codes(rows, LARGEST_CODE)
    high = (codes + CODE_STEPS // 2) // CODE_STEPS
    low = codes - CODE_STEPS * high
    lanes = DOT_LANES // 2 // tile  # each sums the words that it sees; the first takes all the excess
    starts = np.zeros((2, len(rows), lanes), np.int32)
    starts[:, :, 0] = [-128 * part.sum(axis=1) for part in (high, low)]
    counts = np.repeat(np.stack([units * CODE_STEPS, units])[:, :, None], lanes, axis=2).astype(np.float32)
    ordered = [a.reshape(2, len(rows) // tile, -1).swapaxes(0, 1) for a in (starts, counts)]
    packed = _dot_order(high.astype(np.int8), low.astype(np.int8), tile)
    return Packed(DOT, len(rows), packed, tile, *map(_aligned_copy, ordered))


def _pack_pairs(rows: NDArray[np.float32], width: int) -> Packed:
    """Each value as a 16-bit code."""
    tall = _tall(len(rows))
    rows = _padded(rows, tall)
    codes, units = _codes(rows, min(LARGEST_PAIR_CODE, LARGEST_PAIR_CODE * PAIR_DIMS * width // (8 * rows.shape[1])))
    padded = np.zeros(max(len(units), FEW_TALL), np.float32)
    padded[: len(units)] = units
    return Packed(PAIRS, len(rows), _few_order(codes.astype(np.int16), tall), units=_aligned_copy(padded))


def _codes(rows: NDArray[np.float32], largest: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Integers up to ``largest``, and what one counts in each row. NaN and infinity reach the scores by way of that."""
    with np.errstate(invalid="ignore"):
        units = np.abs(rows).max(axis=1) / np.float32(largest)
        codes = np.rint(rows / np.where(units > 0, units, 1)[:, None])
    return np.nan_to_num(codes, posinf=0, neginf=0).astype(np.int32), units


def _tall(count: int) -> int:
    """Rows of a tile whose lanes are dims."""
    return min(count, FEW_TALL) if count != 3 else FEW_TALL


def _few_order(rows: NDArray[Any], tall: int) -> NDArray[Any]:
    """[rows / tall][chunks][tall][CHUNK]"""
    return _aligned_copy(rows.reshape(len(rows) // tall, tall, -1, CHUNK).swapaxes(1, 2))


def _dot_tile(count: int) -> int:
    return next(tile for tile in (1, 2, 4, 8) if tile >= min(count, 8))


def _dot_order(high: NDArray[Any], low: NDArray[Any], tile: int) -> NDArray[Any]:
    """[rows / tile][steps][part][row][word], as _maxsim_dots.h says."""
    words, per_word = DOT_LANES // 2 // tile, 4 // high.itemsize
    parts = np.stack([high, low]).reshape(2, len(high) // tile, tile, -1, words * per_word)
    return _aligned_copy(parts.transpose(1, 3, 0, 2, 4))


def _padded(rows: NDArray[np.float32], multiple: int) -> NDArray[np.float32]:
    count, dims = rows.shape
    padded = np.zeros((-(-count // multiple) * multiple, -(-dims // CHUNK) * CHUNK), np.float32)
    padded[:count, :dims] = rows
    return padded


def _aligned_copy(array: NDArray[Any]) -> NDArray[Any]:
    # On a cache line: loads that straddle two lines halve the speed of the kernels' inner loop.
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy: NDArray[Any] = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
