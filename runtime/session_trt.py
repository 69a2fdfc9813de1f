"""Sessions over TensorRT and TensorRT-RTX. The only file of the runtime that imports either.

One stream serves all sessions of an encoder, so that what one enqueues another can read without waiting. A plan is
deserialised only after its SHA-256 is found equal to the one that bundle.json keeps.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import mmap
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cuda import find_gpu
from .device_buffers import DeviceArray, Gpu, Shape, place
from .engines import EngineSet, choose_engines, read_engine_sets, vouched_plan
from .errors import BundleError, MetaEmbedError, UsageError
from .manifest import VISION, Bundle, FileRecord, rebuild_command, remedy
from .session import Session
from .trt_engine import EngineRunner, dims

log = logging.getLogger(__name__)
FLAVOURS = ("tensorrt", "tensorrt_rtx")  # import names, the faster first


def installed_flavours() -> dict[str, str]:
    """Import name -> version of each TensorRT that can be imported here."""
    found = {}
    for name in FLAVOURS:
        if importlib.util.find_spec(name):
            try:
                found[name] = str(importlib.import_module(name).__version__)
            # A wheel without its libraries, a library without its driver, a folder of that name.
            except (ImportError, OSError, AttributeError) as error:
                log.warning("%s is installed and cannot be imported: %s", name, error)
    return found


def open_trt_sessions(bundle: Bundle, graphs: Iterable[str], *, cuda_graphs: bool = False) -> list[Session] | None:
    """A session for each graph on the bundle's engines for this GPU; None when there is no GPU or no engine at all.

    The vision session leaves its output on the GPU, where the language session reads it.

    Raises:
        BundleError: the bundle has engines, but none that may be loaded here; the sentence says what builds them.
    """
    gpu = find_gpu() if read_engine_sets(bundle) else None
    found = choose_engines(bundle, gpu.capability, installed_flavours()) if gpu else None
    if gpu is None or found is None:
        return None
    if cuda_graphs and found.flavour == "tensorrt_rtx":
        raise UsageError("TensorRT-RTX changes kernels while it runs, which a recorded CUDA graph would not notice")
    gpu.use()
    trt = importlib.import_module(found.flavour)
    stream = SharedStream(gpu)
    return [
        TrtSession(
            [load_engine(trt, bundle, plan) for plan in _plans(bundle, found, graph)],
            gpu=gpu,
            stream=stream,
            label=f"{'TensorRT-RTX' if found.flavour == 'tensorrt_rtx' else 'TensorRT'} {found.version} ({gpu.name})",
            keep_on_device=graph == VISION,
            cuda_graphs=cuda_graphs,
        )
        for graph in graphs
    ]


def _plans(bundle: Bundle, found: EngineSet, graph: str) -> tuple[str, ...]:
    if graph not in found.plans:
        again = rebuild_command(bundle.folder, found.target)
        raise BundleError(f"the engines for {found.target} lack {graph}; build with: {again}")
    return found.plans[graph]


def load_engine(trt: Any, bundle: Bundle, name: str) -> Any:
    """Deserialise a plan that the manifest vouches for.

    Raises:
        BundleError: the file is not the one that bundle.json describes, or TensorRT refuses it.
        MetaEmbedError: TensorRT does not start: it is newer than the driver, for one.
    """
    record, path, advice = vouched_plan(bundle, name), bundle.path(name), remedy(bundle.folder, name)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        _check_plan(path, plan, record, advice)
        try:
            runtime = trt.Runtime(_logger(trt))
        except TypeError:  # how pybind11 says that there is none
            raise MetaEmbedError(f"TensorRT {trt.__version__} does not start here; its own message says why") from None
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BundleError(
            f"TensorRT {trt.__version__} cannot load {path}; its own message says why: where GPU memory is short, free "
            f"some, else {advice}"
        )
    return engine


def _check_plan(path: Path, plan: mmap.mmap, record: FileRecord, advice: str) -> None:
    """Checked again here although opening the bundle checked it: that may have been switched off, or long ago."""
    if len(plan) != record.bytes or hashlib.sha256(plan).hexdigest() != record.sha256:
        raise BundleError(f"{path} has changed since it was built (SHA-256) and is never loaded; {advice}")


@lru_cache
def _logger(trt: Any) -> Any:
    """One for the life of the process: TensorRT keeps the first that it is given, and uses it for all that follows
    (TensorRT issue 1475), so it must not go with the first engine."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            serious = severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)
            log.log(logging.ERROR if serious else logging.DEBUG, "%s", message)

    return Logger()


