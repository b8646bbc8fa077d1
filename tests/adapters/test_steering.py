"""The transformers node: exactly the edit that was asked for, where and when it was asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from steering_service.adapters.sites import ModelSites
from steering_service.adapters.transformers import steered
from steering_service.core.errors import InvalidInput, Refused

SITES = {
    "resid_post.1": 64,
    "resid_mid.1": 64,
    "resid_pre.1": 64,
    "attn_out.1": 64,
    "mlp_out.1": 64,
    "z.1": 128,
    "z.1.5": 16,
}


def _hooks(model: torch.nn.Module) -> list[int]:
    """Every hook on every module. transformers leaves some of its own, so it is compared."""
    return [
        id(hook)
        for module in model.modules()
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        for hook in hooks.values()
    ]


def _logits(model: Any, ids_BT: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(ids_BT, use_cache=False, **inputs).logits
    return logits


@pytest.fixture
def ids_BT() -> torch.Tensor:
    return torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("operation", ["add", "project_out"])
@pytest.mark.parametrize("site", SITES)
def test_strength_zero_is_the_plain_model_bit_for_bit(
    model: Any,
    ids_BT: torch.Tensor,
    make_artifact: Any,
    make_intervention: Any,
    site: str,
    operation: str,
) -> None:
    artifact = make_artifact([make_intervention(site, SITES[site], operation=operation)])
    plain = _logits(model, ids_BT)
    with steered(model, artifact, 0.0):
        assert torch.equal(_logits(model, ids_BT), plain)
        generated = model.generate(ids_BT[:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.generate(ids_BT[:1], max_new_tokens=4, do_sample=False))
    with steered(model, artifact, 1.0):
        assert not torch.equal(_logits(model, ids_BT), plain)
    assert torch.equal(_logits(model, ids_BT), plain)


def test_no_hook_is_left(
    model: Any, ids_BT: torch.Tensor, make_artifact: Any, make_intervention: Any
) -> None:
    before = _hooks(model)
    artifact = make_artifact([make_intervention(site, width) for site, width in SITES.items()])
    with steered(model, artifact, 1.0):
        # One on the body, and one a stream and layer: both z sites share theirs.
        assert len(_hooks(model)) == len(before) + 7
        _logits(model, ids_BT)
    assert _hooks(model) == before
    with pytest.raises(KeyError, match="in the middle"), steered(model, artifact, 1.0):  # noqa: PT012
        _logits(model, ids_BT)
        raise KeyError("in the middle")
    assert _hooks(model) == before
    too_wide = make_artifact(
        [make_intervention("resid_post.0", 64), make_intervention("resid_post.1", 65)]
    )
    with pytest.raises(InvalidInput) as caught, steered(model, too_wide, 1.0):
        pass
    assert caught.value.kind == "direction_width"
    assert _hooks(model) == before


def test_one_hook_on_the_body_remains_at_strength_zero(
    model: Any, make_artifact: Any, make_intervention: Any
) -> None:
    artifact = make_artifact([make_intervention("resid_post.1", 64)])
    before = _hooks(model)
    with steered(model, artifact, 0.0):
        assert len(_hooks(model)) == len(before) + 1


@pytest.mark.parametrize("family", ["llama", "llama-wide-heads", "gpt-neox", "gpt2"])
def test_an_edit_of_a_head_adds_its_projection_to_the_attention_output(
    load_model: Any,
    ids_BT: torch.Tensor,
    make_artifact: Any,
    make_intervention: Any,
    family: str,
) -> None:
    model = load_model(family)
    sites = ModelSites.of(model)
    head, dim = 5, sites.head_dim
    item = make_intervention(f"z.1.{head}", dim, positions="all", weight=0.5)
    projection = sites.output_projection(1)
    outputs: list[torch.Tensor] = []
    handle = projection.register_forward_hook(lambda _m, _a, out: outputs.append(out.clone()))
    _logits(model, ids_BT)
    with steered(model, make_artifact([item]), 1.5):
        _logits(model, ids_BT)
    handle.remove()
    weight_DI = projection.weight if family != "gpt2" else projection.weight.T
    delta_D = torch.tensor(item.direction.vector_D) * 1.5 * 0.5
    expected_D = weight_DI[:, head * dim : (head + 1) * dim] @ delta_D
    torch.testing.assert_close(
        outputs[1] - outputs[0], expected_D.expand_as(outputs[0]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("unit", ["direction", "sigma", "unit"])
def test_strength_is_counted_in_its_unit(
    model: Any, ids_BT: torch.Tensor, make_artifact: Any, make_intervention: Any, unit: str
) -> None:
    item = make_intervention("resid_post.1", 64, positions="all", strength_unit=unit)
    plain, other = _residuals(model, ids_BT, make_artifact([item]), -2.0)
    length = {"direction": 4.0, "sigma": 1.5, "unit": 1.0}[unit]
    step_D = -2.0 * length * torch.tensor(item.direction.unit_D)
    torch.testing.assert_close(other - plain, step_D.expand_as(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("site", ["resid_post.1", "z.1.5"])
def test_project_out_removes_the_component_and_nothing_else(
    model: Any, ids_BT: torch.Tensor, make_artifact: Any, make_intervention: Any, site: str
) -> None:
    item = make_intervention(site, SITES[site], operation="project_out", positions="all")
    plain, other = _residuals(model, ids_BT, make_artifact([item]), 1.0, site)
    u_D = torch.tensor(item.direction.unit_D)
    assert (plain @ u_D).abs().max() > 0.1
    torch.testing.assert_close(other @ u_D, torch.zeros(2, 9), rtol=0, atol=1e-5)
    torch.testing.assert_close(other + (plain @ u_D)[..., None] * u_D, plain, rtol=1e-5, atol=1e-5)


def _residuals(
    model: Any, ids_BT: torch.Tensor, artifact: Any, strength: float, site: str = "resid_post.1"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The values at a site of layer 1, plain and steered, read after the edit."""
    block = model.model.layers[1]
    seen: list[torch.Tensor] = []

    def read(values: torch.Tensor) -> None:
        seen.append(values[..., 80:96].clone() if site == "z.1.5" else values.clone())

    for steering in (False, True):
        with steered(model, artifact, strength if steering else 0.0):
            # Attached last, so it sees what the edit left.
            handle = (
                block.self_attn.o_proj.register_forward_pre_hook(lambda _m, args: read(args[0]))
                if site == "z.1.5"
                else block.register_forward_hook(lambda _m, _a, out: read(out))
            )
            _logits(model, ids_BT)
            handle.remove()
    return seen[0], seen[1]


