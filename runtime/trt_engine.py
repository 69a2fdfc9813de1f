"""One deserialised engine: its profiles, its buffers, its runs. Written against the API that TensorRT 10.3 to 11 and
TensorRT-RTX share, without importing either: the engine object is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .device_buffers import Buffer, DeviceArray, Gpu, Shape
from .errors import MetaEmbedError, UsageError

DTYPES = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "INT64": np.dtype(np.int64),
    "INT32": np.dtype(np.int32),
    "BOOL": np.dtype(np.bool_),
}
MOST_GRAPHS = 8  # captured CUDA graphs kept per session; each pins some memory


class ProfileShapes:
    """The shapes that one optimisation profile of an engine covers: input -> (min, opt, max)."""

    def __init__(self, engine: Any, index: int, inputs: Iterable[str]) -> None:
        self.index = index
        self._spans: dict[str, tuple[Shape, Shape, Shape]] = {}
        for name in inputs:
            low, best, high = (tuple(shape) for shape in engine.get_tensor_profile_shape(name, index))
            self._spans[name] = (low, best, high)

    @property
    def max_items(self) -> int:
        return max(high[0] for _, _, high in self._spans.values() if len(high) > 1)

    def covers(self, shapes: Mapping[str, Shape]) -> bool:
        return all(
            len(shape) == len(span[0])
            and all(low <= size <= high for low, size, high in zip(span[0], shape, span[2], strict=True))
            for shape, span in ((shapes[name], span) for name, span in self._spans.items())
        )

    def distance(self, shapes: Mapping[str, Shape]) -> float:
        """How far shapes are from what this profile is tuned for: the sum of |log(size / opt)|."""
        return sum(
            float(np.abs(np.log(np.divide(shapes[name], best))).sum()) for name, (_, best, _) in self._spans.items()
        )

    def describe(self) -> str:
        return ", ".join(f"{name} {dims(low)} to {dims(high)}" for name, (low, _, high) in self._spans.items())


class EngineRunner:
    """One deserialised engine with its execution context and buffers. Profiles share the context and its memory."""

    def __init__(self, engine: Any, gpu: Gpu, stream: int, cuda_graphs: bool) -> None:
        self._engine, self._gpu, self._stream = engine, gpu, stream
        self._context = engine.create_execution_context()
        if self._context is None:
            raise MetaEmbedError("TensorRT could not create an execution context; GPU memory may be short")
        names = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
        if any(engine.get_tensor_location(name).name != "DEVICE" for name in names):
            raise MetaEmbedError("this engine wants some input in host memory, which none of ours does; build it again")
        kinds = {name: DTYPES[engine.get_tensor_dtype(name).name] for name in names}
        reads = {name for name in names if engine.get_tensor_mode(name).name == "INPUT"}
        self.inputs = {name: kinds[name] for name in names if name in reads}
        self._outputs = {name: kinds[name] for name in names if name not in reads}
        self._buffers = {name: Buffer(gpu) for name in names}
        self._profiles = [
            ProfileShapes(engine, index, self.inputs) for index in range(engine.num_optimization_profiles)
        ]
        self._profile = 0
        self._graphs = CapturedRuns(gpu, stream) if cuda_graphs else None
        self._pending = False

    @property
    def max_items(self) -> int:
        return max(profile.max_items for profile in self._profiles)

    @property
    def profiles(self) -> list[ProfileShapes]:
        return self._profiles

    def fitting(self, shapes: Mapping[str, Shape]) -> list[ProfileShapes]:
        """The profiles that cover these shapes; a UsageError for wrong names."""
        if set(shapes) != set(self.inputs):
            raise UsageError(f"the engine takes {', '.join(sorted(self.inputs))}, not {', '.join(sorted(shapes))}")
        return [profile for profile in self._profiles if profile.covers(shapes)]

    def run(self, profile: int, feeds: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, DeviceArray]:
        """Enqueue one execution. Outputs are on the GPU, complete once the stream gets there."""
        if self._pending:  # the host copies of the last run's inputs may still be read
            self._gpu.synchronise(self._stream)
        self._pending = True
        if profile != self._profile:
            self._context.set_optimization_profile_async(profile, self._stream)
            self._profile = profile
        addresses = {name: self._place_input(name, value) for name, value in feeds.items()}
        for name, shape in shapes.items():
            self._context.set_input_shape(name, shape)
        missing = self._context.infer_shapes()
        if missing:
            raise MetaEmbedError(f"TensorRT cannot infer shapes; it lacks {', '.join(missing)}")
        outputs = {name: tuple(self._context.get_tensor_shape(name)) for name in self._outputs}
        for name, shape in outputs.items():
            self._buffers[name].reserve(int(np.prod(shape)) * self._outputs[name].itemsize)
            addresses[name] = self._buffers[name].address
        for name, address in addresses.items():
            self._context.set_tensor_address(name, address)
        self._execute((profile, *sorted(shapes.items()), *sorted(addresses.items())))
        return {
            name: DeviceArray(self._gpu, self._buffers[name], shape, self._outputs[name], self._stream)
            for name, shape in outputs.items()
        }

    def fetch(self, outputs: Mapping[str, DeviceArray]) -> dict[str, NDArray[Any]]:
        """Copy outputs out, with one wait for all of them."""
        views = {
            name: self._buffers[name].download(value.shape, value.dtype, self._stream)
            for name, value in outputs.items()
        }
        self._gpu.synchronise(self._stream)
        self._pending = False
        return {name: view.copy() for name, view in views.items()}

    def close(self) -> None:
        self._gpu.synchronise(self._stream)
        if self._graphs:
            self._graphs.close()
        for buffer in self._buffers.values():
            buffer.free()
        self._context = self._engine = None  # TensorRT frees them with the last reference, the context first

    def _place_input(self, name: str, value: Any) -> int:
        """The address where the engine finds an input: the caller's on the GPU, or our buffer after an upload."""
        if value.dtype != self.inputs[name]:
            raise UsageError(f"{name} has type {value.dtype}, and the engine takes {self.inputs[name]}")
        if isinstance(value, DeviceArray):
            value.check()
            return value.address
        buffer = self._buffers[name]
        buffer.reserve(value.nbytes)
        buffer.upload(value, self._stream)
        return buffer.address

    def _execute(self, key: tuple[Any, ...]) -> None:
        def enqueue() -> None:
            if not self._context.execute_async_v3(self._stream):
                raise MetaEmbedError("TensorRT could not run the engine; its log says why (--verbose)")

        if self._graphs:
            self._graphs.run(key, enqueue)
        else:
            enqueue()


