"""Teacher-forced scoring: how likely given answers are, under whatever `steered` block is active.

A text is run once, prompt and answer together, and the positions that are edited are exactly those
that decoding with a cache would have edited, since the block is told where each prompt ends.

Shapes: N prompts, B batch, T positions with padding on the left, A tokens of one answer,
V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import InvalidInput
from pipeline.evaluation.generate import ChatPrompt, generate_ids, prompt_ids
from pipeline.evaluation.suites import (
    Kind,
    Measured,
    Metric,
    Role,
    asked,
    nonempty,
    prompts_under,
)
from pipeline.prompts.corpus import Example
from steering_service.adapters.transformers import Steering

# Logits of one pass, in numbers: 256 MiB of float32, whatever the vocabulary.
_MAX_LOGITS: Final = 1 << 26
_MAX_BATCH: Final = 64


@dataclass(frozen=True, slots=True)
class ForcedAnswer:
    """An answer that the model is made to give.

    Attributes:
        prompt_ids: Tokens before the answer, chat template included; at least one.
        answer_ids: Tokens that are scored; at least one.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


def answer_logits(
    model: nn.Module,
    texts: Sequence[ForcedAnswer],
    steering: Steering | None,
    *,
    batch_size: int = _MAX_BATCH,
) -> Iterator[tuple[int, Tensor]]:
    """Logits that predict the tokens of each answer, a text at a time.

    Only positions that predict answer tokens go through the head, and a pass takes only as many
    texts as keeps its logits below 256 MiB.

    Args:
        model: A causal language model.
        texts: What is scored.
        steering: What the active `steered` block has yielded; None where there is none.
        batch_size: Most texts of a pass.

    Yields:
        Index of the text and its float32 [A, V] logits, shortest texts first. Every text once.

    Raises:
        InvalidInput: An empty prompt or answer, or a text longer than the model's context.
    """
    config: Any = model.config
    text_config = config.get_text_config()
    _check(texts, int(getattr(text_config, "max_position_embeddings", None) or 1 << 30))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    vocabulary = int(text_config.vocab_size)
    while order:
        chosen: list[int] = []
        longest = 0
        while order and len(chosen) < batch_size:
            grown = max(longest, len(texts[order[0]].answer_ids))
            if chosen and (len(chosen) + 1) * grown * vocabulary > _MAX_LOGITS:
                break
            longest = grown
            chosen.append(order.pop(0))
        logits_BAV = _forward(model, [texts[i] for i in chosen], longest, steering)
        for row, i in enumerate(chosen):
            yield i, logits_BAV[row, longest - len(texts[i].answer_ids) :].float()


def log_probs(
    model: nn.Module, texts: Sequence[ForcedAnswer], steering: Steering | None
) -> list[Tensor]:
    """Log-probability of every answer token, in nats.

    Returns:
        Float64 [A] a text, in the given order, on the CPU.
    """
    found: dict[int, Tensor] = {}
    for i, logits_AV in answer_logits(model, texts, steering):
        ids_A1 = torch.tensor(texts[i].answer_ids, device=logits_AV.device)[:, None]
        found[i] = logits_AV.log_softmax(-1).gather(-1, ids_A1)[:, 0].double().cpu()
    return [found[i] for i in range(len(texts))]


def base_log_probs(model: nn.Module, texts: Sequence[ForcedAnswer]) -> list[Tensor]:
    """The plain model's whole distribution at every answer token; call it outside of any block.

    Returns:
        Float32 [A, V] a text, in the given order, on the CPU: 4 V bytes for each answer token.
    """
    found = {i: x.log_softmax(-1).cpu() for i, x in answer_logits(model, texts, None)}
    return [found[i] for i in range(len(texts))]


def divergences(
    model: nn.Module,
    texts: Sequence[ForcedAnswer],
    base: Sequence[Tensor],
    steering: Steering | None,
) -> list[Tensor]:
    """KL(base || steered) at every answer token, in nats.

    Args:
        base: From `base_log_probs`, in the order of `texts`.

    Returns:
        Float64 [A] a text, in the given order, on the CPU.
    """
    found: dict[int, Tensor] = {}
    for i, logits_AV in answer_logits(model, texts, steering):
        base_AV = base[i].to(logits_AV.device)
        terms_AV = base_AV.exp() * (base_AV - logits_AV.log_softmax(-1))
        found[i] = terms_AV.double().sum(-1).cpu()
    return [found[i] for i in range(len(texts))]


