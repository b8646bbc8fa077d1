"""What the registry tells of artifacts."""

from __future__ import annotations

from dataclasses import dataclass

from steering_service.core.artifact import Manifest
from steering_service.v1 import artifact_pb2


@dataclass(frozen=True, slots=True, eq=False)
class PublishedManifest:
    """What the service knows of an artifact without its payload. Not verified: nodes do that.

    Attributes:
        manifest: Parsed.
        manifest_bytes: The canonical JSON that the digest is of.
        signature: DSSE envelope.
        payload_size: Bytes.
    """

    digest: str
    manifest: Manifest
    manifest_bytes: bytes
    signature: bytes
    payload_size: int


@dataclass(frozen=True, slots=True)
class ArtifactEntry:
    """One line of the registry's list.

    Attributes:
        kind: ``intervention`` or ``controller``.
        payload_size: Bytes.
    """

    digest: str
    name: str
    kind: str
    model_name: str
    model_fingerprint: str
    payload_size: int

    @classmethod
    def from_proto(cls, message: artifact_pb2.ArtifactEntry) -> ArtifactEntry:
        """Read the wire form."""
        return cls(
            message.digest,
            message.name,
            message.kind,
            message.model_name,
            message.model_fingerprint,
            message.payload_size,
        )
