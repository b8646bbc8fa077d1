"""The node runs a controller once a request, and edits by what it said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from steering_service.adapters.sites import ModelSites
from steering_service.adapters.transformers import Fixed, fits, steered
from steering_service.core.artifact import Artifact, ModelReference, Policy, build
from steering_service.core.controller import Controller
from steering_service.core.errors import InvalidInput, Refused
from steering_service.core.intervention import edit
from steering_service.core.site import Site

READS = ("resid_post.0", "z.1.5")
WIDTH = 64 + 16
EDITED = {"resid_post.1": 64, "z.2.3": 16}


def make_controller(seed: int = 0, reads: tuple[str, ...] = READS, **options: Any) -> Controller:
    generator = np.random.default_rng(seed)
    shapes = ((WIDTH, 6), (6,), (6, 1 + len(EDITED)), (1 + len(EDITED),))
    arrays = [generator.standard_normal(shape).astype(np.float32) for shape in shapes]
    # So that logits are of order 1.
    arrays[0] *= 0.03
    return Controller(tuple(Site.parse(read) for read in reads), *arrays, **options)


@pytest.fixture
def artifact_of(make_intervention: Any) -> Any:
    def make(controller: Controller | None, **options: Any) -> Artifact:
        return build(
            [
                make_intervention(site, width, i, **options)
                for i, (site, width) in enumerate(EDITED.items())
            ],
            name="gated",
            model=ModelReference(name="tiny", fingerprint="0" * 64),
            policy=Policy(min_strength=-2.0, max_strength=2.0),
            controller=controller,
        )

    return make


@pytest.fixture
def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, 300, (1, n), generator=generator) for n in (7, 4, 6, 5)]


def _padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    longest = max(prompt.shape[1] for prompt in prompts)
    pad = [(longest - prompt.shape[1], 0) for prompt in prompts]
    return {
        "input_ids": torch.cat(
            [torch.nn.functional.pad(p, by) for p, by in zip(prompts, pad, strict=True)]
        ),
        "attention_mask": torch.cat(
            [
                torch.nn.functional.pad(torch.ones_like(p), by)
                for p, by in zip(prompts, pad, strict=True)
            ]
        ),
    }


def _generate(model: Any, steps: int = 5, **inputs: Any) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )


def _reads(model: Any, prompt_1T: torch.Tensor) -> np.ndarray[Any, Any]:
    """What the controller should read of a prompt, from the plain model."""
    seen: list[torch.Tensor] = []
    sites = ModelSites.of(model)
    hooks = [
        sites.blocks[0].register_forward_hook(lambda _m, _a, out: seen.append(out[0, -1].clone())),
        sites.output_projection(1).register_forward_pre_hook(
            lambda _m, args: seen.append(args[0][0, -1, 5 * 16 : 6 * 16].clone())
        ),
    ]
    with torch.inference_mode():
        model(prompt_1T)
    for hook in hooks:
        hook.remove()
    return torch.cat(seen).numpy()[None]


def test_what_a_model_overwrites_is_read_before(
    load_model: Any, artifact_of: Any, prompts: list[torch.Tensor]
) -> None:
    """Falcon adds what attention makes into the tensor that its MLP returned."""
    model = load_model("falcon")
    generator = np.random.default_rng(0)
    shapes = ((2 * 64, 6), (6,), (6, 2), (2,))
    arrays = [0.1 * generator.standard_normal(shape).astype(np.float32) for shape in shapes]
    reads = (Site.parse("mlp_out.0"), Site.parse("resid_post.0"))
    controller = Controller(reads, *arrays)
    artifact = artifact_of(None)
    artifact = build(
        artifact.interventions[:1],
        name="gated",
        model=artifact.manifest.model,
        policy=artifact.manifest.policy,
        controller=controller,
    )
    seen: list[torch.Tensor] = []
    block = model.transformer.h[0]
    hooks = [
        block.mlp.register_forward_hook(lambda _m, _a, out: seen.append(out[0, -1].clone())),
        block.register_forward_hook(lambda _m, _a, out: seen.append(out[0][0, -1].clone())),
    ]
    with torch.inference_mode():
        model(prompts[0])
        for hook in hooks:
            hook.remove()
        with steered(model, artifact, 0.5) as steering:
            model(prompts[0])
    assert steering.decision is not None
    want = controller.decide(torch.cat(seen).numpy()[None])
    np.testing.assert_allclose(steering.decision.logit_B, want.logit_B, rtol=1e-5)


def test_each_row_of_a_batch_is_steered_by_its_own_decision(
    model: Any, artifact_of: Any, make_intervention: Any, prompts: list[torch.Tensor]
) -> None:
    """Equal to plain artifacts whose weights were worked out by hand, row by row."""
    controller = make_controller()
    with steered(model, artifact_of(controller), 0.5) as steering:
        together = _generate(model, **_padded(prompts))
        decision = steering.decision
    assert decision is not None
    assert np.ptp(decision.scale_B) > 0.05
    for row, prompt in enumerate(prompts):
        expected = controller.decide(_reads(model, prompt))
        np.testing.assert_allclose(decision.strength_BI[row], expected.strength_BI[0], atol=1e-4)
        items = [
            make_intervention(site, width, i, weight=float(expected.strength_BI[0, i]))
            for i, (site, width) in enumerate(EDITED.items())
        ]
        constant = build(
            items,
            name="constant",
            model=ModelReference(name="tiny", fingerprint="0" * 64),
            policy=Policy(min_strength=-2.0, max_strength=2.0),
        )
        with steered(model, constant, 0.5):
            alone = _generate(model, input_ids=prompt)
        torch.testing.assert_close(
            torch.stack(together.logits, dim=1)[row],
            torch.stack(alone.logits, dim=1)[0],
            rtol=1e-3,
            atol=1e-3,
        )


def test_the_decision_is_kept_while_an_answer_is_decoded(
    model: Any, artifact_of: Any, prompts: list[torch.Tensor]
) -> None:
    decided = []
    with steered(model, artifact_of(make_controller()), 1.0) as steering:
        hook = model.register_forward_hook(lambda *_: decided.append(steering.decision))
        _generate(model, steps=4, input_ids=prompts[0])
        _generate(model, steps=4, input_ids=prompts[1])
        hook.remove()
    assert len(decided) == 8
    assert all(decision is decided[0] for decision in decided[:4])
    assert all(decision is decided[4] for decision in decided[4:])
    assert decided[0] is not decided[4]


def test_reference_compat_decides_in_every_pass(
    model: Any, artifact_of: Any, prompts: list[torch.Tensor]
) -> None:
    decided = []
    with steered(model, artifact_of(make_controller(mode="reference_compat")), 0.1) as steering:
        hook = model.register_forward_hook(lambda *_: decided.append(steering.decision))
        _generate(model, steps=4, input_ids=prompts[0])
        hook.remove()
    assert len({id(decision) for decision in decided}) == 4


def test_requests_below_the_threshold_get_the_plain_model_bit_for_bit(
    model: Any, artifact_of: Any, prompts: list[torch.Tensor]
) -> None:
    inputs = _padded(prompts)
    plain = _generate(model, **inputs)
    with steered(model, artifact_of(make_controller()), 1.0) as steering:
        free = _generate(model, **inputs)
        assert steering.decision is not None
        scale_B = np.sort(steering.decision.scale_B)
    threshold = float(scale_B[1] + scale_B[2]) / 2
    with steered(model, artifact_of(make_controller(threshold=threshold)), 1.0) as steering:
        some = _generate(model, **inputs)
        assert steering.decision is not None
        off_B = steering.decision.scale_B == 0
    assert off_B.sum() == 2
    for row, off in enumerate(off_B):
        same_as = plain if off else free
        for step in range(5):
            assert torch.equal(some.logits[step][row], same_as.logits[step][row])
    with steered(model, artifact_of(make_controller(threshold=1.0)), 1.0):
        none = _generate(model, **inputs)
    assert all(torch.equal(a, b) for a, b in zip(none.logits, plain.logits, strict=True))


@pytest.mark.parametrize("positions", ["last", "generated", "prompt", "all"])
def test_scoring_at_once_decides_where_each_prompt_ends(
    model: Any, artifact_of: Any, positions: str
) -> None:
    ids_BT = torch.randint(5, 300, (3, 9), generator=torch.Generator().manual_seed(4))
    lengths = (2, 9, 5)
    with steered(model, artifact_of(make_controller(), positions=positions), 1.0) as steering:
        with torch.inference_mode():
            steering.set_prompt_lengths(lengths)
            together = model(ids_BT, use_cache=False).logits
            for row, length in enumerate(lengths):
                steering.set_prompt_lengths(length)
                alone = model(ids_BT[row : row + 1], use_cache=False).logits
                torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-4)
        steering.set_prompt_lengths(None)


@pytest.mark.parametrize("lengths", [int, lambda length: [length]], ids=["one", "a row"])
def test_a_prompt_that_comes_in_parts_is_decided_where_it_ends(
    model: Any, artifact_of: Any, prompts: list[torch.Tensor], lengths: Any
) -> None:
    import transformers

    prompt_1T = prompts[0]
    with steered(model, artifact_of(make_controller()), 1.0) as steering:
        cache = transformers.DynamicCache()
        with torch.inference_mode():
            model(prompts[2])
            assert steering.decision is not None
            steering.set_prompt_lengths(lengths(prompt_1T.shape[1]))
            # Another request begins: nothing of the one before may reach it.
            model(prompt_1T[:, :3], past_key_values=cache)
            assert steering.decision is None or not steering.decision.scale_B.any()
            model(prompt_1T[:, 3:], past_key_values=cache)
            in_parts = steering.decision
            assert in_parts is not None
            model(prompt_1T[:, :1], past_key_values=cache)
            assert steering.decision is not None
            np.testing.assert_array_equal(steering.decision.scale_B, in_parts.scale_B)
        steering.set_prompt_lengths(None)
    expected = make_controller().decide(_reads(model, prompt_1T))
    np.testing.assert_allclose(in_parts.strength_BI, expected.strength_BI, atol=1e-4)


def test_a_batch_that_changes_its_rows_while_it_is_answered_is_an_error(
    model: Any, artifact_of: Any, prompts: list[torch.Tensor]
) -> None:
    import transformers

    cache = transformers.DynamicCache()
    with steered(model, artifact_of(make_controller()), 1.0), torch.inference_mode():
        model(**_padded(prompts), past_key_values=cache)
        cache.batch_select_indices(torch.tensor([0, 2]))
        with pytest.raises(InvalidInput, match="decided for 4 rows, and this pass has 2"):
            model(torch.tensor([[5], [6]]), past_key_values=cache)


def test_a_controller_of_another_width_is_refused_before_it_is_accepted(
    model: Any, artifact_of: Any
) -> None:
    narrow = artifact_of(make_controller(reads=("z.0.1", "z.1.5")))
    with pytest.raises(InvalidInput, match=r"reads 80 activations; this model has 32"):
        fits(model)(narrow)
    fits(model)(artifact_of(make_controller()))


def test_an_edit_takes_a_strength_a_row() -> None:
    h_BTD, step_D = torch.randn(2, 3, 4), torch.randn(4)
    unit_D = step_D / step_D.norm()
    strengths = torch.tensor([0.5, -2.0])[:, None, None]
    for operation, step in (("add", step_D), ("project_out", unit_D)):
        both = edit(h_BTD, step, operation, strengths)
        for row in range(2):
            one = edit(h_BTD[row : row + 1], step, operation, float(strengths[row]))
            torch.testing.assert_close(both[row : row + 1], one)


def test_no_controller_takes_a_strength_out_of_the_signed_policy(
    model: Any, artifact_of: Any, make_intervention: Any
) -> None:
    """The raw logit of reference_compat has no bounds; the node's limits hold all the same."""
    ids_BT = torch.randint(5, 300, (1, 6), generator=torch.Generator().manual_seed(4))
    wild = make_controller(mode="reference_compat")
    arrays = wild.tensors() | {"output_bias": np.array([1e6, 30, 30], np.float32)}
    wild = Controller(wild.reads, *arrays.values(), mode="reference_compat")
    limited = build(
        [make_intervention("resid_post.1", 64, 0), make_intervention("z.2.3", 16, 1)],
        name="limit",
        model=ModelReference(name="tiny", fingerprint="0" * 64),
        policy=Policy(min_strength=-2.0, max_strength=2.0),
    )
    with torch.inference_mode():
        with steered(model, artifact_of(wild), 0.5):
            got = model(ids_BT).logits
        with steered(model, limited, 2.0):
            expected = model(ids_BT).logits
    torch.testing.assert_close(got, expected)


