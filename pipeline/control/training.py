"""What both ways of training a controller share: rows, network, steps, and the stored result.

Shapes: N rows, B requests of a step, R widths of the read sites together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.config import TrainSection
from pipeline.control.network import ControllerNetwork
from pipeline.control.results import TrainedController, trained_digest
from pipeline.control.rows import read_rows
from pipeline.errors import InvalidInput
from pipeline.extraction.models import DtypeName, load_model, load_tokenizer
from pipeline.reduction.results import Reduction
from pipeline.reduction.scores import auroc
from steering_service.core.controller import Mode
from steering_service.core.direction import Direction
from steering_service.core.site import Site
from store.activations import ActivationCache
from store.location import Location

_THREADS: Final = 1
"""More threads change the last bits of a sum, and make small models no faster."""
_ROWS_A_CALL: Final = 4096


@dataclass(frozen=True, slots=True)
class Task:
    """What a training works on; travels to the machine that does it.

    Attributes:
        store_url: The store.
        cache: Digest of the cache that the controller reads.
        reduction: Digest of the reduction whose directions it steers along.
        model_path: The model's folder.
        device: ``cpu`` or ``cuda``.
    """

    store_url: str
    cache: str
    reduction: str
    model_path: str
    section: TrainSection
    device: str


class Training(ABC):
    """One controller in training.

    Attributes:
        num_steps: How many steps there are.
        history: By step, the losses in nats, and the step's number.
    """

    mode: Mode
    num_steps: int

    def __init__(self, task: Task) -> None:
        torch.set_num_threads(_THREADS)
        torch.manual_seed(task.section.seed)
        self.task = task
        self.random = np.random.default_rng(task.section.seed)
        self.device = torch.device(task.device)
        root = Location.open(task.store_url)
        cache = ActivationCache.open(root, task.cache)
        self.reads = [Site.parse(text) for text in task.section.reads]
        self.rows = read_rows(cache, self.reads)
        self.train = {label: self.rows.chosen("train", label) for label in (True, False)}
        for label, chosen in self.train.items():
            if len(chosen) == 0:
                raise InvalidInput(
                    f"cache {task.cache[:12]}: no {'positive' if label else 'negative'} row in "
                    "the training split; check the labels and split shares of the run file",
                    kind="class_empty",
                )
        self.reduction = Reduction.open(root, task.reduction)
        dtype: DtypeName = cache.capture["model"]["dtype"]
        self.model: Any = load_model(Path(task.model_path), dtype, task.device)
        self.tokenizer = load_tokenizer(Path(task.model_path))
        self.history: list[dict[str, float]] = []
        self._losses: dict[str, float] = {}
        self._root = root

    # What the two ways differ in.

    network: ControllerNetwork
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def directions(self) -> Sequence[Direction]:
        """What the artifact steers along, in its order."""

    @abstractmethod
    def outputs(self) -> Sequence[int]:
        """Which outputs of the network belong to them."""

    @abstractmethod
    def threshold(self, logit_N: NDArray[np.float32], label_N: NDArray[np.bool_]) -> float:
        """The Controller's threshold, from the logits of validation rows."""

    @abstractmethod
    def step(self, number: int) -> dict[str, float]:
        """Take one step; the losses by name, in nats."""

    # What they share.

    def advance(self, num_steps: int) -> tuple[int, int, dict[str, float]]:
        """Take some steps; returns steps done, steps in all, and the last losses."""
        for _ in range(min(num_steps, self.num_steps - len(self.history))):
            number = len(self.history)
            losses = self.step(number)
            if not np.isfinite([*losses.values()]).all():
                raise InvalidInput(
                    f"training step {number + 1}: losses {losses} are not finite; lower "
                    "train.learning_rate",
                    kind="train_diverged",
                )
            self.history.append(losses | {"step": number + 1})
            self._losses = losses
        return len(self.history), self.num_steps, self._losses

    def inputs(self, rows: NDArray[np.int64]) -> Tensor:
        """Float32 [B, R], what the controller reads of some rows."""
        values_BR = np.ascontiguousarray(self.rows.reads_NR[rows])
        return torch.from_numpy(values_BR).to(self.device)

    def descend(self, loss: Tensor) -> None:
        """One step of the optimiser, gradients clipped at norm 1."""
        # Of the whole network: what is left in parts that no longer train would count in the norm.
        self.network.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()

    def finish(self) -> None:
        """Freeze the network, score it on held-out rows, and store it."""
        label_N, split_N = self.rows.label_N, self.rows.split_N
        logit_N, weight_NI = self._outputs()
        chosen_N = split_N == "validation"
        threshold = self.threshold(logit_N[chosen_N], label_N[chosen_N])
        directions, outputs = list(self.directions()), list(self.outputs())
        scores = {"threshold": threshold}
        for split in ("validation", "test"):
            chosen_N = split_N == split
            area = auroc(logit_N[chosen_N][:, None], label_N[chosen_N])
            scores[f"gate_auroc_{split}"] = float(area[0])
        # The weights that matter are those of requests that are steered.
        steered_N = (split_N == "train") & label_N
        for number, direction in zip(outputs, directions, strict=True):
            scores[f"weight_{direction.site}"] = float(weight_NI[steered_N, number].mean())
        section = self.task.section
        TrainedController.write(
            self._root,
            trained_digest(self.task.cache, self.task.reduction, section),
            controller=self.network.frozen(
                self.reads, threshold=threshold, mode=self.mode, outputs=outputs
            ),
            directions=directions,
            section=section,
            capture=self.task.cache,
            reduction=self.task.reduction,
            scores={name: value for name, value in scores.items() if np.isfinite(value)},
            history=self.history,
        )

    def _outputs(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        logits, weights = [], []
        with torch.no_grad():
            for first in range(0, len(self.rows.label_N), _ROWS_A_CALL):
                rows = np.arange(first, min(first + _ROWS_A_CALL, len(self.rows.label_N)))
                logit_B, weight_BI = self.network(self.inputs(rows))
                logits.append(logit_B.cpu().numpy())
                weights.append(weight_BI.sigmoid().cpu().numpy())
        return np.concatenate(logits), np.concatenate(weights)
