"""Lab: what every recipe works with: the store, Ray, the steering service and an inference node.

A recipe computes with the pipeline's own steps, publishes what it finds, promotes it, and measures
what the node does with what the service has delivered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from pipeline.config import ModelSection, RunFile
from pipeline.control.results import TrainedController
from pipeline.control.train import Progress, train
from pipeline.errors import GateRefused
from pipeline.evaluation.generate import ChatPrompt, prompt_ids
from pipeline.evaluation.suites import AnySuite, Point, sweep
from pipeline.extraction.models import DtypeName, ModelInfo
from pipeline.extraction.shard_worker import Receipt
from pipeline.extraction.workers import extract
from pipeline.prompts.plan import Plan, plan
from pipeline.ray_runtime import Pool
from pipeline.reduction.methods import Method
from pipeline.reduction.reduce import reduce
from pipeline.reduction.results import Reduction
from steering_service.adapters.transformers import Steering, fits, steered
from steering_service.client.channel import Proposal
from steering_service.client.operator import Operator
from steering_service.client.subscription import Subscription
from steering_service.core.artifact import Artifact, ModelReference, Policy, build
from steering_service.core.intervention import Intervention
from steering_service.core.signing import Signer, TrustRoots
from store.location import Location

PREFIX: Final = "repro-"
"""Of artifacts and channels, so that no recipe touches a channel that nodes may be following."""

Track = Callable[[str, int | None], AbstractContextManager[Callable[[str], None]]]
"""Shows progress: from a label and a number of steps, what is called at each with a note."""


@dataclass(frozen=True, slots=True)
class Lab:
    """Everything that a recipe needs to run.

    Attributes:
        root: The store.
        info: The model, and `model` and `tokenizer`, loaded to generate with in `dtype`.
        operator: Of the service that delivers, at `address`.
        signer: Signs what is published; `trust` holds its public half.
        node_cache: Where the node keeps what it was sent.
        num_workers: Of a local Ray; `ray` is the address of a cluster in its place.
        device: ``cpu`` or ``cuda``.
        track: Shows progress.
    """

    root: Location
    info: ModelInfo
    dtype: DtypeName
    model: nn.Module
    tokenizer: Any
    operator: Operator
    address: str
    signer: Signer
    trust: TrustRoots
    node_cache: Path
    num_workers: int
    ray: str | None
    device: str
    track: Track

    @property
    def model_section(self) -> ModelSection:
        """The model, for a run file."""
        return ModelSection(path=self.info.path, dtype=self.dtype)

    def cached(self, run: RunFile) -> Plan:
        """Plan and extract a run, or find its cache."""
        planned = plan(run, self.root)
        missing = len(planned.cache.missing())
        with self.track(f"extract {run.name}", missing) as step:

            def on_receipt(receipt: Receipt) -> None:
                step(f"{receipt.tokens} tokens")

            extract(
                planned,
                self.root,
                pool=Pool(self.num_workers),
                device=self.device,
                address=self.ray,
                on_receipt=on_receipt,
            )
        return planned

    def reduced(self, planned: Plan, method: Method = "difference_of_means") -> Reduction:
        """Directions and scores of a cache, computed or found."""
        with self.track(f"reduce by {method}", None) as step:
            return reduce(
                planned.cache,
                self.root,
                method=method,
                num_workers=self.num_workers,
                address=self.ray,
                on_progress=lambda done, total: step(f"{done} of {total} tasks"),
            )

    def trained(self, run: RunFile, planned: Plan, reduction: Reduction) -> TrainedController:
        """A controller, trained or found."""
        assert run.train is not None

        with self.track(f"train {run.name}", None) as step:

            def on_progress(progress: Progress) -> None:
                step(f"step {progress.step} of {progress.num_steps}  {progress.note}")

            return train(
                planned.cache,
                reduction,
                self.root,
                run.train,
                model_path=run.model.path,
                device=self.device,
                address=self.ray,
                on_progress=on_progress,
            )

    def artifact(
        self, name: str, interventions: Sequence[Intervention], limit: float, **lineage: Any
    ) -> Artifact:
        """An artifact for this lab's model, with strengths of up to `limit` either way."""
        return build(
            interventions,
            name=f"{PREFIX}{name}",
            model=ModelReference(name=self.info.name, fingerprint=self.info.fingerprint),
            policy=Policy(min_strength=-limit, max_strength=limit),
            lineage=lineage,
        )

    def plain(self, suites: Sequence[AnySuite]) -> list[Point]:
        """Measure the plain model."""
        return sweep(self.model, self.tokenizer, suites, [0.0], lambda _: nullcontext())

    def tried(self, artifact: Artifact, strength: float, suites: Sequence[AnySuite]) -> list[Point]:
        """Measure an artifact that may never be published: what searches do by the hundred."""
        return sweep(
            self.model,
            self.tokenizer,
            suites,
            [strength],
            lambda value: steered(self.model, artifact, value),
        )

    @contextmanager
    def delivered(
        self,
        artifact: Artifact,
        *,
        node_id: str = "repro-node",
        actor: str = "steerage repro",
        leave_on: bool = False,
    ) -> Iterator[Delivered]:
        """Publish an artifact, and have a node follow its channel inside the block.

        Args:
            node_id: The node's name, for the service.
            actor: Who turns the strength, for the channel's log.
            leave_on: Leave the channel at its last strength; else it is switched off in the end.
        """
        self.operator.publish(artifact, self.signer.sign(artifact.manifest_bytes))
        with Subscription(
            self.address,
            channel=artifact.manifest.name,
            node_id=node_id,
            cache_dir=self.node_cache,
            trust_roots=self.trust,
            model_fingerprint=self.info.fingerprint,
            check=fits(self.model),
        ) as subscription:
            delivered = Delivered(self, artifact, subscription, actor)
            try:
                yield delivered
            finally:
                if not leave_on:
                    delivered.promote(0.0, enabled=False, reason="measured")


