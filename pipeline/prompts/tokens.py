"""From examples to token ids: templates, context length, and where the completion lies.

Built for millions of prompts: the tokenizer's own objects, hundreds of bytes a token, live for a
batch; what is kept is two arrays a prompt, 12 bytes a token.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray

from pipeline.config import PromptsSection
from pipeline.errors import InvalidInput
from pipeline.prompts.corpus import Example, Quarantined

_NOW: Final = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_MARKER: Final = "STEERAGE-COMPLETION"
"""Stands for a completion; nothing that a template would strip, escape or split."""
_BATCH_TEXTS: Final = 1_000
_BATCH_CHARACTERS: Final = 2_000_000
"""Bounds of a batch: what a tokenizer makes of long texts is large even if they are few."""


# Arrays do not compare to a single truth.
@dataclass(frozen=True, slots=True, eq=False)
class TokenizedPrompt:
    """One example as the model reads it. Shapes: T tokens.

    Attributes:
        text: What was tokenised, template included.
        token_ids: Its tokens, int32 [T].
        offsets: Character span [start, stop) of each token in `text`, int32 [T, 2].
        completion: Character span [start, stop) of the completion in `text`, as the template wrote
            it; None if the example has none, or if the template changed it so that its place
            cannot be told.
    """

    example: Example
    text: str
    token_ids: NDArray[np.int32]
    offsets: NDArray[np.int32]
    completion: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class _Rendered:
    """An example's text and where its completion lies in it."""

    example: Example
    text: str
    completion: tuple[int, int] | None


def tokenize(
    examples: Sequence[Example], tokenizer: Any, section: PromptsSection, context: int
) -> tuple[list[TokenizedPrompt], list[Quarantined]]:
    """Render and tokenise examples.

    A pair of which one side is bad is left out whole, so that classes stay balanced.

    Args:
        tokenizer: A transformers tokenizer.
        section: Template, system prompt and end of turn.
        context: Longest input in tokens.

    Returns:
        The prompts that fit, and the rows that do not, or that the chat template or the tokenizer
        fails on.

    Raises:
        InvalidInput: The run asks for a chat template and the tokenizer has none, or the tokenizer
            is not a fast one and so cannot say where tokens lie in the text.
    """
    if section.template == "chat" and not getattr(tokenizer, "chat_template", None):
        raise InvalidInput(
            "prompts.template is 'chat', and the model's tokenizer has no chat template; "
            'set template = "none" under [prompts]',
            kind="chat_template",
        )
    if not getattr(tokenizer, "is_fast", False):
        raise InvalidInput(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so tokens cannot be traced to "
            "their text; save the model with a tokenizer.json",
            kind="tokenizer_slow",
        )
    encode = functools.partial(
        tokenizer,
        # A chat template writes its own special tokens.
        add_special_tokens=section.template == "none",
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    bad: dict[tuple[str, int], Quarantined] = {}

    def quarantine(example: Example, reason: str) -> None:
        bad[example.source] = Quarantined(*example.source, reason)

    def render_all() -> Iterator[_Rendered]:
        for example in examples:
            try:
                yield _Rendered(example, *render(example, tokenizer, section))
            except TemplateError as error:
                # Such as a template without a system role.
                quarantine(example, f"chat template: {error}")

    prompts = []
    for batch in _batches(render_all()):
        for item, encoded in zip(batch, _encode(batch, encode), strict=True):
            if isinstance(encoded, str):
                quarantine(item.example, encoded)
            elif not 0 < len(encoded[0]) <= context:
                num = len(encoded[0])
                reason = f"{num} tokens, longer than the model's context of {context}"
                quarantine(item.example, reason if num else "no tokens")
            else:
                prompts.append(TokenizedPrompt(item.example, item.text, *encoded, item.completion))
    kept = [prompt for prompt in prompts if prompt.example.source not in bad]
    return kept, list(bad.values())


def render(
    example: Example, tokenizer: Any, section: PromptsSection
) -> tuple[str, tuple[int, int] | None]:
    """The text that the model reads for an example, and where its completion lies in it.

    Returns:
        The text, and the character span [start, stop) of the completion as the template wrote it:
        stripped, perhaps, and without the end of turn. None if the example has no completion, or
        its place cannot be told.

    Raises:
        TemplateError: The chat template refuses the example.
    """
    completion = example.completion or ""
    if section.template == "none":
        return _followed_by(example.prompt, example.completion)
    messages = [{"role": "user", "content": example.prompt}]
    if example.system is not None:
        messages.insert(0, {"role": "system", "content": example.system})
    template = functools.partial(
        tokenizer.apply_chat_template,
        tokenize=False,
        chat_template=_dated(tokenizer.get_chat_template(), section.date),
        date_string=section.date.strftime("%d %b %Y"),
    )
    if example.completion is None or not section.close_turn:
        return _followed_by(template(messages, add_generation_prompt=True), example.completion)

    def closed(answer: str) -> str:
        # ChatML ends with a line break behind the end of turn, which is the token that is wanted.
        return str(template([*messages, {"role": "assistant", "content": answer}])).rstrip()

    # Looking for the completion's text would find it in the question or in the end of turn, too, or
    # not at all if the template strips it. What surrounds a marker surrounds the completion.
    text = closed(completion)
    before, _, behind = closed(_MARKER).rpartition(_MARKER)
    start, stop = len(before), len(text) - len(behind)
    if start < stop and text.startswith(before) and text.endswith(behind):
        return text, (start, stop)
    return text, None


def _followed_by(text: str, completion: str | None) -> tuple[str, tuple[int, int] | None]:
    if completion is None:
        return text, None
    return text + completion, (len(text), len(text) + len(completion))


def _dated(template: str, date: datetime.date) -> str:
    """A chat template with a fixed date: today's would make another capture every day."""
    return _NOW.sub(lambda call: json.dumps(date.strftime(call[2])), template)


def _batches(items: Iterator[_Rendered]) -> Iterator[list[_Rendered]]:
    batch: list[_Rendered] = []
    characters = 0
    for item in items:
        if batch and (
            len(batch) == _BATCH_TEXTS or characters + len(item.text) > _BATCH_CHARACTERS
        ):
            yield batch
            batch, characters = [], 0
        batch.append(item)
        characters += len(item.text)
    if batch:
        yield batch


def _encode(
    batch: Sequence[_Rendered], encode: Any
) -> list[tuple[NDArray[np.int32], NDArray[np.int32]] | str]:
    """Token ids and offsets of each text, or why the tokenizer fails on it."""
    try:
        encoded = encode([item.text for item in batch])
    except BaseException as error:
        if not _is_failure(error):
            raise
        if len(batch) == 1:
            return [f"tokenizer: {type(error).__name__}: {error}"]
        # One by one, to find which it is.
        return [found for item in batch for found in _encode([item], encode)]
    return [
        (np.array(ids, np.int32), np.array(offsets, np.int32).reshape(-1, 2))
        for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _is_failure(error: BaseException) -> bool:
    # A panic of the tokenizer's Rust code is no Exception, and its class cannot be imported.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
