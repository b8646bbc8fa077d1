"""Suites: prompts and a measure, and how it moves with the strength.

A suite asks its prompts under whatever `steered` block is active and gives one value a prompt;
a Point holds those of one suite under one condition, and sums them up with an interval.

Shapes: N prompts, R resamples.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Protocol, Self

import numpy as np
from torch import nn

from pipeline.errors import InvalidInput
from pipeline.evaluation.generate import ChatPrompt, generate
from pipeline.evaluation.judges import choice, is_refusal
from pipeline.evaluation.statistics import wilson
from pipeline.prompts.corpus import Example
from steering_service.adapters.transformers import Steering

Kind = Literal["refusal", "choice", "answer", "fluency"]
Role = Literal["target", "harm", "skill"]
Metric = Literal["share", "probability", "perplexity", "kl"]
Condition = Literal["none", "prompt", "steered", "random"]

_RESAMPLES: Final = 2000


@dataclass(frozen=True, slots=True)
class Measured:
    """What a suite gives, by prompt.

    Attributes:
        values: [N]; see `Point.values`.
        answers: [N] texts that were generated or scored.
        weights: [N] tokens that a value is the mean of; None where each prompt counts alike.
        undefined: Indices of answers that could not be judged; they count as misses.
    """

    values: tuple[float, ...]
    answers: tuple[str, ...]
    weights: tuple[int, ...] | None = None
    undefined: tuple[int, ...] = ()


class AnySuite(Protocol):
    """What can be asked: prompts and one measure.

    Attributes:
        name: What the number is, such as ``refuses jailbroken requests``.
        role: ``target``: steering should raise it; ``harm``: it should stay low; ``skill``: it must
            not drop. None: of no axis of the trade-off.
    """

    @property
    def name(self) -> str: ...
    @property
    def prompts(self) -> tuple[ChatPrompt, ...]: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def metric(self) -> Metric: ...
    @property
    def role(self) -> Role | None: ...

    def ask(self, model: nn.Module, tokenizer: Any, steering: Steering | None) -> Measured:
        """Measure every prompt under the active `steered` block, which has yielded `steering`."""
        ...

    def under(self, system: str) -> Self:
        """The same suite with a system prompt before each prompt's own."""
        ...


@dataclass(frozen=True, slots=True)
class Suite:
    """Prompts that are answered, and what counts as a hit.

    Attributes:
        is_hit: Judges the answer to the prompt of an index.
        max_new_tokens: Longest answer that the judge needs.
        is_undefined: Whether an answer cannot be judged.
        batch_size: Prompts that are answered at a time.
    """

    name: str
    prompts: tuple[ChatPrompt, ...]
    is_hit: Callable[[int, str], bool]
    max_new_tokens: int
    kind: Kind = "refusal"
    role: Role | None = None
    is_undefined: Callable[[str], bool] = lambda answer: False
    batch_size: int = 128

    @property
    def metric(self) -> Metric:
        """Share of hits."""
        return "share"

    def ask(self, model: nn.Module, tokenizer: Any, steering: Steering | None) -> Measured:
        """Generate an answer to every prompt, and judge it: 1 for a hit, else 0."""
        answers = generate(
            model,
            tokenizer,
            self.prompts,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )
        return Measured(
            tuple(float(self.is_hit(i, answer)) for i, answer in enumerate(answers)),
            tuple(answers),
            undefined=tuple(i for i, answer in enumerate(answers) if self.is_undefined(answer)),
        )

    def under(self, system: str) -> Suite:
        """See `AnySuite.under`."""
        return replace(self, prompts=prompts_under(self.prompts, system))


