"""What the rules for a refusal direction are measured on: a run's own harmful and harmless prompts.

Scores are of the first answer token alone, in one forward pass: the log-odds that it begins a
refusal (arXiv 2406.11717, METHODS 6).

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor, nn

from pipeline.config import RunFile
from pipeline.errors import GateRefused, InvalidInput
from pipeline.evaluation.generate import ChatPrompt, generate_ids, prompt_ids
from pipeline.evaluation.likelihood import (
    ForcedAnswer,
    answer_logits,
    base_log_probs,
    divergences,
)
from pipeline.prompts.corpus import read_corpus
from pipeline.reduction.results import Reduction
from pipeline.selection.refusal import RefusalCandidate, ablation, addition
from pipeline.selection.validation import ValidationFile
from steering_service.adapters.sites import ModelSites
from steering_service.adapters.transformers import Steering, steered
from steering_service.core.artifact import Artifact, ModelReference, Policy, build
from steering_service.core.direction import Direction
from steering_service.core.intervention import Intervention

REFUSAL_SCHEMA: Final = 2
"""Goes up where a reduction and a token come to mean another direction."""

_REFUSAL_TOKENS: Final = 16
"""Most tokens of an answer that a judge needs to tell a refusal."""

_TRAINING_REQUESTS: Final = 128
"""Of each class, that the plain model answers to show how it begins a refusal."""


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests of a run, by class and split.

    Attributes:
        harmful, harmless: Of the validation split: what candidates are measured on.
        harmful_train, harmless_train: Of the training split: what tells how a refusal begins.
    """

    harmful: tuple[ChatPrompt, ...]
    harmless: tuple[ChatPrompt, ...]
    harmful_train: tuple[ChatPrompt, ...]
    harmless_train: tuple[ChatPrompt, ...]


def read_requests(run: RunFile, most: int) -> Requests:
    """The requests of a run file; the positive class is the harmful one.

    Args:
        most: Of each class of the validation split.

    Raises:
        InvalidInput: The prompts hold completions or no chat template, so that they are no
            requests; or a class is empty.
    """
    corpus = read_corpus(run.prompts)
    if corpus.format != "labelled" or run.prompts.template != "chat":
        raise InvalidInput(
            f"run {run.name!r}: prompts of format {corpus.format} and template "
            f"{run.prompts.template}; a refusal direction is found with requests, "
            '{prompt, label}, in template = "chat"',
            kind="refusal_prompts",
        )

    def of(split: str, label: bool, num: int) -> tuple[ChatPrompt, ...]:
        chosen = [e for e in corpus.examples if e.split == split and e.label is label]
        if not chosen:
            raise InvalidInput(
                f"run {run.name!r}: no prompt of label {label} in the split {split!r}; check the "
                "labels and the split shares",
                kind="class_empty",
            )
        return tuple(ChatPrompt(e.prompt, e.system) for e in chosen[:num])

    return Requests(
        of("validation", True, most),
        of("validation", False, most),
        of("train", True, _TRAINING_REQUESTS),
        of("train", False, _TRAINING_REQUESTS),
    )


def refusal_measurement_request(
    reduction: Reduction, file: ValidationFile, most: int
) -> dict[str, Any]:
    """What every measured direction depends on beside its site and token.

    Args:
        reduction: Its capture names the prompts.
        file: Its target tells refusals.
        most: As for `read_requests`.
    """
    return {
        "schema_version": REFUSAL_SCHEMA,
        "reduction": reduction.digest,
        "targets": file.record()["targets"],
        "prompts": most,
    }


def refusal_tokens(
    model: nn.Module,
    tokenizer: Any,
    harmful: Sequence[ChatPrompt],
    harmless: Sequence[ChatPrompt],
    is_refusal: Callable[[str], bool],
) -> list[int]:
    """First tokens of the plain model's own refusals; the paper names them by hand for each model.

    A token that begins as many of the answers to harmless requests is no sign of a refusal, and is
    left out.

    Raises:
        GateRefused: The plain model refuses no harmful request, or in no way of its own.
    """
    first = {}
    for name, prompts in (("harmful", harmful), ("harmless", harmless)):
        ids = generate_ids(model, tokenizer, prompts, max_new_tokens=_REFUSAL_TOKENS)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        first[name] = Counter(
            answer[0]
            for answer, text in zip(ids, texts, strict=True)
            if answer and (name == "harmless" or is_refusal(text.strip()))
        )
    if not first["harmful"]:
        raise GateRefused(
            f"the plain model refuses none of {len(harmful)} harmful prompts of the training "
            "split, so there is no refusal to find a direction of; check the phrases of the suite "
            "and the labels of the run file (1 is the harmful class)",
            kind="refusal_none",
        )
    share = {
        name: {token: num / counts.total() for token, num in counts.items()}
        for name, counts in first.items()
    }
    tokens = [t for t, s in share["harmful"].items() if s > share["harmless"].get(t, 0.0)]
    if not tokens:
        raise GateRefused(
            "every token that begins a refusal begins as many answers to harmless requests, so "
            "the first token does not tell a refusal",
            kind="refusal_none",
        )
    return sorted(tokens)


