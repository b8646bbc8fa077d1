"""Probes: the batched fit has the minimum of its objective, as other solvers find it, and stays
finite where the classes can be separated.

Shapes: S sites, N rows, D width.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InvalidInput
from pipeline.reduction.probes import fit_counted_probes, fit_probes


def overlapping(seed, num_sites, num_rows, width, *, apart=0.6):
    """Classes that overlap, features of unequal scale, far from zero, and correlated."""
    random = np.random.default_rng(seed)
    label_N = random.random(num_rows) < 0.4
    label_N[:2] = [True, False]
    mixing_SDD = random.standard_normal((num_sites, width, width))
    features_SND = random.standard_normal((num_sites, num_rows, width)) @ mixing_SDD
    features_SND[:, label_N] += apart * random.standard_normal((num_sites, 1, width))
    return features_SND * np.geomspace(1e-2, 1e2, width) + 30, label_N


def objective(theta_E, features_ND, label_N, l2):
    """Value and gradient over standardised features, written down once more."""
    standard_ND = (features_ND - features_ND.mean(axis=0)) / features_ND.std(axis=0)
    sign_N = np.where(label_N, 1.0, -1.0)
    margin_N = sign_N * (standard_ND @ theta_E[:-1] + theta_E[-1])
    value = np.logaddexp(0, -margin_N).sum() + 0.5 * l2 * theta_E[:-1] @ theta_E[:-1]
    pull_N = -sign_N / (1 + np.exp(margin_N))
    gradient_E = np.append(standard_ND.T @ pull_N + l2 * theta_E[:-1], pull_N.sum())
    return value, gradient_E


@pytest.mark.parametrize("l2", [0.01, 1.0, 30.0])
@pytest.mark.parametrize(("num_rows", "width"), [(300, 12), (20, 12), (15, 40)])
def test_the_fit_is_the_minimum_that_scipy_finds(num_rows, width, l2):
    features_SND, label_N = overlapping(3, 4, num_rows, width)
    probes = fit_probes(features_SND, label_N, l2=l2)
    for features_ND, weights_D, intercept in zip(
        features_SND, probes.weights_SD, probes.intercept_S, strict=True
    ):
        found = scipy.optimize.minimize(
            objective,
            np.zeros(width + 1),
            (features_ND, label_N, l2),
            jac=True,
            method="L-BFGS-B",
            options={"ftol": 1e-16, "gtol": 1e-10, "maxiter": 20_000, "maxfun": 40_000},
        )
        scale_D = features_ND.std(axis=0)
        np.testing.assert_allclose(weights_D * scale_D, found.x[:-1], atol=1e-6)
        at_mean = intercept + weights_D @ features_ND.mean(axis=0)
        assert at_mean == pytest.approx(found.x[-1], abs=1e-6)
        ours = np.append(weights_D * scale_D, at_mean)
        _, gradient_E = objective(ours, features_ND, label_N, l2)
        np.testing.assert_allclose(gradient_E, 0, atol=1e-7)


def test_the_fit_is_that_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    features_SND, label_N = overlapping(5, 3, 200, 10)
    probes = fit_probes(features_SND, label_N, l2=0.5)
    for features_ND, weights_D, intercept in zip(
        features_SND, probes.weights_SD, probes.intercept_S, strict=True
    ):
        mean_D, scale_D = features_ND.mean(axis=0), features_ND.std(axis=0)
        model = linear_model.LogisticRegression(C=2.0, solver="newton-cholesky", tol=1e-12)
        model.fit((features_ND - mean_D) / scale_D, label_N)
        np.testing.assert_allclose(weights_D * scale_D, model.coef_[0], atol=1e-6)
        assert intercept + weights_D @ mean_D == pytest.approx(model.intercept_[0], abs=1e-6)


@pytest.mark.parametrize("l2", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("num_rows", [8, 100])
def test_separable_classes_do_not_diverge(num_rows, l2):
    features_SND, label_N = overlapping(1, 2, num_rows, 20)
    features_SND[:, label_N, 3] += 1e4
    probes = fit_probes(features_SND, label_N, l2=l2)
    assert np.isfinite(probes.weights_SD).all()
    logits_SN = np.einsum("snd,sd->sn", features_SND, probes.weights_SD)
    logits_SN += probes.intercept_S[:, None]
    assert ((logits_SN > 0) == label_N).all()
    for features_ND, weights_D, intercept in zip(
        features_SND, probes.weights_SD, probes.intercept_S, strict=True
    ):
        scaled = np.append(
            weights_D * features_ND.std(axis=0), intercept + weights_D @ features_ND.mean(axis=0)
        )
        _, gradient_E = objective(scaled, features_ND, label_N, l2)
        # The objective is l2-strongly convex: gradient over l2 bounds the distance to its minimum.
        np.testing.assert_allclose(gradient_E, 0, atol=1e-6 * l2)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), num_rows=st.integers(4, 60), width=st.integers(1, 12))
def test_a_site_does_not_depend_on_the_others_in_the_batch(seed, num_rows, width):
    features_SND, label_N = overlapping(seed, 3, num_rows, width)
    # This one needs many more steps than the others.
    features_SND[1, label_N, 0] += 1e5
    together = fit_probes(features_SND, label_N, l2=1e-3)
    for site in range(3):
        alone = fit_probes(features_SND[site : site + 1], label_N, l2=1e-3)
        scale_D = features_SND[site].std(axis=0)
        np.testing.assert_allclose(
            together.weights_SD[site] * scale_D, alone.weights_SD[0] * scale_D, atol=1e-8
        )


def test_features_that_do_not_vary_get_no_weight():
    features_SND, label_N = overlapping(2, 2, 50, 6)
    want = fit_probes(features_SND[..., 1:], label_N, l2=1.0)
    # 0.1 is not a float64, so its mean over 50 rows is off by rounding.
    features_SND[..., 0] = np.float32(0.1)
    got = fit_probes(features_SND, label_N, l2=1.0)
    assert (got.weights_SD[:, 0] == 0).all()
    np.testing.assert_allclose(got.weights_SD[:, 1:], want.weights_SD, rtol=1e-9)
    still = fit_probes(np.ones((1, 50, 3)), label_N, l2=1.0)
    assert (still.weights_SD == 0).all()
    share = label_N.mean()
    assert still.intercept_S[0] == pytest.approx(np.log(share / (1 - share)))


def test_what_cannot_be_fitted_is_named():
    features_SND, label_N = overlapping(0, 2, 30, 4)
    names = ["z.0.0", "z.0.1"]
    broken = features_SND.copy()
    broken[1, 7, 2] = np.inf
    for features, label, l2, message in (
        (broken, label_N, 1.0, "z.0.1 are not all finite"),
        (features_SND, np.ones(30, bool), 1.0, "both classes need rows"),
        (features_SND, label_N, 0.0, "l2 must be finite and positive"),
        (features_SND, label_N[:9], 1.0, r"features must be \[2, 9, D\]"),
    ):
        with pytest.raises(InvalidInput, match=message) as caught:
            fit_probes(features, label, l2=l2, names=names)
        assert caught.value.kind == "probe_data"
    apart = features_SND.copy()
    apart[:, label_N] += 1e6
    with pytest.raises(InvalidInput, match=r"first z\.0\.0, have not converged") as caught:
        # So weak a term leaves the logits without a bound that float64 can reach.
        fit_probes(apart, label_N, l2=1e-300, names=names)
    assert caught.value.kind == "probe_convergence"


def assert_same_probes(got, want, features_SND, *, rtol):
    """Over standardised features, relative to the largest number of a site's solution."""
    scale_SD = features_SND.astype(np.float64).std(axis=1)
    mean_SD = features_SND.astype(np.float64).mean(axis=1)
    for probes_D, wanted_D, mean_D, scale_D, at, wanted_at in zip(
        got.weights_SD,
        want.weights_SD,
        mean_SD,
        scale_SD,
        got.intercept_S,
        want.intercept_S,
        strict=True,
    ):
        at_mean, wanted_at_mean = at + probes_D @ mean_D, wanted_at + wanted_D @ mean_D
        room = rtol * (1 + max(np.abs(wanted_D * scale_D).max(), abs(wanted_at_mean)))
        np.testing.assert_allclose(probes_D * scale_D, wanted_D * scale_D, rtol=0, atol=room)
        assert at_mean == pytest.approx(wanted_at_mean, abs=room)


