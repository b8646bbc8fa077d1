"""Selections: which tokens of a prompt become rows, named in one string.

    last            the last token
    -2              that many tokens from the end: -1 is the last
    last_3          the last three tokens, a row each
    mean            the mean over all tokens
    mean_prompt     the mean over the tokens before the completion
    mean_completion the mean over the completion's tokens
    answer_letter   the token that holds the letter of the completion's answer, (A) or a bare A
    all             every token, a row each
    completion      every token of the completion, a row each
    text:SUBSTRING  the mean over the tokens of the last occurrence of a text
    regex:PATTERN   the mean over the tokens of the last match, or of its first group

CAA (arXiv 2312.06681) reads the answer letter; HSI (arXiv 2502.05945) reads the last token.

A token belongs to a span of characters if it overlaps it, so whatever the tokenizer merged with the
span is part of it. The prompt of `mean_prompt` is all that the model reads before the completion,
template included; what a template writes behind a completion belongs to neither. A text without a
completion is all prompt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from pipeline.errors import InvalidInput

if TYPE_CHECKING:
    from pipeline.prompts.corpus import Format
    from pipeline.prompts.tokens import TokenizedPrompt

Form = Literal[
    "index",
    "last",
    "mean",
    "mean_prompt",
    "mean_completion",
    "answer_letter",
    "all",
    "completion",
    "text",
    "regex",
]
_FORMS: Final = (
    "last; a negative index such as -2; last_3 (the last 3 tokens, a row each); mean; mean_prompt; "
    "mean_completion; answer_letter; all (a row a token); completion (a row a token of it); "
    "text:SUBSTRING (mean over the last occurrence); regex:PATTERN (mean over the last match's "
    "first group, or over all of it)"
)
# Nine digits: more tokens than any context, fewer than int() refuses to read.
_COUNTED: Final = re.compile(r"(?P<sign>-|last_)(?P<count>[1-9][0-9]{0,8})")
_PLAIN: Final[dict[str, Form]] = {
    "mean": "mean",
    "mean_prompt": "mean_prompt",
    "mean_completion": "mean_completion",
    "answer_letter": "answer_letter",
    "all": "all",
    "completion": "completion",
}
_NEED_COMPLETION: Final[frozenset[Form]] = frozenset(
    {"mean_completion", "answer_letter", "completion"}
)

_LETTER: Final = re.compile(r"\(\s*([A-Za-z])\s*\)")
# A letter that begins the answer and is no word of it: "B", "B.", "B: both", but not "I think so".
_BARE_LETTER: Final = re.compile(r"\s*([A-Za-z])(?=[.):\]\n\r]|\s*\Z)")


@dataclass(frozen=True, slots=True)
class Selection:
    """Which tokens of a prompt become rows. Made by `parse`.

    Attributes:
        text: As the run file spells it.
        form: How the tokens are found; ``-2`` is of the form ``index``, ``last`` and ``last_3`` are
            of the form ``last``.
        count: index: tokens from the end; last: rows; else 0.
        literal: text: what is looked for; else empty.
        pattern: regex: what is matched; else None.
    """

    text: str
    form: Form
    count: int = 0
    literal: str = ""
    pattern: re.Pattern[str] | None = None

    @classmethod
    def parse(cls, text: str) -> Selection:
        """Read a selection; the forms are listed at the top of this module.

        Raises:
            InvalidInput: kind "selection": no form, or a pattern that is no regular expression.
        """
        if text in _PLAIN:
            return cls(text, _PLAIN[text])
        if text == "last":
            return cls(text, "last", count=1)
        if counted := _COUNTED.fullmatch(text):
            form: Form = "index" if counted["sign"] == "-" else "last"
            return cls(text, form, count=int(counted["count"]))
        name, colon, rest = text.partition(":")
        if colon and rest and name == "text":
            return cls(text, "text", literal=rest)
        if colon and rest and name == "regex":
            try:
                return cls(text, "regex", pattern=re.compile(rest))
            except (re.error, OverflowError, RecursionError) as error:
                raise InvalidInput(
                    f"tokens = {text!r}: {rest!r} is not a regular expression of Python: {error}",
                    kind="selection",
                ) from error
        raise InvalidInput(
            f"tokens = {text!r} selects nothing; expected one of: {_FORMS}", kind="selection"
        )

    def __str__(self) -> str:
        return self.text

    def check_format(self, known: Format) -> None:
        """Refuse prompts none of which can have what is selected.

        Raises:
            InvalidInput: kind "selection": the selection reads completions, and the prompts are
                labelled, so they have none.
        """
        if known == "labelled" and self.form in _NEED_COMPLETION:
            raise InvalidInput(
                f"tokens = {self.text!r} reads completions, and labelled prompts have none; select "
                "last, mean or text:SUBSTRING, say, or use pairs, {prompt, positive, negative}",
                kind="selection",
            )

    def spans(self, prompt: TokenizedPrompt) -> list[tuple[int, int]]:
        """The rows of a prompt.

        Returns:
            Token spans [start, stop), one a row, in order and none of them empty; a span of several
            tokens is their mean. No spans if the prompt has no such tokens; `reason` says why.
        """
        found = self._find(prompt)
        return [] if isinstance(found, str) else found

    def reason(self, prompt: TokenizedPrompt) -> str | None:
        """Why a prompt has no such tokens, for its quarantine; None if it has."""
        found = self._find(prompt)
        return found if isinstance(found, str) else None

    def _find(self, prompt: TokenizedPrompt) -> list[tuple[int, int]] | str:
        num_tokens = len(prompt.token_ids)
        match self.form:
            case "all":
                return _each(0, num_tokens) or "no tokens"
            case "mean":
                return [(0, num_tokens)] if num_tokens else "no tokens"
            case "index" | "last":
                first = num_tokens - self.count
                if first < 0:
                    return f"{num_tokens} tokens, too few for tokens = {self.text!r}"
                return [(first, first + 1)] if self.form == "index" else _each(first, num_tokens)
            case "text" | "regex":
                found = self._search(prompt.text)
                return found if isinstance(found, str) else _over(prompt, *found)
            case "mean_prompt" if prompt.example.completion is None:
                return [(0, num_tokens)] if num_tokens else "no tokens"
            case _:
                return self._find_by_completion(prompt)

    def _find_by_completion(self, prompt: TokenizedPrompt) -> list[tuple[int, int]] | str:
        if prompt.example.completion is None:
            return f"tokens = {self.text!r} reads the completion, and there is none"
        if prompt.completion is None:
            return (
                f"tokens = {self.text!r} needs the completion's place, and the chat template "
                "changed or dropped the completion so that it cannot be found; with "
                "prompts.close_turn = false it stays as it is"
            )
        if self.form == "answer_letter":
            found = _answer_letter(prompt.text, *prompt.completion)
            return found if isinstance(found, str) else _over(prompt, *found)
        spans = _over(prompt, *prompt.completion)
        if isinstance(spans, str) or self.form == "mean_completion":
            return spans
        ((start, stop),) = spans
        if self.form == "completion":
            return _each(start, stop)
        return [(0, start)] if start else "no token lies before the completion"

    def _search(self, text: str) -> tuple[int, int] | str:
        """The characters that a text or a pattern names, or why there are none."""
        if self.pattern is None:
            start = text.rfind(self.literal)
            if start < 0:
                return f"the text has no {_shown(self.literal)}"
            return start, start + len(self.literal)
        last = None
        for match in self.pattern.finditer(text):
            # Group 1 is (-1, -1) where the match is without it.
            span = match.span(1) if self.pattern.groups else match.span()
            if self.pattern.groups and span[0] < 0:
                span = match.span()
            # Empty ones, such as the last match of "x*", name no character.
            last = span if span[0] < span[1] else last
        return last or f"nothing in the text matches {_shown(self.pattern.pattern)}"


def _each(start: int, stop: int) -> list[tuple[int, int]]:
    return [(i, i + 1) for i in range(start, stop)]


def _over(prompt: TokenizedPrompt, start: int, stop: int) -> list[tuple[int, int]] | str:
    """From the first to the last token that overlaps the characters [start, stop)."""
    starts, stops = prompt.offsets[:, 0], prompt.offsets[:, 1]
    # Byte-level tokenizers that trim offsets give a token of spaces the empty span at its end.
    trimmed = (starts == stops) & (starts <= stop)
    overlap = np.flatnonzero((stops > start) & ((starts < stop) | trimmed))
    if not len(overlap):
        return f"no token covers {_shown(prompt.text[start:stop])} of the text"
    return [(int(overlap[0]), int(overlap[-1]) + 1)]


def _answer_letter(text: str, start: int, stop: int) -> tuple[int, int] | str:
    """The character of the answer's letter: of the first (A), else of a bare A that it begins with.

    Args:
        start: Where the completion begins in the text.
        stop: Where it ends.
    """
    completion = text[start:stop]
    found = _LETTER.search(completion) or _BARE_LETTER.match(completion)
    if found is None:
        return (
            f"the completion {_shown(completion)} has no answer letter: expected one such as (A), "
            "or that it begins with a letter alone"
        )
    return start + found.start(1), start + found.end(1)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:59]}…")
