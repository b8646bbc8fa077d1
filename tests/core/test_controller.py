"""Controller: what it decides, what it refuses, and that an artifact carries it unchanged."""

from __future__ import annotations

import json

import numpy as np
import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from steering_service.core.artifact import ModelReference, Policy, build, parse
from steering_service.core.controller import Controller, check_order
from steering_service.core.direction import Direction
from steering_service.core.errors import InvalidInput
from steering_service.core.intervention import Intervention
from steering_service.core.site import Site

READS = (Site("resid_post", 1), Site("z", 2, 3))
WIDTH, HIDDEN = 8 + 4, 5


def controller(interventions=2, seed=0, reads=READS, **options):
    generator = np.random.default_rng(seed)
    shapes = ((WIDTH, HIDDEN), (HIDDEN,), (HIDDEN, 1 + interventions), (1 + interventions,))
    arrays = [generator.standard_normal(shape).astype(np.float32) for shape in shapes]
    return Controller(reads, *arrays, **options)


def artifact(made, sites=("resid_post.2", "resid_post.3")):
    generator = np.random.default_rng(1)
    items = [
        Intervention(Direction(Site.parse(site), generator.standard_normal(8), 1.0, 2.0, "random"))
        for site in sites
    ]
    return build(
        items,
        name="gated",
        model=ModelReference(name="pocket", fingerprint="a" * 64),
        policy=Policy(min_strength=0.0, max_strength=1.0),
        controller=made,
    )


def by_hand(made, x_BR):
    """The network, written a second time with loops."""
    t = made.tensors()
    out = []
    for x in x_BR:
        hidden = [
            max(0.0, float(x @ t["hidden_weight"][:, k] + t["hidden_bias"][k]))
            for k in range(HIDDEN)
        ]
        out.append(
            [
                float(np.dot(hidden, t["output_weight"][:, o]) + t["output_bias"][o])
                for o in range(3)
            ]
        )
    return np.array(out)


@given(st.integers(0, 1000), st.integers(1, 4))
def test_a_decision_is_the_networks(seed, num):
    made = controller(seed=seed)
    x_BR = np.random.default_rng(seed + 1).standard_normal((num, WIDTH)).astype(np.float32)
    decision = made.decide(x_BR)
    logits = by_hand(made, x_BR)
    np.testing.assert_allclose(decision.logit_B, logits[:, 0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(decision.scale_B, 1 / (1 + np.exp(-logits[:, 0])), atol=1e-4)
    np.testing.assert_allclose(decision.weight_BI, 1 / (1 + np.exp(-logits[:, 1:])), atol=1e-4)
    np.testing.assert_array_equal(
        decision.strength_BI, decision.scale_B[:, None] * decision.weight_BI
    )


def test_below_the_threshold_the_scale_is_exactly_zero():
    x_BR = np.random.default_rng(3).standard_normal((64, WIDTH)).astype(np.float32)
    free = controller().decide(x_BR)
    held = controller(threshold=0.6).decide(x_BR)
    assert 0 < (free.scale_B < 0.6).sum() < 64
    np.testing.assert_array_equal(held.scale_B == 0, free.scale_B < 0.6)
    np.testing.assert_array_equal(held.scale_B[held.scale_B > 0], free.scale_B[free.scale_B >= 0.6])


def test_reference_compat_scales_by_the_raw_logit():
    """Defect 2 of METHODS 2: unbounded, and negative where the gate says no."""
    x_BR = 50 * np.random.default_rng(3).standard_normal((64, WIDTH)).astype(np.float32)
    decision = controller(mode="reference_compat").decide(x_BR)
    np.testing.assert_array_equal(decision.scale_B, decision.logit_B)
    assert decision.scale_B.min() < -1
    assert decision.scale_B.max() > 1


def test_large_inputs_do_not_overflow():
    decision = controller().decide(np.full((1, WIDTH), 1e30, np.float32))
    assert np.isfinite(decision.scale_B).all()


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"mode": "other"}, "controller_mode"),
        ({"threshold": 1.5}, "controller_threshold"),
        ({"threshold": float("nan")}, "controller_threshold"),
        ({"reads": ()}, "controller_reads"),
        ({"reads": (READS[0], READS[0])}, "controller_reads"),
    ],
)
def test_doubtful_controllers_are_refused(change, kind):
    with pytest.raises(InvalidInput) as caught:
        controller(**change)
    assert caught.value.kind == kind


def test_shapes_must_fit_and_numbers_be_finite():
    good = controller()
    for name, value in (
        ("hidden_weight_RK", np.zeros((WIDTH, HIDDEN + 1))),
        ("hidden_bias_K", np.zeros((HIDDEN, 1))),
        ("output_bias_O", np.zeros(2)),
        ("output_weight_KO", np.full((HIDDEN, 3), np.nan)),
    ):
        fields = {
            field: getattr(good, field)
            for field in ("hidden_weight_RK", "hidden_bias_K", "output_weight_KO", "output_bias_O")
        }
        with pytest.raises(InvalidInput, match=r"expected finite \[R, K\]"):
            Controller(READS, **(fields | {name: value}))
    with pytest.raises(InvalidInput, match=r"reads \[requests, 12\]"):
        good.decide(np.zeros((2, WIDTH + 1)))


@pytest.mark.parametrize(
    ("edited", "allowed"),
    [
        ("resid_post.2", True),
        ("resid_post.3", True),
        ("z.2.3", True),
        ("mlp_out.2", True),
        ("resid_pre.2", False),
        ("resid_post.1", False),
    ],
)
def test_what_is_read_must_come_before_what_is_edited(edited, allowed):
    sites = (Site.parse("resid_post.4"), Site.parse(edited))
    if allowed:
        check_order(READS, sites)
    else:
        with pytest.raises(InvalidInput, match="which a forward pass computes after"):
            check_order(READS, sites)


def test_an_artifact_carries_its_controller():
    made = controller(threshold=0.25)
    before = artifact(made)
    after = parse(before.manifest_bytes, before.payload_bytes)
    assert before.manifest.kind == "controller"
    assert after.digest == before.digest
    assert after.controller is not None
    assert (after.controller.reads, after.controller.mode) == (READS, "gated")
    assert after.controller.threshold == 0.25
    for name, value in made.tensors().items():
        np.testing.assert_array_equal(after.controller.tensors()[name], value)


def test_an_artifact_without_a_controller_has_no_such_field():
    plain = artifact(None)
    assert plain.manifest.kind == "intervention"
    assert b"controller" not in plain.manifest_bytes


def test_a_controller_that_does_not_fit_its_artifact_is_refused():
    with pytest.raises(InvalidInput, match="weighs 3 interventions"):
        artifact(controller(interventions=3))
    with pytest.raises(InvalidInput, match="which a forward pass computes after"):
        artifact(controller(), sites=("resid_post.0", "resid_post.3"))
    gated = artifact(controller())
    for change in ({"kind": "intervention"}, {"controller": None}):
        manifest = rfc8785.dumps(json.loads(gated.manifest_bytes) | change)
        with pytest.raises(InvalidInput, match="do not go together"):
            parse(manifest, gated.payload_bytes)