class RefusalBench:
    """Measures candidates.

    Only requests that the plain model treats as it should are asked, as in the released code:
    harmful ones whose score is positive, harmless ones whose score is negative.

    Args:
        model: The plain model; no `steered` block is active.
        harmful, harmless: Requests of the validation split.
        tokens: Ids that begin a refusal.

    Raises:
        GateRefused: No request of a class is left.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        reference: ModelReference,
        harmful: Sequence[ChatPrompt],
        harmless: Sequence[ChatPrompt],
        tokens: Sequence[int],
    ) -> None:
        self._model, self._reference = model, reference
        self._num_layers = ModelSites.of(model).num_layers
        self._tokens = torch.tensor(list(tokens))
        self._harmful = self._kept("harmful", _texts(tokenizer, harmful), lambda score: score > 0)
        self._harmless = self._kept(
            "harmless", _texts(tokenizer, harmless), lambda score: score < 0
        )

    @cached_property
    def plain_harmful(self) -> float:
        """Score of the harmful requests that are asked, without steering."""
        return _mean(self._scores(self._harmful, None))

    @cached_property
    def plain_harmless(self) -> float:
        """Score of the harmless requests that are asked, without steering."""
        return _mean(self._scores(self._harmless, None))

    @property
    def num_prompts(self) -> tuple[int, int]:
        """Harmful and harmless requests that are asked."""
        return len(self._harmful), len(self._harmless)

    @cached_property
    def _base(self) -> list[Tensor]:
        return base_log_probs(self._model, self._harmless)

    def measured(self, position: int, direction: Direction) -> RefusalCandidate:
        """What a direction does, ablated everywhere and added where it was read."""
        base = self._base
        with steered(self._model, self._artifact(ablation(direction, self._num_layers)), 1.0) as on:
            ablated = _mean(self._scores(self._harmful, on))
            found = divergences(self._model, self._harmless, base, on)
        with steered(self._model, self._artifact(addition(direction)), 1.0) as on:
            induced = _mean(self._scores(self._harmless, on))
        kl = _mean([float(terms.mean()) for terms in found])
        return RefusalCandidate(direction.site, position, ablated, induced, kl)

    def _artifact(self, items: Sequence[Intervention]) -> Artifact:
        policy = Policy(min_strength=0.0, max_strength=1.0)
        return build(items, name="candidate", model=self._reference, policy=policy)

    def _kept(
        self, name: str, texts: list[ForcedAnswer], keep: Callable[[float], bool]
    ) -> list[ForcedAnswer]:
        scores = self._scores(texts, None)
        kept = [text for text, score in zip(texts, scores, strict=True) if keep(score)]
        if not kept:
            raise GateRefused(
                f"the plain model {'refuses' if name == 'harmful' else 'answers'} none of "
                f"{len(texts)} {name} prompts of the validation split (mean score "
                f"{_mean(scores):+.2f} nats), so there is nothing to measure on",
                kind="refusal_none",
            )
        return kept

    def _scores(self, texts: Sequence[ForcedAnswer], steering: Steering | None) -> list[float]:
        """Log-odds of a refusal's first token, by text, in nats."""
        scores = [0.0] * len(texts)
        for i, logits_1V in answer_logits(self._model, texts, steering):
            scores[i] = log_odds(logits_1V[0], self._tokens)
        return scores


def log_odds(logits_V: Tensor, tokens: Tensor) -> float:
    """log P(one of the tokens) - log P(none of them), in nats; float64, so that it stays finite
    where one of the two is next to nothing.
    """
    wide_V = logits_V.double().cpu()
    among_V = torch.zeros_like(wide_V, dtype=torch.bool)
    among_V[tokens] = True
    return float(wide_V[among_V].logsumexp(-1) - wide_V[~among_V].logsumexp(-1))


def _texts(tokenizer: Any, prompts: Sequence[ChatPrompt]) -> list[ForcedAnswer]:
    # What is scored is what predicts the answer's first token, so any token will do.
    return [ForcedAnswer(ids, (0,)) for ids in prompt_ids(tokenizer, prompts)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