class CapturedRuns:
    """CUDA graphs of runs that repeat: a key's first run is plain, and so is any that follows another key's; the next one of the
    same key is recorded, later ones replay.

    TensorRT updates the context at the first enqueue after a change of shapes, and a recording must not hold that.
    """

    def __init__(self, gpu: Gpu, stream: int) -> None:
        self._gpu, self._stream = gpu, stream
        self._last: tuple[Any, ...] = ()  # of the last run
        self._graphs: dict[tuple[Any, ...], int] = {}

    def run(self, key: tuple[Any, ...], enqueue: Callable[[], None]) -> None:
        """``key`` holds the shapes and every address: a graph remembers both."""
        repeated, self._last = key == self._last, key
        if not repeated:
            enqueue()  # TensorRT prepares itself for other shapes here
        elif key in self._graphs:
            self._gpu.launch(self._graphs[key], self._stream)
        elif len(self._graphs) >= MOST_GRAPHS:
            enqueue()
        else:
            self._gpu.begin_capture(self._stream)
            try:
                enqueue()
            finally:
                graph = self._gpu.end_capture(self._stream)
            self._graphs[key] = graph
            self._gpu.launch(graph, self._stream)

    def close(self) -> None:
        for graph in self._graphs.values():
            self._gpu.destroy_graph(graph)
        self._graphs.clear()


def dims(shape: Shape) -> str:
    """``4x3x1656``."""
    return "x".join(map(str, shape))
