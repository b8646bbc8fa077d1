"""How sure scores are: intervals, p by permutation, and what a thousand sites find by luck.

Shapes: N rows, P pairs, S sites, K blocks, B bins.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.reduction.scores import (
    auroc,
    benjamini_hochberg,
    bootstrap_auroc,
    histograms,
    permutation_p,
    site_cosines,
)
from store.layout import StreamLayout

SEEDS = st.integers(0, 2**32 - 1)


def pairs_and_singles(num_pairs: int, num_singles: int):
    """Labels and blocks of shuffled rows: pairs, and rows without one, a third of them positive."""
    label_N = np.r_[np.tile([True, False], num_pairs), np.arange(num_singles) % 3 == 0]
    block_N = np.r_[np.repeat(np.arange(num_pairs), 2), num_pairs + np.arange(num_singles)]
    order_N = np.random.default_rng(0).permutation(len(label_N))
    return label_N[order_N], block_N[order_N] * 7 + 3


@settings(max_examples=30)
@given(
    seed=SEEDS,
    num_pairs=st.integers(0, 12),
    num_singles=st.integers(0, 12),
    levels=st.sampled_from([2, 5, 10**6]),
)
def test_bootstrap_is_that_of_a_plain_loop(seed, num_pairs, num_singles, levels):
    label_N, block_N = pairs_and_singles(num_pairs, num_singles)
    values_NS = np.random.default_rng(seed).integers(levels, size=(len(label_N), 3)) / 8
    low_S, high_S = bootstrap_auroc(values_NS, label_N, block_N, num=30, seed=seed)
    blocks = np.unique(block_N)
    if label_N.all() or not label_N.any() or len(blocks) < 2:
        assert np.isnan([low_S, high_S]).all()
        return
    picks_RK = np.random.default_rng(seed).integers(len(blocks), size=(30, len(blocks)))
    found = []
    for picks_K in picks_RK:
        rows = np.concatenate([np.flatnonzero(block_N == blocks[pick]) for pick in picks_K])
        found.append(auroc(values_NS[rows], label_N[rows]))
    known = [area_S for area_S in found if not np.isnan(area_S).any()]
    if not known:
        assert np.isnan([low_S, high_S]).all()
        return
    want_S = np.percentile(known, [2.5, 97.5], axis=0)
    np.testing.assert_allclose([low_S, high_S], want_S, atol=1e-12)


def test_a_pair_is_resampled_whole():
    # Both sides share a nuisance twenty times their difference: in order in every pair, and yet
    # the rows of different pairs are in no order.
    random = np.random.default_rng(0)
    label_N = np.tile([True, False], 100)
    pair_N = np.repeat(np.arange(100), 2)
    values_NS = (20 * random.standard_normal(100)[pair_N] + 5 * label_N)[:, None]
    ends = [
        bootstrap_auroc(values_NS, label_N, block_N, num=400)
        for block_N in (pair_N, np.arange(200))
    ]
    together, apart = (float(high_S[0] - low_S[0]) for low_S, high_S in ends)
    assert together < apart / 2
    assert ends[0][0][0] > 0.5 > ends[1][0][0]


def test_the_interval_holds_the_truth_in_about_95_of_100_draws():
    truth = scipy.stats.norm.cdf(1 / np.sqrt(2))
    random = np.random.default_rng(1)
    label_N = np.arange(200) % 2 == 0
    values_NS = random.standard_normal((200, 400)) + label_N[:, None]
    low_S, high_S = bootstrap_auroc(values_NS, label_N, np.arange(200))
    assert 0.9 < ((low_S <= truth) & (truth <= high_S)).mean() < 0.98


@pytest.mark.parametrize("levels", [4, 10**6])
@pytest.mark.parametrize("shift", [0.0, 0.6])
def test_p_is_that_of_sampled_permutations(levels, shift):
    label_N, block_N = pairs_and_singles(20, 30)
    random = np.random.default_rng(2)
    values_N = random.standard_normal(len(label_N)) + shift * label_N
    values_N = np.floor(scipy.stats.norm.cdf(values_N) * levels)
    (p,) = permutation_p(values_N[:, None], label_N, block_N)
    singles = np.flatnonzero(~np.isin(block_N, block_N[_has_partner(block_N)]))
    blocks = [np.flatnonzero(block_N == b) for b in np.unique(block_N[_has_partner(block_N)])]
    rank_N = scipy.stats.rankdata(values_N)
    observed = rank_N[label_N].sum()
    sums = []
    for _ in range(20_000):
        permuted_N = label_N.copy()
        for block in (*blocks, singles):
            permuted_N[block] = random.permutation(label_N[block])
        sums.append(rank_N[permuted_N].sum())
    # The normal tail stands for half of what is exactly as large.
    want = np.mean(np.array(sums) > observed) + 0.5 * np.mean(np.array(sums) == observed)
    assert p == pytest.approx(want, abs=0.012)


def _has_partner(block_N):
    _, inverse_N, counts_K = np.unique(block_N, return_inverse=True, return_counts=True)
    return counts_K[inverse_N] == 2


def test_p_is_uniform_without_an_effect_although_pairs_share_a_nuisance():
    label_N, block_N = pairs_and_singles(60, 40)
    random = np.random.default_rng(3)
    shared = 3 * random.standard_normal((block_N.max() + 1, 2000))
    p_S = permutation_p(random.standard_normal((160, 2000)) + shared[block_N], label_N, block_N)
    assert scipy.stats.kstest(p_S, "uniform").pvalue > 0.01


def test_p_follows_blocks_and_not_the_classes_alone():
    # 40 pairs in order, by less than pairs are apart: certain within pairs, lost among rows.
    label_N = np.tile([True, False], 40)
    pair_N = np.repeat(np.arange(40), 2)
    values_NS = (10.0 * pair_N + label_N)[:, None]
    assert permutation_p(values_NS, label_N, pair_N)[0] < 1e-6
    assert permutation_p(values_NS, label_N, np.arange(80))[0] > 0.4
    assert permutation_p(-values_NS, label_N, pair_N)[0] > 1 - 1e-6


def test_p_where_there_is_nothing_to_permute():
    ones_NS = np.ones((6, 1))
    label_N = np.tile([True, False], 3)
    assert permutation_p(ones_NS, label_N, np.arange(6)).tolist() == [1.0]
    assert np.isnan(permutation_p(ones_NS, np.ones(6, bool), np.arange(6))).all()
    assert np.isnan(permutation_p(ones_NS[:0], label_N[:0], np.arange(0))).all()


@given(arrays(np.float64, st.integers(0, 40), elements=st.floats(0, 1)), SEEDS)
def test_q_is_that_of_benjamini_and_hochberg(p_S, seed):
    missing_S = np.random.default_rng(seed).random(len(p_S)) < 0.2
    q_S = benjamini_hochberg(np.where(missing_S, np.nan, p_S))
    assert np.array_equal(np.isnan(q_S), missing_S)
    if not missing_S.all():
        want_S = scipy.stats.false_discovery_control(p_S[~missing_S])
        np.testing.assert_allclose(q_S[~missing_S], want_S, rtol=1e-12)


def test_a_thousand_heads_have_no_luck_and_planted_ones_are_found():
    label_N = np.tile([True, False], 100)
    block_N = np.repeat(np.arange(100), 2)
    seeds_with_luck, false, found = 0, 0, []
    for seed in range(40):
        random = np.random.default_rng(seed)
        values_NS = random.standard_normal((200, 1010)) + random.standard_normal((100, 1))[block_N]
        null_NS = values_NS[:, :1000]
        lucky_S = benjamini_hochberg(permutation_p(null_NS, label_N, block_N)) < 0.05
        seeds_with_luck += bool(lucky_S.any())
        # Without the correction, a twentieth of them would be called found.
        assert (permutation_p(null_NS, label_N, block_N) < 0.05).sum() > 20
        values_NS[label_N, 1000:] += 1.0
        q_S = benjamini_hochberg(permutation_p(values_NS, label_N, block_N))
        found.append((q_S[1000:] < 0.05).mean())
        false += int((q_S[:1000] < 0.05).sum())
    assert seeds_with_luck <= 5
    assert np.mean(found) > 0.95
    assert false / (false + 10 * sum(found)) < 0.08


@given(seed=SEEDS, num_rows=st.integers(1, 60), num_bins=st.integers(1, 40))
def test_histograms_are_those_of_numpy(seed, num_rows, num_bins):
    random = np.random.default_rng(seed)
    values_NS = (100 * random.standard_normal((num_rows, 3))).astype(np.float32)
    values_NS[:, 2] = 5
    label_N = random.random(num_rows) < 0.5
    got = histograms(values_NS, label_N, num_bins)
    for site in range(3):
        start, stop = got.start_S[site], got.stop_S[site]
        assert (start, stop) == (values_NS[:, site].min(), values_NS[:, site].max())
        for label, counts_SB in ((True, got.positive_SB), (False, got.negative_SB)):
            chosen_N = values_NS[label_N == label, site].astype(np.float64)
            if start == stop:
                assert counts_SB[site].tolist() == [len(chosen_N)] + [0] * (num_bins - 1)
            else:
                want_B, _ = np.histogram(chosen_N, num_bins, (start, stop))
                assert counts_SB[site].tolist() == want_B.tolist()


def test_histograms_without_rows_have_no_range():
    got = histograms(np.zeros((0, 2), np.float32), np.zeros(0, bool))
    assert np.isnan([got.start_S, got.stop_S]).all()
    assert got.positive_SB.shape == got.negative_SB.shape == (2, 40)
    assert not got.positive_SB.any()


def test_cosines_are_of_each_site():
    layout = StreamLayout("z", 4, (3, 5), 6, "float32", 32, num_heads=2)
    a_LW = np.array([[1, 0, 0, 1, 1, 0], [0, 2, 0, 0, 0, 0]], np.float32)
    b_LW = np.array([[3, 0, 0, 0, -4, 0], [0, -1, 0, 1, 0, 0]], np.float32)
    got_S = site_cosines(a_LW, b_LW, layout)
    np.testing.assert_allclose(got_S, [1, -np.sqrt(0.5), -1, np.nan])
    whole = StreamLayout("resid_post", 4, (3, 5), 6, "float32", 32)
    assert site_cosines(a_LW, b_LW, whole)[0] == pytest.approx(-1 / np.sqrt(3) / 5)


@pytest.mark.parametrize("paired", [True, False])
def test_tokens_of_one_prompt_are_no_more_evidence_than_the_prompt(paired):
    """Without an effect p is small as seldom with 20 tokens a prompt as with one."""
    num_prompts, num_tokens, num_sites = 40, 20, 400
    random = np.random.default_rng(0)
    prompt_N = np.repeat(np.arange(num_prompts), num_tokens)
    label_N = prompt_N % 2 == 0
    # What the tokens of a prompt share is nearly all there is of them.
    of_prompt_PS = random.standard_normal((num_prompts, num_sites))
    values_NS = of_prompt_PS[prompt_N] + 0.1 * random.standard_normal((len(prompt_N), num_sites))
    block_N = prompt_N // 2 if paired else prompt_N
    p_S = permutation_p(values_NS, label_N, block_N)
    assert 0.01 < (p_S < 0.05).mean() < 0.1
    # And an effect is found.
    assert (permutation_p(values_NS + 3 * label_N[:, None], label_N, block_N) < 0.001).all()
