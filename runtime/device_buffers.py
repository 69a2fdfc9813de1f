"""Buffers that a session keeps between runs: grown when a larger input arrives, never shrunk, freed with the session."""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, ...]


class Gpu(Protocol):
    """What buffers and sessions ask of a GPU; ``cuda.Cuda`` is the one, and tests have another over host memory."""

    def use(self) -> None: ...
    def allocate(self, size: int) -> int: ...
    def free(self, address: int) -> None: ...
    def allocate_host(self, size: int) -> int: ...
    def free_host(self, address: int) -> None: ...
    def copy_in(self, device: int, host: int, size: int, stream: int) -> None: ...
    def copy_out(self, host: int, device: int, size: int, stream: int) -> None: ...
    def create_stream(self) -> int: ...
    def synchronise(self, stream: int) -> None: ...
    def destroy_stream(self, stream: int) -> None: ...
    def begin_capture(self, stream: int) -> None: ...
    def end_capture(self, stream: int) -> int: ...
    def launch(self, graph: int, stream: int) -> None: ...
    def destroy_graph(self, graph: int) -> None: ...


class Buffer:
    """Device memory for one tensor, with page-locked host memory of the same size beside it when it is first needed."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.size = 0
        self.address = 0
        self._host = 0
        self._host_size = 0

    def reserve(self, size: int) -> bool:
        """Make room for ``size`` bytes; true when the address changed. At least one byte: TensorRT refuses null."""
        size = max(1, size)
        if size <= self.size:
            return False
        self._free_device()
        self.address, self.size = self._gpu.allocate(size), size
        return True

    def upload(self, values: NDArray[Any], stream: int) -> None:
        """Copy an array in, through page-locked memory, so that the copy runs on the stream."""
        staged = self._staged(values.shape, values.dtype)
        np.copyto(staged, values)
        self._gpu.copy_in(self.address, self._host, values.nbytes, stream)

    def download(self, shape: Shape, dtype: np.dtype[Any], stream: int) -> NDArray[Any]:
        """Start copying out; the returned view is valid after the stream is synchronised, until the next run."""
        staged = self._staged(shape, dtype)
        self._gpu.copy_out(self._host, self.address, staged.nbytes, stream)
        return staged

    def unstage(self) -> None:
        """Give the page-locked memory back; what was enqueued on it must be complete."""
        if self._host:
            self._gpu.free_host(self._host)
        self._host = self._host_size = 0

    def free(self) -> None:
        self._free_device()
        self.unstage()

    def _free_device(self) -> None:
        if self.address:
            self._gpu.free(self.address)
        self.address = self.size = 0

    def _staged(self, shape: Shape, dtype: np.dtype[Any]) -> NDArray[Any]:
        """A view of the page-locked memory as an array of this shape."""
        size = max(1, int(np.prod(shape)) * dtype.itemsize)
        if size > self._host_size:
            self.unstage()
            self._host, self._host_size = self._gpu.allocate_host(size), size
        count = int(np.prod(shape))
        raw = memoryview((ctypes.c_ubyte * (count * dtype.itemsize)).from_address(self._host))
        values: NDArray[Any] = np.frombuffer(raw, np.uint8).view(dtype)
        return values.reshape(shape)


class DeviceArray:
    """An array on the GPU: hand it to a session as a feed, or ``np.asarray`` it to copy it out.

    A session's output names that session's buffer, so it is valid until the session runs again or is closed. One that was
    placed has a buffer of its own, until ``free``.
    """

    def __init__(self, gpu: Gpu, buffer: Buffer, shape: Shape, dtype: np.dtype[Any], stream: int) -> None:
        self._gpu, self._buffer, self._stream = gpu, buffer, stream
        self.shape, self.dtype = shape, dtype
        self.address = buffer.address

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        self.check()
        self._gpu.use()
        values = self._buffer.download(self.shape, self.dtype, self._stream)
        self._gpu.synchronise(self._stream)
        return values.astype(dtype or self.dtype, copy=True)

    def check(self) -> None:
        """A ValueError when its memory is no longer its own."""
        if not self.address or self.address != self._buffer.address:
            raise ValueError(
                "this array is gone: it was freed, or its session has run again with larger inputs or is closed"
            )

    def free(self) -> None:
        """Give its memory back, once; for placed arrays. On any thread."""
        self._gpu.use()
        self._buffer.free()


def place(gpu: Gpu, values: NDArray[Any], stream: int) -> DeviceArray:
    """Copy an array to the GPU, to stay there until it is freed."""
    buffer = Buffer(gpu)
    buffer.reserve(values.nbytes)
    try:
        buffer.upload(values, stream)
        gpu.synchronise(stream)
        buffer.unstage()
    except BaseException:
        buffer.free()
        raise
    return DeviceArray(gpu, buffer, values.shape, values.dtype, stream)
