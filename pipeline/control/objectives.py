"""What a controller is trained for.

The code released with Guiding Giants lets no loss of the model's output reach the layer weights, so
they stay near one half (METHODS 2, defect 3). Here the steered model's own answers train them.

Shapes: B requests, T positions, V vocabulary, M answer positions, I interventions.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steering_service.adapters.transformers import Steering


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """Prompts with answers behind them, padded on the right.

    Padding lies behind everything that counts, where a causal mask alone keeps it from being seen.

    Attributes:
        ids_BT: Int64 [B, T].
        prompt_lengths: Positions before each answer.
        is_answer_BT: Bool [B, T], positions of answer tokens.
    """

    ids_BT: Tensor
    prompt_lengths: tuple[int, ...]
    is_answer_BT: Tensor

    @classmethod
    def of(
        cls,
        prompts: Sequence[NDArray[np.int64]],
        answers: Sequence[Sequence[int]],
        device: torch.device,
    ) -> Answers:
        """Lay out prompts and answers."""
        longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids_BT = torch.zeros((len(prompts), longest), dtype=torch.int64)
        is_answer_BT = torch.zeros((len(prompts), longest), dtype=torch.bool)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            stop = len(prompt) + len(answer)
            ids_BT[row, : len(prompt)] = torch.from_numpy(prompt)
            ids_BT[row, len(prompt) : stop] = torch.tensor(answer, dtype=torch.int64)
            is_answer_BT[row, len(prompt) : stop] = True
        lengths = tuple(len(prompt) for prompt in prompts)
        return cls(ids_BT.to(device), lengths, is_answer_BT.to(device))

    @property
    def targets_M(self) -> Tensor:
        """Int64 [M], the answer tokens, row by row."""
        return self.ids_BT[self.is_answer_BT]

    def logits(self, model: nn.Module) -> Tensor:
        """Float32 [M, V], what the model says where each answer token is due."""
        due_BT = self.is_answer_BT[:, 1:]
        options: dict[str, Any] = {}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            # Logits of the prompts would be most of the memory with a large vocabulary, so only
            # positions where some row's answer is due are computed.
            kept = due_BT.any(dim=0).nonzero().flatten()
            options["logits_to_keep"] = kept
            due_BT = due_BT[:, kept]
        output: Any = model(input_ids=self.ids_BT, use_cache=False, **options)
        logits: Tensor = output.logits[:, : due_BT.shape[1]][due_BT].float()
        return logits


def begins_with(
    steering: Steering, model: nn.Module, answers: Answers, factor_BI: Tensor
) -> Tensor:
    """Cross-entropy of wanted answers under steering, in nats a token: a scalar.

    Args:
        answers: Requests to steer, with what they should be answered.
        factor_BI: [B, I], s * w; gradients flow to it.
    """
    logits_MV = _steered_logits(steering, model, answers, factor_BI)
    return nn.functional.cross_entropy(logits_MV, answers.targets_M)


def stays_as_it_is(
    steering: Steering, model: nn.Module, answers: Answers, factor_BI: Tensor
) -> Tensor:
    """KL(plain model || steered model) over the plain model's answers, in nats a token: a scalar.

    Args:
        answers: Requests to leave alone, with the plain model's own answers.
    """
    with torch.no_grad():
        steering.set_factors(torch.zeros_like(factor_BI))
        plain_MV = answers.logits(model).log_softmax(dim=-1)
    steered_MV = _steered_logits(steering, model, answers, factor_BI).log_softmax(dim=-1)
    return nn.functional.kl_div(steered_MV, plain_MV, log_target=True, reduction="batchmean")


def _steered_logits(
    steering: Steering, model: nn.Module, answers: Answers, factor_BI: Tensor
) -> Tensor:
    steering.set_factors(factor_BI)
    steering.set_prompt_lengths(answers.prompt_lengths)
    try:
        return answers.logits(model)
    finally:
        steering.set_factors(None)
        steering.set_prompt_lengths(None)


def own_answers(
    model: Any, prompts: Sequence[NDArray[np.int64]], num_tokens: int
) -> list[list[int]]:
    """The plain model's greedy answers, at most `num_tokens` each, cut at the end of the answer."""
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    ids_BT = torch.zeros((len(prompts), longest), dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask_BT[row, longest - len(prompt) :] = 1
    with torch.inference_mode():
        output_BT = model.generate(
            input_ids=ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    end = model.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [end])
    answers = []
    for row in output_BT[:, longest:].tolist():
        stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:stop])
    return answers
