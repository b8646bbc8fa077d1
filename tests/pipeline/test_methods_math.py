"""Methods as arithmetic: what each finds in rows whose truth is known, where METHODS says that they
agree, and the controls that they are compared with.

Shapes: N rows, P pairs, L layers, W width of a stream, H heads, D width of a site.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InvalidInput
from pipeline.reduction.components import pca_of_pairs, sign_by_pairs
from pipeline.reduction.directions import (
    difference_of_means,
    match_norms,
    paired_difference,
    random_direction,
    random_directions,
    scaled_to,
    site_names,
    split_heads,
    whitened_difference,
)
from pipeline.reduction.moments import CrossMoments, Moments
from pipeline.reduction.pairs import pair_order
from pipeline.reduction.probes import fit_probes
from pipeline.reduction.scores import auroc
from steering_service.core.direction import Direction
from steering_service.core.site import Site
from store.layout import StreamLayout

SEEDS = st.integers(0, 2**32 - 1)
HEADS = StreamLayout("z", 10, (1, 4, 5), 12, "float32", 32, num_heads=3)
WHOLE = StreamLayout("resid_post", 10, (1, 4, 5), 12, "float32", 32)


def cosine(a_D, b_D) -> float:
    return float(a_D @ b_D / np.linalg.norm(a_D) / np.linalg.norm(b_D))


def lda(positive_ND, negative_ND, shrinkage):
    moments = [CrossMoments.of(rows_ND[:, None]) for rows_ND in (positive_ND, negative_ND)]
    return whitened_difference(*moments, shrinkage)[0]


def found_by_every_method(positive_PD, negative_PD):
    """Unit directions by the name of the method; + is the positive class."""
    differences_PD = positive_PD - negative_PD
    names = tuple(f"{number}/0" for number in range(len(positive_PD)))
    component_D = pca_of_pairs(differences_PD, pair_order(names, 0))
    sign = sign_by_pairs((positive_PD @ component_D)[:, None], (negative_PD @ component_D)[:, None])
    rows_ND = np.concatenate([positive_PD, negative_PD])
    label_N = np.arange(len(rows_ND)) < len(positive_PD)
    found = {
        "difference_of_means": difference_of_means(
            Moments.of(positive_PD), Moments.of(negative_PD)
        ),
        "paired_difference": paired_difference(Moments.of(differences_PD)),
        "pca": sign[0] * component_D,
        "probe": fit_probes(rows_ND[None], label_N, l2=1.0).weights_SD[0],
        "lda": lda(positive_PD, negative_PD, 0.1),
    }
    return {name: vector_D / np.linalg.norm(vector_D) for name, vector_D in found.items()}


def test_methods_agree_where_the_noise_is_round():
    # METHODS 3: with the order shuffled, PCA recovers the mean difference, .99; LDA's whitening
    # and a probe's weights differ from it only where the noise is not round.
    random = np.random.default_rng(0)
    truth_D = np.linalg.qr(random.standard_normal((32, 1)))[0][:, 0]
    shared_PD = random.standard_normal((2000, 32))
    positive_PD = shared_PD + 0.5 * random.standard_normal((2000, 32)) + 1.5 * truth_D
    negative_PD = shared_PD + 0.5 * random.standard_normal((2000, 32)) - 1.5 * truth_D
    found = found_by_every_method(positive_PD, negative_PD)
    for name, vector_D in found.items():
        assert cosine(vector_D, truth_D) > 0.97, name
    np.testing.assert_allclose(found["paired_difference"], found["difference_of_means"], atol=1e-6)


def test_methods_part_where_the_noise_is_not_round():
    # A nuisance along which the classes differ a little and rows differ very much: the mean
    # difference leans into it, whitening and a probe discount it.
    random = np.random.default_rng(1)
    basis_DD = np.linalg.qr(random.standard_normal((16, 16)))[0]
    truth_D, nuisance_D = basis_DD[0], basis_DD[1]

    def rows(sign):
        noise_PD = random.standard_normal((2000, 16))
        noise_PD += 10 * random.standard_normal((2000, 1)) * nuisance_D
        return noise_PD + sign * (truth_D + nuisance_D)

    positive_PD, negative_PD = rows(1), rows(-1)
    found = found_by_every_method(positive_PD, negative_PD)
    held_PD = np.concatenate([rows(1), rows(-1)])
    label_N = np.arange(4000) < 2000
    area = {
        name: float(auroc((held_PD @ vector_D)[:, None], label_N)[0])
        for name, vector_D in found.items()
    }
    for name in ("lda", "probe"):
        assert cosine(found[name], truth_D) > 0.95
        assert area[name] > area["difference_of_means"] + 0.2
    assert cosine(found["lda"], found["probe"]) > 0.98
    assert cosine(found["difference_of_means"], truth_D) < 0.8


def test_pair_order_trap_of_the_methods_document():
    # METHODS 3, its figures: fixed order |cos| .02, shuffled .99, pooled PCA .80, means .99.
    random = np.random.default_rng(2)
    truth_D, nuisance_D = np.linalg.qr(random.standard_normal((64, 2)))[0].T
    shared_PD = 0.3 * random.standard_normal((4000, 64))
    sides = []
    for sign in (1, -1):
        along_P1 = random.standard_normal((4000, 1))
        noise_PD = 0.1 * random.standard_normal((4000, 64)) + 1.2 * along_P1 * nuisance_D
        sides.append(shared_PD + noise_PD + sign * truth_D)
    positive_PD, negative_PD = sides
    differences_PD = positive_PD - negative_PD
    fixed_D = pca_of_pairs(differences_PD, np.ones(4000))
    found = found_by_every_method(positive_PD, negative_PD)
    assert abs(cosine(fixed_D, truth_D)) < 0.05
    assert abs(cosine(fixed_D, found["difference_of_means"])) < 0.05
    assert abs(cosine(fixed_D, nuisance_D)) > 0.95
    assert cosine(found["pca"], truth_D) > 0.95
    for name in ("difference_of_means", "paired_difference", "lda", "probe"):
        assert cosine(found[name], truth_D) > 0.95, name
        assert cosine(found[name], found["pca"]) > 0.95, name


@given(SEEDS, st.integers(2, 12), st.integers(1, 12), st.floats(0.05, 1))
def test_whitened_difference_by_hand(seed, num_rows, width, shrinkage):
    random = np.random.default_rng(seed)
    positive_ND = random.standard_normal((num_rows + 1, width)) * 3 + 1
    negative_ND = random.standard_normal((num_rows, width)) @ random.standard_normal((width, width))
    got_D = lda(positive_ND, negative_ND, shrinkage)
    # Each class's covariance weighted by its share of the rows: the same pooled matrix, made of
    # the rows themselves.
    covariance_DD = np.zeros((width, width))
    for rows_ND in (positive_ND, negative_ND):
        centred_ND = rows_ND - rows_ND.mean(axis=0)
        covariance_DD += centred_ND.T @ centred_ND / (2 * num_rows + 1)
    shrunk_DD = (1 - shrinkage) * covariance_DD
    shrunk_DD += shrinkage * np.trace(covariance_DD) / width * np.eye(width)
    want_D = np.linalg.inv(shrunk_DD) @ (positive_ND.mean(axis=0) - negative_ND.mean(axis=0))
    np.testing.assert_allclose(got_D, want_D / np.linalg.norm(want_D), atol=1e-6)


@given(SEEDS, st.floats(1e-6, 1e6))
def test_whitening_does_not_depend_on_the_unit_of_activations(seed, unit):
    random = np.random.default_rng(seed)
    positive_ND, negative_ND = random.standard_normal((2, 6, 8))
    expected_D = lda(positive_ND, negative_ND, 0.1)
    np.testing.assert_allclose(
        lda(unit * positive_ND, unit * negative_ND, 0.1), expected_D, atol=1e-6
    )


def test_whitening_at_its_ends():
    random = np.random.default_rng(0)
    positive_ND, negative_ND = random.standard_normal((2, 4, 9))
    difference_D = positive_ND.mean(axis=0) - negative_ND.mean(axis=0)
    assert cosine(lda(positive_ND, negative_ND, 1.0), difference_D) == pytest.approx(1)
    with pytest.raises(InvalidInput, match=r"raise reduce\.shrinkage"):
        lda(positive_ND, negative_ND, 0.0)
    for shrinkage in (-0.1, 1.1, float("nan")):
        with pytest.raises(InvalidInput, match="from 0 to 1") as caught:
            lda(positive_ND, negative_ND, shrinkage)
        assert caught.value.kind == "shrinkage"
    ones_ND = np.ones((3, 4))
    assert not lda(ones_ND, ones_ND, 0.1).any()
    # Nothing varies within the classes: nothing to whiten with.
    np.testing.assert_allclose(lda(2 * ones_ND, ones_ND, 0.1), [0.5] * 4)
    positive_ND[0, 0] = np.nan
    assert np.isnan(lda(positive_ND, negative_ND, 0.1)).all()


@given(SEEDS, st.sampled_from([HEADS, WHOLE]))
def test_vectors_scaled_to_the_norms_of_others(seed, layout):
    random = np.random.default_rng(seed)
    vectors_LW, reference_LW = random.standard_normal((2, 3, 12)).astype(np.float32)
    vectors_LW[2] = 0
    reference_LW[1] = 0
    got_LHD = split_heads(scaled_to(vectors_LW, reference_LW, layout), layout)
    norms_LH = np.linalg.norm(got_LHD, axis=-1)
    want_LH = np.linalg.norm(split_heads(reference_LW, layout), axis=-1)
    np.testing.assert_allclose(norms_LH[0], want_LH[0], rtol=1e-5)
    assert not norms_LH[1:].any()
    for got_D, vector_D in zip(got_LHD[0], split_heads(vectors_LW, layout)[0], strict=True):
        assert cosine(got_D, vector_D) == pytest.approx(1, abs=1e-6)


@given(st.integers(0, 1000))
def test_random_directions_are_of_their_site_and_seed(seed):
    got_LW = random_directions(HEADS, seed)
    heads_LHD = split_heads(got_LW, HEADS)
    np.testing.assert_allclose(np.linalg.norm(heads_LHD, axis=-1), 1, rtol=1e-6)
    sites = list(site_names({"z": HEADS}))
    for site, vector_D in zip(sites, heads_LHD.reshape(-1, 4), strict=True):
        np.testing.assert_allclose(vector_D, random_direction(site, 4, seed), atol=1e-7)
    fewer = StreamLayout("z", 10, (4,), 12, "float32", 32, num_heads=3)
    assert np.array_equal(random_directions(fewer, seed)[0], got_LW[1])
    assert not np.array_equal(random_directions(HEADS, seed + 1), got_LW)
    assert random_directions(WHOLE, seed).shape == (3, 12)


def test_random_directions_lean_nowhere():
    vectors_SD = np.stack([random_direction(Site("z", 0, h), 16, 0) for h in range(2000)])
    assert np.abs(vectors_SD.mean(axis=0)).max() < 0.03
    np.testing.assert_allclose(vectors_SD.T @ vectors_SD / 2000, np.eye(16) / 16, atol=0.01)


def direction_of(seed: int, width: int = 8, layer: int = 3) -> Direction:
    vector_D = (seed + 1) * np.random.default_rng(seed).standard_normal(width)
    scores, lineage = {"auroc_test": 0.9}, {"reduction": f"r{seed}"}
    site = Site("resid_post", layer)
    return Direction(site, vector_D, 2.0, 7.0, "difference_of_means", scores, lineage)


def test_behaviours_at_one_site_get_the_mean_of_their_norms():
    whole = [direction_of(seed) for seed in range(3)]
    matched = match_norms(whole)
    mean = np.mean([direction.norm for direction in whole])
    for before, after in zip(whole, matched, strict=True):
        assert after.norm == pytest.approx(mean, rel=1e-6)
        np.testing.assert_allclose(after.unit_D, before.unit_D, atol=1e-6)
        assert (after.sigma, after.scores) == (before.sigma, before.scores)
        step = after.lineage["steps"][-1]
        assert step["operation"] == "match_norms"
        assert step["of"] == [direction.digest for direction in whole]
        assert step["norms"] == [direction.norm for direction in whole]
        assert step["result"] == after.digest
        assert set(after.lineage["sources"]) == {direction.digest for direction in whole}
    for wrong in ([], [direction_of(0), direction_of(1, layer=4)], [whole[0], direction_of(1, 5)]):
        with pytest.raises(InvalidInput, match="several behaviours at one site") as caught:
            match_norms(wrong)
        assert caught.value.kind == "norms"
