"""Batched greedy generation, steered or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A request as a user sends it.

    Attributes:
        completion: Text that the answer is made to begin with, such as ``(`` before a letter.
    """

    user: str
    system: str | None = None
    completion: str = ""


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[ChatPrompt],
    *,
    max_new_tokens: int,
    batch_size: int = 128,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Answer prompts greedily, several at a time.

    Steering, if any, is whatever `steered` block the call is made in.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, with a chat template.
        max_new_tokens: Longest answer.
        batch_size: Prompts a batch; they are sorted by length, so that little is padding.
        on_batch: Called with the number of prompts that are done.

    Returns:
        One answer a prompt, in the given order, without the prompt.
    """
    answers = generate_ids(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        on_batch=on_batch,
    )
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def generate_ids(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[ChatPrompt],
    *,
    max_new_tokens: int,
    batch_size: int = 128,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[tuple[int, ...]]:
    """`generate`, as the token ids that were decoded.

    Returns:
        One answer a prompt, in the given order, up to and with its end token if it has one.
    """
    texts = [_render(tokenizer, prompt) for prompt in prompts]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    answers: list[tuple[int, ...]] = [()] * len(prompts)
    # Edits and decoding are at the last position, so padding belongs on the left.
    tokenizer.padding_side = "left"
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    ends = _end_tokens(model, tokenizer)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        batch = tokenizer(
            [texts[i] for i in chosen],
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
        ).to(next(model.parameters()).device)
        with torch.inference_mode():
            output_BT = model.generate(  # type: ignore[operator]
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
            )
        new_BT = output_BT[:, batch["input_ids"].shape[1] :].tolist()
        for i, ids in zip(chosen, new_BT, strict=True):
            # Behind the end token there is only padding.
            end = next((at for at, token in enumerate(ids) if token in ends), len(ids))
            answers[i] = tuple(ids[: end + 1])
        on_batch(first + len(chosen))
    return answers


def prompt_ids(tokenizer: Any, prompts: Sequence[ChatPrompt]) -> list[tuple[int, ...]]:
    """Token ids of prompts as `generate` gives them to the model."""
    if not prompts:
        return []
    texts = [_render(tokenizer, prompt) for prompt in prompts]
    return [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Ids at which `model.generate` ends an answer."""
    configured: Any = getattr(model, "generation_config", None)
    ends = getattr(configured, "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


def _render(tokenizer: Any, prompt: ChatPrompt) -> str:
    messages = [{"role": "user", "content": prompt.user}]
    if prompt.system is not None:
        messages.insert(0, {"role": "system", "content": prompt.system})
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return f"{opened}{prompt.completion}"
