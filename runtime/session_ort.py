"""Sessions over ONNX Runtime."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from .cpu import has_vnni
from .errors import BundleError, MetaEmbedError, UsageError
from .session import Arrays

log = logging.getLogger(__name__)
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
        providers: execution providers, best first; by default the CPU's.
        threads: CPU threads; 0 lets ONNX Runtime choose (one per core).
        lean: keep weights memory-mapped in their stored type and widen each when it is used, instead of folding the
            casts into float32 copies: slower, but the whole model never has to fit in memory.
        quantised: the graph holds Q/DQ pairs, which are to become integer products.

    Raises:
        BundleError: ONNX Runtime refuses the graph.
        UsageError: none of the providers asked for could be had.
    """

    def __init__(
        self,
        path: Path,
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int = 0,
        lean: bool = False,
        quantised: bool = False,
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
                str(path), options, providers=list(providers), disabled_optimizers=disabled
            )
        except Exception as error:  # ONNX Runtime raises several unrelated classes
            raise BundleError(f"ONNX Runtime cannot load {path}: {_first_line(error)}") from error
        self.providers: list[str] = self._session.get_providers()  # what was got, not what was asked
        if self.providers[0] != providers[0]:
            log.warning("asked for %s, ONNX Runtime runs on %s", providers[0], self.providers[0])
        self._inputs = {value.name: NUMPY_TYPES[value.type] for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]

    @property
    def description(self) -> str:
        return f"ONNX Runtime {ort.__version__} ({self.providers[0]})"

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        return self._inputs

    @property
    def max_items(self) -> int | None:
        return None

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        if self._session is None:
            raise UsageError("this session is closed")
        try:
            outputs = self._session.run(self._outputs, dict(feeds))
        except Exception as error:  # several unrelated classes, here too
            raise MetaEmbedError(f"ONNX Runtime failed while running: {_first_line(error)}") from error
        return dict(zip(self._outputs, outputs, strict=True))

    def close(self) -> None:
        self._session = None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
