"""bfloat16 as bits: numpy has no such dtype, so it is uint16 and widens to float32 by a shift."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from store.errors import InvalidInput

QUIET_NAN_BITS = 0x7FC0
"""The bfloat16 NaN that Zarr's fill value "NaN" stands for."""


def to_float32(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Widen stored values to float32, exactly; float32 is returned as it is, without a copy.

    Args:
        values: uint16 bfloat16 bits or float32, any shape.

    Raises:
        InvalidInput: another dtype.
    """
    if values.dtype == np.float32:
        return values
    if values.dtype != np.uint16:
        message = f"expected uint16 bfloat16 bits or float32, got dtype {values.dtype}"
        raise InvalidInput(message, kind="values")
    widened = values.astype(np.uint32)
    widened <<= 16
    return widened.view(np.float32)


def from_float32(values: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """Round float32 to bfloat16 bits, to nearest, ties to even, as torch and ml_dtypes do.

    Too large values become infinity, and every NaN stays a NaN (quiet, with its sign).

    Args:
        values: float32, any shape.

    Raises:
        InvalidInput: another dtype (float64 would be rounded twice).
    """
    if values.dtype != np.float32:
        message = f"expected float32, got dtype {values.dtype}; convert it first"
        raise InvalidInput(message, kind="values")
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    high = (bits >> 16).astype(np.uint16)
    # Adding 0x7FFF plus the lowest kept bit carries into the kept half exactly when rounding up is
    # due.
    rounded = ((bits + (np.uint32(0x7FFF) + (high & 1))) >> 16).astype(np.uint16)
    # The carry would turn some NaNs into infinity or zero, so they are truncated instead.
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, high | np.uint16(0x0040), rounded)
