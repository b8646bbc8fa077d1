"""A live source: changes are followed between sequences, never within one, and a bad one is not."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers

from steering_service.adapters.transformers import Fixed, fits, steered
from steering_service.core.errors import InvalidInput

NEW_T = 4


@dataclass
class Switchboard:
    """A source whose deployment the test changes, as a subscription's does when news arrive."""

    current: Fixed


@pytest.fixture
def prompt_1T() -> torch.Tensor:
    return torch.randint(5, 300, (1, 6), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def artifact(make_artifact: Any, make_intervention: Any) -> Any:
    return make_artifact([make_intervention("resid_post.1", 64), make_intervention("z.0.2", 16)])


def _logits(model: Any, prompt_1T: torch.Tensor, **options: Any) -> torch.Tensor:
    """Logits of each generated token, [NEW_T, vocabulary]."""
    generated = model.generate(
        prompt_1T,
        max_new_tokens=NEW_T,
        min_new_tokens=NEW_T,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.cat(generated.logits)


def _fixed(model: Any, prompt_1T: torch.Tensor, artifact: Any, strength: float) -> torch.Tensor:
    with steered(model, artifact, strength):
        return _logits(model, prompt_1T)


def test_a_change_is_followed_at_the_next_sequence(
    model: Any, artifact: Any, prompt_1T: torch.Tensor
) -> None:
    expected = {s: _fixed(model, prompt_1T, artifact, s) for s in (0.0, 1.0, -1.0)}
    source = Switchboard(Fixed(None, 0.0))
    with steered(model, source) as steering:
        assert torch.equal(_logits(model, prompt_1T), expected[0.0])
        for strength in (1.0, -1.0, 0.0, 1.0):
            source.current = Fixed(artifact, strength)
            assert torch.equal(_logits(model, prompt_1T), expected[strength])
            assert steering.deployed is source.current
        source.current = Fixed(None, 0.0)
        assert torch.equal(_logits(model, prompt_1T), expected[0.0])


class Switch(transformers.StoppingCriteria):
    """Changes the deployment after the second token, in the middle of the generation."""

    def __init__(self, source: Switchboard, deployment: Fixed, prompt_T: int) -> None:
        self._source, self._deployment, self._at = source, deployment, prompt_T + 2

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if input_ids.shape[1] == self._at:
            self._source.current = self._deployment
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(("start", "then"), [(1.0, -1.0), (1.0, 0.0), (0.0, 1.0)])
def test_a_change_waits_until_the_sequence_is_over(
    model: Any, artifact: Any, prompt_1T: torch.Tensor, start: float, then: float
) -> None:
    source = Switchboard(Fixed(artifact, start))
    change = Switch(source, Fixed(artifact, then), prompt_1T.shape[1])
    with steered(model, source) as steering:
        during = _logits(model, prompt_1T, stopping_criteria=[change])
        assert source.current.strength == then
        assert steering.deployed.strength == start
        after = _logits(model, prompt_1T)
    assert torch.equal(during, _fixed(model, prompt_1T, artifact, start))
    assert torch.equal(after, _fixed(model, prompt_1T, artifact, then))


def test_a_deployment_that_does_not_fit_leaves_the_last_good_one(
    model: Any,
    artifact: Any,
    make_artifact: Any,
    make_intervention: Any,
    prompt_1T: torch.Tensor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    good = Fixed(artifact, 1.0)
    expected = _fixed(model, prompt_1T, artifact, 1.0)
    fits = make_intervention("resid_post.0", 64)
    bad = [
        Fixed(make_artifact([fits, make_intervention("resid_post.9", 64)]), 1.0),
        Fixed(make_artifact([fits, make_intervention("z.1", 64)]), 1.0),
        Fixed(make_artifact([fits, make_intervention("z.1.8", 16)]), 1.0),
        Fixed(make_artifact([fits, make_intervention("mlp_out.1", 63)]), 1.0),
        # Outside the signed policy, whatever the service says.
        Fixed(make_artifact([fits], limits=(0.0, 0.5)), 0.6),
    ]
    source = Switchboard(good)
    with steered(model, source) as steering:
        for deployment in bad:
            source.current = deployment
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                for _ in range(2):
                    assert torch.equal(_logits(model, prompt_1T), expected)
            assert steering.deployed is good
            # Said once, not at every request.
            assert [record.message for record in caplog.records] == [
                "deployment refused by the model"
            ]
        source.current = Fixed(make_artifact([fits]), 1.0)
        assert not torch.equal(_logits(model, prompt_1T), expected)
        source.current = good
        assert torch.equal(_logits(model, prompt_1T), expected)


def test_a_chat_that_keeps_its_cache_follows_at_its_next_turn(
    model: Any, artifact: Any, prompt_1T: torch.Tensor
) -> None:
    source = Switchboard(Fixed(artifact, 1.0))
    cache = transformers.DynamicCache()
    with steered(model, source) as steering, torch.inference_mode():
        model(prompt_1T, past_key_values=cache)
        assert steering.deployed.strength == 1.0
        source.current = Fixed(None, 0.0)
        model(prompt_1T[:, :1], past_key_values=cache)
        assert steering.deployed.strength == 1.0
        model(prompt_1T[:, :3], past_key_values=cache)
        assert steering.deployed.artifact is None


def test_a_subscriptions_check_refuses_what_the_model_lacks(
    model: Any, load_model: Any, artifact: Any, make_artifact: Any, make_intervention: Any
) -> None:
    check = fits(model)
    check(artifact)
    for site, width in (("resid_post.9", 64), ("resid_post.1", 63), ("mlp_out.1", 63)):
        with pytest.raises(InvalidInput):
            check(make_artifact([make_intervention(site, width)]))
    between = make_artifact([make_intervention("resid_mid.1", 64)])
    check(between)
    with pytest.raises(InvalidInput, match="is parallel"):
        fits(load_model("gpt-neox"))(between)
