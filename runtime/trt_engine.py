"""One deserialised engine: its profiles, its buffers, its runs. Written against the API that TensorRT 10.3 to 11 and
TensorRT-RTX share, without importing either: the engine object is given.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .device_buffers import Buffer, DeviceArray, Gpu, Shape
from .errors import MetaEmbedError, UsageError

log = logging.getLogger(__name__)
DTYPES = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "INT64": np.dtype(np.int64),
    "INT32": np.dtype(np.int32),
    "BOOL": np.dtype(np.bool_),
}


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

    def most_items(self, name: str, item: Shape) -> int:
        """The most items of one shape that an input takes; 0 where that shape is outside."""
        low, _, high = self._spans[name]
        fits = len(item) + 1 == len(low) and all(
            a <= size <= b for a, size, b in zip(low[1:], item, high[1:], strict=True)
        )
        return high[0] if fits else 0

    def covers(self, shapes: Mapping[str, Shape]) -> bool:
        return all(
            len(shape) == len(span[0])
            and all(low <= size <= high for low, size, high in zip(span[0], shape, span[2], strict=True))
            for shape, span in ((shapes[name], span) for name, span in self._spans.items())
        )

    def distance(self, shapes: Mapping[str, Shape]) -> float:
        """How far shapes are from what this profile is tuned for: the sum of |log(size / opt)|."""
        return sum(
            abs(math.log(size / tuned))
            for name, (_, best, _) in self._spans.items()
            for size, tuned in zip(shapes[name], best, strict=True)
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
        self._profile = 0  # where TensorRT puts the first context of an engine
        self._prepared: tuple[int, dict[str, Shape]] | None = None  # the profile and the shapes that the context holds
        self._addresses: dict[str, int] = {}  # and the addresses
        self._shapes: dict[str, Shape] = {}  # of the outputs
        self._recorded = RecordedRun(gpu, stream) if cuda_graphs else None
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
        inputs = {name: self._place_input(name, value) for name, value in feeds.items()}
        changed = self._set_shapes(profile, shapes)
        changed |= self._set_addresses({**inputs, **{name: self._buffers[name].address for name in self._outputs}})
        if self._recorded:
            self._recorded.run(self._enqueue, repeated=not changed)
        else:
            self._enqueue()
        return {
            name: DeviceArray(self._gpu, self._buffers[name], shape, self._outputs[name], self._stream)
            for name, shape in self._shapes.items()
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
        if self._recorded:
            self._recorded.close()
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

    def _set_shapes(self, profile: int, shapes: Mapping[str, Shape]) -> bool:
        """Make the context ready for these shapes, with room for the outputs; false when it was ready already.

        TensorRT's setters return False where they refuse, and do not raise.
        """
        if self._prepared == (profile, shapes):
            return False
        self._prepared = None
        if self._recorded:
            self._recorded.close()
        context = self._context
        if profile != self._profile:  # on the stream of the runs, so that they follow it
            _check(context.set_optimization_profile_async(profile, self._stream), f"optimisation profile {profile}")
            self._profile = profile
            self._addresses.clear()
        for name, shape in shapes.items():
            _check(context.set_input_shape(name, shape), f"{name} {dims(shape)}")
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:
            raise MetaEmbedError(f"TensorRT cannot infer shapes: {error}") from None
        if missing:
            raise MetaEmbedError(f"TensorRT cannot infer shapes; it lacks {', '.join(missing)}")
        self._shapes = {name: tuple(context.get_tensor_shape(name)) for name in self._outputs}
        for name, shape in self._shapes.items():
            self._buffers[name].reserve(int(np.prod(shape)) * self._outputs[name].itemsize)
        self._prepared = profile, dict(shapes)
        return True

    def _set_addresses(self, addresses: Mapping[str, int]) -> bool:
        """Tell the context those that are new to it; false when there are none."""
        new = {name: address for name, address in addresses.items() if self._addresses.get(name) != address}
        for name, address in new.items():
            _check(self._context.set_tensor_address(name, address), f"the address of {name}")
            self._addresses[name] = address
        return bool(new)

    def _enqueue(self) -> None:
        prepared, self._prepared = self._prepared, None  # after a failure, nothing is taken for granted
        _check(self._context.execute_async_v3(self._stream), "to run the engine")
        self._prepared = prepared


class RecordedRun:
    """The CUDA graph of a run that repeats: a run unlike the last is plain, the next like it is recorded, later ones replay.

    One graph at a time, dropped before anything changes. TensorRT updates its context at the first run after a change, which a
    recording must not hold, and NVIDIA's guide calls it undefined to launch a graph whose context has since been changed; a
    switch of profiles after a recording has also failed outright (TensorRT-Edge-LLM issue 50).
    """

    def __init__(self, gpu: Gpu, stream: int) -> None:
        self._gpu, self._stream = gpu, stream
        self._graph = 0
        self._refused = False

    def run(self, enqueue: Callable[[], None], *, repeated: bool) -> None:
        """``repeated``: shapes and all addresses are the last run's."""
        if not repeated:
            self.close()
        elif not self._graph and not self._refused:
            self._record(enqueue)
        if self._graph:
            self._gpu.launch(self._graph, self._stream)
        else:
            enqueue()

    def close(self) -> None:
        if self._graph:
            self._gpu.destroy_graph(self._graph)
        self._graph = 0

    def _record(self, enqueue: Callable[[], None]) -> None:
        """Not every engine can be recorded: one that waits or allocates while it runs cannot. It then runs plainly."""
        self._gpu.begin_capture(self._stream)
        try:
            try:
                enqueue()
            finally:
                self._graph = self._gpu.end_capture(self._stream)
        except MetaEmbedError as error:
            self.close()
            self._refused = True
            log.warning("this engine cannot be recorded as a CUDA graph, and runs without: %s", error)


def _check(done: bool, what: str) -> None:
    if not done:
        raise MetaEmbedError(f"TensorRT refused {what}; its own message says why")


def dims(shape: Shape) -> str:
    """``4x3x1656``."""
    return "x".join(map(str, shape))
