"""TrainedController: the stored result of `train`.

controllers/<digest>/controller.safetensors   the network and the directions, float32
controllers/<digest>/losses.jsonl             a line a step
controllers/<digest>/controller.json          written last: its existence is the commit
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import safetensors.numpy

from pipeline.config import PublishSection, TrainSection
from pipeline.errors import NotFound
from pipeline.extraction.models import ModelInfo
from steering_service.core.artifact import Artifact, ModelReference, Policy, build
from steering_service.core.controller import TENSORS, Controller
from steering_service.core.direction import Direction
from steering_service.core.intervention import Intervention, Positions
from steering_service.core.site import Site
from store.digest import canonical_json, sha256_hex
from store.location import Location

CONTROLLER_SCHEMA: Final = 1


def trained_digest(capture: str, reduction: str, section: TrainSection) -> str:
    """The name of a trained controller: what it is trained on, and how."""
    return sha256_hex(
        canonical_json(
            {
                "schema_version": CONTROLLER_SCHEMA,
                "capture": capture,
                "reduction": reduction,
                # The reduction stands for the run file that `directions` names.
                "train": section.model_dump(mode="json", exclude={"directions"}),
            }
        )
    )


@dataclass(frozen=True, slots=True, eq=False)
class TrainedController:
    """A controller with the directions that it weighs.

    Attributes:
        digest: See `trained_digest`.
        directions: In the order of the controller's weights.
        scores: Held-out AUROC of the gate, its threshold, and the mean weight of each site over the
            training rows that are to be steered.
        record: controller.json.
    """

    digest: str
    controller: Controller
    directions: tuple[Direction, ...]
    scores: Mapping[str, float]
    record: Mapping[str, Any]
    location: Location

    @classmethod
    def exists(cls, root: Location, digest: str) -> bool:
        """Whether it has been trained."""
        return root.exists(f"controllers/{digest}/controller.json")

    @classmethod
    def write(
        cls,
        root: Location,
        digest: str,
        *,
        controller: Controller,
        directions: Sequence[Direction],
        section: TrainSection,
        capture: str,
        reduction: str,
        scores: Mapping[str, float],
        history: Sequence[Mapping[str, float]],
    ) -> None:
        """Store a result. What a killed run has left of the same result is replaced."""
        location = root.child(f"controllers/{digest}")
        tensors = controller.tensors() | {
            f"direction.{i}": direction.vector_D for i, direction in enumerate(directions)
        }
        location.replace("controller.safetensors", safetensors.numpy.save(dict(tensors)))
        lines = [json.dumps(dict(row), sort_keys=True) for row in history]
        location.replace("losses.jsonl", "".join(f"{line}\n" for line in lines).encode())
        record = {
            "schema_version": CONTROLLER_SCHEMA,
            "capture": capture,
            "reduction": reduction,
            "train": section.model_dump(mode="json", exclude={"directions"}),
            "mode": controller.mode,
            "threshold": controller.threshold,
            "reads": [str(site) for site in controller.reads],
            "directions": [
                {
                    "site": str(direction.site),
                    "sigma": direction.sigma,
                    "activation_norm": direction.activation_norm,
                    "method": direction.method,
                    "scores": dict(direction.scores),
                }
                for direction in directions
            ],
            "scores": dict(scores),
        }
        location.put_same("controller.json", canonical_json(record))

    @classmethod
    def open(cls, root: Location, digest: str) -> TrainedController:
        """Read a stored result.

        Raises:
            NotFound: It has not been trained.
        """
        if not cls.exists(root, digest):
            raise NotFound(
                f"controller {digest[:12]} is not in {root.url}; "
                "run `steerage train` on the same run file first",
                kind="controller",
            )
        location = root.child(f"controllers/{digest}")
        record = json.loads(location.get("controller.json"))
        tensors = safetensors.numpy.load(location.get("controller.safetensors"))
        w1, b1, w2, b2 = (tensors[name] for name in TENSORS)
        return cls(
            digest=digest,
            controller=Controller(
                tuple(Site.parse(text) for text in record["reads"]),
                w1,
                b1,
                w2,
                b2,
                threshold=record["threshold"],
                mode=record["mode"],
            ),
            directions=tuple(
                Direction(
                    site=Site.parse(item["site"]),
                    vector_D=tensors[f"direction.{i}"],
                    sigma=item["sigma"],
                    activation_norm=item["activation_norm"],
                    method=item["method"],
                    scores=item["scores"],
                )
                for i, item in enumerate(record["directions"])
            ),
            scores=record["scores"],
            record=record,
            location=location,
        )

    def artifact(self, section: PublishSection, *, name: str, model: ModelInfo) -> Artifact:
        """The artifact of the controller and its directions.

        Args:
            section: The strength limits that nodes enforce. All else is as it was trained.
            name: For people.
            model: The model that it was trained for.
        """
        # The reference edits the last position of every pass, and decides there each time.
        positions: Positions = "generated" if self.controller.mode == "gated" else "last"
        return build(
            [Intervention(item, positions=positions) for item in self.directions],
            name=name,
            model=ModelReference(name=model.name, fingerprint=model.fingerprint),
            policy=Policy(min_strength=section.min_strength, max_strength=section.max_strength),
            controller=self.controller,
            parents=[self.record["capture"], self.record["reduction"]],
            lineage={
                "controller": self.digest,
                "scores": dict(self.scores),
                "trained_for_strength": self.record["train"]["strength"],
            },
        )
