"""Train: a finished cache becomes a Controller, by a Ray actor on one CPU or GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pipeline.config import TrainSection
from pipeline.control.gated import GatedTraining
from pipeline.control.reference import ReferenceTraining
from pipeline.control.results import TrainedController, trained_digest
from pipeline.control.training import Task, Training
from pipeline.errors import InvalidInput
from pipeline.ray_runtime import check_device, ray_session
from pipeline.reduction.results import Reduction
from store.activations import ActivationCache
from store.location import Location

_STEPS_A_CALL: Final = 10


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training is.

    Attributes:
        losses: Of the last step, by name, in nats.
    """

    step: int
    num_steps: int
    losses: Mapping[str, float]

    @property
    def note(self) -> str:
        """The losses, for a progress bar."""
        return "  ".join(f"{name} {value:.3f}" for name, value in self.losses.items())


class _Actor:
    """Holds a Training. It is made in a call of its own, since Ray says of an error in an actor's
    `__init__` only that the actor has died.
    """

    def begin(self, training: Callable[[Task], Training], task: Task) -> None:
        self._training = training(task)

    def advance(self, num_steps: int) -> tuple[int, int, dict[str, float]]:
        return self._training.advance(num_steps)

    def finish(self) -> None:
        self._training.finish()


def train(
    cache: ActivationCache,
    reduction: Reduction,
    root: Location,
    section: TrainSection,
    *,
    model_path: Path,
    device: str = "cpu",
    address: str | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> TrainedController:
    """Train a controller, or find the one trained before with the same settings.

    Args:
        cache: What it reads: the last token of each prompt. The positive class is steered.
        reduction: Where the directions come from that it steers along.
        root: The store that holds the cache and takes the result.
        section: Settings.
        model_path: The model's folder.
        device: ``cpu`` or ``cuda``.
        address: A Ray cluster, or None for a local Ray.

    Raises:
        NotFound: The cache is not complete, or a site was not captured.
        InvalidInput: A class without training rows, prompts or tokens that a controller cannot
            read, directions of another model or of doubtful sign, losses that diverge, or ``cuda``
            without a GPU.
    """
    digest = trained_digest(cache.digest, reduction.digest, section)
    if TrainedController.exists(root, digest):
        return TrainedController.open(root, digest)
    check_device(device, address)
    ours, theirs = (c["model"]["fingerprint"] for c in (cache.capture, reduction.capture))
    if ours != theirs:
        raise InvalidInput(
            f"cache {cache.digest[:12]} is of the model {ours[:12]}, and the directions are of "
            f"{theirs[:12]}; train.directions must name a run with the same model",
            kind="train_model",
        )
    training = GatedTraining if section.mode == "gated" else ReferenceTraining
    task = Task(root.url, cache.digest, reduction.digest, str(model_path), section, device)
    with ray_session(address, 1):
        import ray

        # Some steps a call, so that the driver can show them and Ctrl-C ends between two.
        actor = ray.remote(num_cpus=1, num_gpus=int(device == "cuda"))(_Actor).remote()
        ray.get(actor.begin.remote(training, task))
        while True:
            step, num_steps, losses = ray.get(actor.advance.remote(_STEPS_A_CALL))
            on_progress(Progress(step, num_steps, losses))
            if step >= num_steps:
                break
        ray.get(actor.finish.remote())
    return TrainedController.open(root, digest)
