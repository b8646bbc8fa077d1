"""Judges: what an answer counts as."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, Literal

Choice = Literal["A", "B", "undefined"]

_CHOICE: Final = re.compile(r"\(([AB])\)")


def is_refusal(answer: str, phrases: Sequence[str]) -> bool:
    """Whether an answer refuses, by a list of phrases.

    Args:
        phrases: Lower-case beginnings of refusals; matched at the start of the answer.
    """
    text = answer.strip().lower().replace("\u2019", "'")
    return text.startswith(tuple(phrases))


def choice(answer: str) -> Choice:
    """Which of two options an answer takes.

    ``undefined`` where it names both or neither, as in HSI's sweep (METHODS 1).
    """
    letters = set(_CHOICE.findall(answer))
    if letters == {"A"}:
        return "A"
    if letters == {"B"}:
        return "B"
    return "undefined"