@pytest.mark.parametrize("l2", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("apart", [0.0, 0.6, 8.0])
@pytest.mark.parametrize(("num_rows", "width"), [(600, 24), (40, 24), (20, 60)])
def test_float32_features_have_the_answer_of_float64(num_rows, width, apart, l2):
    features_SND, label_N = overlapping(7, 3, num_rows, width, apart=apart)
    features_SND = features_SND.astype(np.float32)
    want = fit_probes(features_SND.astype(np.float64), label_N, l2=l2)
    got = fit_probes(features_SND, label_N, l2=l2)
    assert got.weights_SD.dtype == np.float64
    assert_same_probes(got, want, features_SND, rtol=1e-4)


@pytest.mark.parametrize("factor", [1e-24, 1e25])
def test_what_float32_cannot_hold_is_solved_in_float64(factor):
    features_SND, label_N = overlapping(8, 2, 90, 5)
    features_SND = ((features_SND - 30) * factor).astype(np.float32)
    want = fit_probes(features_SND.astype(np.float64), label_N, l2=1.0)
    got = fit_probes(features_SND, label_N, l2=1.0)
    assert_same_probes(got, want, features_SND, rtol=1e-9)
    assert np.abs(got.weights_SD).min() > 0


def test_float32_features_that_can_be_separated_do_not_diverge():
    features_SND, label_N = overlapping(1, 2, 100, 20)
    features_SND[:, label_N, 3] += 1e4
    features_SND = features_SND.astype(np.float32)
    want = fit_probes(features_SND.astype(np.float64), label_N, l2=1e-6)
    got = fit_probes(features_SND, label_N, l2=1e-6)
    assert_same_probes(got, want, features_SND, rtol=1e-4)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), num_rows=st.integers(4, 200), width=st.integers(1, 40))