def test_factors_steer_rows_of_a_batch_differently(model: Any, artifact_of: Any) -> None:
    ids_BT = torch.randint(5, 300, (2, 6), generator=torch.Generator().manual_seed(4))
    artifact = artifact_of(None)
    factor_BI = torch.tensor([[0.5, 0.5], [1.0, 1.0]], requires_grad=True)
    with steered(model, artifact, 1.0) as steering:
        steering.set_factors(factor_BI)
        both = model(ids_BT).logits
        both.sum().backward()
        steering.set_factors(None)
        with pytest.raises(InvalidInput, match=r"expected \[rows, 2\]"):
            steering.set_factors(torch.ones(2, 3))
        with pytest.raises(Refused, match=r"strength 3\.0 is outside"):
            steering.set_factors(torch.full((2, 2), 3.0))
    assert factor_BI.grad is not None
    assert (factor_BI.grad != 0).all()
    for row, strength in enumerate((0.5, 1.0)):
        with steered(model, artifact, strength), torch.inference_mode():
            alone = model(ids_BT[row : row + 1]).logits
        torch.testing.assert_close(both[row : row + 1].detach(), alone, rtol=1e-4, atol=1e-4)
    with (
        steered(model, artifact_of(make_controller()), 1.0) as steering,
        pytest.raises(InvalidInput, match="without a controller"),
    ):
        steering.set_factors(factor_BI)


