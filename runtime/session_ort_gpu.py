"""Sessions over ONNX Runtime on an NVIDIA GPU: what one graph gives stays there for the next, and candidates between queries."""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .device_buffers import DeviceArray, Gpu, Shape, place
from .errors import UsageError
from .session_ort import BFLOAT16, NUMPY_TYPES, OrtSession

DEFAULT_STREAM = 0  # ONNX Runtime runs on a stream of its own, and has finished when a run returns


class KeptOutput:
    """An output in the GPU's memory, as long as this object lives: a feed, or ``np.asarray`` copies it out."""

    def __init__(self, value: Any, gpu: Gpu) -> None:
        self.value, self._gpu = value, gpu
        self.shape: Shape = tuple(value.shape())
        self.dtype = NUMPY_TYPES[value.data_type()]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        values = np.empty(self.shape, self.dtype)
        if values.size:
            self._gpu.use()
            self._gpu.copy_out(values.ctypes.data, self.value.data_ptr(), values.nbytes, DEFAULT_STREAM)
            self._gpu.synchronise(DEFAULT_STREAM)
        return values.astype(dtype or self.dtype, copy=False)


class OrtGpuSession(OrtSession):
    """An ONNX graph on a GPU. Inputs may lie in its memory: outputs of another session there, or what ``place`` returned.

    Args:
        gpu: the GPU that the providers use; it copies, ONNX Runtime computes.
        keep_on_device: outputs stay there, as ``KeptOutput``; otherwise they are arrays of the caller's.
        device: ONNX Runtime's name for that memory.
        options: of ``OrtSession``.
    """

    def __init__(
        self, *args: Any, gpu: Gpu, keep_on_device: bool = False, device: str = "cuda", **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._gpu, self._keep, self._device = gpu, keep_on_device, device
        self._bound = True

    def most_items(self, name: str, item: Shape) -> int:
        """No profiles, no limit but that of ``max_items``."""
        return self.max_items or sys.maxsize

    def place(self, values: NDArray[Any]) -> DeviceArray:
        """A copy in the GPU's memory, to feed any number of times and to free."""
        if self._session is None:
            raise UsageError("this session is closed")
        self._gpu.use()
        return place(self._gpu, values, DEFAULT_STREAM)

    def _bind_input(self, binding: Any, name: str, value: Any) -> object:
        if not isinstance(value, (DeviceArray, KeptOutput)):
            return super()._bind_input(binding, name, value)
        self._check_type(name, value)
        if isinstance(value, KeptOutput):
            binding.bind_ortvalue_input(name, value.value)
        else:
            value.check()
            kind = BFLOAT16 if value.dtype == ml_dtypes.bfloat16 else value.dtype
            binding.bind_input(name, self._device, 0, kind, value.shape, value.address)
        return value

    def _bind_output(self, binding: Any, name: str) -> None:
        binding.bind_output(name, self._device if self._keep else "cpu")

    def _output(self, value: Any) -> Any:
        return KeptOutput(value, self._gpu) if self._keep else super()._output(value)
