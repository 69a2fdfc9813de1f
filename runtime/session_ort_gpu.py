"""Sessions over ONNX Runtime on an NVIDIA GPU: what one graph gives stays there for the next, and candidates between queries."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .device_buffers import Buffer, DeviceArray, Gpu, Shape, place
from .errors import UsageError
from .session_ort import BFLOAT16, NUMPY_TYPES, OrtSession, graph_options

DEFAULT_STREAM = 0  # ONNX Runtime runs on a stream of its own, and has finished when a run returns

# Shapes of a session: ONNX Runtime keeps a recorded graph as long as the session, 60 MiB for a query of 3B.
MOST_RECORDED = 16
NOT_RECORDED = -1


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
        cuda_graphs: what comes from the host in a shape that has come before is recorded as a CUDA graph, and replayed from then
            on, which saves the launches; one run at a time. For the ``MOST_RECORDED`` shapes that come twice first.
        device: ONNX Runtime's name for that memory.
        options: of ``OrtSession``.
    """

    def __init__(
        self,
        *args: Any,
        gpu: Gpu,
        keep_on_device: bool = False,
        cuda_graphs: bool = False,
        device: str = "cuda",
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._gpu, self._keep, self._device = gpu, keep_on_device, device
        self._bound = True
        self._graphs = cuda_graphs
        self._seen: set[tuple[Shape, ...]] = set()
        self._recorded: dict[tuple[Shape, ...], _RecordedRun] = {}
        self._lock = threading.Lock()

    def most_items(self, name: str, item: Shape) -> int:
        """No profiles, no limit but that of ``max_items``."""
        return self.max_items or sys.maxsize

    def place(self, values: NDArray[Any]) -> DeviceArray:
        """A copy in the GPU's memory, to feed any number of times and to free."""
        if self._session is None:
            raise UsageError("this session is closed")
        self._gpu.use()
        return place(self._gpu, values, DEFAULT_STREAM)

    def close(self) -> None:
        for recorded in self._recorded.values():
            recorded.free()
        self._recorded = {}
        super().close()

    def _run_bound(self, feeds: Mapping[str, Any]) -> list[Any]:
        if not self._graphs:
            return super()._run_bound(feeds)
        with self._lock:
            recorded = self._find_recorded(feeds)
            return super()._run_bound(feeds) if recorded is None else recorded.run(self._session, feeds)

    def _find_recorded(self, feeds: Mapping[str, Any]) -> _RecordedRun | None:
        """The buffers of these shapes, made when they come for the second time; None for a run as usual."""
        if self._keep or set(feeds) != set(self._inputs) or not all(isinstance(v, np.ndarray) for v in feeds.values()):
            return None
        for name, value in feeds.items():
            self._check_type(name, value)
        shapes = tuple(feeds[name].shape for name in self._inputs)
        if shapes not in self._seen:
            self._seen.add(shapes)
            return None
        if shapes not in self._recorded and len(self._recorded) < MOST_RECORDED:
            outputs = {value.name: NUMPY_TYPES[value.type] for value in self._session.get_outputs()}
            self._recorded[shapes] = _RecordedRun(self._gpu, self._device, len(self._recorded) + 1, outputs)
        return self._recorded.get(shapes)

    def _run_options(self) -> Any:
        return graph_options(NOT_RECORDED) if self._graphs else None

    def _bind_input(self, binding: Any, name: str, value: Any) -> object:
        if not isinstance(value, (DeviceArray, KeptOutput)):
            return super()._bind_input(binding, name, value)
        self._check_type(name, value)
        if isinstance(value, KeptOutput):
            binding.bind_ortvalue_input(name, value.value)
        else:
            value.check()
            binding.bind_input(name, self._device, 0, _onnx_type(value.dtype), value.shape, value.address)
        return value

    def _bind_output(self, binding: Any, name: str) -> None:
        binding.bind_output(name, self._device if self._keep else "cpu")

    def _output(self, value: Any) -> Any:
        return KeptOutput(value, self._gpu) if self._keep else super()._output(value)


class _RecordedRun:
    """Runs in one shape from and to the same places, which a CUDA graph needs: ONNX Runtime records the second one here."""

    def __init__(self, gpu: Gpu, device: str, number: int, outputs: Mapping[str, np.dtype[Any]]) -> None:
        self._gpu, self._device, self._outputs = gpu, device, outputs
        self._options = graph_options(number)
        self._inputs: dict[str, Buffer] = {}
        self._results: list[tuple[Buffer, Shape, np.dtype[Any]]] = []
        self._binding: Any = None

    def run(self, session: Any, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        self._gpu.use()
        for name, value in feeds.items():
            buffer = self._inputs.setdefault(name, Buffer(self._gpu))
            buffer.reserve(value.nbytes)
            buffer.upload(value, DEFAULT_STREAM)
        self._gpu.synchronise(DEFAULT_STREAM)
        if self._binding is None:
            self._bind(session, feeds)
        session.run_with_iobinding(self._binding, self._options)
        self._binding.synchronize_outputs()
        views = [buffer.download(shape, kind, DEFAULT_STREAM) for buffer, shape, kind in self._results]
        self._gpu.synchronise(DEFAULT_STREAM)
        return [view.copy() for view in views]

    def free(self) -> None:
        self._gpu.use()
        for buffer in (*self._inputs.values(), *(buffer for buffer, _, _ in self._results)):
            buffer.free()

    def _bind(self, session: Any, feeds: Mapping[str, NDArray[Any]]) -> None:
        """Name the places; one run that is not recorded says how large the outputs are."""
        binding = session.io_binding()
        for name, value in feeds.items():
            binding.bind_input(name, self._device, 0, _onnx_type(value.dtype), value.shape, self._inputs[name].address)
        for name in self._outputs:
            binding.bind_output(name, self._device)
        session.run_with_iobinding(binding, graph_options(NOT_RECORDED))
        shapes = [tuple(value.shape()) for value in binding.get_outputs()]
        binding.clear_binding_outputs()
        for (name, kind), shape in zip(self._outputs.items(), shapes, strict=True):
            buffer = Buffer(self._gpu)
            self._results.append((buffer, shape, kind))
            buffer.reserve(int(np.prod(shape)) * kind.itemsize)
            binding.bind_output(name, self._device, 0, _onnx_type(kind), shape, buffer.address)
        self._binding = binding


def _onnx_type(kind: np.dtype[Any]) -> Any:
    return BFLOAT16 if kind == ml_dtypes.bfloat16 else kind
