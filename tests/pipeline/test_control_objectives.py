"""What a controller is trained for, compared with the same worked out row by row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.control.objectives import Answers, begins_with, own_answers, stays_as_it_is
from pipeline.extraction.models import load_model
from steering_service.adapters.transformers import steered
from steering_service.core.artifact import Artifact, ModelReference, Policy, build
from steering_service.core.direction import Direction
from steering_service.core.intervention import Intervention
from steering_service.core.site import Site

CPU = torch.device("cpu")
EDITED = {"resid_post.1": 64, "z.2.3": 16}
STRENGTH = 1.5
FACTORS = [[0.2, 0.9], [0.6, 0.4], [1.0, 0.0]]
FAMILIES = ["llama-wide-heads", "mistral-window", "gemma2"]
"""One with full attention, two with a window; the last one also caps its logits."""

Load = Callable[..., Any]


@pytest.fixture(scope="module")
def load(make_model: Callable[..., Path]) -> Load:
    loaded: dict[Any, Any] = {}

    def get(family: str = "llama-wide-heads", dtype: Any = "float32") -> Any:
        if (family, dtype) not in loaded:
            loaded[family, dtype] = load_model(make_model(family, head_dim=16), dtype)
        return loaded[family, dtype]

    return get


def artifact_of(weights: tuple[float, ...] = (1.0, 1.0)) -> Artifact:
    items = []
    for seed, (site, width) in enumerate(EDITED.items()):
        vector = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
        direction = Direction(Site.parse(site), vector * 4, 1.0, 3.0, "random")
        items.append(Intervention(direction, weight=weights[seed]))
    return build(
        items,
        name="test",
        model=ModelReference(name="tiny", fingerprint="0" * 64),
        policy=Policy(min_strength=0.0, max_strength=STRENGTH),
    )


PROMPTS = [np.random.default_rng(n).integers(5, 300, n) for n in (4, 11, 7)]
ANSWERS = [[30, 31, 32], [40, 41, 42], [50, 51, 52]]
UNEVEN = [[30], [40, 41, 42, 43], [50, 51]]


def by_hand(model: Any, row: int, answer: list[int], strength: float) -> Any:
    """Float64 [answer, V]: log-probabilities where an answer's tokens are due, of one row alone."""
    prompt = PROMPTS[row]
    artifact = artifact_of((FACTORS[row][0], FACTORS[row][1]))
    with steered(model, artifact, strength) as steering, torch.inference_mode():
        steering.set_prompt_lengths(len(prompt))
        logits_TV = model(torch.tensor([[*prompt, *answer]])).logits[0].double()
    return logits_TV.log_softmax(-1)[len(prompt) - 1 : -1].numpy()


def test_answers_lie_behind_their_prompts() -> None:
    answers = Answers.of(PROMPTS, UNEVEN, CPU)
    assert answers.ids_BT.shape == answers.is_answer_BT.shape == (3, 15)
    assert answers.prompt_lengths == (4, 11, 7)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, UNEVEN, strict=True)):
        stop = len(prompt) + len(answer)
        assert answers.ids_BT[row, :stop].tolist() == [*prompt, *answer]
        assert answers.ids_BT[row, stop:].tolist() == [0] * (15 - stop)
        at = torch.arange(15)
        assert torch.equal(answers.is_answer_BT[row], (at >= len(prompt)) & (at < stop))
    assert answers.targets_M.tolist() == [token for answer in UNEVEN for token in answer]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_each_row_alone(load: Load, family: str) -> None:
    model = load(family)
    with torch.inference_mode():
        got_MV = Answers.of(PROMPTS, UNEVEN, CPU).logits(model)
        want = [
            model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            for prompt, answer in zip(PROMPTS, UNEVEN, strict=True)
        ]
    assert got_MV.dtype == torch.float32
    torch.testing.assert_close(got_MV, torch.cat(want), rtol=1e-4, atol=1e-4)


def test_the_head_runs_only_where_an_answer_is_due(load: Load) -> None:
    """With a large vocabulary, the prompts' logits would be most of the memory."""
    model, seen = load(), []
    hook = model.lm_head.register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[1]))
    long = [np.arange(5, 9), np.arange(5, 205)]
    with torch.inference_mode():
        Answers.of(long, [[7, 8, 9], [7, 8, 9]], CPU).logits(model)
    hook.remove()
    assert seen == [6]


