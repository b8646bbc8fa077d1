"""Shard bytes: round trip, determinism, and every damaged byte noticed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.errors import Corrupt, InvalidInput
from store.layout import StreamLayout
from store.shard import (
    build_shard,
    check_layer,
    decode_layer,
    decode_shard,
    layer_parts,
    layer_range,
    read_index,
)


@st.composite
def shards(draw):
    """A layout of one or more shards, the number of one, and its values with any bits."""
    per_chunk = draw(st.integers(1, 5))
    layout = StreamLayout(
        stream="resid_post",
        num_rows=draw(st.integers(1, 40)),
        layers=tuple(range(draw(st.integers(1, 3)))),
        width=draw(st.integers(1, 7)),
        dtype=draw(st.sampled_from(["bfloat16", "float32"])),
        rows_per_shard=per_chunk * draw(st.integers(1, 4)),
        rows_per_chunk=per_chunk,
    )
    shard = draw(st.integers(0, layout.num_shards - 1))
    shape = (len(layout.shard_rows(shard)), *layout.shape[1:])
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    raw = rng.integers(0, 256, (*shape, layout.itemsize), dtype=np.uint8)
    dtype = np.uint16 if layout.dtype == "bfloat16" else np.float32
    return layout, shard, raw.view(dtype)[..., 0]


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@given(shards())
def test_round_trip(example):
    layout, shard, values = example
    data = build_shard(values, layout)
    assert len(data) == layout.shard_nbytes(shard)
    assert same_bits(decode_shard(data, layout, shard, where="x"), values)
    index = read_index(bytes(data[-layout.index_nbytes :]), layout, shard, where="x")
    for position, layer in enumerate(layout.layers):
        start, length = layer_range(index, layout, position)
        stored = data[start : start + length]
        found = decode_layer(stored, layout, shard, where="x", layer=layer)
        assert same_bits(found, np.ascontiguousarray(values[:, position]))


@given(shards(), st.data())
def test_a_layer_read_in_parts(example, data):
    layout, shard, values = example
    stored = bytes(build_shard(values, layout))
    index = read_index(stored[-layout.index_nbytes :], layout, shard, where="x")
    position = data.draw(st.integers(0, len(layout.layers) - 1))
    start, length = layer_range(index, layout, position)
    present = layout.present_chunks(shard)
    found_RW = np.empty((present * layout.rows_per_chunk, layout.width), values.dtype)
    checksums_P4 = np.empty((present, 4), np.uint8)
    parts = layer_parts(found_RW, checksums_P4)

    def read(layer_bytes):
        for part in parts:
            part[:] = layer_bytes[: len(part)]
            layer_bytes = layer_bytes[len(part) :]
        assert not layer_bytes
        check_layer(found_RW, checksums_P4, where="x", layer=7)

    whole = stored[start : start + length]
    read(whole)
    assert same_bits(found_RW[: len(values)], np.ascontiguousarray(values[:, position]))
    at = data.draw(st.integers(0, length - 1))
    changed = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    chunk = at // layout.stored_chunk_nbytes
    with pytest.raises(Corrupt, match=f"shard x: crc32c of chunk {chunk} of layer 7 is") as caught:
        read(changed)
    assert caught.value.kind == "shard_checksum"


@given(shards())
def test_same_values_give_same_bytes_from_any_memory(example):
    layout, shard, values = example
    data = bytes(build_shard(values, layout))
    layer_major = np.ascontiguousarray(values.transpose(1, 0, 2)).transpose(1, 0, 2)
    scratch = np.full(layout.shard_nbytes(shard) + 9, 0xAA, np.uint8)
    assert bytes(build_shard(layer_major, layout, buffer=scratch)) == data


@given(shards(), st.data())
def test_every_changed_byte_is_noticed(example, data):
    layout, shard, values = example
    stored = bytearray(build_shard(values, layout))
    stored[data.draw(st.integers(0, len(stored) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(Corrupt):
        decode_shard(stored, layout, shard, where="x")


@given(shards(), st.data())
def test_every_cut_is_noticed(example, data):
    layout, shard, values = example
    stored = bytes(build_shard(values, layout))
    cut = stored[: data.draw(st.integers(0, len(stored) - 1))]
    with pytest.raises(Corrupt):
        decode_shard(cut, layout, shard, where="x")
    with pytest.raises(Corrupt):
        read_index(cut[-layout.index_nbytes :], layout, shard, where="x")


def test_padding_is_nan_and_absent_chunks_are_marked():
    layout = StreamLayout("z", 33, (0, 1), 4, "bfloat16", 128)
    values = np.zeros((33, 2, 4), np.uint16)
    data = build_shard(values, layout)
    index = read_index(bytes(data[-layout.index_nbytes :]), layout, 0, where="x")
    assert (index[2:] == 2**64 - 1).all()
    assert index[:2, :, 1].tolist() == [[260, 260], [260, 260]]
    assert index[:2, :, 0].tolist() == [[0, 520], [260, 780]]  # layer by layer
    second = np.frombuffer(data[260 : 260 + 256], np.uint16).reshape(32, 4)
    assert (second[0] == 0).all()
    assert (second[1:] == 0x7FC0).all()


def test_damage_is_located():
    layout = StreamLayout("z", 64, (3, 8), 4, "float32", 64)
    data = bytearray(build_shard(np.ones((64, 2, 4), np.float32), layout))
    data[3 * layout.stored_chunk_nbytes + 5] ^= 1
    with pytest.raises(Corrupt, match="shard z/c/0/0/0: crc32c of chunk 1 of layer 8 is") as caught:
        decode_shard(data, layout, 0, where="z/c/0/0/0")
    assert caught.value.kind == "shard_checksum"


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((32, 2, 4), np.float32),
        np.zeros((32, 2, 4), np.int16),
        np.zeros((32, 2, 5), np.uint16),
        np.zeros((32, 3, 4), np.uint16),
        np.zeros((33, 2, 4), np.uint16),
        np.zeros((0, 2, 4), np.uint16),
        np.zeros((32, 8), np.uint16),
    ],
)
def test_wrong_values_are_refused(values):
    layout = StreamLayout("z", 64, (0, 1), 4, "bfloat16", 32)
    with pytest.raises(InvalidInput, match="expected") as caught:
        build_shard(values, layout)
    assert caught.value.kind == "values"
