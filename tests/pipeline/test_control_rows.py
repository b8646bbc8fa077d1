"""What a controller is trained on is what the cache holds, in the order that it reads."""

from __future__ import annotations

import gc
import tempfile
from typing import Any

import numpy as np
import pytest

from pipeline.control.rows import read_rows
from pipeline.errors import InvalidInput, NotFound
from pipeline.prompts.worklist import read_prompts
from steering_service.core.site import Site
from store.activations import ActivationCache
from store.bfloat16 import from_float32, to_float32
from store.errors import NotFound as StoreNotFound

HEADS, HEAD_DIM = 8, 8
READS = ("z.1.5", "resid_post.2", "z.0.2", "z.2", "resid_post.0")
ROWS = [
    {
        "prompt": f"{n}: which way" + " to the north" * (n % 5),
        "label": n % 3 == 0,
        "split": ("train", "validation", "test")[n % 4 % 3],
    }
    for n in range(50)
]
STREAMS = 'streams = ["resid_post", "z"]\n'


def fill(cache: ActivationCache, seal: bool = True) -> dict[str, Any]:
    """Random values in every shard; returns them as float32 [N, L, W] by stream."""
    random = np.random.default_rng(0)
    values = {}
    for stream, layout in cache.streams.items():
        array = (random.standard_normal(layout.shape) * 3 + 20).astype(np.float32)
        values[stream] = from_float32(array) if layout.dtype == "bfloat16" else array
    any_layout = next(iter(cache.streams.values()))
    for shard in range(cache.num_shards if seal else cache.num_shards - 1):
        rows = any_layout.shard_rows(shard)
        cache.write_shard(shard, {s: v[rows.start : rows.stop] for s, v in values.items()})
    if seal:
        cache.seal()
    return {stream: to_float32(array) for stream, array in values.items()}


def sites(*names: str) -> list[Site]:
    return [Site.parse(name) for name in names]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_the_caches_values_in_the_order_of_reads(make_plan: Any, dtype: str) -> None:
    cache = make_plan(rows=ROWS, capture=f'{STREAMS}dtype = "{dtype}"').cache
    values = fill(cache)
    assert cache.num_shards > 1
    rows = read_rows(cache, sites(*READS))
    parts = [
        values["z"][:, 1, 5 * HEAD_DIM : 6 * HEAD_DIM],
        values["resid_post"][:, 2],
        values["z"][:, 0, 2 * HEAD_DIM : 3 * HEAD_DIM],
        values["z"][:, 2],
        values["resid_post"][:, 0],
    ]
    assert rows.reads_NR.dtype == np.float32
    np.testing.assert_array_equal(rows.reads_NR, np.concatenate(parts, axis=1))


def test_labels_splits_and_prompts_are_those_of_the_rows(make_plan: Any) -> None:
    cache = make_plan(rows=ROWS, capture=STREAMS).cache
    fill(cache)
    rows = read_rows(cache, sites("resid_post.1"))
    index = cache.index().to_pydict()
    assert rows.label_N.tolist() == index["label"]
    assert rows.split_N.tolist() == index["split"]
    for ids, position, token in zip(
        rows.token_ids, index["position"], index["token_id"], strict=True
    ):
        assert (len(ids) - 1, ids[-1]) == (position, token)
    assert len({tuple(ids) for ids in rows.token_ids}) == len(read_prompts(cache)) == len(ROWS)
    for split in ("train", "validation", "test"):
        for label in (True, False):
            want = sum(row["split"] == split and row["label"] == label for row in ROWS)
            chosen = rows.chosen(split, label)
            assert len(chosen) == want > 0
            assert set(rows.label_N[chosen]) == {label}
            assert set(rows.split_N[chosen]) == {split}


def test_the_copy_leaves_no_file_and_lives_as_long_as_the_rows(
    make_plan: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    cache = make_plan(rows=ROWS, capture=STREAMS).cache
    values = fill(cache)
    rows = read_rows(cache, sites("resid_post.1"))
    gc.collect()
    assert isinstance(rows.reads_NR, np.memmap)
    assert list(folder.iterdir()) == []
    np.testing.assert_array_equal(rows.reads_NR[[3, 40]], values["resid_post"][[3, 40], 1])


@pytest.mark.parametrize(
    ("capture", "reads", "kind", "message"),
    [
        (STREAMS + 'tokens = "-2"', "resid_post.1", "controller_tokens", 'set tokens = "last"'),
        (STREAMS + 'tokens = "all"', "resid_post.1", "controller_tokens", "'all'"),
        (STREAMS + "layers = [0, 1]", "resid_post.2", "site", r"layers \[0, 1\] of resid_post"),
        (STREAMS, "resid_post.3", "site", "the controller reads resid_post.3"),
        (STREAMS, "z.1.8", "site", "heads 0 to 7 of z"),
        (STREAMS, "resid_pre.1", "no_stream", "resid_pre"),
    ],
)
def test_what_was_not_captured_is_said(
    make_plan: Any, capture: str, reads: str, kind: str, message: str
) -> None:
    cache = make_plan(rows=ROWS, capture=capture).cache
    fill(cache)
    with pytest.raises((InvalidInput, NotFound, StoreNotFound), match=message) as raised:
        read_rows(cache, sites("resid_post.0", reads))
    assert raised.value.kind == kind


def test_prompts_with_completions_are_refused(make_plan: Any) -> None:
    cache = make_plan(capture=STREAMS).cache
    fill(cache)
    with pytest.raises(InvalidInput, match="use prompts with labels") as raised:
        read_rows(cache, sites("resid_post.0"))
    assert raised.value.kind == "controller_prompts"


def test_an_unfinished_cache_is_refused(make_plan: Any) -> None:
    cache = make_plan(rows=ROWS, capture=STREAMS).cache
    fill(cache, seal=False)
    with pytest.raises(NotFound, match=r"lacks 1 of .* `steerage extract`") as raised:
        read_rows(cache, sites("resid_post.0"))
    assert raised.value.kind == "cache_incomplete"
