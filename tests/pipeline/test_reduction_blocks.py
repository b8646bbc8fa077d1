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
from pipeline.reduction.samples import Blocks, Samples
from pipeline.reduction.sources import drawn, parts_of

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
            assert abs(turned_N[group_N].sum() - size / 2) <= 0.5


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


def samples_of(block_N, label_N):
    index = pa.table({"label": label_N, "split": ["train"] * len(label_N)})
    blocks = Blocks(block_N, label_N, label_N)
    return Samples(index, np.arange(len(label_N)), len(label_N), 0, blocks)


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=30),
    most=st.integers(1, 60),
    seed=SEEDS,
)
def test_drawn_samples_are_whole_blocks_of_each_kind(sizes, most, seed):
    """About as many as asked for, in proportion; and of every kind that is there at least one."""
    random = np.random.default_rng(seed)
    block_N = np.repeat(np.arange(len(sizes)), sizes)
    kind_B = random.integers(0, 3, len(sizes))
    label_N = np.where(kind_B[block_N] == 2, np.arange(len(block_N)) % 2, kind_B[block_N]) == 1
    samples = samples_of(block_N, label_N)
    chosen_N = random.random(len(block_N)) < 0.9
    drawn_N = drawn(samples, chosen_N, most)
    assert not (drawn_N & ~chosen_N).any()
    assert np.array_equal(drawn_N, drawn(samples, chosen_N, most))
    if chosen_N.sum() <= most:
        assert np.array_equal(drawn_N, chosen_N)
        return
    assert drawn_N.sum() <= most + 3 * 5
    for block in range(len(sizes)):
        assert len(set(drawn_N[(block_N == block) & chosen_N])) <= 1
    for label in (True, False):
        assert drawn_N[chosen_N & (label_N == label)].any() == (chosen_N & (label_N == label)).any()


def test_a_block_larger_than_all_that_is_wanted_is_drawn():
    """Two prompts of many tokens each: a class would be lost otherwise."""
    block_N = np.repeat([0, 1, 2, 3], 100)
    label_N = block_N < 2
    drawn_N = drawn(samples_of(block_N, label_N), np.ones(400, np.bool_), 50)
    assert drawn_N.sum() == 200
    assert drawn_N[label_N].sum() == 100


@given(most=st.integers(1, 100), sizes=st.lists(st.integers(0, 50), min_size=1, max_size=5))
def test_sources_have_their_parts(most, sizes):
    parts = parts_of(most, sizes)
    assert all(part <= size for part, size in zip(parts, sizes, strict=True))
    assert sum(parts) <= max(most, 0) or sum(sizes) <= most
    if sum(sizes) > most:
        assert sum(parts) > most - len(sizes)


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
