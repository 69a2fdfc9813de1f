"""NaN and infinity among stored weights, told by their exponent bits: nothing is widened, and no copy of a tensor made."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

# Of each type, the integers of its size, signed and not, and its exponent bits: all set is NaN or infinity (IEEE 754).
EXPONENTS: dict[np.dtype[Any], tuple[type[np.signedinteger[Any]], type[np.unsignedinteger[Any]], int]] = {
    np.dtype(np.float32): (np.int32, np.uint32, 0x7F80_0000),
    np.dtype(np.float16): (np.int16, np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.int16, np.uint16, 0x7F80),
}
BLOCK_BYTES = 1 << 19  # stays in a core's cache between the passes


def count_not_finite(values: NDArray[Any]) -> int:
    """How many of these float32, float16 or bfloat16 values, of any shape, are NaN or infinite."""
    signed, unsigned, exponent = EXPONENTS[values.dtype]
    sign = np.iinfo(signed).max + 1
    flat, step = values.reshape(-1), BLOCK_BYTES // values.itemsize
    found = 0
    for start in range(0, flat.size, step):
        block = flat[start : start + step]
        # As integers those above zero sort last when signed, those below when unsigned: two passes that write nothing.
        if block.view(signed).max() >= exponent or block.view(unsigned).max() >= sign + exponent:
            found += int(np.count_nonzero((block.view(unsigned) & unsigned(exponent)) == exponent))
    return found
