"""ONNX Runtime as calibration uses it: exact simulation, taps on inner tensors, and a memory of earlier outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from metaembed.runtime.errors import BundleError
from metaembed.runtime.session import Arrays, Session
from metaembed.runtime.session_ort import NUMPY_TYPES

Tap = Callable[[str, NDArray[Any], Arrays], None]
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class ExactSession:
    """A graph in ONNX Runtime as it is written: quantised, dequantised and multiplied in floating point.

    At the basic level ONNX Runtime does not replace Q/DQ by integer kernels, so every rounding is the graph's own.

    Args:
        model: the graph; its external weights lie in ``folder``.
        taps: inner tensors to hand to ``tap(name, values, feeds)`` on every run.
    """

    def __init__(
        self, model: ir.Model, folder: Path, *, taps: Sequence[str] = (), tap: Tap | None = None, threads: int = 0
    ) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = False  # a real-size model's activations would stay allocated
        options.add_session_config_entry(WEIGHTS_FOLDER, str(folder.resolve()))
        try:
            self._session: Any = ort.InferenceSession(
                _with_outputs(model, taps),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=["ConstantFolding"],  # it would keep a second copy of every weight, widened
            )
        except Exception as error:  # ONNX Runtime raises several unrelated classes
            raise BundleError(f"ONNX Runtime cannot load the graph {model.graph.name}: {error}") from error
        self._outputs = [str(value.name) for value in model.graph.outputs]
        self._taps, self._tap = list(taps), tap
        self._inputs = {value.name: NUMPY_TYPES[value.type] for value in self._session.get_inputs()}

    @property
    def description(self) -> str:
        return f"ONNX Runtime {ort.__version__} (exact simulation)"

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        return self._inputs

    @property
    def max_items(self) -> int | None:
        return None

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        arrays = self._session.run([*self._outputs, *self._taps], dict(feeds))
        for name, array in zip(self._taps, arrays[len(self._outputs) :], strict=True):
            assert self._tap is not None
            self._tap(name, array, feeds)
        return dict(zip(self._outputs, arrays, strict=False))

    def close(self) -> None:
        self._session = None


class RememberingSession:
    """Answers a feed that it has seen from memory: while language groups are judged, the vision graph runs once."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._known: dict[bytes, dict[str, NDArray[Any]]] = {}

    @property
    def description(self) -> str:
        return self._session.description

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        return self._session.inputs

    @property
    def max_items(self) -> int | None:
        return self._session.max_items

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        digest = hashlib.sha256()
        for name in sorted(feeds):
            digest.update(f"{name}{feeds[name].shape}".encode())
            digest.update(np.ascontiguousarray(feeds[name]))
        key = digest.digest()
        if key not in self._known:
            self._known[key] = self._session.run(feeds)
        return self._known[key]

    def close(self) -> None:
        """The session stays open: its owner closes it."""


def _with_outputs(model: ir.Model, names: Sequence[str]) -> bytes:
    proto = ir.to_proto(model)
    proto.graph.output.extend(type(proto.graph.output[0])(name=name) for name in names)
    return proto.SerializeToString()
