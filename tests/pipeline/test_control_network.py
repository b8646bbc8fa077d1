"""The network as it is frozen is the network as it was trained, and its threshold is the best."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.control.network import ControllerNetwork, best_threshold
from steering_service.core.controller import Controller
from steering_service.core.site import Site

READS = [Site("resid_post", 1), Site("z", 2, 3)]
WIDTH, HIDDEN, SITES = 40, 16, 3


def network_of(mean: float = 0.0, spread: float = 1.0) -> tuple[ControllerNetwork, Any]:
    """A random network and [B, R] of what it may read."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    mean_R = (random.standard_normal(WIDTH) * mean + mean).astype(np.float32)
    std_R = (random.uniform(0.5, 2, WIDTH) * spread).astype(np.float32)
    reads_BR = (random.standard_normal((20, WIDTH)) * std_R + mean_R).astype(np.float32)
    return ControllerNetwork(mean_R, std_R, HIDDEN, SITES), reads_BR


def frozen(network: ControllerNetwork, outputs: Any = range(SITES), **options: Any) -> Controller:
    settings: dict[str, Any] = {"threshold": 0.0, "mode": "gated"} | options
    return network.frozen(READS, outputs=outputs, **settings)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


@pytest.mark.parametrize(
    ("mean", "spread", "atol"),
    # Float32 alone rounds a mean of 300 by 1.5e-5, so what is folded cannot be closer than that.
    [(0.0, 1.0, 1e-5), (5.0, 0.1, 1e-4), (30.0, 10.0, 1e-5), (300.0, 1.0, 1e-3)],
)
def test_frozen_it_says_what_the_module_says(mean: float, spread: float, atol: float) -> None:
    network, reads_BR = network_of(mean, spread)
    with torch.no_grad():
        logit_B, weight_BI = (t.numpy() for t in network(torch.from_numpy(reads_BR)))
        plain_B = network(torch.zeros(20, WIDTH))[0].numpy()
    decision = frozen(network).decide(reads_BR)
    assert np.ptp(logit_B) > 0.1
    # The normalisation matters, so leaving it out would be seen.
    assert mean == 0 or abs(plain_B - logit_B).max() > 0.1
    np.testing.assert_allclose(decision.logit_B, logit_B, atol=atol)
    np.testing.assert_allclose(decision.scale_B, sigmoid(logit_B), atol=atol)
    np.testing.assert_allclose(decision.weight_BI, sigmoid(weight_BI), atol=atol)


def test_the_module_normalises() -> None:
    network, reads_BR = network_of(50.0, 3.0)
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in network.parameters())
    x_BR = (reads_BR.astype(np.float64) - network.mean_R.numpy()) / network.std_R.numpy()
    want_BO = np.maximum(x_BR @ w1.T + b1, 0) @ w2.T + b2
    with torch.no_grad():
        logit_B, weight_BI = network(torch.from_numpy(reads_BR))
    np.testing.assert_allclose(logit_B.numpy(), want_BO[:, 0], atol=1e-5)
    np.testing.assert_allclose(weight_BI.numpy(), want_BO[:, 1:], atol=1e-5)


def test_only_the_chosen_outputs_are_kept_in_their_order() -> None:
    network, reads_BR = network_of()
    every = frozen(network).decide(reads_BR)
    some = frozen(network, [2, 0], threshold=0.3, mode="gated")
    assert (some.num_interventions, some.threshold, some.reads) == (2, 0.3, tuple(READS))
    got = some.decide(reads_BR)
    np.testing.assert_allclose(got.weight_BI, every.weight_BI[:, [2, 0]], rtol=1e-6)
    np.testing.assert_array_equal(got.logit_B, every.logit_B)
    raw = frozen(network, [1], mode="reference_compat").decide(reads_BR)
    np.testing.assert_array_equal(raw.scale_B, raw.logit_B)


def test_freezing_leaves_the_network_as_it_is() -> None:
    network, reads_BR = network_of(5.0)
    with torch.no_grad():
        before = network(torch.from_numpy(reads_BR))[0].clone()
        first, second = frozen(network), frozen(network)
        assert torch.equal(network(torch.from_numpy(reads_BR))[0], before)
    assert all(parameter.requires_grad for parameter in network.parameters())
    for name, tensor in first.tensors().items():
        np.testing.assert_array_equal(tensor, second.tensors()[name])


def youden(scale_N: Any, label_N: Any, threshold: float) -> float:
    """Sum of the two classes' accuracies minus 1, where a scale below the threshold counts as 0."""
    above = scale_N >= threshold
    return float(above[label_N].mean() - above[~label_N].mean())


def test_a_threshold_between_separable_classes_is_in_the_middle_of_the_gap() -> None:
    logit_N = np.array([-3.0, -2.0, -1.0, 2.0, 3.0, 9.0], np.float32)
    label_N = np.array([False] * 3 + [True] * 3)
    assert best_threshold(logit_N, label_N) == pytest.approx(sigmoid(0.5))
    order = np.random.default_rng(0).permutation(6)
    assert best_threshold(logit_N[order], label_N[order]) == best_threshold(logit_N, label_N)


def test_a_threshold_between_overlapping_classes_by_hand() -> None:
    logit_N = np.array([-4, -2, 1, 3, -1, 2, 4, 5], np.float32)
    label_N = np.array([False] * 4 + [True] * 4)
    # Above -1.5 are all positives and two of four negatives; above 1.5, three and one; above 3.5,
    # two and none: 0.5 each.
    threshold = best_threshold(logit_N, label_N)
    assert threshold == pytest.approx(sigmoid(1.5))
    assert youden(sigmoid(logit_N), label_N, threshold) == 0.5


@pytest.mark.parametrize("labels", [[], [True, True, True], [False, False, False]])
def test_without_both_classes_the_threshold_is_a_half(labels: list[bool]) -> None:
    logit_N = np.linspace(-5, 9, len(labels)).astype(np.float32)
    assert best_threshold(logit_N, np.array(labels, bool)) == 0.5


def test_a_gate_that_is_the_wrong_way_round_steers_nobody_or_all() -> None:
    logit_N = np.array([-3.0, -2.0, 2.0, 3.0], np.float32)
    label_N = np.array([True, True, False, False])
    threshold = best_threshold(logit_N, label_N)
    assert youden(sigmoid(logit_N), label_N, threshold) == 0.0


@given(
    # Thirds of whole numbers, so that there are ties, and float32 is told apart after a sigmoid.
    rows=st.lists(st.tuples(st.integers(-24, 24), st.booleans()), min_size=1, max_size=30),
)
def test_no_threshold_has_a_larger_youdens_j(rows: list[tuple[int, bool]]) -> None:
    logit_N = np.array([value / 3 for value, _ in rows], np.float32)
    label_N = np.array([label for _, label in rows])
    threshold = best_threshold(logit_N, label_N)
    assert 0 < threshold < 1
    if label_N.all() or not label_N.any():
        assert threshold == 0.5
        return
    scale_N = sigmoid(logit_N)
    every = [youden(scale_N, label_N, other) for other in [*scale_N, 0.0, 1.0]]
    assert youden(scale_N, label_N, threshold) >= max(every) - 1e-9


def test_a_threshold_of_many_rows_takes_little_memory() -> None:
    random = np.random.default_rng(0)
    label_N = random.random(200_000) < 0.5
    logit_N = (random.standard_normal(200_000) + 4 * label_N).astype(np.float32)
    assert best_threshold(logit_N, label_N) == pytest.approx(sigmoid(2.0), abs=0.02)
