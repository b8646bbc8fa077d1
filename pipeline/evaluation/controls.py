"""Controls: what any effect of a direction has to be compared with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from steering_service.core.artifact import Artifact, build
from steering_service.core.direction import Direction


def random_twin(artifact: Artifact, seed: int) -> Artifact:
    """The same artifact with random directions of the same norms at the same sites.

    A controller stays: the twin is steered at the same requests, only another way.

    Args:
        seed: Of the random vectors; they are uniform on the sphere.
    """
    generator = np.random.default_rng(seed)
    interventions = []
    for item in artifact.interventions:
        random_D = generator.standard_normal(item.direction.vector_D.shape)
        vector_D = random_D * (item.direction.norm / np.linalg.norm(random_D))
        direction = Direction(
            site=item.site,
            vector_D=vector_D.astype(np.float32),
            sigma=item.direction.sigma,
            activation_norm=item.direction.activation_norm,
            method="random",
        )
        interventions.append(replace(item, direction=direction))
    return build(
        interventions,
        name=f"{artifact.manifest.name}-random-{seed}",
        model=artifact.manifest.model,
        policy=artifact.manifest.policy,
        controller=artifact.controller,
        parents=[artifact.digest],
        lineage={"control": "random direction of the same norm", "seed": seed},
    )
