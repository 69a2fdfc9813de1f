"""NaN and infinity found by their bits. Expected: numpy's own isfinite on the values widened to float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from metaembed.runtime.finite import BLOCK_BYTES, count_not_finite

TYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_pattern_of_sixteen_bits(dtype: type):
    values = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaN
        finite = np.isfinite(values.astype(np.float64))
    assert 0 < count_not_finite(values) == np.count_nonzero(~finite)
    assert count_not_finite(values[finite]) == 0
    for value in values[~finite]:
        assert count_not_finite(value[None]) == 1


def test_every_exponent_of_float32_with_either_sign_and_any_mantissa():
    rng = np.random.default_rng(3)
    exponents = np.arange(1 << 9, dtype=np.uint32)[:, None] << 23
    mantissas = np.concatenate([[0, 1, 1 << 22, (1 << 23) - 1], rng.integers(1 << 23, size=100)]).astype(np.uint32)
    values = (exponents | mantissas).view(np.float32)
    assert count_not_finite(values) == np.count_nonzero(~np.isfinite(values)) == 2 * mantissas.size


@pytest.mark.parametrize("dtype", TYPES)
def test_wherever_it_lies_it_is_counted(dtype: type):
    """Around the ends of blocks, and in the last, which is not full."""
    block = BLOCK_BYTES // np.dtype(dtype).itemsize
    values = np.zeros((3, block // 2 + 7), dtype)
    for place in (0, block - 1, block, values.size - 1):
        values.reshape(-1)[place] = -np.inf
    assert count_not_finite(values) == 4
    assert count_not_finite(values[:0]) == 0