def test_a_site_has_the_same_bits_in_any_company(seed, num_rows, width):
    features_SND, label_N = overlapping(seed, 5, num_rows, width)
    features_SND = features_SND.astype(np.float32)
    features_SND[1, label_N, 0] += 1e4
    features_SND[2, :, 0] = 3
    together = fit_probes(features_SND, label_N, l2=0.1, num_threads=3)
    # As a layer's rows lie in memory: head beside head.
    side_by_side = np.ascontiguousarray(features_SND.swapaxes(0, 1)).swapaxes(0, 1)
    for site in range(5):
        for features in (features_SND[site : site + 1].copy(), side_by_side[site : site + 1]):
            alone = fit_probes(features, label_N, l2=0.1)
            np.testing.assert_array_equal(together.weights_SD[site], alone.weights_SD[0])
            assert together.intercept_S[site] == alone.intercept_S[0]


def test_rows_of_float32_count_as_often_as_they_are_told():
    features_SND, label_N = overlapping(4, 2, 80, 6)
    features_SND = features_SND.astype(np.float32)
    times_N = np.random.default_rng(0).integers(1, 4, 80)
    positive_N = np.where(label_N, times_N, 0)
    positive_N[5], negative_N = 1, np.where(label_N, 0, times_N)
    negative_N[5] = 2
    got = fit_counted_probes(features_SND, positive_N, negative_N, l2=0.7)
    row_N = np.repeat(np.arange(80), positive_N + negative_N)
    label = np.concatenate(
        [[True] * p + [False] * n for p, n in zip(positive_N, negative_N, strict=True)]
    )
    repeated = features_SND.astype(np.float64)[:, row_N]
    assert_same_probes(got, fit_probes(repeated, label, l2=0.7), repeated, rtol=1e-4)


def test_a_value_that_is_not_finite_is_named_before_what_does_not_converge():
    features_SND, label_N = overlapping(0, 3, 30, 4)
    features_SND[:, label_N] += 1e6
    for dtype in (np.float32, np.float64):
        broken = features_SND.astype(dtype)
        broken[2, 3, 1] = np.nan
        with pytest.raises(InvalidInput, match="z.2 are not all finite") as caught:
            fit_probes(broken, label_N, l2=1e-300, names=["z.0", "z.1", "z.2"])
        assert caught.value.kind == "probe_data"
