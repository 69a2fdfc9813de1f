"""The two number formats that weights and activations are rounded to, and how a scale follows from a range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from metaembed.runtime.errors import UsageError

Array = NDArray[Any]


@dataclass(frozen=True)
class Format:
    """Symmetric quantisation: ``value = code * scale``, codes within ``[-largest, largest]``, zero point 0.

    ``per_channel`` says whether a weight has a scale per output channel or one in all; activations always have one.
    ``remainder`` times the range of a value is that of what rounding leaves over, half a step at most: a power of two, so
    that magnifying by it is exact.
    """

    name: str
    largest: float
    code: np.dtype[Any]
    onnx: ir.DataType
    per_channel: bool
    remainder: float

    def scale(self, amax: Array | float, kind: np.dtype[Any]) -> Array:
        """The scale that maps ``amax`` to the largest code, rounded to ``kind``, in which the graph computes.

        TensorRT wants scales in the compute type, and bf16 has 8 significant bits: codes must be made with the rounded
        scale. Where nothing but zeros was seen the scale is 1; none is 0, even where ``kind`` underflows.
        """
        wide = np.asarray(amax, np.float64) / self.largest
        tiny = float(ml_dtypes.finfo(kind).smallest_normal)
        return np.where(wide > 0, np.maximum(wide, tiny), 1.0).astype(kind)

    def quantise(self, values: Array, scale: Array) -> Array:
        """Codes of ``values``: divided by the scale in float32, clipped, rounded to nearest, ties to even."""
        steps = np.asarray(values, np.float32) / np.asarray(scale, np.float32)
        steps = np.clip(steps, -self.largest, self.largest)
        return (np.rint(steps) if self.code == np.int8 else steps).astype(self.code)

    def round_trip(self, values: Array, scale: Array) -> Array:
        """What the graph computes with: quantised and dequantised, float32."""
        return self.quantise(values, scale).astype(np.float32) * np.asarray(scale, np.float32)

    def weight_scale(self, weight: Array, kind: np.dtype[Any]) -> Array:
        """The scale of a weight (out, in): (out,) where per channel, else a scalar ()."""
        return self.scale(np.abs(np.asarray(weight, np.float32)).max(axis=1 if self.per_channel else None), kind)


FORMATS = {
    # -128 stays unused, so that the codes are symmetric as TensorRT requires of weights.
    "int8": Format("int8", 127.0, np.dtype(np.int8), ir.DataType.INT8, per_channel=True, remainder=2**-8),
    # E4M3 without infinities: the largest finite value is 448 (arXiv 2209.05433, table 1). TensorRT takes FP8 weights
    # with one scale per tensor on every version from 10.3 on.
    "fp8": Format(
        "fp8", 448.0, np.dtype(ml_dtypes.float8_e4m3fn), ir.DataType.FLOAT8E4M3FN, per_channel=False, remainder=2**-4
    ),
}


def find_format(name: str) -> Format:
    """The format of that name, or a UsageError that lists them."""
    if name not in FORMATS:
        raise UsageError(f"quantisation {name!r} is not one of {', '.join(FORMATS)}")
    return FORMATS[name]
