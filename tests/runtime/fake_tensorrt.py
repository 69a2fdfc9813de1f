"""A stand-in for a GPU and a TensorRT engine, faithful in what buffers must respect, so that their logic is tested here.

Addresses are real host addresses. Everything enqueued waits in the stream and happens at a synchronisation, as on a GPU
that is slow: host memory that is overwritten too early shows. Freed memory is gone. TensorRT's setters refuse with False,
as the real ones do, a switch of profiles unsets the shapes, and a recording is spoilt by the first run after a change of
shapes and by any wait or allocation. The engine's arithmetic is ONNX Runtime's on the same graph. Nothing here says
anything about TensorRT's own numbers or speed.
"""

import ctypes
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort

from metaembed.export.profiles import Sizes, plan_engines
from metaembed.runtime.encoder import Encoder
from metaembed.runtime.errors import MetaEmbedError
from metaembed.runtime.manifest import LANGUAGE, VISION
from metaembed.runtime.session_ort import NUMPY_TYPES
from metaembed.runtime.session_trt import SharedStream, TrtSession

STREAM = 77
TRT_NAMES = {"float32": "FLOAT", "int64": "INT64", "bool": "BOOL"}


class FakeGpu:
    name = "fake"
    capability = (8, 0)

    def __init__(self):
        self.memory = {}
        self.queue = []
        self.calls = []
        self._captured = None
        self._spoilt = False
        self._graphs = {}

    def use(self):
        pass

    def allocate(self, size):
        return self._take("allocate", size)

    def allocate_host(self, size):
        return self._take("allocate_host", size)

    def free(self, address):
        self.drain()  # cuMemFree waits
        del self.memory[address]

    def free_host(self, address):
        self.drain()
        del self.memory[address]

    def copy_in(self, device, host, size, stream):
        self.calls.append("copy_in")
        self.enqueue(lambda: ctypes.memmove(self.check(device, size), self.check(host, size), size))

    def copy_out(self, host, device, size, stream):
        self.calls.append("copy_out")
        self.enqueue(lambda: ctypes.memmove(self.check(host, size), self.check(device, size), size))

    def create_stream(self):
        self.memory["stream"] = None
        return STREAM

    def destroy_stream(self, stream):
        self.drain()
        del self.memory["stream"]

    def synchronise(self, stream):
        assert stream == STREAM
        self.spoil()
        self.drain()

    @property
    def capturing(self):
        return self._captured is not None

    def spoil(self):
        """What a recording cannot hold was done: while one is made, it fails."""
        self._spoilt = self.capturing

    def begin_capture(self, stream):
        self._captured, self._spoilt = [], False

    def end_capture(self, stream):
        captured, self._captured = self._captured, None
        if self._spoilt:
            raise MetaEmbedError("CUDA: operation failed due to a previous error during capture (error 901)")
        self._graphs[len(self._graphs) + 1] = captured
        self.memory["graph", len(self._graphs)] = None
        return len(self._graphs)

    def launch(self, graph, stream):
        self.calls.append("launch")
        self.queue.extend(self._graphs[graph])

    def destroy_graph(self, graph):
        del self.memory["graph", graph]

    def enqueue(self, work):
        (self.queue if self._captured is None else self._captured).append(work)

    def drain(self):
        work, self.queue = self.queue, []
        for step in work:
            step()

    def check(self, address, size):
        """The address, when that many bytes behind it are allocated."""
        for start, block in self.memory.items():
            if block is not None and start <= address and address + size <= start + len(block):
                return address
        raise AssertionError(f"{size} bytes at {address} are not allocated")

    def _take(self, kind, size):
        self.spoil()
        self.calls.append(kind)
        block = ctypes.create_string_buffer(size)
        address = ctypes.addressof(block)
        self.memory[address] = block
        return address


