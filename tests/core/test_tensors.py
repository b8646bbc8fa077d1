"""Reading payloads in place gives what the safetensors library gives, and refuses what it does."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from steering_service.core.direction import Direction
from steering_service.core.site import Site
from steering_service.core.tensors import is_immutable, load_tensors

shapes = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
float32 = arrays.arrays(np.float32, shapes)
others = arrays.arrays(st.sampled_from([np.float64, np.int32, np.float16, np.uint8]), shapes)
GOOD = safetensors.numpy.save({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 3), "f4")})
ERRORS = (safetensors.SafetensorError, ValueError, KeyError, TypeError)


def outcome(load, data):
    try:
        return {name: (v.dtype, v.shape, v.tobytes()) for name, v in load(data).items()}
    except ERRORS:
        return None


def same(data):
    ours, theirs = outcome(load_tensors, data), outcome(safetensors.numpy.load, data)
    assert ours == theirs
    return ours


@given(st.dictionaries(st.text(max_size=5), float32 | others, max_size=4))
def test_what_was_saved_is_what_the_library_reads(tensors):
    tensors.pop("__metadata__", None)
    assert same(safetensors.numpy.save(tensors)) is not None


@given(st.binary(max_size=200))
def test_noise_is_what_the_library_says(noise):
    same(noise)


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_no_flipped_byte_reads_otherwise(position, flip):
    flipped = bytearray(GOOD)
    flipped[position] ^= flip
    same(bytes(flipped))


@given(st.integers(0, len(GOOD)), st.binary(max_size=9))
def test_cut_or_longer_is_what_the_library_says(length, more):
    same(GOOD[:length] + more)


def with_header(header, payload=bytes(48)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + payload


def record(first, last, shape, dtype="F32", **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last], **more}


@pytest.mark.parametrize(
    "header",
    [
        {"a": record(0, 24, [6]), "b": record(24, 48, [6])},
        {"a": record(24, 48, [6]), "b": record(0, 24, [6])},
        {"a": record(0, 24, [6]), "b": record(20, 44, [6])},
        {"a": record(0, 24, [6]), "b": record(0, 24, [6])},
        {"a": record(0, 20, [5]), "b": record(24, 48, [6])},
        {"a": record(0, 48, [6])},
        {"a": record(0, 48, [12, 1, 1])},
        {"a": record(0, 48, [-12])},
        {"a": record(0, 48, [-3, -4])},
        {"a": record(48, 0, [12])},
        {"a": record(0, 48, [12.0])},
        {"a": record(0, 48, [True, 12])},
        {"a": record(0, 48, "12")},
        {"a": record(0, 48, [2**62, 4])},
        {"a": record(0, 48, [2**70])},
        {"a": record(0, 48, [12], note=1)},
        {"a": record(0, 48, [12]), "empty": record(48, 48, [0])},
        {"a": record(0, 48, [12]), "__metadata__": {"format": "np"}},
        {"a": record(0, 48, [12]), "__metadata__": {"format": 1}},
        {"__metadata__": record(0, 48, [12])},
        {"a": record(0, 48, [6], "F64")},
        {"a": record(0, 24, [3], "F64"), "b": record(24, 48, [6])},
        {"a": record(0, 48, [12], "f32")},
        {"a": record(0, 48, [12], None)},
        {"a": {"dtype": "F32", "shape": [12]}},
        {"a": {"dtype": "F32", "shape": [12], "data_offsets": [0, 24, 48]}},
        {"a": []},
        [],
        b'{"a":{"dtype":"F32","shape":[12],"data_offsets":[0,48]}',
        b'{"a":{"dtype":"F32","shape":[12],"data_offsets":[0,48]}}x',
        b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,48]}}',
        b'{"a":{"dtype":"F32","shape":[1e1],"data_offsets":[0,48]}}',
        b"[" * 10_000,
        b"\xff\xfe",
        b"",
    ],
)
def test_headers_that_lie_are_what_the_library_says(header):
    same(with_header(header))


@given(st.binary(max_size=3))
def test_headers_of_odd_length_are_read_all_the_same(pad):
    text = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + b" " * len(pad)
    same(len(text).to_bytes(8, "little") + text + b"abcd")


def test_a_direction_of_a_payload_is_not_copied_and_cannot_be_written():
    tensor = load_tensors(GOOD)["a"]
    assert is_immutable(tensor)
    direction = Direction(Site("resid_post", 1), tensor, 1.0, 1.0, "difference_of_means")
    assert np.shares_memory(direction.vector_D, tensor)
    assert not direction.vector_D.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        direction.vector_D.flags.writeable = True


def test_what_somebody_may_write_is_copied():
    mine = np.ones(4, np.float32)
    view = mine[:]
    view.flags.writeable = False
    over_bytearray = np.frombuffer(bytearray(16), np.float32)
    for array in (mine, view, over_bytearray + 1, np.frombuffer(bytearray(b"abcd" * 4), "f4")):
        assert not is_immutable(array)
        direction = Direction(Site("resid_post", 1), array, 1.0, 1.0, "difference_of_means")
        assert not np.shares_memory(direction.vector_D, array)


@pytest.mark.parametrize("value", [1e-30, 1e30, -1e-45, 3.4e38])
def test_vectors_whose_square_leaves_float32_are_good(value):
    Direction(Site("resid_post", 1), np.full(3, value, np.float32), 1.0, 1.0, "difference_of_means")
