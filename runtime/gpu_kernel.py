"""MaxSim as a kernel of our own on NVIDIA GPUs, through the driver alone: neither TensorRT nor ONNX Runtime is needed for it.

The scorer graph widens its candidates and stores every dot product; the kernel reads each candidate once and stores scores.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .cuda import CudaError, find_gpu
from .device_buffers import Buffer, DeviceArray, place
from .errors import UsageError
from .graph_maxsim import MEMORY_BYTES, QUERIES, Placed, Scorer
from .manifest import Bundle

log = logging.getLogger(__name__)
PTX = Path(__file__).with_name("_maxsim.ptx")  # of _maxsim.cu, whose constants these are
ROWS, BLOCK, WARPS, SLOTS = 16, 32, 4, 32
# Tiles of query vectors in a block, lines under way at once: a kernel for each. Measured on an H200 by hand (docs/gpu.md).
FEW, FEW_LONG, SOME, MANY = VARIANTS = ((1, 3), (1, 4), (2, 3), (4, 3))
LONG = 2048  # more dimensions than these, and one more line under way is faster
TYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp16": np.dtype(np.float16)}
MOST_BLOCKS = 65535  # of a grid, in y
FIRST_CAPABILITY = (8, 0)


class KernelScorer(Scorer):
    """MaxSim on a GPU in bf16 or fp16, with float32 sums; a context manager like any scorer.

    Args:
        gpu: of compute capability 8.0 or later.
        dtype: what vectors are converted to.

    Raises:
        CudaError: the driver does not take the kernel.
        OSError: this installation lacks the PTX.
    """

    def __init__(self, gpu: Any, dtype: np.dtype[Any]) -> None:
        self._gpu, self._dtype = gpu, dtype
        gpu.use()
        self._module = gpu.load_module(PTX.read_bytes())
        self._kernels = {
            variant: gpu.find_kernel(self._module, kernel_name(dtype, variant), shared_bytes(variant))
            for variant in VARIANTS
        }
        self._stream = gpu.create_stream()
        self._queries, self._candidates, self._scores = Buffer(gpu), Buffer(gpu), Buffer(gpu)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._dtype

    @property
    def description(self) -> str:
        return f"MaxSim kernel ({self._gpu.name})"

    def scores(
        self, queries: NDArray[Any], candidates: NDArray[Any] | Placed, *, memory_bytes: int = MEMORY_BYTES
    ) -> NDArray[np.float32]:
        """Scores (q, n) in float32 of queries (q, r_q, d) against candidates (n, r_c, d); higher is better.

        Raises:
            UsageError: dims differ, or are no multiple of 32; not one candidate fits the memory.
        """
        (count, r_q, dim), (items, r_c, dims) = queries.shape, candidates.shape
        if dim != dims or dim % BLOCK or not min(r_q, r_c):
            raise UsageError(f"this scorer takes vectors of one length, a multiple of {BLOCK}, not {dim} and {dims}")
        result = np.empty((count, items), np.float32)
        if not result.size:
            return result
        self._gpu.use()
        rows = rows_of(r_q)
        for first in range(0, count, QUERIES):
            some = result[first : first + QUERIES]
            packed = pack_queries(np.ascontiguousarray(queries[first : first + QUERIES], self._dtype))
            parts = len(some) * -(-r_q // ROWS)  # a query of more than 16 vectors is scored in parts of 16
            self._queries.reserve(packed.nbytes)
            self._queries.upload(packed, self._stream)
            self._scores.reserve(4 * parts * items)
            start = 0
            for piece in self._pieces(candidates, memory_bytes):
                self._launch(piece, len(packed), parts, rows, start, items)
                start += piece.shape[0]
            got = self._scores.download((parts, items), np.dtype(np.float32), self._stream)
            self._gpu.synchronise(self._stream)
            np.sum(got.reshape(len(some), -1, items), 1, out=some) if parts > len(some) else np.copyto(some, got)
        return result

    def place(self, read: Callable[[slice], NDArray[Any]], shape: tuple[int, int, int]) -> Placed:
        """Copy candidates to the GPU; see ``Scorer.place``."""
        placed = Placed([], shape)
        self._gpu.use()
        try:
            for rows in self._chunks(shape, MEMORY_BYTES):
                piece = np.ascontiguousarray(read(rows), self._dtype)
                placed.pieces.append(place(self._gpu, piece, self._stream))
        except BaseException:
            placed.free()
            raise
        return placed

    def close(self) -> None:
        if self._module:
            self._gpu.use()
            self._gpu.synchronise(self._stream)
            for buffer in (self._queries, self._candidates, self._scores):
                buffer.free()
            self._gpu.destroy_stream(self._stream)
            self._gpu.unload_module(self._module)
        self._module = 0

    def _pieces(self, candidates: NDArray[Any] | Placed, memory_bytes: int) -> Iterator[DeviceArray]:
        if isinstance(candidates, Placed):
            yield from candidates.pieces
            return
        for rows in self._chunks(candidates.shape, memory_bytes):
            values = np.ascontiguousarray(candidates[rows], self._dtype)
            self._gpu.synchronise(self._stream)  # the last chunk has been read
            self._candidates.reserve(values.nbytes)
            self._candidates.upload(values, self._stream)
            yield DeviceArray(self._gpu, self._candidates, values.shape, values.dtype, self._stream)

    def _chunks(self, shape: tuple[int, ...], memory_bytes: int) -> Iterator[slice]:
        items, r_c, dim = shape
        each = r_c * dim * self._dtype.itemsize
        if each > memory_bytes:
            raise UsageError(f"a candidate takes {each} bytes; {memory_bytes} are allowed")
        step = min(memory_bytes // each, MOST_BLOCKS * WARPS * items_of_warp(r_c))
        return (slice(start, min(start + step, items)) for start in range(0, items, step))

    def _launch(self, piece: DeviceArray, tiles: int, queries: int, rows: int, start: int, stride: int) -> None:
        piece.check()
        items, r_c, dim = piece.shape
        variant = choose_variant(tiles, dim)
        self._gpu.run_kernel(
            self._kernels[variant],
            (-(-tiles // variant[0]), -(-items // (WARPS * items_of_warp(r_c)))),
            32 * WARPS,
            shared_bytes(variant),
            self._stream,
            ctypes.c_void_p(self._queries.address),
            ctypes.c_void_p(piece.address),
            ctypes.c_void_p(self._scores.address + 4 * start),
            *map(ctypes.c_int, (queries, rows, items, r_c, dim // BLOCK)),
            ctypes.c_ulonglong(stride),
        )


def pack_queries(queries: NDArray[Any]) -> NDArray[np.uint32]:
    """Queries (q, r_q, d) of 16-bit numbers in tiles of 16 vectors, each in the order in which the kernel's lanes read it.

    A query has ``rows_of(r_q)`` rows of a tile, or several whole tiles. Of a tile (16, d), row 8 h + g and dimension 32 b + 8 t +
    4 s + 2 p + e go to place (b, s, g, t, p, h, e): register 2 p + h of A in instruction s, at lane 4 g + t (PTX ISA, fragments
    of mma.m16n8k16). Rows that are lacking are zero: their largest product is 0, and adds nothing.
    """
    count, r_q, dim = queries.shape
    each = rows_of(r_q) if r_q <= ROWS else -(-r_q // ROWS) * ROWS
    tiles = -(-count * each // ROWS)
    filled = np.zeros((tiles * ROWS, dim // 2), np.uint32)  # pairs e
    filled[: count * each].reshape(count, each, -1)[:, :r_q] = queries.view(np.uint32)
    packed: NDArray[np.uint32] = filled.reshape(tiles, -1).take(_order(dim), axis=1)
    return packed


@lru_cache(maxsize=8)
def _order(dim: int) -> NDArray[np.intp]:
    """Where each pair of a packed tile comes from."""
    places = np.arange(ROWS * dim // 2).reshape(2, 8, dim // BLOCK, 4, 2, 2)  # h, g, b, t, s, p
    return np.ascontiguousarray(places.transpose(2, 4, 1, 3, 5, 0)).ravel()


def rows_of(r_q: int) -> int:
    """Rows of a tile that a query takes: a power of two, at most all 16."""
    return min(ROWS, 1 << (r_q - 1).bit_length())


def items_of_warp(r_c: int) -> int:
    return max(1, SLOTS // r_c)


def choose_variant(tiles: int, dim: int) -> tuple[int, int]:
    if tiles > 1:
        return SOME if tiles == 2 else MANY
    return FEW_LONG if dim > LONG else FEW


def shared_bytes(variant: tuple[int, int]) -> int:
    """Of a block: lines of 64 numbers of its query vectors and of its warps' candidate vectors."""
    tiles, stages = variant
    return stages * 2 * 64 * (tiles * ROWS + WARPS * SLOTS)


def kernel_name(dtype: np.dtype[Any], variant: tuple[int, int]) -> str:
    kind = next(kind for kind, known in TYPES.items() if known == dtype)
    return f"maxsim_{kind}_{variant[0]}_{variant[1]}"


def open_kernel(bundle: Bundle) -> KernelScorer | None:
    """The kernel in a bundle's type; None where there is no GPU for it, or the bundle's vectors are not of its kind."""
    manifest = bundle.manifest
    if manifest.precision not in TYPES or manifest.geometry.dim % BLOCK:
        return None
    gpu = find_gpu()
    if gpu is None or gpu.capability < FIRST_CAPABILITY:
        return None
    try:
        return KernelScorer(gpu, TYPES[manifest.precision])
    except (CudaError, OSError) as error:
        log.warning("the MaxSim kernel does not start on %s (%s); scoring by the graph", gpu.name, error)
        return None
