"""Layout arithmetic: shard ranges partition the rows, whatever the sizes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.errors import Corrupt, InvalidInput, NotFound
from store.layout import StreamLayout, choose_rows_per_shard


@st.composite
def layouts(draw, max_rows=5000, max_width=64):
    per_chunk = draw(st.integers(1, 40))
    layers = draw(st.sets(st.integers(0, 90), min_size=1, max_size=6))
    return StreamLayout(
        stream=draw(st.sampled_from(["resid_post", "z", "mlp_out"])),
        num_rows=draw(st.integers(1, max_rows)),
        layers=tuple(sorted(layers)),
        width=draw(st.integers(1, max_width)),
        dtype=draw(st.sampled_from(["bfloat16", "float32"])),
        rows_per_shard=per_chunk * draw(st.integers(1, 6)),
        rows_per_chunk=per_chunk,
    )


@given(layouts())
def test_shards_partition_the_rows(layout):
    rows = [row for shard in range(layout.num_shards) for row in layout.shard_rows(shard)]
    assert rows == list(range(layout.num_rows))
    for shard in range(layout.num_shards):
        span = layout.shard_rows(shard)
        assert {layout.shard_of_row(row) for row in (span[0], span[-1])} == {shard}
        assert len(span) == layout.rows_per_shard or shard == layout.num_shards - 1
        assert (layout.present_chunks(shard) - 1) * layout.rows_per_chunk < len(span)
        assert len(span) <= layout.present_chunks(shard) * layout.rows_per_chunk
    assert len({layout.shard_key(shard) for shard in range(layout.num_shards)}) == layout.num_shards


@given(layouts())
def test_metadata_round_trip(layout):
    metadata = json.loads(json.dumps(layout.array_metadata()))
    assert StreamLayout.from_metadata(metadata) == layout


def test_edited_metadata_is_corrupt():
    layout = StreamLayout("z", 10, (1, 2), 8, "float32", 32, num_heads=2)
    for change in (
        {"fill_value": 0.0},
        {"shape": [10, 2, 9]},
        {"shape": [10]},
        {"data_type": "float16"},
        {"attributes": {}},
        {"codecs": []},
        {"extra": 1},
    ):
        with pytest.raises(Corrupt) as caught:
            StreamLayout.from_metadata({**layout.array_metadata(), **change})
        assert caught.value.kind == "array_metadata"


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"stream": "Resid"}, "name"),
        ({"stream": "../x"}, "name"),
        ({"num_rows": 0}, "num_rows"),
        ({"layers": ()}, "layers"),
        ({"layers": (2, 1)}, "layers"),
        ({"layers": (1, 1)}, "layers"),
        ({"layers": (-1,)}, "layers"),
        ({"width": 0}, "width"),
        ({"dtype": "float16"}, "dtype"),
        ({"rows_per_shard": 33}, "rows_per_shard"),
        ({"rows_per_chunk": 0}, "rows_per_chunk"),
        ({"num_heads": 3}, "num_heads"),
    ],
)
def test_bad_fields_are_named(change, names):
    good = {
        "stream": "z",
        "num_rows": 10,
        "layers": (1, 2),
        "width": 8,
        "dtype": "float32",
        "rows_per_shard": 32,
    }
    StreamLayout(**good)
    with pytest.raises(InvalidInput, match=names):
        StreamLayout(**{**good, **change})


def test_outside_is_not_found():
    layout = StreamLayout("z", 40, (1, 5), 8, "float32", 32)
    assert layout.layer_position(5) == 1
    assert layout.shard_key(1) == "z/c/1/0/0"
    for call in (
        lambda: layout.shard_rows(2),
        lambda: layout.shard_rows(-1),
        lambda: layout.shard_key(2),
        lambda: layout.layer_position(0),
    ):
        with pytest.raises(NotFound):
            call()
    for row in (-1, 40):
        with pytest.raises(InvalidInput):
            layout.shard_of_row(row)


@given(
    st.integers(1, 100), st.integers(1, 20_000), st.sampled_from([2, 4]), st.integers(1, 1 << 30)
)
def test_chosen_shards_fit_the_target(num_layers, width, itemsize, target):
    rows = choose_rows_per_shard(num_layers, width, itemsize, target)
    assert rows >= 32
    assert rows % 32 == 0
    row_nbytes = num_layers * width * itemsize
    assert rows == 32 or rows * row_nbytes <= target < (rows + 32) * row_nbytes


def test_widest_stream_decides():
    assert choose_rows_per_shard(28, [3584, 128], 2) == choose_rows_per_shard(28, 3584, 2) == 640
    with pytest.raises(InvalidInput):
        choose_rows_per_shard(0, 8, 2)
