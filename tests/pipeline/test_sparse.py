"""Sparse directions: how many entries stay, which ones, and with which norm; and how they are
published.

Shapes: D width, E entries of several sites, N rows.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.config import PublishSection
from pipeline.errors import InvalidInput
from pipeline.reduction.moments import Moments
from pipeline.reduction.scores import auroc
from pipeline.reduction.sparse import (
    paired_t,
    random_fraction,
    sparsity_curve,
    top_fraction,
    top_fraction_over,
    welch_t,
)
from steering_service.core.direction import Direction
from steering_service.core.site import Site


def direction_of(seed: int, width: int) -> Direction:
    return Direction(
        site=Site("resid_post", 3),
        vector_D=np.random.default_rng(seed).standard_normal(width).astype(np.float32),
        sigma=2.0,
        activation_norm=7.0,
        method="pca",
        scores={"auroc_test": 0.9},
        lineage={"capture": "c"},
    )


CASES = {
    "seed": st.integers(0, 2**32 - 1),
    "width": st.integers(1, 300),
    "fraction": st.floats(0, 1, exclude_min=True),
}


@given(**CASES, match_norm=st.booleans())
def test_int_of_fraction_times_width_entries_stay_and_they_are_the_largest(
    seed, width, fraction, match_norm
):
    whole = direction_of(seed, width)
    if int(fraction * width) == 0:
        with pytest.raises(InvalidInput, match="= 0 of its entries") as caught:
            top_fraction(whole, fraction, match_norm=match_norm)
        assert caught.value.kind == "nothing_kept"
        return
    sparse = top_fraction(whole, fraction, match_norm=match_norm)
    kept_D = sparse.vector_D != 0
    assert kept_D.sum() == int(fraction * width)
    if not kept_D.all():
        smallest_kept = np.abs(whole.vector_D[kept_D]).min()
        assert smallest_kept >= np.abs(whole.vector_D[~kept_D]).max()
    if match_norm:
        assert sparse.norm == pytest.approx(whole.norm, rel=1e-6)
        np.testing.assert_allclose(
            sparse.vector_D[kept_D] / sparse.norm,
            whole.vector_D[kept_D] / np.linalg.norm(whole.vector_D[kept_D]),
            rtol=1e-5,
        )
    else:
        assert np.array_equal(sparse.vector_D[kept_D], whole.vector_D[kept_D])


@given(**CASES, match_norm=st.booleans())
def test_masking_again_changes_nothing(seed, width, fraction, match_norm):
    if int(fraction * width) == 0:
        return
    for mask in (top_fraction, lambda d, f, **k: random_fraction(d, f, seed, **k)):
        once = mask(direction_of(seed, width), fraction, match_norm=match_norm)
        twice = mask(once, fraction, match_norm=match_norm)
        np.testing.assert_allclose(twice.vector_D, once.vector_D, rtol=1e-6 if match_norm else 0)


@given(**CASES)
def test_random_entries_are_as_many_and_nested(seed, width, fraction):
    whole = direction_of(seed, width)
    if int(fraction * width) == 0:
        return
    some = random_fraction(whole, fraction, seed)
    kept_D = some.vector_D != 0
    assert kept_D.sum() == int(fraction * width)
    assert np.array_equal(some.vector_D[kept_D], whole.vector_D[kept_D])
    assert np.array_equal(random_fraction(whole, fraction, seed).vector_D, some.vector_D)
    if int(fraction / 2 * width):
        fewer = random_fraction(whole, fraction / 2, seed)
        assert not ((fewer.vector_D != 0) & ~kept_D).any()


def test_top_entries_of_a_random_unit_vector_keep_half_of_its_norm():
    # METHODS 3. Past 1.96 standard deviations lie 5 % of a Gaussian, and 0.528^2 of its square.
    whole = direction_of(0, 20_000)
    assert top_fraction(whole, 0.05).norm / whole.norm == pytest.approx(0.528, abs=0.01)
    assert random_fraction(whole, 0.05, 1).norm / whole.norm == pytest.approx(0.05**0.5, abs=0.02)


def test_a_mask_is_said_and_scores_of_the_whole_vector_are_not_claimed():
    whole = direction_of(0, 40)
    sparse = top_fraction(whole, 0.1)
    assert sparse.method == "pca+top_fraction"
    assert sparse.scores == {}
    assert (sparse.sigma, sparse.activation_norm) == (2.0, 7.0)
    assert sparse.lineage["capture"] == "c"
    (entry,) = sparse.lineage["masks"]
    assert entry == {
        "selector": "top",
        "fraction": 0.1,
        "num_kept": 4,
        "match_norm": False,
        "whole_norm": whole.norm,
        "whole_scores": {"auroc_test": 0.9},
    }
    again = random_fraction(sparse, 0.9, 3, match_norm=True)
    assert again.method == "pca+top_fraction+random_fraction"
    assert [item["selector"] for item in again.lineage["masks"]] == ["top", "random"]
    assert again.lineage["masks"][1]["seed"] == 3
    assert top_fraction(whole, 1.0) is whole


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan"), float("inf")])
def test_a_fraction_out_of_range_is_refused(fraction):
    for mask in (top_fraction, lambda d, f: random_fraction(d, f, 0)):
        with pytest.raises(InvalidInput, match="above 0 and at most 1") as caught:
            mask(direction_of(0, 8), fraction)
        assert caught.value.kind == "fraction"


def test_random_entries_that_are_all_zero_are_refused():
    sparse = top_fraction(direction_of(0, 1000), 0.001)
    with pytest.raises(InvalidInput, match="entries that would be kept are zero") as caught:
        random_fraction(sparse, 0.01, 0)
    assert caught.value.kind == "nothing_kept"


@given(seed=st.integers(0, 2**32 - 1), sizes=st.tuples(*[st.integers(2, 9)] * 2))
def test_t_statistics_are_those_of_scipy(seed, sizes):
    random = np.random.default_rng(seed)
    a_ND, b_ND = (random.standard_normal((size, 4)) * size + 1 for size in sizes)
    want = scipy.stats.ttest_ind(a_ND, b_ND, equal_var=False).statistic
    np.testing.assert_allclose(welch_t(Moments.of(a_ND), Moments.of(b_ND)), want)
    want = scipy.stats.ttest_1samp(a_ND, 0).statistic
    np.testing.assert_allclose(paired_t(Moments.of(a_ND)), want)


def test_t_statistics_where_nothing_varies_and_of_too_few_rows():
    two, three = np.array([[1.0, 1.0]] * 2), np.array([[1.0, 2.0]] * 2)
    assert welch_t(Moments.of(three), Moments.of(two)).tolist() == [0, np.inf]
    assert paired_t(Moments.of(two - three)).tolist() == [0, -np.inf]
    for compute in (
        lambda: welch_t(Moments.of(two), Moments.of(two[:1])),
        lambda: paired_t(Moments.of(two[:1])),
    ):
        with pytest.raises(InvalidInput, match="at least 2") as caught:
            compute()
        assert caught.value.kind == "statistic_rows"


@given(**CASES)
def test_entries_of_the_largest_statistic_stay(seed, width, fraction):
    if int(fraction * width) == 0:
        return
    whole = direction_of(seed, width)
    statistic_D = np.random.default_rng(seed + 1).standard_normal(width)
    sparse = top_fraction(whole, fraction, statistic_D=statistic_D)
    kept_D = sparse.vector_D != 0
    assert kept_D.sum() == int(fraction * width)
    assert np.array_equal(sparse.vector_D[kept_D], whole.vector_D[kept_D])
    if not kept_D.all():
        assert np.abs(statistic_D[kept_D]).min() >= np.abs(statistic_D[~kept_D]).max()
        assert sparse.method == "pca+top_t_fraction"
        assert sparse.lineage["masks"][0]["selector"] == "top_t"


def test_t_passes_over_dimensions_that_are_merely_large():
    # The residual stream has dimensions a hundred times the others: they differ most between any
    # two means, and say least.
    random = np.random.default_rng(0)
    scale_D, effect_D = np.ones(100), np.zeros(100)
    scale_D[:5], effect_D[5:10] = 100, 1
    a_ND, b_ND = scale_D * random.standard_normal((2, 200, 100))
    a, b = Moments.of(a_ND + effect_D), Moments.of(b_ND)
    whole = Direction(Site("resid_post", 0), a.mean - b.mean, 1.0, 1.0, "difference_of_means")
    by_t = top_fraction(whole, 0.05, statistic_D=welch_t(a, b))
    assert np.flatnonzero(by_t.vector_D).tolist() == [5, 6, 7, 8, 9]
    assert np.flatnonzero(top_fraction(whole, 0.05).vector_D).tolist() == [0, 1, 2, 3, 4]


def several(seed: int, widths) -> list[Direction]:
    random = np.random.default_rng(seed)
    return [
        Direction(
            Site("resid_post", layer),
            (10.0**layer * random.standard_normal(width)).astype(np.float32),
            sigma=1.0,
            activation_norm=10.0**layer,
            method="pca",
        )
        for layer, width in enumerate(widths)
    ]


@given(
    seed=st.integers(0, 2**32 - 1),
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    fraction=st.floats(0.01, 1),
    match_norm=st.booleans(),
    by_statistic=st.booleans(),
)
def test_one_threshold_over_several_sites(seed, widths, fraction, match_norm, by_statistic):
    whole, num_kept = several(seed, widths), int(fraction * sum(widths))
    random = np.random.default_rng(seed + 1)
    statistics = [random.standard_normal(width) for width in widths] if by_statistic else None
    if num_kept == 0:
        with pytest.raises(InvalidInput, match="= 0 of its entries"):
            top_fraction_over(whole, fraction, statistics=statistics)
        return
    sparse = top_fraction_over(whole, fraction, match_norm=match_norm, statistics=statistics)
    left = {item.site: item for item in sparse}
    assert list(left) == [item.site for item in whole if item.site in left]
    rank_E = np.concatenate(statistics or [item.vector_D / item.activation_norm for item in whole])
    vector_E = np.concatenate(
        [left[d.site].vector_D if d.site in left else 0 * d.vector_D for d in whole]
    )
    kept_E = vector_E != 0
    assert kept_E.sum() == num_kept
    if not kept_E.all():
        assert np.abs(rank_E[kept_E]).min() >= np.abs(rank_E[~kept_E]).max()
    unit_E = np.repeat([item.activation_norm for item in whole], widths)
    whole_E = np.concatenate([item.vector_D for item in whole])
    ratio_E = vector_E[kept_E] / whole_E[kept_E]
    if match_norm:
        np.testing.assert_allclose(ratio_E, ratio_E[0], rtol=1e-5)
        np.testing.assert_allclose(
            np.linalg.norm(vector_E / unit_E), np.linalg.norm(whole_E / unit_E), rtol=1e-5
        )
    else:
        assert (ratio_E == 1).all()


def test_without_a_common_unit_nothing_is_compared():
    whole = several(0, [40, 40, 40])
    # Entries as they are would all be of the last site.
    sparse = top_fraction_over(whole, 0.2)
    assert [str(item.site) for item in sparse] == [f"resid_post.{layer}" for layer in range(3)]
    (mask,) = sparse[0].lineage["masks"]
    assert mask["selector"] == "top_over"
    assert mask["sites"] == ["resid_post.0", "resid_post.1", "resid_post.2"]
    assert sparse[0].method == "pca+top_over_fraction"
    unknown = Direction(Site("z", 0, 1), np.ones(4, np.float32), 0.0, 0.0, "pca")
    zeros = Direction(Site("z", 0, 2), np.eye(4, dtype=np.float32)[0], 0.0, 1.0, "pca")
    cases = [
        (lambda: top_fraction_over([], 0.5), "sparse_sites"),
        (lambda: top_fraction_over([whole[0], whole[0]], 0.5), "sparse_sites"),
        (lambda: top_fraction_over([whole[0], unknown], 0.5), "activation_norm"),
        (lambda: top_fraction_over(whole, 0.5, statistics=[np.ones(40)]), "statistic_shape"),
        (lambda: top_fraction(whole[0], 0.5, statistic_D=np.ones(3)), "statistic_shape"),
        (lambda: top_fraction(whole[0], 0.5, statistic_D=np.full(40, np.nan)), "statistic_shape"),
        (lambda: top_fraction_over([zeros], 0.5, statistics=[np.arange(4)]), "nothing_kept"),
    ]
    for make, kind in cases:
        with pytest.raises(InvalidInput) as caught:
            make()
        assert caught.value.kind == kind


@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 60), by_statistic=st.booleans())
def test_a_curve_is_that_of_the_masks(seed, width, by_statistic):
    random = np.random.default_rng(seed)
    whole, label_N = direction_of(seed, width), np.arange(40) % 2 == 0
    values_ND = (random.standard_normal((40, width)) + label_N[:, None]).astype(np.float32)
    statistic_D = random.standard_normal(width) if by_statistic else None
    fractions = [0.01, 0.05, 0.3, 1.0]
    curve = sparsity_curve(whole, values_ND, label_N, fractions, statistic_D=statistic_D)
    assert curve.fraction_K.tolist() == fractions
    for number, fraction in enumerate(fractions):
        assert curve.num_kept_K[number] == int(fraction * width)
        if int(fraction * width) == 0:
            assert curve.norm_share_K[number] == 0
            assert np.isnan(curve.auroc_K[number])
            continue
        sparse = top_fraction(whole, fraction, statistic_D=statistic_D)
        assert curve.norm_share_K[number] == pytest.approx(sparse.norm / whole.norm)
        want = auroc((values_ND @ sparse.vector_D)[:, None], label_N)[0]
        assert curve.auroc_K[number] == pytest.approx(want, abs=0.01)
    assert curve.norm_share_K[-1] == pytest.approx(1)
    with pytest.raises(InvalidInput, match="activations of width"):
        sparsity_curve(whole, values_ND[:, 1:], label_N, fractions)
    with pytest.raises(InvalidInput, match="above 0 and at most 1"):
        sparsity_curve(whole, values_ND, label_N, [0.0])


def test_a_run_file_that_leaves_the_dose_open_is_refused():
    assert PublishSection(keep_fraction=0.05).keep_fraction == 0.05
    assert PublishSection(keep_fraction=0.05, strength_unit="sigma", match_norm=True).match_norm
    for changes in ({"strength_unit": "unit"}, {"operation": "project_out"}):
        with pytest.raises(ValidationError, match="say match_norm = true"):
            PublishSection(keep_fraction=0.05, **changes)
    for fraction in (0, -1, 1.01, float("nan")):
        with pytest.raises(ValidationError, match="keep_fraction"):
            PublishSection(keep_fraction=fraction)
