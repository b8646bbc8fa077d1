"""Sparse directions: how many entries stay, which ones, and with which norm; and how they are
published.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.config import PublishSection
from pipeline.errors import InvalidInput
from pipeline.reduction.sparse import random_fraction, top_fraction
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


def test_a_run_file_that_leaves_the_dose_open_is_refused():
    assert PublishSection(keep_fraction=0.05).keep_fraction == 0.05
    assert PublishSection(keep_fraction=0.05, strength_unit="sigma", match_norm=True).match_norm
    for changes in ({"strength_unit": "unit"}, {"operation": "project_out"}):
        with pytest.raises(ValidationError, match="say match_norm = true"):
            PublishSection(keep_fraction=0.05, **changes)
    for fraction in (0, -1, 1.01, float("nan")):
        with pytest.raises(ValidationError, match="keep_fraction"):
            PublishSection(keep_fraction=fraction)
