"""Arrays as callers give them: refused where numpy's conversion would drop or make up something, or raise an error of its own."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .errors import UsageError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)  # to numpy a "void" type, as structures are


def as_array(values: Any, what: str) -> NDArray[Any]:
    """`values` as an array of real numbers, not copied where they are one.

    Raises:
        UsageError: they are masked, complex, structures, objects (None is one), texts, truth values, or rows of unequal lengths.
    """
    if isinstance(values, np.ma.MaskedArray):
        raise UsageError(f"{what} are a masked array, and masks are not heeded; fill it or leave out what it masks")
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what} cannot be read as an array of numbers ({error})") from None
    if array.dtype.kind not in "fiu" and array.dtype != BFLOAT16:
        raise UsageError(f"{what} are {array.dtype}; an array of real numbers is needed")
    return array
