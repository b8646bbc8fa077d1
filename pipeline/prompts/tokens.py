"""From examples to token ids: templates, context length, and which positions become rows."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from jinja2.exceptions import TemplateError

from pipeline.config import PromptsSection
from pipeline.errors import InvalidInput
from pipeline.prompts.corpus import Example, Quarantined

_NOW: Final = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """One example as the model reads it.

    Attributes:
        text: What was tokenised, template included.
        token_ids: Its tokens.
        offsets: Character span [start, stop) of each token in `text`.
    """

    example: Example
    text: str
    token_ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]


def tokenize(
    examples: Sequence[Example], tokenizer: Any, section: PromptsSection, context: int
) -> tuple[list[TokenizedPrompt], list[Quarantined]]:
    """Render and tokenise examples.

    A pair of which one side does not fit is left out whole, so that classes stay balanced.

    Args:
        tokenizer: A transformers tokenizer.
        section: Template, system prompt and end of turn.
        context: Longest input in tokens.

    Returns:
        The prompts that fit, and the rows that do not, or that the chat template refuses.

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
    bad: dict[tuple[str, int], Quarantined] = {}
    rendered: list[tuple[Example, str]] = []
    for example in examples:
        try:
            rendered.append((example, render(example, tokenizer, section)))
        except TemplateError as error:
            # Such as a template without a system role.
            bad[example.source] = Quarantined(*example.source, f"chat template: {error}")
    if not rendered:
        return [], list(bad.values())
    encoded = tokenizer(
        [text for _, text in rendered],
        # A chat template writes its own special tokens.
        add_special_tokens=section.template == "none",
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    prompts = []
    for (example, text), ids, offsets in zip(
        rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        if 0 < len(ids) <= context:
            spans = tuple((int(a), int(b)) for a, b in offsets)
            prompts.append(TokenizedPrompt(example, text, tuple(ids), spans))
            continue
        file, line = example.source
        reason = f"{len(ids)} tokens, longer than the model's context of {context}"
        bad[file, line] = Quarantined(file, line, reason if ids else "no tokens")
    kept = [prompt for prompt in prompts if prompt.example.source not in bad]
    return kept, list(bad.values())


def render(example: Example, tokenizer: Any, section: PromptsSection) -> str:
    """The text that the model reads for an example."""
    if section.template == "none":
        return example.prompt + (example.completion or "")
    messages = [{"role": "user", "content": example.prompt}]
    if example.system is not None:
        messages.insert(0, {"role": "system", "content": example.system})
    template = functools.partial(
        tokenizer.apply_chat_template,
        tokenize=False,
        chat_template=_dated(tokenizer.get_chat_template(), section.date),
        date_string=section.date.strftime("%d %b %Y"),
    )
    if example.completion is not None and section.close_turn:
        messages.append({"role": "assistant", "content": example.completion})
        # ChatML ends with a line break behind the end of turn, which is the token that is wanted.
        return str(template(messages)).rstrip()
    return f"{template(messages, add_generation_prompt=True)}{example.completion or ''}"


def _dated(template: str, date: datetime.date) -> str:
    """A chat template with a fixed date: today's would make another capture every day."""
    return _NOW.sub(lambda call: json.dumps(date.strftime(call[2])), template)


def row_spans(selection: str, num_tokens: int) -> list[tuple[int, int]]:
    """Which positions of a prompt become rows.

    Args:
        selection: ``last``, a negative index, ``mean`` or ``all``.
        num_tokens: Length of the prompt.

    Returns:
        Token spans [start, stop), one a row; a span of several tokens is their mean. Empty if a
        negative index reaches before the first token.
    """
    if selection == "all":
        return [(i, i + 1) for i in range(num_tokens)]
    if selection == "mean":
        return [(0, num_tokens)]
    position = num_tokens + (-1 if selection == "last" else int(selection))
    return [(position, position + 1)] if position >= 0 else []
