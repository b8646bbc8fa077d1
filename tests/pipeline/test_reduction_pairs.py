"""Pairs and components: which rows belong together, the order within each, and what the principal
component of their differences finds in either order.

Shapes: N rows or differences, P pairs, D width, H heads, S sites.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.reduction.components import first_component, pca_of_pairs, sign_by_pairs
from pipeline.reduction.moments import CrossMoments
from pipeline.reduction.pairs import find_pairs, pair_order
from pipeline.reduction.scores import pair_accuracy

SEEDS = st.integers(0, 2**32 - 1)


def cosine(a_D, b_D) -> float:
    return float(a_D @ b_D / np.linalg.norm(a_D) / np.linalg.norm(b_D))


def nuisance_pairs(seed: int, num_pairs: int, width: int):
    """Differences with mean 3 along one axis, and much nuisance along another."""
    random = np.random.default_rng(seed)
    basis_DD = np.linalg.qr(random.standard_normal((width, width)))[0]
    differences_ND = 0.5 * random.standard_normal((num_pairs, width)) @ basis_DD
    differences_ND += 3 * basis_DD[0] + 2 * random.standard_normal((num_pairs, 1)) * basis_DD[1]
    return differences_ND, basis_DD[0]


def test_the_trap_of_a_fixed_pair_order():
    differences_ND, mean_D = nuisance_pairs(0, 500, 32)
    fixed_D = pca_of_pairs(differences_ND, np.ones(500))
    assert abs(cosine(fixed_D, mean_D)) < 0.1
    names = tuple(f"{number}/0" for number in range(500))
    for seed in range(5):
        shuffled_D = pca_of_pairs(differences_ND, pair_order(names, seed))
        assert abs(cosine(shuffled_D, mean_D)) > 0.95
        assert np.linalg.norm(shuffled_D) == pytest.approx(1)


@given(seed=SEEDS, num_pairs=st.integers(2, 40), width=st.integers(1, 8))
def test_pca_of_pairs_is_the_first_right_singular_vector(seed, num_pairs, width):
    random = np.random.default_rng(seed)
    differences_ND = random.standard_normal((num_pairs, width)) + 2
    signs_N = random.choice([-1.0, 1.0], num_pairs)
    got_D = pca_of_pairs(differences_ND, signs_N)
    ordered_ND = differences_ND * signs_N[:, None]
    centred_ND = ordered_ND - ordered_ND.mean(axis=0)
    most = np.linalg.svd(centred_ND, compute_uv=False)[0]
    assert np.linalg.norm(centred_ND @ got_D) == pytest.approx(most, rel=1e-9)


def test_nothing_that_varies_has_no_component():
    assert (pca_of_pairs(np.ones((6, 4)), np.ones(6)) == 0).all()
    assert (first_component(np.zeros((3, 3))) == 0).all()


@given(seed=SEEDS, cuts=st.lists(st.integers(0, 50), max_size=4))
def test_cross_moments_of_any_split_are_those_of_the_whole(seed, cuts):
    rows_NHD = np.random.default_rng(seed).standard_normal((50, 2, 3)) + 100
    merged = CrossMoments.empty(2, 3)
    for part_NHD in np.split(rows_NHD, sorted(cuts)):
        merged = merged.merge(CrossMoments.of(part_NHD))
    assert merged.count == 50
    np.testing.assert_allclose(merged.mean_HD, rows_NHD.mean(axis=0), rtol=1e-12)
    for head in range(2):
        want_DD = np.cov(rows_NHD[:, head].T, ddof=0) * 50
        np.testing.assert_allclose(merged.m2_HDD[head], want_DD, rtol=1e-9, atol=1e-9)


@given(names=st.sets(st.text(max_size=5), max_size=30), seed=st.integers(0, 99))
def test_half_of_the_pairs_are_turned_and_their_order_does_not_matter(names, seed):
    ordered = tuple(sorted(names))
    signs_P = pair_order(ordered, seed)
    assert (signs_P == -1).sum() == len(names) // 2
    assert set(signs_P) <= {1.0, -1.0}
    backwards_P = pair_order(ordered[::-1], seed)
    assert np.array_equal(backwards_P[::-1], signs_P)


def test_another_seed_turns_other_pairs():
    names = tuple(map(str, range(64)))
    assert not np.array_equal(pair_order(names, 0), pair_order(names, 1))


def test_the_sign_is_that_of_most_pairs_and_plus_on_a_tie():
    positive_PS = np.array([[1, 1, 5, 0], [1, 1, -1, 0], [1, -9, -1, 0]], np.float32)
    assert sign_by_pairs(positive_PS, np.zeros((3, 4), np.float32)).tolist() == [1, 1, -1, 1]
    assert sign_by_pairs(positive_PS[1:], np.zeros((2, 4), np.float32)).tolist() == [1, 1, -1, 1]


def test_pair_accuracy_by_hand():
    positive_PS = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0], [5.0, 0.0]])
    negative_PS = np.array([[0.0, 0.0], [2.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    assert pair_accuracy(positive_PS, negative_PS).tolist() == [2.5 / 4, 0.5 / 4]
    assert np.isnan(pair_accuracy(positive_PS[:0], negative_PS[:0])).all()


@given(seed=SEEDS, num_rows=st.integers(0, 40))
def test_pairs_are_of_one_name_and_two_labels_each_row_once(seed, num_rows):
    random = np.random.default_rng(seed)
    pair_N = random.choice(["a", "b", "c", "d", "e", None], num_rows)
    label_N = random.random(num_rows) < 0.5
    chosen_N = random.random(num_rows) < 0.8
    index = pa.table({"pair": pa.array(pair_N, pa.string()), "label": pa.array(label_N)})
    pairs = find_pairs(index, chosen_N)
    rows = [*pairs.positive_P, *pairs.negative_P]
    assert sorted([*rows, *pairs.unpaired]) == np.flatnonzero(chosen_N).tolist()
    assert label_N[pairs.positive_P].all()
    assert not label_N[pairs.negative_P].any()
    assert len(set(pairs.names)) == len(pairs)
    for positive, negative, name in zip(
        pairs.positive_P, pairs.negative_P, pairs.names, strict=True
    ):
        assert pair_N[positive] == pair_N[negative] == name.split("/")[0]
    for name in "abcde":
        of_N = chosen_N & (pair_N == name)
        fewer = min((of_N & label_N).sum(), (of_N & ~label_N).sum())
        assert sum(item.startswith(name) for item in pairs.names) == fewer