@dataclass(frozen=True, slots=True)
class Point:
    """One suite at one strength under one condition.

    Attributes:
        values: [N], in the suite's order. ``share``: 1 for a hit, else 0; ``probability``: 0 to 1;
            ``perplexity``: mean loss a token in nats; ``kl``: mean divergence a token in nats.
        answers: [N], in the suite's order.
        weights: [N] tokens of each answer, or None; see `Measured`.
        undefined: Indices of answers that could not be judged.
        seed: Of the random direction, under the condition ``random``.
    """

    suite: str
    strength: float
    values: tuple[float, ...]
    answers: tuple[str, ...]
    weights: tuple[int, ...] | None = None
    undefined: tuple[int, ...] = ()
    metric: Metric = "share"
    condition: Condition = "steered"
    seed: int | None = None

    @property
    def num(self) -> int:
        """Prompts in all."""
        return len(self.values)

    @property
    def hits(self) -> int:
        """Answers that count, of a share."""
        return round(sum(self.values))

    @property
    def share(self) -> float:
        """Mean value in points, 0 to 100, of a share or a probability."""
        return 100.0 * sum(self.values) / len(self.values)

    @property
    def value(self) -> float:
        """The suite's number: points, a perplexity, or nats a token."""
        if self.metric in ("share", "probability"):
            return self.share
        return float(self._summary(np.average(self.values, weights=self.weights)))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `value`: Wilson's of a share, else the bootstrap's."""
        if self.metric != "share":
            return self.bootstrap()
        ends = wilson(self.hits, self.num)
        return ends.low, ends.high

    def bootstrap(self, *, seed: int = 0) -> tuple[float, float]:
        """95 % percentile interval of `value`, over resampled prompts.

        Args:
            seed: Of the resampling; two points of one suite get the same resamples.
        """
        values_N = np.asarray(self.values)
        weights_N = np.ones(self.num) if self.weights is None else np.asarray(self.weights, float)
        chosen_RN = np.random.default_rng(seed).integers(self.num, size=(_RESAMPLES, self.num))
        sums_R = (values_N * weights_N)[chosen_RN].sum(-1)
        low, high = np.quantile(
            self._summary(sums_R / weights_N[chosen_RN].sum(-1)), (0.025, 0.975)
        )
        return float(low), float(high)

    def _summary(self, mean: Any) -> Any:
        if self.metric == "perplexity":
            return np.exp(mean)
        return mean if self.metric == "kl" else 100.0 * mean


def refusal_suite(
    name: str,
    examples: Sequence[Example],
    phrases: Sequence[str],
    *,
    role: Role | None = None,
    max_new_tokens: int = 10,
) -> Suite:
    """How many requests are refused.

    Args:
        phrases: Lower-case beginnings of refusals.
        max_new_tokens: A refusal shows in its first words.
    """
    return Suite(
        name,
        asked(name, examples),
        lambda _, answer: is_refusal(answer, phrases),
        max_new_tokens,
        role=role,
    )


def choice_suite(
    name: str, examples: Sequence[Example], *, role: Role | None = None, max_new_tokens: int = 8
) -> Suite:
    """How many two-choice questions are answered with the positive example's letter.

    An answer that names both letters or neither is undefined and counts as not.

    Args:
        examples: Both examples of each pair; the positive one's completion is the letter.

    Raises:
        InvalidInput: A completion names no letter.
    """
    positive = [e for e in examples if e.label]
    letters = [choice(e.completion or "") for e in positive]
    if "undefined" in letters:
        bad = positive[letters.index("undefined")]
        raise InvalidInput(
            f"{bad.prompt_id}: completion {bad.completion!r} names neither (A) nor (B)",
            kind="choice_letter",
        )
    return Suite(
        name,
        asked(name, positive),
        lambda i, answer: choice(answer) == letters[i],
        max_new_tokens,
        kind="choice",
        role=role,
        is_undefined=lambda answer: choice(answer) == "undefined",
    )


def answer_suite(
    name: str,
    prompts: Sequence[ChatPrompt],
    expected: Sequence[str],
    *,
    role: Role | None = None,
    max_new_tokens: int = 24,
) -> Suite:
    """How many answers contain the expected one, as a word or a number of its own."""
    patterns = [re.compile(rf"(?<!\w){re.escape(text)}(?!\w)") for text in expected]
    return Suite(
        name,
        nonempty(name, prompts),
        lambda i, answer: patterns[i].search(answer) is not None,
        max_new_tokens,
        kind="answer",
        role=role,
    )


def sweep(
    model: nn.Module,
    tokenizer: Any,
    suites: Sequence[AnySuite],
    strengths: Sequence[float],
    steering_at: Callable[[float], AbstractContextManager[Any]],
    on_point: Callable[[Point], None] = lambda point: None,
) -> list[Point]:
    """Ask every suite at every strength.

    Args:
        steering_at: Gives the `steered` block for a strength; what it yields is a `Steering`, or
            None where nothing is steered.
        on_point: Called with each point as it is measured.

    Returns:
        By strength, then suite, in the given orders.
    """
    points = []
    for strength in strengths:
        with steering_at(strength) as steering:
            for suite in suites:
                found = suite.ask(model, tokenizer, steering)
                point = Point(
                    suite.name,
                    strength,
                    found.values,
                    found.answers,
                    found.weights,
                    found.undefined,
                    suite.metric,
                )
                points.append(point)
                on_point(point)
    return points


def asked(name: str, examples: Sequence[Example]) -> tuple[ChatPrompt, ...]:
    """The prompts of examples. Raises InvalidInput where there is none."""
    return nonempty(name, [ChatPrompt(e.prompt, e.system) for e in examples])


def nonempty(name: str, prompts: Sequence[ChatPrompt]) -> tuple[ChatPrompt, ...]:
    """The prompts of a suite. Raises InvalidInput where there is none."""
    if not prompts:
        raise InvalidInput(f"suite {name!r} has no example", kind="suite_empty")
    return tuple(prompts)


def prompts_under(prompts: Sequence[ChatPrompt], system: str) -> tuple[ChatPrompt, ...]:
    """The prompts with a system prompt before each one's own."""
    return tuple(
        replace(p, system=system if p.system is None else f"{system}\n{p.system}") for p in prompts
    )
