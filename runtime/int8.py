"""Vectors as int8 codes with one scale each: half the bytes of bf16, for a first pass that is rescored exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import as_array
from .errors import UsageError

LARGEST_CODE = 127
SMALLEST = np.nextafter(np.float32(0), np.float32(1))


@dataclass(frozen=True)
class Int8Vectors:
    """Embeddings (n, r, d) as ``codes * scales[..., None]``.

    Attributes:
        codes: (n, r, d) int8.
        scales: (n, r) float32, largest magnitude of each vector / 127. Of magnitudes below 2**-119 that is a denormal number, which
            may be rounded up.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]

    def __post_init__(self) -> None:
        for part in (self.codes, self.scales):
            if not isinstance(part, np.ndarray) or isinstance(part, np.ma.MaskedArray):
                raise UsageError(
                    f"int8 vectors need codes and scales as plain numpy arrays, not a {type(part).__name__}"
                )
        if self.codes.dtype != np.int8 or self.scales.dtype != np.float32:
            raise UsageError(
                f"int8 vectors need int8 codes and float32 scales, not {self.codes.dtype}, {self.scales.dtype}"
            )
        if self.codes.ndim != 3 or self.scales.shape != self.codes.shape[:2]:
            raise UsageError(f"codes {self.codes.shape} and scales {self.scales.shape} are not (n, r, d) and (n, r)")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def prefix(self, vectors: int) -> Int8Vectors:
        """The first `vectors` vectors of every item, without a copy."""
        return Int8Vectors(self.codes[:, :vectors], self.scales[:, :vectors])


def quantize_int8(embeddings: NDArray[Any]) -> Int8Vectors:
    """Round (n, r, d) floats to Int8Vectors, symmetrically, each vector by its own largest magnitude."""
    values = as_array(embeddings, "embeddings").astype(np.float32, copy=False)
    largest = np.abs(values).max(axis=-1, initial=0.0)
    if not np.isfinite(largest).all():
        raise UsageError("embeddings hold a NaN or infinite value; int8 codes cannot express it")
    scales = np.where(largest > 0, np.maximum(largest / LARGEST_CODE, SMALLEST), np.float32(1))  # (n, r)
    # Denormal numbers are whole steps: a scale of 2.36 of them, rounded down to 2, made codes up to 150.
    beyond = np.rint(largest / scales) > LARGEST_CODE
    scales[beyond] = np.nextafter(scales[beyond], np.float32(1))
    return Int8Vectors(np.rint(values / scales[..., None]).astype(np.int8), scales)


def dequantize_int8(vectors: Int8Vectors) -> NDArray[np.float32]:
    """The float32 embeddings (n, r, d) that the codes stand for."""
    return vectors.codes.astype(np.float32) * vectors.scales[..., None]