def test_a_model_that_computes_every_logit_gives_the_same(load: Load) -> None:
    class Old(nn.Module):
        """As models were before `logits_to_keep`."""

        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            return load()(input_ids=input_ids, use_cache=use_cache)

    answers = Answers.of(PROMPTS, UNEVEN, CPU)
    with torch.inference_mode():
        torch.testing.assert_close(answers.logits(Old()), answers.logits(load()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wanted", [ANSWERS, UNEVEN])
def test_begins_with_is_the_cross_entropy_under_steering(
    load: Load, family: str, wanted: list[list[int]]
) -> None:
    model = load(family)
    answers = Answers.of(PROMPTS, wanted, CPU)
    with steered(model, artifact_of(), STRENGTH) as steering, torch.no_grad():
        got = begins_with(steering, model, answers, torch.tensor(FACTORS)).item()
        plain = begins_with(steering, model, answers, torch.zeros(3, 2)).item()
    losses = [
        -by_hand(model, row, answer, STRENGTH)[i, token]
        for row, answer in enumerate(wanted)
        for i, token in enumerate(answer)
    ]
    assert got == pytest.approx(np.mean(losses), rel=1e-4)
    assert abs(plain - got) > 0.01


def test_stays_as_it_is_is_the_divergence_from_the_plain_model(load: Load) -> None:
    model = load()
    answers = Answers.of(PROMPTS, UNEVEN, CPU)
    with steered(model, artifact_of(), STRENGTH) as steering, torch.no_grad():
        none = stays_as_it_is(steering, model, answers, torch.zeros(3, 2)).item()
        got = stays_as_it_is(steering, model, answers, torch.tensor(FACTORS)).item()
    terms = []
    for row, answer in enumerate(UNEVEN):
        plain, moved = (by_hand(model, row, answer, strength) for strength in (0.0, STRENGTH))
        terms.extend((np.exp(plain) * (plain - moved)).sum(axis=-1))
    assert none == pytest.approx(0.0, abs=1e-6)
    assert got > 0.01
    assert got == pytest.approx(np.mean(terms), rel=1e-3)


@pytest.mark.parametrize("objective", [begins_with, stays_as_it_is])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_reach_every_factor_and_no_weight_of_the_model(
    load: Load, objective: Any, dtype: str
) -> None:
    model = load(dtype=dtype)
    factor_BI = torch.full((3, 2), 0.5, requires_grad=True)
    with steered(model, artifact_of(), STRENGTH) as steering:
        objective(steering, model, Answers.of(PROMPTS, ANSWERS, CPU), factor_BI).backward()
    assert factor_BI.grad is not None
    assert factor_BI.grad.isfinite().all()
    assert (factor_BI.grad.abs() > 1e-6).all()
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_a_gradient_is_the_slope_of_its_loss(load: Load) -> None:
    model, answers = load(), Answers.of(PROMPTS, UNEVEN, CPU)
    factor_BI = torch.tensor([*FACTORS[:2], [0.5, 0.5]], requires_grad=True)
    with steered(model, artifact_of(), STRENGTH) as steering:
        begins_with(steering, model, answers, factor_BI).backward()
        assert factor_BI.grad is not None
        for row, site in ((0, 0), (1, 1), (2, 0)):
            ends = []
            for by in (-1e-2, 1e-2):
                moved = factor_BI.detach().clone()
                moved[row, site] += by
                with torch.no_grad():
                    ends.append(begins_with(steering, model, answers, moved).item())
            slope = (ends[1] - ends[0]) / 2e-2
            assert factor_BI.grad[row, site].item() == pytest.approx(slope, rel=0.05, abs=1e-3)


def test_the_model_is_plain_again_after_an_objective(load: Load) -> None:
    model, ids_BT = load(), torch.from_numpy(PROMPTS[1])[None]
    with torch.no_grad():
        before = model(ids_BT).logits
        with steered(model, artifact_of(), STRENGTH) as steering:
            answers = Answers.of(PROMPTS, ANSWERS, CPU)
            begins_with(steering, model, answers, torch.ones(3, 2))
            # Factors are gone, and so are the lengths of three prompts.
            steering.set_factors(torch.zeros(1, 2))
            torch.testing.assert_close(model(ids_BT).logits, before)
        assert torch.equal(model(ids_BT).logits, before)


def generated(model: Any, prompt: Any, num_tokens: int) -> list[int]:
    ids = model.generate(
        torch.from_numpy(prompt)[None], max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
    )
    return list(ids[0, len(prompt) :].tolist())


@pytest.mark.parametrize("ends", ["one", "list", "none"])
def test_own_answers_are_the_models_row_by_row_up_to_the_end_token(
    make_model: Callable[..., Path], ends: str
) -> None:
    model: Any = load_model(make_model("llama-wide-heads"), "float32")
    model.generation_config.eos_token_id = None
    plain = [generated(model, prompt, 8) for prompt in PROMPTS]
    assert own_answers(model, PROMPTS, 8) == plain
    if ends == "none":
        assert {len(answer) for answer in plain} == {8}
        return
    end = plain[1][2]
    model.generation_config.eos_token_id = end if ends == "one" else [319, end]
    want = [
        answer[: answer.index(end) + 1] if end in answer else answer
        for answer in (plain[0], plain[1], plain[2])
    ]
    got = own_answers(model, PROMPTS, 8)
    assert got == want
    assert got[1] == plain[1][: plain[1].index(end) + 1]
    assert len(got[1]) <= 3
    assert [len(a) for a in own_answers(model, PROMPTS[:1], 1)] == [1]