def test_numbers_that_overflow_steer_nothing(model: Any, artifact_of: Any) -> None:
    ids_BT = torch.randint(5, 300, (1, 6), generator=torch.Generator().manual_seed(4))
    wild = make_controller(mode="reference_compat")
    arrays = wild.tensors() | {
        "output_weight": np.full((6, 3), 3e38, np.float32),
        "output_bias": np.array([0, -3e38, -3e38], np.float32),
    }
    wild = Controller(wild.reads, *arrays.values(), mode="reference_compat")
    with steered(model, artifact_of(wild), 0.5), torch.inference_mode():
        assert torch.isfinite(model(ids_BT).logits).all()


@dataclass
class Changing:
    """A source that is told what to run."""

    current: Fixed


def test_a_deployment_that_factors_do_not_fit_is_refused(
    model: Any, artifact_of: Any, make_intervention: Any, make_artifact: Any
) -> None:
    ids_BT = torch.randint(5, 300, (2, 6), generator=torch.Generator().manual_seed(4))
    source = Changing(Fixed(artifact_of(None), 0.1))
    with steered(model, source) as steering, torch.inference_mode():
        steering.set_factors(torch.full((2, 2), 10.0))
        before = model(ids_BT).logits
        narrow = make_artifact([make_intervention("resid_post.1", 64)])
        for deployed in (
            Fixed(artifact_of(None), 1.0),
            Fixed(narrow, 0.1),
            Fixed(artifact_of(make_controller()), 0.1),
        ):
            source.current = deployed
            assert torch.equal(model(ids_BT).logits, before)
            assert steering.deployed.strength == 0.1
            assert len(steering.deployed.artifact.interventions) == 2
        steering.set_factors(None)
        source.current = Fixed(artifact_of(None), 0.5)
        model(ids_BT)
        assert steering.deployed.strength == 0.5
        source.current = Fixed(None, 0.0)
        model(ids_BT)
        with pytest.raises(InvalidInput, match="no artifact"):
            steering.set_factors(torch.ones(2, 2))
