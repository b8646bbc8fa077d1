"""Comparing directions: cosines, what other methods have left, and how few entries would do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.reduction.comparing import (
    ANTIDOTE_FRACTION,
    Sparsity,
    cosines,
    sparsity,
    stored_beside,
)
from pipeline.reduction.methods import DEFAULT_PARAMETERS
from pipeline.reduction.results import Reduction
from pipeline.reduction.scores import auroc
from steering_service.core.direction import Direction
from steering_service.core.site import Site
from store.activations import ActivationCache
from store.layout import StreamLayout
from store.location import Location

HEADS, HEAD_DIM, ROWS = 2, 40, 200
SITE = Site("z", 1, 1)


def write_cache(
    root: Location, *, rows_per_shard: int = 32, quarantined: tuple[int, ...] = (), name: str = ""
) -> tuple[ActivationCache, Any]:
    """Rows of one stream; samples in the opposite order, and the last two of them in one row."""
    random = np.random.default_rng(3)
    values = random.standard_normal((ROWS, 2, HEADS * HEAD_DIM)).astype(np.float32)
    values[list(quarantined)] = np.nan
    layout = StreamLayout("z", ROWS, (0, 1), HEADS * HEAD_DIM, "float32", rows_per_shard, 32, HEADS)
    row_N = np.append(np.arange(ROWS)[::-1], 7)
    label_N = row_N % 3 == 0
    split_N = np.where(row_N % 5 < 2, "test", "train")
    index = pa.table({"row": row_N, "label": label_N, "split": split_N})
    capture = {"layers": [0, 1], "name": name, "shard": rows_per_shard, "bad": list(quarantined)}
    cache = ActivationCache.create(root, capture, [layout], index)
    for shard in range(cache.num_shards):
        rows = layout.shard_rows(shard)
        reasons = {row: "not finite" for row in quarantined if row in rows}
        cache.write_shard(shard, {"z": values[rows.start : rows.stop]}, quarantined=reasons)
    cache.seal()
    return cache, (values, row_N, label_N, split_N)


def direction(seed: int = 0) -> Direction:
    vector_D = np.random.default_rng(seed).standard_normal(HEAD_DIM).astype(np.float32)
    return Direction(SITE, vector_D, 1.0, 10.0, "difference_of_means")


@pytest.fixture
def root(tmp_path: Path) -> Location:
    return Location.open(str(tmp_path))


@pytest.mark.parametrize("rows_per_shard", [32, 96, 256])
def test_the_curve_is_that_of_masked_directions(root: Location, rows_per_shard: int) -> None:
    cache, (values, row_N, label_N, split_N) = write_cache(root, rows_per_shard=rows_per_shard)
    whole = direction()
    found = sparsity(whole, [cache], "test")
    held_N = split_N == "test"
    assert found.num_samples == held_N.sum()
    h_ND = values[row_N[held_N], SITE.layer, HEAD_DIM : 2 * HEAD_DIM]
    by_size = np.argsort(-np.abs(whole.vector_D))
    curve = found.largest
    # int(fraction * 40): none twice, and not where nothing would be kept.
    assert curve.num_kept_K.tolist() == [1, 2, 4, 6, 8, 12, 20, 28, 40]
    for num_kept, norm, got in zip(
        curve.num_kept_K, curve.norm_share_K, curve.auroc_K, strict=True
    ):
        masked_D = np.zeros(HEAD_DIM)
        masked_D[by_size[:num_kept]] = whole.vector_D[by_size[:num_kept]]
        assert norm == pytest.approx(np.linalg.norm(masked_D) / np.linalg.norm(whole.vector_D))
        assert got == pytest.approx(auroc((h_ND @ masked_D)[:, None], label_N[held_N])[0])
    assert found.at(ANTIDOTE_FRACTION) == 1
    assert found.at(0.001) is None
    np.testing.assert_array_equal(found.random.num_kept_K, curve.num_kept_K)
    assert (found.random.norm_share_K[:-1] < curve.norm_share_K[:-1]).all()
    assert found.random.auroc_K[-1] == curve.auroc_K[-1]


def test_rows_in_quarantine_do_not_count(root: Location) -> None:
    bad = (0, 41)
    cache, (values, row_N, label_N, split_N) = write_cache(root, quarantined=bad)
    found = sparsity(direction(), [cache], "test")
    held_N = (split_N == "test") & ~np.isin(row_N, bad)
    assert found.num_samples == held_N.sum()
    projected = values[row_N[held_N], 1, HEAD_DIM:] @ direction().vector_D
    assert found.largest.auroc_K[-1] == pytest.approx(auroc(projected[:, None], label_N[held_N])[0])


def test_of_many_rows_some_shards_are_read(root: Location) -> None:
    cache, (_, row_N, _, split_N) = write_cache(root)
    all_rows = sparsity(direction(), [cache], "test").num_samples
    half = sparsity(direction(), [cache], "test", most_read=all_rows // 2 + 1)
    # Every second of the seven shards.
    assert half.num_samples == ((split_N == "test") & (row_N // 32 % 2 == 0)).sum()


def test_all_caches_of_a_reduction_are_read(root: Location) -> None:
    caches = [write_cache(root, name=name)[0] for name in "ab"]
    one, both = (sparsity(direction(), chosen, "test") for chosen in (caches[:1], caches))
    assert both.num_samples == 2 * one.num_samples
    np.testing.assert_allclose(both.largest.auroc_K, one.largest.auroc_K)


def test_without_rows_the_norms_are_left(root: Location) -> None:
    cache, _ = write_cache(root)
    for found in (sparsity(direction(), [], "test"), sparsity(direction(), [cache], "validation")):
        assert found.num_samples == 0
        assert np.isnan(found.largest.auroc_K).all()
        assert found.largest.norm_share_K[-1] == pytest.approx(1)


def test_five_percent_of_few_entries_is_no_point() -> None:
    few = dataclasses.replace(direction(), vector_D=np.ones(10, np.float32))
    found: Sparsity = sparsity(few, [], "test")
    assert found.at(ANTIDOTE_FRACTION) is None
    assert found.largest.num_kept_K[0] == 1


@given(seed=st.integers(0, 2**32 - 1), num=st.integers(1, 6), width=st.integers(1, 9))
def test_cosines_know_angles_and_nothing_else(seed: int, num: int, width: int) -> None:
    random = np.random.default_rng(seed)
    vectors_KD = random.standard_normal((num, width))
    got_KK = cosines(vectors_KD)
    np.testing.assert_allclose(np.diagonal(got_KK), 1)
    np.testing.assert_allclose(got_KK, got_KK.T)
    assert (np.abs(got_KK) <= 1).all()
    scale_K1 = random.choice([-2.0, 0.001, 30.0], (num, 1))
    np.testing.assert_allclose(
        cosines(vectors_KD * scale_K1), got_KK * np.sign(scale_K1 * scale_K1.T), atol=1e-12
    )
    a, b = vectors_KD[0], vectors_KD[-1]
    want = a @ b / np.sqrt((a @ a) * (b @ b))
    assert got_KK[0, -1] == pytest.approx(want)


def test_a_zero_direction_has_no_cosine() -> None:
    got_33 = cosines(np.array([[1.0, 0.0], [0.0, 0.0], [3.0, 4.0]]))
    assert got_33[0, 2] == pytest.approx(0.6)
    assert np.isnan(got_33[1]).all()
    assert np.isnan(got_33[:, 1]).all()


def store(
    root: Location,
    cache: ActivationCache,
    method: str,
    parameters: dict[str, Any],
    extends: tuple[str, ...] = (),
) -> Reduction:
    vectors = {"z": np.ones((2, HEADS * HEAD_DIM), np.float32)}
    return Reduction.write(
        root,
        cache=cache,
        method=method,
        parameters=parameters,
        directions_LW=vectors,
        shuffled_LW=vectors,
        scores=pa.table({"site": ["z.0.0"]}),
        counts={},
        extends=extends,
    )


def test_other_methods_of_the_same_rows_are_found(root: Location) -> None:
    cache, _ = write_cache(root)
    other_cache, _ = write_cache(root, name="other")
    wanted = {method: dict(parameters) for method, parameters in DEFAULT_PARAMETERS.items()}
    shown = store(root, cache, "difference_of_means", {})
    asked_for = store(root, cache, "pca", wanted["pca"])
    store(root, cache, "pca", {"pair_order_seed": 7})
    differently = store(root, cache, "lda", {"shrinkage": 0.7})
    store(root, other_cache, "probe", wanted["probe"])
    store(root, cache, "paired_difference", {}, (other_cache.digest,))
    root.child("reductions/0killed").replace("scores.parquet", b"half of it")
    of_before = store(root, cache, "probe", {"l2": 9.0})
    record = json.loads(of_before.location.get("reduction.json")) | {"schema_version": 1}
    del record["capture_digest"]
    of_before.location.replace("reduction.json", json.dumps(record).encode())
    found = stored_beside(root, shown, wanted)
    assert [other.digest for other in found] == [asked_for.digest, differently.digest]
    extended = store(root, cache, "difference_of_means", {}, (other_cache.digest,))
    assert [other.method for other in stored_beside(root, extended, wanted)] == [
        "paired_difference"
    ]
