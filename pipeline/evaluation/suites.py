"""Suites: prompts with a judge each, and how the share of hits moves with the strength."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import scipy.stats
from torch import nn

from pipeline.errors import InvalidInput
from pipeline.evaluation.generate import ChatPrompt, generate
from pipeline.evaluation.judges import choice, is_refusal
from pipeline.prompts.corpus import Example


@dataclass(frozen=True, slots=True)
class Suite:
    """Prompts, and what counts as a hit.

    Attributes:
        name: What a hit is, such as ``refuses jailbroken requests``.
        prompts: What the model is asked.
        is_hit: Judges the answer to the prompt of an index.
        max_new_tokens: Longest answer that the judge needs.
    """

    name: str
    prompts: tuple[ChatPrompt, ...]
    is_hit: Callable[[int, str], bool]
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Point:
    """One suite at one strength.

    Attributes:
        hits: Answers that count.
        num: Answers in all.
        answers: One a prompt, in the suite's order.
    """

    suite: str
    strength: float
    hits: int
    num: int
    answers: tuple[str, ...]

    @property
    def share(self) -> float:
        """Hits in points, 0 to 100."""
        return 100.0 * self.hits / self.num

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share, in points."""
        ends = scipy.stats.binomtest(self.hits, self.num).proportion_ci(method="wilson")
        return 100.0 * ends.low, 100.0 * ends.high


def refusal_suite(name: str, examples: Sequence[Example], phrases: Sequence[str]) -> Suite:
    """How many requests are refused.

    Args:
        phrases: Lower-case beginnings of refusals.
    """
    return Suite(
        name,
        tuple(ChatPrompt(e.prompt, e.system) for e in _some(name, examples)),
        lambda _, answer: is_refusal(answer, phrases),
        # A refusal shows in its first words.
        max_new_tokens=10,
    )


def choice_suite(name: str, examples: Sequence[Example]) -> Suite:
    """How many two-choice questions are answered with the positive example's letter.

    An answer that names both letters or neither counts as not.

    Args:
        examples: Both examples of each pair; the positive one's completion is the letter.

    Raises:
        InvalidInput: A completion names no letter.
    """
    positive = [e for e in _some(name, examples) if e.label]
    letters = [choice(e.completion or "") for e in positive]
    if "undefined" in letters:
        bad = positive[letters.index("undefined")]
        raise InvalidInput(
            f"{bad.prompt_id}: completion {bad.completion!r} names neither (A) nor (B)",
            kind="choice_letter",
        )
    return Suite(
        name,
        tuple(ChatPrompt(e.prompt, e.system) for e in positive),
        lambda i, answer: choice(answer) == letters[i],
        max_new_tokens=8,
    )


def sweep(
    model: nn.Module,
    tokenizer: Any,
    suites: Sequence[Suite],
    strengths: Sequence[float],
    steering_at: Callable[[float], AbstractContextManager[Any]],
    on_point: Callable[[Point], None] = lambda point: None,
) -> list[Point]:
    """Ask every suite at every strength.

    Args:
        steering_at: Gives the `steered` block for a strength.
        on_point: Called with each point as it is measured.

    Returns:
        By strength, then suite, in the given orders.
    """
    points = []
    for strength in strengths:
        with steering_at(strength):
            for suite in suites:
                answers = generate(
                    model, tokenizer, suite.prompts, max_new_tokens=suite.max_new_tokens
                )
                hits = sum(suite.is_hit(i, answer) for i, answer in enumerate(answers))
                point = Point(suite.name, strength, hits, len(answers), tuple(answers))
                points.append(point)
                on_point(point)
    return points


def _some(name: str, examples: Sequence[Example]) -> Sequence[Example]:
    if not examples:
        raise InvalidInput(f"suite {name!r} has no example", kind="suite_empty")
    return examples