class NoProfileError(UsageError):
    """The engines were cut to other shapes: to some budgets, to one side, or to smaller batches."""


class SharedStream:
    """One CUDA stream, destroyed when the last session that holds it closes."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.handle = gpu.create_stream()
        self._users = 0

    def take(self) -> int:
        self._users += 1
        return self.handle

    def give_back(self) -> None:
        self._users -= 1
        if self._users == 0:
            self._gpu.destroy_stream(self.handle)


class TrtSession:
    """The engines of one graph: one that serves all shapes, or several that share them out (``--layout separate``).

    Buffers are kept between runs. Outputs are copied to the caller, unless ``keep_on_device``: then they are
    ``DeviceArray`` and valid until the next run. With ``cuda_graphs`` the second run in a row of one shape is
    recorded and later ones replay it, which saves launch time where shapes repeat.

    Raises:
        NoProfileError: a shape that no profile covers.
        UsageError: a wrong name or type, or a closed session.
    """

    def __init__(
        self,
        engines: list[Any],
        *,
        gpu: Gpu,
        stream: SharedStream,
        label: str,
        keep_on_device: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        self.description = label
        self._gpu, self._stream = gpu, stream
        self._keep = keep_on_device
        self._handle = stream.take()
        self._engines = [EngineRunner(engine, gpu, self._handle, cuda_graphs) for engine in engines]

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        return self._engines[0].inputs if self._engines else {}

    @property
    def max_items(self) -> int:
        """The most items that every profile takes, whichever side it is for: more must come in several batches."""
        return min(profile.max_items for engine in self._engines for profile in engine.profiles)

    def most_items(self, name: str, item: Shape) -> int:
        """The most items of this shape that one run takes of an input; 0 where no profile covers them."""
        return max(profile.most_items(name, item) for engine in self._engines for profile in engine.profiles)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        if not self._engines:
            raise UsageError("this session is closed")
        self._gpu.use()
        shapes = {name: tuple(value.shape) for name, value in feeds.items()}
        fitting = [(engine, profile) for engine in self._engines for profile in engine.fitting(shapes)]
        if not fitting:
            raise NoProfileError(_no_profile(shapes, self._engines))
        engine, profile = min(fitting, key=lambda pair: pair[1].distance(shapes))
        outputs = engine.run(profile.index, feeds, shapes)
        if self._keep:
            return outputs
        return engine.fetch(outputs)

    def place(self, values: NDArray[Any]) -> DeviceArray:
        """A copy on the GPU, to feed any number of times and to free before the session is closed."""
        if not self._engines:
            raise UsageError("this session is closed")
        self._gpu.use()
        return place(self._gpu, values, self._handle)

    def close(self) -> None:
        """Free engines, buffers and, with the last session, the stream."""
        if self._engines:
            self._gpu.use()
            for engine in self._engines:
                engine.close()
            self._engines = []
            self._stream.give_back()

    def __enter__(self) -> TrtSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _no_profile(shapes: Mapping[str, Shape], engines: list[EngineRunner]) -> str:
    asked = ", ".join(f"{name} {dims(shape)}" for name, shape in shapes.items())
    most = max(engine.max_items for engine in engines)
    covered = "; or ".join(profile.describe() for engine in engines for profile in engine.profiles)
    return (
        f"no optimisation profile covers {asked}; the engines cover {covered} (at most {most} items at once: use a "
        f"smaller batch_size, or build with a larger --max-batch)"
    )
