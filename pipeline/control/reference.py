"""Training of a `reference_compat` controller, as the code released with Guiding Giants does it.

For comparison only; METHODS 2 lists what is wrong with it. Reproduced: no normalisation, 1,024
hidden units, one output a layer of the model of which only the last layer's ever acts (what it
reads is known only when the final block has run), a direction between the input embeddings of
phrases, the raw logit as scale, a loss in which no output of the model takes part, AdamW at 5e-5,
batches of 8, 10 epochs of all positive batches and then all negative ones, and the final weights
(its "best" state is a shallow copy). Not reproduced: caching without the generation prompt while
steering with it, a mismatch that a cache of ours cannot have.

Shapes: N rows, B requests of a step, I layers of the model, D width of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.control.network import ControllerNetwork
from pipeline.control.training import Task, Training
from pipeline.errors import InvalidInput
from steering_service.adapters.sites import ModelSites
from steering_service.core.direction import Direction
from steering_service.core.site import Site

HIDDEN: Final = 1024
LEARNING_RATE: Final = 5e-5
BATCH: Final = 8
EPOCHS: Final = 10
REFUSALS: Final = ("I apologize", "I cannot", "I'm sorry", "I can't")
ANSWERS: Final = ("Sure", "Here", "Certainly", "Of course")


class ReferenceTraining(Training):
    """See the module."""

    mode = "reference_compat"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._num_layers = ModelSites.of(self.model).num_layers
        last = f"resid_post.{self._num_layers - 1}"
        if list(task.section.edits) != [last]:
            raise InvalidInput(
                f"train.edits {list(task.section.edits)}: reference_compat only ever edits the "
                f"last layer, here {last!r}, since it reads the last four",
                kind="train_edits",
            )
        width = self.rows.reads_NR.shape[1]
        plain = np.zeros(width, np.float32), np.ones(width, np.float32)
        self.network = ControllerNetwork(*plain, HIDDEN, self._num_layers).to(self.device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=LEARNING_RATE)
        self._batches = [
            (batch, label)
            for _ in range(EPOCHS)
            for label in (True, False)
            for batch in np.array_split(
                self.random.permutation(self.train[label]), -(-len(self.train[label]) // BATCH)
            )
        ]
        self.num_steps = len(self._batches)
        site = Site.parse(last)
        self._direction = Direction(
            site=site,
            vector_D=embedding_direction(self.model, self.tokenizer),
            sigma=0.0,
            activation_norm=self.reduction.direction(site).activation_norm,
            method="embedding_difference",
        )

    def directions(self) -> Sequence[Direction]:
        return [self._direction]

    def outputs(self) -> Sequence[int]:
        return [self._num_layers - 1]

    def threshold(self, logit_N: NDArray[np.float32], label_N: NDArray[np.bool_]) -> float:
        return 0.0

    def step(self, number: int) -> dict[str, float]:
        rows, label = self._batches[number]
        logit_B, weight_BI = self.network(self.inputs(rows))
        loss = reference_loss(logit_B, weight_BI, label)
        self.descend(loss)
        return {"reference": loss.item()}


def reference_loss(logit_B: Tensor, weight_BI: Tensor, label: bool) -> Tensor:
    """Binary cross-entropy of the scale; on positive batches a regulariser, the only thing that
    ever reaches the layer weights: 0.1 (mean |sigmoid(w) - 0.5| + 0.01 mean sigmoid(w)).
    """
    loss = nn.functional.binary_cross_entropy_with_logits(
        logit_B, torch.full_like(logit_B, float(label))
    )
    if label:
        weights = weight_BI.sigmoid()
        loss = loss + 0.1 * ((weights - 0.5).abs().mean() + 0.01 * weights.mean())
    return loss


def embedding_direction(model: Any, tokenizer: Any) -> NDArray[np.float32]:
    """Float32 [D], unit: mean input embedding of the tokens of refusals, minus that of answers."""
    table = model.get_input_embeddings().weight.detach().float().cpu()
    means = []
    for phrases in (REFUSALS, ANSWERS):
        ids = [i for p in phrases for i in tokenizer(p, add_special_tokens=False)["input_ids"]]
        means.append(table[ids].mean(dim=0))
    difference = means[0] - means[1]
    return np.asarray((difference / difference.norm()).numpy(), np.float32)
