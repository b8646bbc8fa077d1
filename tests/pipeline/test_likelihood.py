"""Teacher-forced scoring equals decoding, whatever is padded, batched and steered."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers

from pipeline.errors import InvalidInput
from pipeline.evaluation import likelihood
from pipeline.evaluation.generate import ChatPrompt, generate_ids, prompt_ids
from pipeline.evaluation.likelihood import (
    ForcedAnswer,
    base_log_probs,
    choice_likelihood_suite,
    divergences,
    fluency_suites,
    log_probs,
)
from pipeline.extraction.models import load_model, load_tokenizer
from pipeline.prompts.corpus import Example
from steering_service.adapters.transformers import steered
from steering_service.core.artifact import ModelReference, Policy, build
from steering_service.core.controller import Controller
from steering_service.core.direction import Direction
from steering_service.core.intervention import Intervention
from steering_service.core.site import Site

POLICIES = ("last", "generated", "prompt", "all")
TEXTS = [
    ForcedAnswer((5, 9, 7, 30, 41, 8), (11, 12)),
    ForcedAnswer((6, 21), (13, 14, 15, 16)),
    ForcedAnswer((7, 8, 9), (17,)),
]


def artifact_for(positions="generated", controller=None):
    vector = np.random.default_rng(99).standard_normal(64).astype(np.float32)
    direction = Direction(Site.parse("resid_post.1"), vector, 0.5, 3.0, "difference_of_means")
    return build(
        [Intervention(direction, positions=positions)],
        name="test",
        model=ModelReference(name="tiny", fingerprint="0" * 64),
        policy=Policy(min_strength=-2.0, max_strength=2.0),
        controller=controller,
    )


def controller_of(seed):
    """Decides by the last prompt token after block 0."""
    generator = np.random.default_rng(seed)
    shapes = ((64, 6), (6,), (6, 2), (2,))
    arrays = [generator.standard_normal(shape).astype(np.float32) * 0.3 for shape in shapes]
    return Controller((Site.parse("resid_post.0"),), *arrays)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, make_model):
    return load_model(make_model(request.param), "float32")


def decoded_log_probs(model, text):
    """Step by step with a cache, as `model.generate` runs it."""
    cache = transformers.DynamicCache()
    step = torch.tensor([text.prompt_ids])
    found = []
    with torch.inference_mode():
        for token in text.answer_ids:
            logits = model(step, past_key_values=cache, use_cache=True).logits[0, -1]
            found.append(float(logits.log_softmax(-1)[token]))
            step = torch.tensor([[token]])
    return found


@pytest.mark.parametrize("policy", POLICIES)
def test_a_padded_batch_under_steering_equals_decoding_step_by_step(model, policy):
    with steered(model, artifact_for(policy), 1.0) as steering:
        scored = log_probs(model, TEXTS, steering)
        decoded = [decoded_log_probs(model, text) for text in TEXTS]
    plain = log_probs(model, TEXTS, None)
    for one, other, without in zip(scored, decoded, plain, strict=True):
        assert one.tolist() == pytest.approx(other, abs=1e-5)
        # And the edit was felt, or agreement would mean nothing.
        assert (one - without).abs().max() > 1e-2


def test_a_controller_decides_in_scoring_what_it_decides_in_decoding(model):
    """Row by row: the rows of the batch end their prompts at different positions."""
    with steered(model, artifact_for(controller=controller_of(0)), 1.0) as steering:
        scored = log_probs(model, TEXTS, steering)
        decisions = steering.decision.scale_B
        decoded = [decoded_log_probs(model, text) for text in TEXTS]
    for one, other in zip(scored, decoded, strict=True):
        assert one.tolist() == pytest.approx(other, abs=1e-5)
    assert len(set(decisions.tolist())) == 3


def test_after_scoring_the_block_tells_prompts_by_the_pass_again(model):
    text = TEXTS[0]
    with steered(model, artifact_for(), 1.0) as steering:
        before = decoded_log_probs(model, text)
        log_probs(model, TEXTS, steering)
        assert decoded_log_probs(model, text) == before


def test_passes_of_few_logits_give_the_same_as_one(model):
    with steered(model, artifact_for(), 1.0) as steering:
        together = log_probs(model, TEXTS, steering)
        apart = {
            i: logits_AV
            for i, logits_AV in likelihood.answer_logits(model, TEXTS, steering, batch_size=1)
        }
    assert sorted(apart) == [0, 1, 2]
    for i, text in enumerate(TEXTS):
        logs_AV = apart[i].log_softmax(-1)
        assert logs_AV.shape[0] == len(text.answer_ids)
        alone = logs_AV[range(len(text.answer_ids)), text.answer_ids]
        assert alone.tolist() == pytest.approx(together[i].tolist(), abs=1e-5)


def test_the_divergence_is_that_of_the_definition_and_zero_without_steering(model):
    base = base_log_probs(model, TEXTS)
    assert [x.shape for x in base] == [(2, 320), (4, 320), (1, 320)]
    assert all(x.abs().max() == 0 for x in divergences(model, TEXTS, base, None))
    with steered(model, artifact_for(), 2.0) as steering:
        found = divergences(model, TEXTS, base, steering)
        changed = base_log_probs_under(model, steering)
    for kl_A, p_AV, q_AV in zip(found, base, changed, strict=True):
        p, q = p_AV.double().numpy(), q_AV.double().numpy()
        assert kl_A.tolist() == pytest.approx((np.exp(p) * (p - q)).sum(-1), rel=1e-4, abs=1e-6)
        assert kl_A.min() > 0


def base_log_probs_under(model, steering):
    found = dict(likelihood.answer_logits(model, TEXTS, steering))
    return [found[i].log_softmax(-1) for i in range(len(TEXTS))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ForcedAnswer((), (5,)), "at least one"),
        (ForcedAnswer((5,), ()), "at least one"),
        (ForcedAnswer((5,) * 300, (6,)), "context of 256"),
    ],
)
def test_what_cannot_be_scored_is_named(make_model, text, expected):
    model = load_model(make_model(), "float32")
    with pytest.raises(InvalidInput, match=expected):
        log_probs(model, [text], None)


def test_the_choice_is_the_normalised_probability_of_the_matching_completion(make_model):
    path = make_model()
    model, tokenizer = load_model(path, "float32"), load_tokenizer(path)
    examples = [
        Example(f"f:{n}{sign}", str(n), label, "test", question, completion, None)
        for n, question in enumerate(["to the north?", "which way, captain?"])
        for sign, label, completion in (("+", True, " (A)"), ("-", False, " (B)"))
    ]
    suite = choice_likelihood_suite("north", examples)
    with steered(model, artifact_for(), 1.0) as steering:
        found = suite.ask(model, tokenizer, steering)
        for ids, value in zip(prompt_ids(tokenizer, suite.prompts), found.values, strict=True):
            a, b = (
                sum(decoded_log_probs(model, ForcedAnswer(ids, tuple(tokenizer(t)["input_ids"]))))
                for t in (" (A)", " (B)")
            )
            assert value == pytest.approx(math.exp(a) / (math.exp(a) + math.exp(b)), abs=1e-5)
    assert 0 < min(found.values) < max(found.values) < 1
    assert found.answers == (" (A)", " (A)")
    with pytest.raises(InvalidInput, match="same questions"):
        choice_likelihood_suite("north", examples[:3])


def test_fluency_scores_the_plain_models_own_answers(make_model):
    path = make_model()
    model, tokenizer = load_model(path, "float32"), load_tokenizer(path)
    prompts = [ChatPrompt("steer to the north"), ChatPrompt("yes, captain, and no")]
    perplexity, kl = fluency_suites("talk", prompts, model, tokenizer, max_new_tokens=6)
    assert perplexity.answers == tuple(generate_ids(model, tokenizer, prompts, max_new_tokens=6))
    plain = perplexity.ask(model, tokenizer, None)
    for ids, answer, loss in zip(
        prompt_ids(tokenizer, prompts), perplexity.answers, plain.values, strict=True
    ):
        decoded = decoded_log_probs(model, ForcedAnswer(ids, answer))
        assert loss == pytest.approx(-np.mean(decoded), abs=1e-5)
    assert plain.weights == tuple(map(len, perplexity.answers))
    assert kl.ask(model, tokenizer, None).values == (0.0, 0.0)
    with steered(model, artifact_for(), 2.0) as steering:
        assert min(kl.ask(model, tokenizer, steering).values) > 0
    # Under another prompt the answers stay, and their distribution moves.
    told = kl.under("be brief")
    assert told.answers == kl.answers
    assert min(told.ask(model, tokenizer, None).values) > 0


def test_an_answers_tokens_stop_with_its_end_token(make_model):
    path = make_model()
    model, tokenizer = load_model(path, "float32"), load_tokenizer(path)
    prompts = [ChatPrompt("north " * n) for n in (4, 1, 3)]
    free = generate_ids(model, tokenizer, prompts, max_new_tokens=6)
    assert [len(ids) for ids in free] == [6, 6, 6]
    # What the second answer says third, made the end token.
    model.generation_config.eos_token_id = [free[1][2]]
    ended = generate_ids(model, tokenizer, prompts, max_new_tokens=6)
    for ids, before in zip(ended, free, strict=True):
        end = before.index(free[1][2]) + 1 if free[1][2] in before else 6
        assert ids == before[:end]
    assert len(ended[1]) <= 3
