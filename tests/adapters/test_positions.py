"""Position policies: the same positions are edited however the text is run through the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers

from steering_service.adapters.sites import ModelSites
from steering_service.adapters.transformers import Steering, steered

POLICIES = ("last", "generated", "prompt", "all")
FAMILIES = ("llama-wide-heads", "mistral-window", "gpt2", "gpt-neox")
SITES = {"resid_post.1": 64, "z.0.3": None}
PROMPT_T, NEW_T = 6, 5


@pytest.fixture
def prompt_1T() -> torch.Tensor:
    return torch.randint(5, 300, (1, PROMPT_T), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def artifact_of(make_artifact: Any, make_intervention: Any) -> Any:
    def make(model: Any, policy: str) -> Any:
        head_dim = getattr(model.config, "head_dim", None) or 64 // 8
        return make_artifact(
            [
                make_intervention(site, width or head_dim, i, positions=policy)
                for i, (site, width) in enumerate(SITES.items())
            ]
        )

    return make


def _generate(model: Any, prompt: torch.Tensor, **options: Any) -> Any:
    return model.generate(
        prompt,
        max_new_tokens=NEW_T,
        min_new_tokens=NEW_T,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def _score(
    model: Any,
    steering: Steering,
    ids_BT: torch.Tensor,
    lengths: int | Sequence[int],
    **inputs: Any,
) -> torch.Tensor:
    """Logits of the whole text in one pass without a cache."""
    steering.set_prompt_lengths(lengths)
    with torch.inference_mode():
        logits: torch.Tensor = model(ids_BT, use_cache=False, **inputs).logits
    steering.set_prompt_lengths(None)
    return logits


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_with_and_without_cache_and_scoring_agree(
    load_model: Any, artifact_of: Any, prompt_1T: torch.Tensor, family: str, policy: str
) -> None:
    model = load_model(family)
    artifact = artifact_of(model, policy)
    plain = _generate(model, prompt_1T)
    with steered(model, artifact, 1.0) as steering:
        cached = _generate(model, prompt_1T)
        steering.set_prompt_lengths(PROMPT_T)
        uncached = _generate(model, prompt_1T, use_cache=False)
        scored = _score(model, steering, cached.sequences, PROMPT_T)
    logits = torch.stack(cached.logits, dim=1)
    torch.testing.assert_close(torch.stack(uncached.logits, dim=1), logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(uncached.sequences, cached.sequences)
    torch.testing.assert_close(scored[:, PROMPT_T - 1 : -1], logits, rtol=1e-4, atol=1e-4)
    # And the edit was felt, or agreement would mean nothing.
    assert not torch.allclose(logits[:, 0], plain.logits[0], atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_exactly_the_named_positions_are_edited(
    load_model: Any,
    artifact_of: Any,
    make_intervention: Any,
    make_artifact: Any,
    prompt_1T: torch.Tensor,
    family: str,
    policy: str,
) -> None:
    model = load_model(family)
    artifact = make_artifact([make_intervention("resid_post.1", 64, positions=policy)])
    plain, edited = _edited_positions(model, prompt_1T, artifact)
    expected = {
        "all": [True] * (PROMPT_T + NEW_T - 1),
        "prompt": [True] * PROMPT_T + [False] * (NEW_T - 1),
        "generated": [False] * (PROMPT_T - 1) + [True] * NEW_T,
        "last": [False] * (PROMPT_T - 1) + [True] * NEW_T,
    }[policy]
    step_D = torch.tensor(artifact.interventions[0].direction.vector_D)
    torch.testing.assert_close(
        edited - plain, torch.tensor(expected)[:, None] * step_D, rtol=1e-4, atol=1e-4
    )


def _edited_positions(
    model: Any, prompt_1T: torch.Tensor, artifact: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """What block 1 gives before and after the edit, at every position that is decoded."""
    block = ModelSites.of(model).blocks[1]
    seen: list[torch.Tensor] = []

    def read(_m: Any, _a: Any, out: torch.Tensor) -> None:
        seen.append(out[0].clone())

    before = block.register_forward_hook(read)
    with steered(model, artifact, 1.0):
        # The body's hook may attach the edit anew only when a deployment changes, so it stays
        # between the two readers.
        after = block.register_forward_hook(read)
        _generate(model, prompt_1T)
    before.remove()
    after.remove()
    return torch.cat(seen[::2]), torch.cat(seen[1::2])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama-wide-heads", "gpt-neox"])
def test_a_batch_padded_on_the_left_equals_its_rows_alone(
    load_model: Any, artifact_of: Any, family: str, policy: str
) -> None:
    model = load_model(family)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(5, 300, (1, n), generator=generator) for n in (3, 8, 5)]
    longest = max(prompt.shape[1] for prompt in prompts)
    padded = torch.cat(
        [torch.nn.functional.pad(prompt, (longest - prompt.shape[1], 0)) for prompt in prompts]
    )
    mask = torch.cat(
        [
            torch.nn.functional.pad(torch.ones_like(prompt), (longest - prompt.shape[1], 0))
            for prompt in prompts
        ]
    )
    with steered(model, artifact_of(model, policy), 1.0):
        together = _generate(model, padded, attention_mask=mask)
        alone = [_generate(model, prompt) for prompt in prompts]
    for row, single in enumerate(alone):
        torch.testing.assert_close(
            torch.stack(together.logits, dim=1)[row],
            torch.stack(single.logits, dim=1)[0],
            rtol=1e-3,
            atol=1e-3,
        )
        assert torch.equal(together.sequences[row, longest:], single.sequences[0, -NEW_T:])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_scored_at_once_has_prompt_lengths_of_its_own(
    model: Any, artifact_of: Any, policy: str
) -> None:
    ids_BT = torch.randint(5, 300, (3, 9), generator=torch.Generator().manual_seed(4))
    with steered(model, artifact_of(model, policy), 1.0) as steering:
        together = _score(model, steering, ids_BT, [2, 9, 5])
        alone = [_score(model, steering, ids_BT[i : i + 1], n) for i, n in enumerate((2, 9, 5))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_a_sequence_that_is_given_as_embeddings_is_steered_alike(
    model: Any, artifact_of: Any, prompt_1T: torch.Tensor
) -> None:
    with torch.inference_mode(), steered(model, artifact_of(model, "generated"), 1.0):
        by_ids = model(prompt_1T, use_cache=False).logits
        by_embeddings = model(
            inputs_embeds=model.get_input_embeddings()(prompt_1T), use_cache=False
        ).logits
    assert torch.equal(by_ids, by_embeddings)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("last", [0, 0, 0, 1]), ("generated", [0, 0, 0, 1]), ("prompt", [1] * 4), ("all", [1] * 4)],
)
def test_a_prompt_on_a_filled_cache_is_a_prompt(
    load_model: Any,
    make_artifact: Any,
    make_intervention: Any,
    prompt_1T: torch.Tensor,
    policy: str,
    expected: list[int],
) -> None:
    model = load_model("llama-wide-heads")
    artifact = make_artifact([make_intervention("resid_post.2", 64, positions=policy)])
    cache = transformers.DynamicCache()
    seen: list[torch.Tensor] = []
    block = ModelSites.of(model).blocks[2]
    with torch.inference_mode():
        model(prompt_1T, past_key_values=cache)
        before = block.register_forward_hook(lambda _m, _a, out: seen.append(_hidden(out)))
        with steered(model, artifact, 1.0):
            after = block.register_forward_hook(lambda _m, _a, out: seen.append(_hidden(out)))
            model(prompt_1T[:, :4], past_key_values=cache)
    before.remove()
    after.remove()
    edited_T = (seen[1] - seen[0]).norm(dim=-1)[0] > 1e-3
    assert edited_T.tolist() == [bool(i) for i in expected]


def _hidden(out: Any) -> torch.Tensor:
    hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return hidden.clone()