def test_edits_of_several_sites_and_operations_add_up(
    model: Any, ids_BT: torch.Tensor, make_artifact: Any, make_intervention: Any
) -> None:
    items = [
        make_intervention("z.1.5", 16, 1, positions="all"),
        make_intervention("z.1.2", 16, 2, positions="all"),
        make_intervention("resid_post.2", 64, 3, positions="all"),
    ]
    together = np.zeros(128, np.float32)
    together[80:96], together[32:48] = items[0].direction.vector_D, items[1].direction.vector_D
    with steered(model, make_artifact(items), 1.0):
        got = _logits(model, ids_BT)

    def add(_m: Any, args: Any) -> Any:
        return (args[0] + torch.tensor(together),)

    def add_residual(_m: Any, _a: Any, out: torch.Tensor) -> torch.Tensor:
        return out + torch.tensor(items[2].direction.vector_D)

    handles = [
        model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(add),
        model.model.layers[2].register_forward_hook(add_residual),
    ]
    want = _logits(model, ids_BT)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_strength_must_be_within_the_policy_and_given_once(
    model: Any, make_artifact: Any, make_intervention: Any
) -> None:
    artifact = make_artifact([make_intervention("resid_post.1", 64)], limits=(-0.5, 1.0))
    before = _hooks(model)
    for strength in (1.01, -0.51, float("nan"), float("inf")):
        with pytest.raises(Refused, match="signed policy"), steered(model, artifact, strength):
            pass
    with pytest.raises(InvalidInput) as caught, steered(model, artifact):
        pass
    assert caught.value.kind == "strength_missing"
    with steered(model, artifact, 1.0) as steering:
        source = steering.deployed
    with pytest.raises(InvalidInput) as caught, steered(model, source, 1.0):  # type: ignore[arg-type]
        pass
    assert caught.value.kind == "strength_twice"
    assert _hooks(model) == before
