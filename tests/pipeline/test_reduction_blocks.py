"""Blocks, pair streams and cross sums: what belongs together stays together, and the order and the
cuts in which rows come change nothing.

Shapes: N samples, P pairs, A rows, R rows of a shard, W width, H heads, D width of a site.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pipeline.reduction.components import PairStream
from pipeline.reduction.crossing import CrossSum
from pipeline.reduction.moments import CrossMoments
from pipeline.reduction.samples import Blocks
from pipeline.reduction.sources import drawn_blocks

SEEDS = st.integers(0, 2**32 - 1)


def index_of(pair_N, label_N, split_N, prompt_N=None):
    columns = {"pair": pair_N, "label": label_N, "split": split_N}
    if prompt_N is not None:
        columns["prompt_id"] = prompt_N
    return pa.table(columns)


@given(num_pairs=st.integers(1, 60), num_alone=st.integers(0, 60), seed=SEEDS)
def test_halves_and_shuffled_labels_are_whole_and_balanced(num_pairs, num_alone, seed):
    """Of pairs, and of samples without one by class; in every split."""
    random = np.random.default_rng(seed)
    pair_N = [f"p{n // 2}" for n in range(2 * num_pairs)] + [None] * num_alone
    label_N = np.array([n % 2 == 0 for n in range(2 * num_pairs)] + [False] * num_alone)
    label_N[2 * num_pairs :] = random.random(num_alone) < 0.5
    train_P = random.random(num_pairs) < 0.5
    train_N = np.concatenate([np.repeat(train_P, 2), random.random(num_alone) < 0.5])
    split_N = np.where(train_N, "train", "test")
    blocks = Blocks.of(index_of(pair_N, label_N, split_N, [str(n) for n in range(len(label_N))]))
    for pair in range(num_pairs):
        first, second = 2 * pair, 2 * pair + 1
        assert blocks.block_N[first] == blocks.block_N[second]
        assert blocks.half_N[first] == blocks.half_N[second]
        assert blocks.shuffled_N[first] != blocks.shuffled_N[second]
    assert len(np.unique(blocks.block_N)) == num_pairs + num_alone
    turned_N = blocks.shuffled_N != label_N
    paired_N = np.arange(len(label_N)) < 2 * num_pairs
    for in_split_N in (train_N, ~train_N):
        groups = [in_split_N & paired_N & label_N]
        groups += [in_split_N & ~paired_N & (label_N == label) for label in (True, False)]
        for group_N in groups:
            size = group_N.sum()
            assert blocks.half_N[group_N].sum() == size // 2
            # Of every four, the third and the fourth are turned: one in each half.
            assert abs(turned_N[group_N].sum() - size / 2) <= 1


def test_another_order_of_the_index_gives_the_same_halves():
    names = [f"p{n // 2}" for n in range(40)]
    labels, splits = np.arange(40) % 2 == 0, np.full(40, "train")
    plain = Blocks.of(index_of(names, labels, splits))
    order = np.random.default_rng(0).permutation(40)
    other = Blocks.of(index_of([names[n] for n in order], labels[order], splits))
    assert np.array_equal(other.half_N, plain.half_N[order])
    assert np.array_equal(other.shuffled_N, plain.shuffled_N[order])
    assert 0 < plain.half_N.sum() < 40


def test_without_names_each_entry_is_a_block():
    blocks = Blocks.of(pa.table({"label": [True, False] * 4, "split": ["train"] * 8}))
    assert len(np.unique(blocks.block_N)) == 8
    assert blocks.half_N.sum() == 4


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=20), most=st.integers(0, 60))
def test_drawn_samples_are_whole_blocks_and_no_more_than_asked_for(sizes, most):
    block_N = np.repeat(np.arange(len(sizes)), sizes)
    chosen_N = np.ones(len(block_N), np.bool_)
    drawn_N = drawn_blocks(block_N, chosen_N, most)
    assert drawn_N.sum() <= max(most, 0)
    for block in range(len(sizes)):
        assert len(set(drawn_N[block_N == block])) == 1
    if len(block_N) <= most:
        assert drawn_N.all()
    elif most >= max(sizes):
        assert drawn_N.sum() > most - max(sizes)


@given(
    seed=SEEDS,
    num_rows=st.integers(1, 40),
    num_pairs=st.integers(0, 40),
    rows_per_shard=st.integers(1, 12),
)
def test_a_pair_stream_gives_every_difference_once(seed, num_rows, num_pairs, rows_per_shard):
    """However shards cut the pairs; rows may be in several pairs, also on both sides of one."""
    random = np.random.default_rng(seed)
    values_AW = random.standard_normal((num_rows, 3)).astype(np.float32)
    positive_P, negative_P = random.integers(0, num_rows, (2, num_pairs))
    stream = PairStream(positive_P, negative_P)
    found = {}
    for start in range(0, num_rows, rows_per_shard):
        rows = range(start, min(start + rows_per_shard, num_rows))
        for pairs_Q, differences_QW in stream.feed(rows, values_AW[rows.start : rows.stop]):
            for pair, difference_W in zip(pairs_Q, differences_QW, strict=True):
                assert pair not in found
                found[pair] = difference_W
    assert sorted(found) == list(range(num_pairs))
    want_PW = values_AW[positive_P].astype(np.float64) - values_AW[negative_P]
    for pair, difference_W in found.items():
        assert np.array_equal(difference_W, want_PW[pair])
    assert stream.num_held == 0


@given(
    seed=SEEDS,
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    cut=st.integers(0, 40),
    offset=st.sampled_from([0.0, 300.0, -3e4]),
)
def test_a_cross_sum_is_the_cross_moments_of_the_repeated_rows(seed, counts, cut, offset):
    counts_R = np.array(counts)
    values_RHD = np.random.default_rng(seed).standard_normal((len(counts), 2, 3)) + offset
    values_RHD = values_RHD.astype(np.float32)
    total = CrossSum(2, 3, "cpu")
    total.add(values_RHD[:cut], counts_R[:cut])
    total.add(values_RHD[cut:], counts_R[cut:])
    got, want = total.moments(), CrossMoments.of(np.repeat(values_RHD, counts_R, axis=0))
    assert got.count == want.count
    np.testing.assert_allclose(got.mean_HD, want.mean_HD, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(got.m2_HDD, want.m2_HDD, rtol=1e-9, atol=1e-7)


def test_a_cross_sum_of_nothing_is_neutral():
    empty = CrossSum(2, 3, "cpu").moments()
    assert empty.count == 0
    full = CrossMoments.of(np.random.default_rng(0).standard_normal((5, 2, 3)))
    assert empty.merge(full) is full


def test_a_split_of_other_prompts_is_not_drawn():
    block_N, chosen_N = np.arange(10), np.arange(10) < 4
    assert not (drawn_blocks(block_N, chosen_N, 3) & ~chosen_N).any()
