"""bfloat16 conversion against ml_dtypes, over every bit pattern and random floats."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from store.bfloat16 import from_float32, to_float32
from store.errors import InvalidInput


def test_every_bit_pattern_survives():
    bits = np.arange(65536, dtype=np.uint16)
    wide = to_float32(bits)
    assert np.array_equal(
        wide.view(np.uint32), bits.view(ml_dtypes.bfloat16).astype(np.float32).view(np.uint32)
    )
    back = from_float32(wide)
    is_nan = np.isnan(wide)
    assert np.array_equal(back[~is_nan], bits[~is_nan])
    assert np.isnan(to_float32(back[is_nan])).all()


@given(hnp.arrays(np.uint32, hnp.array_shapes(min_side=0), elements=st.integers(0, 2**32 - 1)))
def test_rounds_like_ml_dtypes(raw):
    values = raw.view(np.float32)
    ours = from_float32(values)
    assert ours.dtype == np.uint16
    assert ours.shape == values.shape
    with np.errstate(invalid="ignore"):
        theirs = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    is_nan = np.isnan(values)
    assert np.array_equal(ours[~is_nan], theirs[~is_nan])
    assert np.isnan(to_float32(ours[is_nan])).all()


def test_known_values():
    values = np.array([1.0, 70000.0, np.inf, -np.inf, 3.39e38, 1.00390625, 1.01171875], np.float32)
    assert to_float32(from_float32(values)).tolist() == [
        1.0, 70144.0, np.inf, -np.inf, float(np.float32(3.3895314e38)), 1.0, 1.015625,
    ]  # fmt: skip


def test_nan_with_only_low_payload_bits_stays_nan():
    values = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(to_float32(from_float32(values))).all()


def test_float32_passes_through_unchanged():
    values = np.ones(3, np.float32)
    assert to_float32(values) is values


def test_strided_input():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2]
    assert to_float32(from_float32(values)).tolist() == values.tolist()


def test_other_dtypes_are_refused():
    with pytest.raises(InvalidInput):
        from_float32(np.zeros(2))
    with pytest.raises(InvalidInput):
        to_float32(np.zeros(2, np.float16))