class FakeEngine:
    """An ONNX graph (float32) with profiles, behind the part of ICudaEngine that sessions use."""

    def __init__(self, gpu, path, profiles):
        self._gpu = gpu
        self.session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self._profiles = profiles
        self.inputs = {value.name: NUMPY_TYPES[value.type] for value in self.session.get_inputs()}
        self.outputs = {value.name: NUMPY_TYPES[value.type] for value in self.session.get_outputs()}
        self.num_optimization_profiles = len(profiles)
        self.num_io_tensors = len(self.inputs) + len(self.outputs)
        self.used_profiles = []
        self.waits = False  # while it runs, as engines with control flow do: it cannot be recorded
        self.contexts = []

    def get_tensor_name(self, place):
        return [*self.inputs, *self.outputs][place]

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=TRT_NAMES[{**self.inputs, **self.outputs}[name].name])

    def get_tensor_mode(self, name):
        return SimpleNamespace(name="INPUT" if name in self.inputs else "OUTPUT")

    def get_tensor_location(self, name):
        return SimpleNamespace(name="DEVICE")

    def get_tensor_profile_shape(self, name, index):
        span = self._profiles[index].ranges[name]
        return [span.min, span.opt, span.max]

    def create_execution_context(self):
        self.contexts.append(FakeContext(self, self._gpu))
        return self.contexts[-1]


class FakeContext:
    def __init__(self, engine, gpu):
        self._engine, self._gpu = engine, gpu
        self._shapes, self._addresses, self._profile = {}, {}, 0
        self._ran = None  # the profile and shapes of the last run
        self.calls = []

    def set_optimization_profile_async(self, index, stream):
        self.calls.append("profile")
        taken = any(other._profile == index for other in self._engine.contexts if other is not self)
        if stream != STREAM or taken or not 0 <= index < self._engine.num_optimization_profiles:
            return False
        self._profile, self._shapes = index, {}
        return True

    def set_input_shape(self, name, shape):
        self.calls.append("shape")
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        if len(shape) != len(low) or not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
            return False
        self._shapes[name] = tuple(shape)
        return True

    def infer_shapes(self):
        self.calls.append("infer")
        return [name for name in self._engine.inputs if name not in self._shapes]

    def get_tensor_shape(self, name):
        shapes = self._shapes
        if name == "scores":
            return (shapes["queries"][0], shapes["candidates"][0])
        if name == "image_embeddings":
            return (shapes["patches"][0], shapes["patches"][1] * 16, 128)
        return (shapes["token_ids"][0], shapes["rows"][0], 128)

    def set_tensor_address(self, name, address):
        self.calls.append("address")
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        names = {*self._engine.inputs, *self._engine.outputs}
        if stream != STREAM or self.infer_shapes() or not all(self._addresses.get(name) for name in names):
            return False
        state = self._profile, dict(self._shapes)
        if self._engine.waits or state != self._ran:
            self._gpu.spoil()
        self._ran = state
        if self._gpu.capturing and self._gpu._spoilt:
            return False
        self._engine.used_profiles.append(self._profile)
        feeds = {name: self._array(name, self._shapes[name], kind) for name, kind in self._engine.inputs.items()}
        results = {
            name: self._array(name, self.get_tensor_shape(name), kind) for name, kind in self._engine.outputs.items()
        }
        recorded = (state, dict(self._addresses)) if self._gpu.capturing else None

        def work():
            now = (self._profile, self._shapes), self._addresses
            assert recorded in (None, now), "a graph is launched although its context has changed"
            values = self._engine.session.run(list(results), {name: read() for name, read in feeds.items()})
            for read, value in zip(results.values(), values, strict=True):
                read()[...] = value

        self._gpu.enqueue(work)
        return True

    def _array(self, name, shape, kind):
        """How to read a tensor when the stream gets there: its address and shape are settled now."""
        address, size = self._addresses[name], int(np.prod(shape)) * kind.itemsize

        def read():
            raw = (ctypes.c_ubyte * size).from_address(self._gpu.check(address, size))
            return np.frombuffer(raw, kind).reshape(shape)

        return read


class Rig:
    """Sessions of both graphs over fake engines that share one fake GPU and stream."""

    def __init__(self, bundle, budgets=None, cuda_graphs=False, **options):
        self.gpu = FakeGpu()
        self.engines = {}
        stream = SharedStream(self.gpu)
        for engine in plan_engines(Sizes.of(bundle.manifest), budgets or bundle.manifest.budgets, **options):
            path = bundle.path(engine.graph)
            self.engines.setdefault(engine.graph, []).append(FakeEngine(self.gpu, path, engine.profiles))
        self.sessions = {
            graph: TrtSession(
                engines,
                gpu=self.gpu,
                stream=stream,
                label="fake",
                keep_on_device=graph == VISION,
                cuda_graphs=cuda_graphs,
            )
            for graph, engines in self.engines.items()
        }
        self.vision, self.language = self.sessions[VISION], self.sessions[LANGUAGE]

    def encoder(self, bundle):
        return Encoder(bundle, self.vision, self.language)