@dataclass(frozen=True, slots=True)
class ChoiceLikelihood:
    """The normalised probability of the matching completion, as CAA measures it (METHODS 5).

    Attributes:
        completions: By prompt: the matching and the other completion.
    """

    name: str
    prompts: tuple[ChatPrompt, ...]
    completions: tuple[tuple[str, str], ...]
    role: Role | None = None

    @property
    def kind(self) -> Kind:
        """A choice."""
        return "choice"

    @property
    def metric(self) -> Metric:
        """Mean probability."""
        return "probability"

    def ask(self, model: nn.Module, tokenizer: Any, steering: Steering | None) -> Measured:
        """P(matching) / (P(matching) + P(other)), of whole completions, by prompt."""
        ids = prompt_ids(tokenizer, self.prompts)
        texts = [
            ForcedAnswer(ids_P, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
            for ids_P, pair in zip(ids, self.completions, strict=True)
            for text in pair
        ]
        total = [float(x.sum()) for x in log_probs(model, texts, steering)]
        margins = np.array(total[0::2]) - np.array(total[1::2])
        # The logistic of the margin, without an overflow on either side.
        values = np.exp(-np.logaddexp(0.0, -margins))
        return Measured(tuple(values.tolist()), tuple(pair[0] for pair in self.completions))

    def under(self, system: str) -> ChoiceLikelihood:
        """See `AnySuite.under`."""
        return replace(self, prompts=prompts_under(self.prompts, system))


@dataclass(frozen=True, slots=True, eq=False)
class Fluency:
    """The plain model's own answers, scored: from `fluency_suites`.

    Attributes:
        answers: [N] token ids of the plain model's greedy answers.
        base: [N] of [A, V]: its log-probabilities there; empty unless `metric` is ``kl``.
    """

    name: str
    prompts: tuple[ChatPrompt, ...]
    answers: tuple[tuple[int, ...], ...]
    base: tuple[Tensor, ...]
    metric: Metric
    role: Role | None = None

    @property
    def kind(self) -> Kind:
        """Fluency."""
        return "fluency"

    def ask(self, model: nn.Module, tokenizer: Any, steering: Steering | None) -> Measured:
        """Mean loss, or mean KL(base || steered), of each answer's tokens, in nats."""
        ids = prompt_ids(tokenizer, self.prompts)
        texts = [ForcedAnswer(*pair) for pair in zip(ids, self.answers, strict=True)]
        if self.metric == "kl":
            found = divergences(model, texts, self.base, steering)
        else:
            found = [-x for x in log_probs(model, texts, steering)]
        return Measured(
            tuple(float(x.mean()) for x in found),
            tuple(tokenizer.batch_decode(self.answers, skip_special_tokens=True)),
            weights=tuple(map(len, self.answers)),
        )

    def under(self, system: str) -> Fluency:
        """See `AnySuite.under`; the answers stay those without it."""
        return replace(self, prompts=prompts_under(self.prompts, system))


def choice_likelihood_suite(
    name: str, examples: Sequence[Example], *, role: Role | None = None
) -> ChoiceLikelihood:
    """How probable the positive completion is, against the other one alone.

    Args:
        examples: Both examples of each pair, the positive one first.

    Raises:
        InvalidInput: No example, or one without its other side.
    """
    positive, negative = ([e for e in examples if e.label is side] for side in (True, False))
    if [e.source for e in positive] != [e.source for e in negative]:
        raise InvalidInput(
            f"suite {name!r}: {len(positive)} positive and {len(negative)} negative completions "
            "are not of the same questions",
            kind="choice_pair",
        )
    pairs = tuple(
        (a.completion or "", b.completion or "") for a, b in zip(positive, negative, strict=True)
    )
    return ChoiceLikelihood(name, asked(name, positive), pairs, role)


def fluency_suites(
    name: str,
    prompts: Sequence[ChatPrompt],
    model: nn.Module,
    tokenizer: Any,
    *,
    role: Role | None = None,
    max_new_tokens: int = 32,
) -> tuple[Fluency, Fluency]:
    """Perplexity of the plain model's own answers, and the KL divergence from it along them.

    Call it outside of any `steered` block: the answers and their distributions are the reference.

    Args:
        role: Of the perplexity; the divergence has none, as it tells change, not damage.
    """
    chosen = nonempty(name, prompts)
    answers = tuple(generate_ids(model, tokenizer, chosen, max_new_tokens=max_new_tokens))
    texts = [
        ForcedAnswer(*pair) for pair in zip(prompt_ids(tokenizer, chosen), answers, strict=True)
    ]
    base = tuple(base_log_probs(model, texts))
    return (
        Fluency(f"{name}: perplexity", chosen, answers, (), "perplexity", role),
        Fluency(f"{name}: KL to the plain model", chosen, answers, base, "kl"),
    )


def _forward(
    model: nn.Module, texts: Sequence[ForcedAnswer], longest: int, steering: Steering | None
) -> Tensor:
    """[B, A, V] logits of the `longest` last answer positions."""
    length = max(map(len, texts))
    device = next(model.parameters()).device
    ids_BT = torch.zeros((len(texts), length), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, text in enumerate(texts):
        ids_BT[row, length - len(text) :] = torch.tensor(text.prompt_ids + text.answer_ids)
        mask_BT[row, length - len(text) :] = 1
    inputs: dict[str, Any] = {
        "input_ids": ids_BT.to(device),
        "attention_mask": mask_BT.to(device),
        # As `generate` counts them: padding has no position.
        "position_ids": (mask_BT.cumsum(-1) - 1).clamp(min=0).to(device),
        "use_cache": False,
    }
    # The last position predicts what comes after the answer; every other one its next token.
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    if keeps:
        inputs["logits_to_keep"] = longest + 1
    if steering is not None:
        steering.set_prompt_lengths([length - len(text.answer_ids) for text in texts])
    try:
        with torch.inference_mode():
            logits_BTV: Tensor = model(**inputs).logits
    finally:
        if steering is not None:
            steering.set_prompt_lengths(None)
    return logits_BTV[:, -longest - 1 : -1]


def _check(texts: Sequence[ForcedAnswer], context: int) -> None:
    for i, text in enumerate(texts):
        if not text.prompt_ids or not text.answer_ids:
            raise InvalidInput(
                f"text {i} has {len(text.prompt_ids)} prompt tokens and {len(text.answer_ids)} "
                "answer tokens; scoring needs at least one of each",
                kind="score_empty",
            )
        if len(text) > context:
            raise InvalidInput(
                f"text {i} has {len(text)} tokens, more than the model's context of {context}; "
                "leave it out, or lower max_new_tokens",
                kind="score_context",
            )