@dataclass(frozen=True, slots=True)
class Delivered:
    """An artifact on its channel, and the node that follows it."""

    lab: Lab
    artifact: Artifact
    subscription: Subscription
    actor: str

    @contextmanager
    def at(self, strength: float) -> Iterator[Steering]:
        """Promote a strength, wait until the node runs it, and steer by it."""
        revision = self.promote(strength, enabled=True, reason=f"measure at strength {strength:g}")
        self.subscription.active.wait_for(revision, timeout_s=30.0)
        with steered(self.lab.model, self.subscription.active) as steering:
            yield steering

    def promote(self, strength: float, *, enabled: bool, reason: str) -> int:
        """Change the channel; returns the revision.

        Raises:
            GateRefused: The channel asks for a second person's approval.
        """
        entry = self.lab.operator.promote(
            self.subscription.channel,
            artifact=self.artifact.digest,
            strength=strength,
            enabled=enabled,
            share=1.0,
            actor=self.actor,
            reason=reason,
        )
        if isinstance(entry, Proposal):
            raise GateRefused(
                f"channel {self.subscription.channel!r} asks for a second person (proposal "
                f"{entry.id}), and a measurement cannot wait for one; use a channel of its own",
                kind="lab_channel",
            )
        return entry.revision

    def sweep(
        self, suites: Sequence[AnySuite], strengths: Sequence[float], label: str | None = None
    ) -> list[Point]:
        """Measure suites at strengths that the channel sets, while the node runs on.

        Args:
            label: Of the progress shown; by default the artifact's name.

        Raises:
            GateRefused: See `check_zero`, which comes first.
        """
        self.check_zero(suites[0].prompts[:2])
        label = label or f"measure {self.artifact.manifest.name}"
        with self.lab.track(label, len(suites) * len(strengths)) as step:
            return sweep(
                self.lab.model,
                self.lab.tokenizer,
                suites,
                strengths,
                self.at,
                lambda point: step(f"strength {point.strength:+g}"),
            )

    def check_zero(self, prompts: Sequence[ChatPrompt]) -> None:
        """Compare the logits at strength 0 with the plain model's, bit for bit.

        Raises:
            GateRefused: They differ.
        """
        for ids in prompt_ids(self.lab.tokenizer, prompts):
            ids_1T = torch.tensor([ids], device=next(self.lab.model.parameters()).device)
            with torch.inference_mode():
                plain = self.lab.model(ids_1T, use_cache=False).logits
                with self.at(0.0):
                    zero = self.lab.model(ids_1T, use_cache=False).logits
            if not torch.equal(plain, zero):
                worst = float((plain - zero).abs().max())
                raise GateRefused(
                    f"artifact {self.artifact.digest[:12]} at strength 0: logits differ from the "
                    f"plain model's by up to {worst:.3g}; expected none",
                    kind="strength_zero",
                )
