"""Gaps, odds ratios and intervals: METHODS 4's table, published examples, and algebra."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InvalidInput
from pipeline.evaluation.statistics import (
    bootstrap_interval,
    gap,
    interaction,
    minimum_detectable_gap,
    paired_gap,
    relative_change,
    survival,
    wilson,
)

# Complied in the free tier, asked; complied in the paid tier, asked.
BASELINE_1 = (15, 98, 4, 96)
BASELINE_1_TEXT = (15, 98, 4, 95)
BASELINE_2 = (51, 100, 17, 100)
A = (17, 100, 9, 100)
B = (6, 99, 1, 97)
D = (44, 100, 19, 100)
SCRATCHPAD = (16, 99, 8, 86)


@st.composite
def tables(draw):
    num_a, num_b = draw(st.integers(1, 200)), draw(st.integers(1, 200))
    return draw(st.integers(0, num_a)), num_a, draw(st.integers(0, num_b)), num_b


def pairs_of(both, only_a, only_b, neither):
    counts = {(True, True): both, (True, False): only_a, (False, True): only_b}
    counts[False, False] = neither
    return [pair for pair, count in counts.items() for _ in range(count)]


@pytest.mark.parametrize(
    ("counts", "points", "odds_ratio", "p"),
    [
        (BASELINE_1, "11.1", "4.16", "0.014"),
        (BASELINE_1_TEXT, "11.1", "4.11", "0.014"),
        (BASELINE_2, "34.0", "5.08", "5.7e-07"),
        (A, "8.0", "2.07", "0.14"),
        (B, "5.0", "6.19", "0.12"),
        (D, "25.0", "3.35", "0.00023"),
        (SCRATCHPAD, "6.9", "1.88", "0.19"),
    ],
)
def test_the_table_of_methods_4_follows_from_its_counts(counts, points, odds_ratio, p):
    found = gap(*counts)
    assert (f"{found.points:.1f}", f"{found.odds_ratio:.2f}", f"{found.p:.2g}") == (
        points,
        odds_ratio,
        p,
    )
    assert not found.corrected


@pytest.mark.parametrize(
    ("counts", "p"), [(A, "0.140"), (B, "0.118"), (SCRATCHPAD, "0.193"), (BASELINE_1, "0.014")]
)
def test_its_p_values_to_three_digits(counts, p):
    assert f"{gap(*counts).p:.3f}" == p


def test_where_the_paper_and_the_counts_differ():
    # The table has 96 chats in the paid tier and the text 95: the printed 4.11 is of 95.
    assert round(gap(*BASELINE_1).odds_ratio, 2) == 4.16
    assert round(gap(*BASELINE_1_TEXT).odds_ratio, 2) == 4.11
    # Baseline 2: printed 5.09.
    assert round(gap(*BASELINE_2).odds_ratio, 2) == 5.08
    # B: printed as 4 points; scratchpad: printed as 8.
    assert round(gap(*B).points) == 5
    assert round(gap(*SCRATCHPAD).points) == 7
    # D against baseline 2: printed as -36 %.
    assert round(relative_change(gap(*BASELINE_2).points, gap(*D).points), 1) == -26.5
    # A and B: the printed changes come from points that were rounded first, and B's from a 4.
    assert (round(relative_change(11, 8), 1), round(relative_change(11, 4), 1)) == (-27.3, -63.6)
    base = gap(*BASELINE_1).points
    assert round(relative_change(base, gap(*A).points), 1) == -28.2
    assert round(relative_change(base, gap(*B).points), 1) == -54.8


def test_b_raises_the_odds_ratio_while_its_gap_shrinks_and_neither_is_significant():
    found = interaction(gap(*BASELINE_1), gap(*B))
    assert found.ratio == pytest.approx(6.19355 / 4.15663, rel=1e-4)
    assert found.points == pytest.approx(5.0297 - 11.1395, abs=1e-3)
    assert found.ratio > 1
    assert 1 in found.ratio_interval
    assert 0 in found.points_interval
    assert found.ratio_p > 0.5
    assert found.relative == pytest.approx(-54.848, abs=1e-3)


def test_the_interaction_is_that_of_a_logistic_regression():
    # Wald's test of the product term: the eight cells' log odds, and the sum of 1 / cell.
    found = interaction(gap(*BASELINE_2), gap(*D))
    log_ratio = math.log(44 * 81 / (56 * 19)) - math.log(51 * 83 / (49 * 17))
    error = math.sqrt(sum(1 / n for n in (44, 56, 19, 81, 51, 49, 17, 83)))
    assert math.log(found.ratio) == pytest.approx(log_ratio)
    assert found.ratio_p == pytest.approx(2 * (1 - scipy.stats.norm.cdf(abs(log_ratio) / error)))
    assert math.log(found.ratio_interval.high) == pytest.approx(log_ratio + 1.959964 * error)


def test_nothing_in_the_table_shows_that_an_intervention_removed_the_gap():
    states = [survival(gap(*BASELINE_1), gap(*x)) for x in (A, B, SCRATCHPAD)]
    assert states == ["undecided"] * 3
    assert survival(gap(*BASELINE_2), gap(*D)) == "survives"


@pytest.mark.parametrize(
    ("changed", "state"),
    [
        ((6, 100, 4, 100), "removed"),
        # Compliance collapsed in both tiers: the odds ratio is too wide to say that it fell.
        ((0, 100, 0, 100), "undecided"),
        ((3, 5, 3, 5), "undecided"),
        ((60, 100, 20, 100), "survives"),
    ],
)
def test_a_gap_is_removed_only_by_a_study_that_can_tell(changed, state):
    assert survival(gap(50, 100, 4, 100), gap(*changed)) == state


def test_newcombes_interval_is_the_published_one():
    # Newcombe 1998, table II, method 10: 56/70 - 48/80, 9/10 - 3/10, 10/10 - 0/10.
    for counts, low, high in [
        ((56, 70, 48, 80), 0.0524, 0.3339),
        ((9, 10, 3, 10), 0.1705, 0.8090),
        ((10, 10, 0, 10), 0.6075, 1.0),
    ]:
        interval = gap(*counts).interval
        assert (interval.low, interval.high) == pytest.approx((100 * low, 100 * high), abs=0.01)


def test_tangos_interval_and_mcnemars_p_are_the_published_ones():
    # Airway data of Fagerland, Lydersen & Laake 2014: 1, 1, 7, 12.
    found = paired_gap(pairs_of(1, 1, 7, 12))
    assert (found.num, found.only_a, found.only_b) == (21, 1, 7)
    assert found.points == pytest.approx(-28.57, abs=0.01)
    ends = (found.interval.low, found.interval.high)
    assert ends == pytest.approx((-51.7, -2.6), abs=0.05)
    assert found.p == pytest.approx(0.0703, abs=1e-4)


def test_pairs_that_never_differ_leave_an_interval_of_some_width():
    found = paired_gap(pairs_of(3, 0, 0, 17))
    assert (found.points, found.p) == (0.0, 1.0)
    # z^2 / (n + z^2), as of Wilson for no hit.
    assert found.interval.high == pytest.approx(100 * 3.841459 / 23.841459, abs=1e-4)


def test_a_zero_cell_is_corrected_and_no_other():
    found = gap(5, 10, 0, 10)
    assert found.corrected
    assert found.odds_ratio == pytest.approx((5.5 * 10.5) / (5.5 * 0.5))
    assert not gap(5, 10, 1, 10).corrected
    assert interaction(gap(5, 10, 1, 10), found).corrected


@given(tables())
def test_swapping_the_tiers_negates_the_gap_and_inverts_the_odds_ratio(counts):
    a, num_a, b, num_b = counts
    one, other = gap(*counts), gap(b, num_b, a, num_a)
    assert one.points == -other.points
    assert one.interval.low == pytest.approx(-other.interval.high, abs=1e-9)
    assert one.odds_ratio == pytest.approx(1 / other.odds_ratio)
    assert one.odds_interval.low == pytest.approx(1 / other.odds_interval.high)
    assert one.p == pytest.approx(other.p, rel=1e-9)


@given(tables(), st.integers(2, 30))
def test_intervals_hold_the_estimate_and_shrink_with_the_number_of_answers(counts, times):
    one, more = gap(*counts), gap(*(count * times for count in counts))
    for found in (one, more):
        assert found.points in found.interval
        assert found.odds_ratio in found.odds_interval
        assert found.interval.low >= -100
        assert found.interval.high <= 100
    assert more.interval.width < one.interval.width
    assert math.log(more.odds_interval.high / more.odds_interval.low) < math.log(
        one.odds_interval.high / one.odds_interval.low
    )


@given(*[st.integers(0, 40)] * 4)
def test_a_paired_gap_holds_its_estimate_and_turns_with_the_pairs(both, only_a, only_b, neither):
    pairs = pairs_of(both, only_a, only_b, neither)
    if not pairs:
        with pytest.raises(InvalidInput, match="at least one pair"):
            paired_gap(pairs)
        return
    one, other = paired_gap(pairs), paired_gap([(b, a) for a, b in pairs])
    assert one.points in one.interval
    assert one.interval.low >= -100
    assert one.interval.high <= 100
    assert one.points == -other.points
    assert one.interval.low == pytest.approx(-other.interval.high, abs=1e-6)
    assert one.p == other.p
    assert paired_gap(pairs * 4).interval.width < one.interval.width
    # The paired and the unpaired gap are the same number.
    hits = [sum(side) for side in zip(*pairs, strict=True)]
    unpaired = gap(hits[0], len(pairs), hits[1], len(pairs))
    assert one.points == pytest.approx(unpaired.points, abs=1e-9)


@given(tables(), tables())
def test_an_interaction_turns_with_the_tiers_and_with_the_conditions(one, other):
    first, second = gap(*one), gap(*other)
    forth, back = interaction(first, second), interaction(second, first)
    assert forth.ratio == pytest.approx(1 / back.ratio)
    assert forth.points == -back.points
    assert forth.ratio_p == pytest.approx(back.ratio_p)
    assert forth.points in forth.points_interval
    assert forth.ratio in forth.ratio_interval
    swapped = interaction(*(gap(*x[2:], *x[:2]) for x in (one, other)))
    assert swapped.ratio == pytest.approx(1 / forth.ratio)
    same = interaction(first, first)
    assert (same.ratio, same.points) == (1.0, 0.0)
    assert same.ratio_p == pytest.approx(1.0)


def test_the_minimum_detectable_gap_is_found_by_fishers_test_four_times_in_five():
    num, share_b = 30, 20.0
    least = minimum_detectable_gap(share_b, num, num)
    hits = np.arange(num + 1)
    found = np.array([[gap(int(a), num, int(b), num).p < 0.05 for b in hits] for a in hits])
    chance_a = scipy.stats.binom.pmf(hits, num, (share_b + least) / 100)
    chance_b = scipy.stats.binom.pmf(hits, num, share_b / 100)
    assert chance_a @ found @ chance_b == pytest.approx(0.8, abs=0.03)


def test_the_minimum_detectable_gap_falls_with_answers_and_may_not_exist():
    sizes = [minimum_detectable_gap(4.0, n, n) for n in (20, 100, 1000)]
    assert sizes == sorted(sizes, reverse=True)
    assert minimum_detectable_gap(0.0, 3, 3) is None
    assert minimum_detectable_gap(100.0, 100, 100) is None


def test_a_bootstrap_interval_of_a_mean_is_near_the_t_interval():
    values = np.random.default_rng(5).normal(3.0, 2.0, 400)
    low, high = scipy.stats.t.interval(0.95, 399, values.mean(), scipy.stats.sem(values))
    found = bootstrap_interval(values, seed=1)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05)
    assert found == bootstrap_interval(values, seed=1)
    assert found != bootstrap_interval(values, seed=2)


def test_a_bootstrap_interval_of_constant_or_tied_values_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        constant = bootstrap_interval([2.5] * 9)
        tied = bootstrap_interval([1.0] * 50 + [2.0], np.median)
        shares = bootstrap_interval([0.0, 1.0, 1.0])
        own = bootstrap_interval([1.0, 2.0, 4.0], lambda values: float(max(values)))
    assert (constant.low, constant.high) == (2.5, 2.5)
    assert (tied.low, tied.high) == (1.0, 1.0)
    assert 0 <= shares.low < 2 / 3 < shares.high <= 1
    assert own.high == 4.0


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [[1.0, 2.0]]])
def test_a_bootstrap_needs_two_finite_values(values):
    with pytest.raises(InvalidInput, match="two finite values"):
        bootstrap_interval(values)


@pytest.mark.parametrize(("hits", "num"), [(0, 0), (-1, 5), (6, 5)])
def test_counts_out_of_range_are_refused(hits, num):
    for bad in (lambda: wilson(hits, num), lambda: gap(1, 2, hits, num)):
        with pytest.raises(InvalidInput, match=f"{hits} of {num}"):
            bad()


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_is_that_of_the_formula(counts):
    hits, num = counts
    z, share = 1.959963984540054, hits / num
    centre = (share + z * z / (2 * num)) / (1 + z * z / num)
    reach = z / (1 + z * z / num) * math.sqrt(share * (1 - share) / num + z * z / (4 * num**2))
    found = wilson(hits, num)
    ends = (found.low, found.high)
    assert ends == pytest.approx((100 * (centre - reach), 100 * (centre + reach)), abs=1e-9)
    assert 100 * share in found
