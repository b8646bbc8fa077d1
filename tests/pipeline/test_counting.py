"""Counting: any order and any split give the same Moments, to float64 rounding."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InvalidInput
from pipeline.reduction.counting import Counting, count_shard
from pipeline.reduction.grouped import GroupedMoments, GroupSums
from pipeline.reduction.moments import Moments
from store.bfloat16 import from_float32, to_float32


@st.composite
def rows_and_counts(draw):
    """Rows with means up to 300 standard deviations from 0, how often each counts in each group,
    and NaN where it counts nowhere."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_rows, num_groups = draw(st.integers(1, 150)), draw(st.integers(1, 9))
    shape = draw(st.sampled_from([(3,), (2, 5), (1, 1500)]))
    spread = rng.choice([1e-3, 1.0, 1e4], shape)
    values_RX = rng.normal(size=(num_rows, *shape)) * spread
    values_RX += draw(st.sampled_from([0, 1, -300, 300])) * spread
    counts_GR = rng.choice([0, 0, 0, 1, 1, 2, 7], (num_groups, num_rows))
    values_RX[counts_GR.sum(axis=0) == 0] = np.nan
    values_RX = values_RX.astype(np.float32)
    if draw(st.booleans()):
        values_RX = from_float32(values_RX)
    return values_RX, counts_GR


def reference(values_RX, counts_GR):
    """Each group's rows, as often as they count, in numpy's longest float."""
    values_RX = to_float32(values_RX)
    shape = values_RX.shape[1:]
    count, mean, m2 = [], [], []
    for counts_R in counts_GR:
        rows = np.repeat(values_RX, counts_R, axis=0).astype(np.longdouble)
        count.append(len(rows))
        mean.append(rows.mean(axis=0) if len(rows) else np.zeros(shape))
        m2.append(np.square(rows - mean[-1]).sum(axis=0))
    return GroupedMoments(np.array(count), np.array(mean), np.array(m2))


def assert_equal(found, expected, counted_NX):
    """Equal to float64's rounding of the rows `counted_NX` that were counted in any group.

    Sums of squares that are not taken from the rows' midst fail this at means of 300 standard
    deviations: they are off by 1e-16 of the squared mean, which is 1e-11 of the variance.
    """
    assert found.count_G.tolist() == expected.count_G.tolist()
    if len(counted_NX) == 0:
        assert not found.mean.any()
        assert not found.m2.any()
        return
    wide_NX = to_float32(counted_NX).astype(np.float64)
    largest_X, range_X = np.abs(wide_NX).max(axis=0), np.ptp(wide_NX, axis=0)
    counts = expected.count_G.reshape(-1, *[1] * wide_NX[0].ndim)
    assert (np.abs(found.mean - expected.mean) <= 2e-15 * largest_X).all()
    allowed = 1e-13 * expected.m2 + counts * range_X * (2e-14 * range_X + 1e-15 * largest_X)
    assert (np.abs(found.m2 - expected.m2) <= allowed).all()


def counted(values_RX, counts_GR):
    return values_RX[counts_GR.sum(axis=0) > 0]


@given(rows_and_counts())
def test_moments_are_those_of_the_rows_that_count(given_rows) -> None:
    values_RX, counts_GR = given_rows
    found = GroupedMoments.of(values_RX, counts_GR)
    assert_equal(found, reference(values_RX, counts_GR), counted(values_RX, counts_GR))
    assert (found.m2 >= 0).all()


@given(rows_and_counts(), st.randoms(use_true_random=False))
def test_any_order_and_any_split_give_the_same(given_rows, random) -> None:
    values_RX, counts_GR = given_rows
    order = list(range(len(values_RX)))
    random.shuffle(order)
    cuts = sorted(random.randrange(len(order) + 1) for _ in range(random.randrange(5)))
    parts = [
        GroupedMoments.of(values_RX[part], counts_GR[:, part])
        for part in np.split(np.array(order), cuts)
    ]
    while len(parts) > 1:
        other = parts.pop(random.randrange(len(parts)))
        at = random.randrange(len(parts))
        parts[at] = parts[at].merge(other)
    assert_equal(parts[0], reference(values_RX, counts_GR), counted(values_RX, counts_GR))


@pytest.mark.parametrize("mean", [0, 1, 100, 10_000, -3e30])
def test_bits_of_many_rows_need_no_shift(mean) -> None:
    """Their squares add up without rounding; what is taken from them is exact here."""
    rng = np.random.default_rng(0)
    bits_RX = from_float32((mean + rng.normal(size=(4096, 3))).astype(np.float32))
    bits_RX[7, 0] = from_float32(np.array([1e-30], np.float32))[0]
    # A column that does not vary.
    bits_RX[:, 2] = bits_RX[0, 2]
    counts_GR = np.stack([np.ones(4096, int), rng.integers(0, 8, 4096)])
    sums = GroupSums(2, (3,))
    for part in np.split(np.arange(4096), 8):
        sums.add_rows(bits_RX[part], counts_GR[:, part])
    found = sums.moments()
    exact_RX = np.vectorize(Fraction, otypes=[object])(to_float32(bits_RX).astype(np.float64))
    for group, counts_R in enumerate(counts_GR):
        count, sums_X = int(counts_R.sum()), counts_R @ exact_RX
        m2_X = counts_R @ np.square(exact_RX) - sums_X * sums_X / count
        np.testing.assert_allclose(found.mean[group], (sums_X / count).astype(float), rtol=1e-14)
        np.testing.assert_allclose(found.m2[group], m2_X.astype(float), rtol=1e-12)
        assert found.m2[group, 2] == 0


