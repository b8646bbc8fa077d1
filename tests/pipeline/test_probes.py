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
from pipeline.reduction.probes import fit_probes


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
