"""Reduction: moments merge like sets of rows, scores are what their definitions say, and what was
planted is found.
"""

from __future__ import annotations

import dataclasses
import math
from functools import reduce as fold
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InvalidInput, NotFound
from pipeline.reduction.directions import difference_of_means
from pipeline.reduction.moments import Moments
from pipeline.reduction.reduce import reduce
from pipeline.reduction.results import Reduction, reduction_digest
from pipeline.reduction.scores import accuracy, auroc, cohens_d
from steering_service.core.site import Site
from store.activations import ActivationCache
from store.layout import StreamLayout
from store.location import Location

SEEDS = st.integers(0, 2**32 - 1)


def assert_same(got: Moments, want: Moments) -> None:
    assert got.count == want.count
    np.testing.assert_allclose(got.mean, want.mean, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(got.m2, want.m2, rtol=1e-9, atol=1e-9)


def rows_of(seed: int, num_rows: int, offset: float, spread: float) -> Any:
    values = np.random.default_rng(seed).standard_normal((num_rows, 2, 3)) * spread + offset
    return values.astype(np.float32)


@given(
    seed=SEEDS,
    num_rows=st.integers(0, 60),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    offset=st.sampled_from([0.0, 300.0, -3e4]),
    spread=st.sampled_from([1.0, 1e-3, 100.0]),
)
def test_moments_of_any_split_are_those_of_the_whole(
    seed: int, num_rows: int, cuts: list[int], offset: float, spread: float
) -> None:
    rows = rows_of(seed, num_rows, offset, spread)
    parts = [Moments.of(part) for part in np.split(rows, sorted(min(c, num_rows) for c in cuts))]
    merged = fold(Moments.merge, parts)
    whole = rows.astype(np.float64)
    assert merged.count == num_rows
    if num_rows:
        np.testing.assert_allclose(merged.mean, whole.mean(axis=0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(merged.variance, whole.var(axis=0), rtol=1e-7, atol=1e-15)
    shuffled = fold(
        Moments.merge, [parts[i] for i in np.random.default_rng(seed).permutation(len(parts))]
    )
    assert_same(shuffled, merged)


@given(seed=SEEDS, sizes=st.tuples(*[st.integers(0, 20)] * 3))
def test_merging_is_associative_and_commutative(seed: int, sizes: tuple[int, int, int]) -> None:
    a, b, c = (Moments.of(rows_of(seed + i, n, 300.0, 1.0)) for i, n in enumerate(sizes))
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert_same(a.merge(b), b.merge(a))
    assert_same(a.merge(Moments.empty((2, 3))), a)


def test_a_large_mean_does_not_spoil_the_variance() -> None:
    rows = (np.random.default_rng(0).standard_normal(200_000) + 300).astype(np.float32)[:, None]
    moments = fold(Moments.merge, [Moments.of(part) for part in np.array_split(rows, 31)])
    np.testing.assert_allclose(moments.variance, rows.astype(np.float64).var(axis=0), rtol=1e-10)


@given(seed=SEEDS, num_rows=st.integers(1, 40), ties=st.booleans())
def test_auroc_is_the_share_of_pairs_in_order(seed: int, num_rows: int, ties: bool) -> None:
    random = np.random.default_rng(seed)
    scores_NS = (
        random.integers(0, 4, (num_rows, 3)) if ties else random.standard_normal((num_rows, 3))
    )
    label_N = random.random(num_rows) < 0.5
    positive, negative = scores_NS[label_N], scores_NS[~label_N]
    got_S = auroc(scores_NS, label_N)
    if not len(positive) or not len(negative):
        assert np.isnan(got_S).all()
        return
    for site in range(3):
        pairs = [
            1.0 if p > n else 0.5 if p == n else 0.0
            for p in positive[:, site]
            for n in negative[:, site]
        ]
        assert got_S[site] == pytest.approx(np.mean(pairs))
    np.testing.assert_allclose(auroc(-scores_NS, label_N), 1 - got_S)


def test_accuracy_and_cohens_d_by_hand() -> None:
    scores_N1 = np.array([[1.0], [3.0], [2.0], [-1.0], [0.0], [4.0]], np.float32)
    label_N = np.array([True, True, True, False, False, False])
    assert accuracy(scores_N1, label_N, np.array([1.5])) == pytest.approx([4 / 6])
    # Means 2 and 1; sample variances 1 and 7, pooled 4.
    assert cohens_d(scores_N1, label_N) == pytest.approx([0.5])
    assert np.isnan(cohens_d(scores_N1[:4], label_N[:4]))
    assert np.isnan(cohens_d(np.ones((6, 1), np.float32), label_N))
    assert np.isnan(accuracy(scores_N1[:0], label_N[:0], np.array([0.0])))


def test_cohens_d_with_a_large_mean() -> None:
    random = np.random.default_rng(0)
    scores = (random.standard_normal((100_000, 1)) + 3000).astype(np.float32)
    label_N = np.arange(100_000) % 2 == 0
    scores[label_N] += 1
    exact = scores.astype(np.float64)
    a, b = exact[label_N], exact[~label_N]
    want = (a.mean() - b.mean()) / np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    assert cohens_d(scores, label_N) == pytest.approx([want], rel=1e-6)


LAYERS, HEADS, HEAD_DIM, ROWS = 3, 4, 8, 480
PLANTED = Site("z", 1, 2)


def write_cache(
    root: Location,
    *,
    seed: int = 0,
    split: str = "mixed",
    seal: bool = True,
    skip: int | None = None,
) -> tuple[ActivationCache, dict[str, Any]]:
    """A cache of noise around 5, in which one head tells the classes apart along one vector.

    In the training rows only, another head tells them apart as well: what is fitted there must not
    be believed.
    """
    random = np.random.default_rng(seed)
    label_N = random.random(ROWS) < 0.5
    names = ["train", "validation", "test"]
    split_N = (
        random.choice(names, ROWS, p=[0.5, 0.25, 0.25])
        if split == "mixed"
        else np.full(ROWS, split)
    )
    z = 5 + random.standard_normal((ROWS, LAYERS, HEADS, HEAD_DIM))
    planted = random.standard_normal(HEAD_DIM)
    planted *= 8 / np.linalg.norm(planted)
    z[label_N, PLANTED.layer, PLANTED.head] += planted
    z[label_N & (split_N == "train"), 2, 0] += planted
    resid = 100 + random.standard_normal((ROWS, LAYERS, 16))
    values = {
        "z": z.reshape(ROWS, LAYERS, -1).astype(np.float32),
        "resid_post": resid.astype(np.float32),
    }
    layouts = [
        StreamLayout(
            stream=name,
            num_rows=ROWS,
            layers=tuple(range(LAYERS)),
            width=array.shape[2],
            dtype="float32",
            rows_per_shard=32,
            rows_per_chunk=32,
            num_heads=HEADS if name == "z" else None,
        )
        for name, array in values.items()
    ]
    capture = {"layers": list(range(LAYERS)), "seed": seed, "split": split, "skip": skip}
    cache = ActivationCache.create(
        root, capture, layouts, pa.table({"label": label_N, "split": split_N})
    )
    for shard in range(cache.num_shards):
        if shard != skip:
            rows = layouts[0].shard_rows(shard)
            cache.write_shard(
                shard, {name: a[rows.start : rows.stop] for name, a in values.items()}
            )
    if seal and skip is None:
        cache.seal()
    return cache, {**values, "label": label_N, "split": split_N, "planted": planted}


@pytest.fixture(scope="module")
def reduced(
    ray_running: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Location, Reduction, dict[str, Any]]:
    root = Location.open(str(tmp_path_factory.mktemp("store")))
    cache, truth = write_cache(root)
    reduction = reduce(cache, root, method="difference_of_means", num_workers=2)
    return root, reduction, truth


def test_directions_and_sigma_are_of_the_training_rows(reduced: Any) -> None:
    _, reduction, truth = reduced
    train, label = truth["split"] == "train", truth["label"]
    for stream in ("z", "resid_post"):
        values = truth[stream].astype(np.float64)
        want = values[train & label].mean(axis=0) - values[train & ~label].mean(axis=0)
        np.testing.assert_allclose(reduction.directions_LW[stream], want, rtol=1e-5, atol=1e-5)
        positive, negative = Moments.of(values[train & label]), Moments.of(values[train & ~label])
        np.testing.assert_allclose(difference_of_means(positive, negative), want, atol=1e-6)
    for site in (PLANTED, Site("z", 0, 3), Site("resid_post", 2)):
        direction = reduction.direction(site)
        values = truth[site.stream][:, site.layer]
        if site.head is not None:
            values = values[:, site.head * HEAD_DIM : (site.head + 1) * HEAD_DIM]
        projected = values[train].astype(np.float64) @ direction.unit_D
        # Population, both classes together: METHODS 1, item 3.
        assert direction.sigma == pytest.approx(projected.std(ddof=0), rel=1e-4)
        norms = np.linalg.norm(values[train].astype(np.float64), axis=-1)
        assert direction.activation_norm == pytest.approx(norms.mean(), rel=1e-5)
        assert direction.lineage["reduction"] == reduction.digest


def test_the_planted_head_is_found_and_no_other(reduced: Any) -> None:
    _, reduction, truth = reduced
    best, *others = reduction.ranked(heads=True)
    assert best["site"] == str(PLANTED)
    assert min(best["auroc_validation"], best["auroc_test"], best["accuracy_test"]) > 0.99
    assert len(others) == LAYERS * HEADS - 1
    for row in [*others, *reduction.ranked(heads=False)]:
        # The head that separates the training rows only is among them: the splits are held out.
        assert 0.3 < row["auroc_validation"] < 0.7, row
        assert 0.3 < row["auroc_test"] < 0.7, row
    found = reduction.direction(PLANTED)
    cosine = found.unit_D @ truth["planted"] / np.linalg.norm(truth["planted"])
    assert cosine > 0.97
    assert found.norm == pytest.approx(8, rel=0.1)
    assert reduction.direction(Site("z", 2, 0)).norm == pytest.approx(8, rel=0.1)


def test_held_out_scores_are_of_their_split(reduced: Any) -> None:
    _, reduction, truth = reduced
    direction = reduction.direction(PLANTED)
    values = truth["z"][:, 1, 16:24] @ direction.unit_D
    for split in ("validation", "test"):
        rows = truth["split"] == split
        want = auroc(values[rows, None], truth["label"][rows])
        assert direction.scores[f"auroc_{split}"] == pytest.approx(want[0])
        assert reduction.counts[f"{split}_positive"] == (rows & truth["label"]).sum()


def test_reducing_again_finds_the_result_and_computing_again_gives_the_same(
    reduced: Any, ray_running: None, tmp_path: Any
) -> None:
    root, first, _ = reduced
    steps: list[int] = []
    cache = ActivationCache.open(root, first.capture_digest)
    again = reduce(
        cache,
        root,
        method="difference_of_means",
        num_workers=2,
        on_progress=lambda done, total: steps.append(done),
    )
    assert steps == []
    elsewhere = Location.open(str(tmp_path / "store"))
    fresh_cache, _ = write_cache(elsewhere)
    fresh = reduce(
        fresh_cache,
        elsewhere,
        method="difference_of_means",
        num_workers=1,
        on_progress=lambda done, total: steps.append(done),
    )
    assert steps == list(range(1, len(steps) + 1))
    for result in (again, fresh):
        assert result.digest == first.digest
        # By their text, in which NaN equals NaN and every bit of a float shows.
        assert str(result.scores.to_pylist()) == str(first.scores.to_pylist())
        for stream, vectors in first.directions_LW.items():
            assert np.array_equal(result.directions_LW[stream], vectors)


@pytest.mark.parametrize("skip", [None, 7])
def test_an_incomplete_cache_is_refused_with_the_way_on(root: Location, skip: int | None) -> None:
    cache, _ = write_cache(root, seal=False, skip=skip)
    with pytest.raises(NotFound, match="run `steerage extract` on the same run file") as caught:
        reduce(cache, root, method="difference_of_means", num_workers=1)
    assert caught.value.kind == "cache_incomplete"
    assert f"lacks {0 if skip is None else 1} of 15 shards" in str(caught.value)


def test_without_training_rows_nothing_is_computed(root: Location) -> None:
    cache, _ = write_cache(root, split="test")
    with pytest.raises(InvalidInput, match="no positive row in the training split"):
        reduce(cache, root, method="difference_of_means", num_workers=1)


def test_asking_for_what_is_not_there(reduced: Any, root: Location) -> None:
    _, reduction, _ = reduced
    with pytest.raises(NotFound, match=r"has no site resid_post\.9"):
        reduction.direction(Site("resid_post", 9))
    with pytest.raises(NotFound, match="run `steerage reduce`"):
        Reduction.open(root, reduction_digest("0" * 64, "difference_of_means"))


def test_the_best_site_needs_validation_rows_to_choose_on(reduced: Any) -> None:
    _, reduction, _ = reduced
    assert reduction.best(heads=True) == PLANTED
    name = "auroc_validation"
    blank = pa.nulls(len(reduction.scores), pa.float64()).fill_null(math.nan)
    column = reduction.scores.column_names.index(name)
    scores = reduction.scores.set_column(column, name, blank)
    without = dataclasses.replace(reduction, scores=scores)
    with pytest.raises(InvalidInput, match="validation split lacks"):
        without.best(heads=True)


def test_what_a_killed_run_left_of_a_result_is_replaced(reduced: Any) -> None:
    root, reduction, _ = reduced
    assert reduction.location.exists("reduction.json")
    cache = ActivationCache.open(root, reduction.capture_digest)
    reduction.location.delete("reduction.json")
    reduction.location.replace("scores.parquet", b"written by another version")
    again = reduce(cache, root, method="difference_of_means", num_workers=2)
    assert str(again.scores.to_pylist()) == str(reduction.scores.to_pylist())