@pytest.mark.parametrize("bits_first", [False, True])
def test_bits_and_floats_may_be_added_together(bits_first) -> None:
    values_RX = np.random.default_rng(0).normal(3, 1, (40, 5)).astype(np.float32)
    values_RX = to_float32(from_float32(values_RX))
    sums, ones_1R = GroupSums(1, (5,)), np.ones((1, 40), int)
    for part, as_bits in ((slice(20), bits_first), (slice(20, 40), not bits_first)):
        part_RX = from_float32(values_RX[part]) if as_bits else values_RX[part]
        sums.add_rows(part_RX, ones_1R[:, part])
    assert_equal(sums.moments(), reference(values_RX, ones_1R), values_RX)


@given(rows_and_counts())
def test_groups_merge_into_those_of_their_rows_together(given_rows) -> None:
    values_RX, counts_GR = given_rows
    chosen = list(range(0, len(counts_GR), 2))
    merged = GroupedMoments.of(values_RX, counts_GR).group(*chosen)
    together = Moments(merged.count, merged.mean, merged.m2)
    found = GroupedMoments(np.array([merged.count]), together.mean[None], together.m2[None])
    expected = reference(values_RX, counts_GR[chosen].sum(axis=0)[None])
    assert_equal(found, expected, counted(values_RX, counts_GR))


def test_no_rows_are_the_neutral_element() -> None:
    rng = np.random.default_rng(0)
    some = GroupedMoments.of(rng.normal(size=(9, 4)).astype(np.float32), np.eye(3, 9, dtype=int))
    none = GroupedMoments.of(np.zeros((0, 4), np.float32), np.zeros((3, 0), int))
    for merged in (some.merge(none), none.merge(some), some.merge(GroupedMoments.empty(3, (4,)))):
        assert (merged.count_G == some.count_G).all()
        assert (merged.mean == some.mean).all()
        assert (merged.m2 == some.m2).all()


def test_a_row_that_is_not_finite_spoils_its_own_group_only() -> None:
    values_RX = np.arange(12, dtype=np.float32).reshape(6, 2)
    values_RX[0, 1] = np.inf
    counts_GR = np.array([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]])
    found = GroupedMoments.of(values_RX, counts_GR)
    assert np.isfinite(found.mean).tolist() == [[True, False], [True, True]]
    assert found.mean[1].tolist() == [7, 8]


@pytest.mark.parametrize(("dtype", "num_rows"), [(np.float64, 4), (np.float32, 5)])
def test_other_values_are_refused(dtype, num_rows) -> None:
    with pytest.raises(InvalidInput, match="expected 4 rows") as caught:
        GroupedMoments.of(np.zeros((num_rows, 2), dtype), np.ones((2, 4), int))
    assert caught.value.kind == "values"


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.booleans())
def test_a_shards_rows_and_pairs_are_counted(seed, as_bits) -> None:
    rng = np.random.default_rng(seed)
    num_rows, num_pairs, rows = 60, 40, range(20, 50)
    values_ALW = (300 + rng.normal(size=(num_rows, 2, 6))).astype(np.float32)
    counting = Counting(
        counts_GA=rng.integers(0, 2, (4, num_rows)),
        positive_P=rng.integers(0, num_rows, num_pairs),
        negative_P=rng.integers(0, num_rows, num_pairs),
        group_P=rng.integers(0, 2, num_pairs),
        num_pair_groups=2,
    )
    stored_ALW = from_float32(values_ALW) if as_bits else values_ALW
    values_ALW = to_float32(stored_ALW)
    here_RLW = stored_ALW[rows.start : rows.stop]
    found = count_shard({"z": here_RLW}, rows, counting)["z"]
    counts_GR = counting.counts_GA[:, rows.start : rows.stop]
    assert_equal(found.groups, reference(here_RLW, counts_GR), counted(here_RLW, counts_GR))
    both_P = np.isin(counting.positive_P, rows) & np.isin(counting.negative_P, rows)
    wide_ALW = values_ALW.astype(np.longdouble)
    for group in range(2):
        chosen = np.flatnonzero(both_P & (counting.group_P == group))
        differences = wide_ALW[counting.positive_P[chosen]] - wide_ALW[counting.negative_P[chosen]]
        pairs = found.pairs.group(group)
        assert pairs.count == len(chosen)
        if len(chosen):
            np.testing.assert_allclose(pairs.mean, differences.mean(axis=0), rtol=1e-12, atol=1e-12)
            centred = differences - differences.mean(axis=0)
            np.testing.assert_allclose(pairs.m2, np.square(centred).sum(axis=0), atol=1e-9)


def test_without_pairs_none_are_counted() -> None:
    none = np.zeros(0, np.int64)
    counting = Counting(np.ones((1, 3), np.int64), none, none, none, 0)
    found = count_shard({"z": np.ones((3, 1, 2), np.float32)}, range(3), counting)["z"]
    assert found.pairs is None
    assert found.groups.count_G.tolist() == [3]
