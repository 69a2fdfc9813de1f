"""Sessions over ONNX Runtime."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from .cpu import has_vnni
from .errors import BundleError, MetaEmbedError, UsageError
from .providers import CPU

log = logging.getLogger(__name__)
BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16: numpy has no such type, so its bits travel as an OrtValue
NUMPY_TYPES = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": np.dtype(ml_dtypes.bfloat16),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(bool)": np.dtype(np.bool_),
}


class OrtSession:
    """An ONNX graph in ONNX Runtime.

    Args:
        path: the graph; its external weights lie beside it.
        providers: execution providers, best first, each with its options; by default the CPU's.
        threads: CPU threads; 0 lets ONNX Runtime choose (one per core).
        lean: keep weights memory-mapped in their stored type and widen each when it is used, instead of folding the
            casts into float32 copies: slower, but the whole model never has to fit in memory.
        quantised: the graph holds Q/DQ pairs, which are to become integer products.
        max_items: the most items in one run, where a provider's engines have a limit.

    Raises:
        BundleError: ONNX Runtime refuses the graph.
        UsageError: none of the providers asked for could be had.
    """

    def __init__(
        self,
        path: Path,
        *,
        providers: Mapping[str, Mapping[str, str]] = {CPU: {}},
        threads: int = 0,
        lean: bool = False,
        quantised: bool = False,
        max_items: int | None = None,
    ) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = options.enable_mem_pattern = not lean
        # INT8 products must not saturate: on x86 without VNNI the default kernel adds pairs of products in 16 bits, and its
        # worst output was off by 8.6 % of the largest; with this, by 1.3e-7. With VNNI both are exact (5e-8), and this takes
        # 3.4 times as long (one 1024 x 2816 Linear).
        options.add_session_config_entry("session.x64quantprecision", "0" if has_vnni() else "1")
        disabled = ["ConstantFolding"] if lean else []
        if quantised:  # it merges the pairs of q, k and v, and a pair with several readers is not fused
            disabled.append("CommonSubexpressionElimination")
        try:
            self._session: Any = ort.InferenceSession(
                str(path),
                options,
                providers=list(providers),
                provider_options=[dict(chosen) for chosen in providers.values()],
                disabled_optimizers=disabled,
            )
        except Exception as error:  # ONNX Runtime raises several unrelated classes
            raise BundleError(f"ONNX Runtime cannot load {path}: {_first_line(error)}") from error
        self.providers: list[str] = self._session.get_providers()  # what was got, not what was asked
        self.max_items = max_items
        self._inputs = {value.name: NUMPY_TYPES[value.type] for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]
        kinds = {value.type for value in (*self._session.get_inputs(), *self._session.get_outputs())}
        self._bound = self.providers[0] != CPU or "tensor(bfloat16)" in kinds

    @property
    def description(self) -> str:
        return f"ONNX Runtime {ort.__version__} ({self.providers[0]})"

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        return self._inputs

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        if self._session is None:
            raise UsageError("this session is closed")
        try:
            outputs = self._run_bound(feeds) if self._bound else self._session.run(self._outputs, dict(feeds))
        except MetaEmbedError:
            raise
        except Exception as error:  # several unrelated classes, here too
            raise MetaEmbedError(f"ONNX Runtime failed while running: {_first_line(error)}") from error
        return dict(zip(self._outputs, outputs, strict=True))

    def _run_bound(self, feeds: Mapping[str, Any]) -> list[Any]:
        """Through OrtValues, which also hold bf16; ONNX Runtime copies to and from the GPU where there is one."""
        binding = self._session.io_binding()
        held = [self._bind_input(binding, name, value) for name, value in feeds.items()]
        for name in self._outputs:
            self._bind_output(binding, name)
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding, self._run_options())
        binding.synchronize_outputs()
        del held  # what the inputs are read from
        return [self._output(value) for value in binding.get_outputs()]

    def _bind_input(self, binding: Any, name: str, value: Any) -> object:
        """Name an input's memory to ONNX Runtime; what comes back must outlive the run."""
        self._check_type(name, value)
        array = np.ascontiguousarray(value)
        if array.dtype != ml_dtypes.bfloat16:
            held = ort.OrtValue.ortvalue_from_numpy(array)
        else:
            held = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), BFLOAT16)
        binding.bind_ortvalue_input(name, held)
        return array, held

    def _check_type(self, name: str, value: Any) -> None:
        if value.dtype != self._inputs.get(name, value.dtype):
            raise UsageError(f"{name} has type {value.dtype}, and the graph takes {self._inputs[name]}")

    def _run_options(self) -> Any:
        return None

    def _bind_output(self, binding: Any, name: str) -> None:
        binding.bind_output(name, "cpu")

    def _output(self, value: Any) -> Any:
        return _array(value)

    def close(self) -> None:
        self._session = None


def _array(value: Any) -> NDArray[Any]:
    """An output in host memory as an array of its own."""
    if value.element_type() != BFLOAT16:
        return np.array(value.numpy())
    size = value.tensor_size_in_bytes()
    bits = (ctypes.c_ubyte * size).from_address(value.data_ptr()) if size else b""
    return np.array(np.frombuffer(bits, ml_dtypes.bfloat16).reshape(value.shape()))


def graph_options(number: int) -> Any:
    """What tells the CUDA provider which recorded graph a run is; -1: none."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    return options


def load_cuda() -> None:
    """Load CUDA's and cuDNN's libraries from NVIDIA's wheels, where those were installed; the system's are found anyway.

    Without it ONNX Runtime (from 1.21 on) finds none of ``pip install onnxruntime-gpu[cuda,cudnn]``. It prints what it misses.
    """
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls()


def available_providers() -> list[str]:
    """What this build of ONNX Runtime names, whether or not its libraries and a GPU are here."""
    return list(ort.get_available_providers())


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
