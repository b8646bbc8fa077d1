"""Publishers and what they publish. Tests of other folders use these too."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from steering_service.client.operator import Operator
from steering_service.core.artifact import Artifact, ModelReference, Policy, build
from steering_service.core.direction import Direction
from steering_service.core.intervention import Intervention
from steering_service.core.signing import Signer, TrustRoots, generate_key
from steering_service.core.site import Site

FINGERPRINT = "a" * 64


@dataclass
class Publisher:
    """A key pair and what it signs."""

    folder: Path
    signer: Signer = field(init=False)
    public_key: Path = field(init=False)
    roots: TrustRoots = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.public_key = self.folder / "key.pub"
        generate_key(self.folder / "key.pem", self.public_key)
        self.signer = Signer.from_file(self.folder / "key.pem")
        self.roots = TrustRoots.from_paths([self.public_key])

    def sign(self, artifact: Artifact) -> bytes:
        return self.signer.sign(artifact.manifest_bytes)

    def publish(self, operator: Operator, artifact: Artifact) -> str:
        return operator.publish(artifact, self.sign(artifact))


def make_artifact(
    seed: int = 0, *, width: int = 64, fingerprint: str = FINGERPRINT, limit: float = 2.0
) -> Artifact:
    """An artifact of one random direction; `limit` bounds its strength on both sides."""
    vector_D = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
    direction = Direction(Site("resid_post", 3), vector_D, 1.5, 9.0, "difference_of_means")
    return build(
        [Intervention(direction)],
        name=f"artifact {seed}",
        model=ModelReference(name="pocket", fingerprint=fingerprint),
        policy=Policy(min_strength=-limit, max_strength=limit),
    )
