"""Artifact: content-addressed Interventions: a canonical JSON manifest and a safetensors payload.

The digest of an artifact is the sha256 of its manifest, and the manifest holds the sha256 of the
payload, so one digest names everything. Only JSON and safetensors are ever parsed, never pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

import numpy as np
import rfc8785
import safetensors
import safetensors.numpy
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from steering_service.core.direction import Direction
from steering_service.core.errors import Corrupt, InvalidInput, Refused
from steering_service.core.intervention import Intervention, Operation, Positions, StrengthUnit
from steering_service.core.site import Site

SCHEMA_VERSION: Final = 1
MAX_MANIFEST_BYTES: Final = 4 << 20

Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Policy(_Frozen):
    """Limits that nodes enforce; part of the signed manifest."""

    min_strength: Finite
    max_strength: Finite

    @model_validator(mode="after")
    def _ordered(self) -> Policy:
        if self.min_strength > self.max_strength:
            raise ValueError("min_strength is above max_strength")
        return self

    def check(self, strength: float) -> None:
        """Refuse a strength outside the limits.

        Raises:
            Refused: Outside the limits, or not finite.
        """
        if not (np.isfinite(strength) and self.min_strength <= strength <= self.max_strength):
            raise Refused(
                f"strength {strength} is outside the signed policy "
                f"[{self.min_strength}, {self.max_strength}] of this artifact",
                kind="policy_strength",
            )


class ModelReference(_Frozen):
    """The model that the artifact was made for."""

    name: str
    fingerprint: Hex


class Payload(_Frozen):
    """The safetensors file that belongs to the manifest."""

    sha256: Hex
    size: Annotated[int, Field(ge=0)]


class InterventionRecord(_Frozen):
    """One Intervention; its vector is the payload's tensor of the name `tensor`."""

    site: str
    tensor: str
    operation: Operation
    strength_unit: StrengthUnit
    positions: Positions
    weight: Finite
    method: str
    sigma: Annotated[Finite, Field(ge=0)]
    activation_norm: Annotated[Finite, Field(ge=0)]
    scores: dict[str, Finite]


class Manifest(_Frozen):
    """What an artifact is; see `build` for the fields."""

    schema_version: Literal[1]
    kind: Literal["intervention"]
    name: Annotated[str, Field(min_length=1, max_length=200)]
    model: ModelReference
    interventions: Annotated[list[InterventionRecord], Field(min_length=1)]
    policy: Policy
    parents: list[Hex]
    lineage: dict[str, Any]
    payload: Payload


@dataclass(frozen=True, slots=True, eq=False)
class Artifact:
    """A parsed, checked artifact and the bytes it came from.

    Attributes:
        digest: sha256 of `manifest_bytes`, hex.
        manifest: The parsed manifest.
        interventions: In the order of the manifest.
        manifest_bytes: Canonical JSON (RFC 8785).
        payload_bytes: safetensors, one float32 [D] tensor an Intervention.
    """

    digest: str
    manifest: Manifest
    interventions: tuple[Intervention, ...]
    manifest_bytes: bytes = field(repr=False)
    payload_bytes: bytes = field(repr=False)


def build(
    interventions: Sequence[Intervention],
    *,
    name: str,
    model: ModelReference,
    policy: Policy,
    parents: Sequence[str] = (),
    lineage: Mapping[str, Any] | None = None,
) -> Artifact:
    """Make an artifact. The same input gives the same bytes and so the same digest.

    Args:
        interventions: At least one, at most one for a Site and operation.
        name: For people; not unique.
        model: The model that the directions were fitted on.
        policy: Strength limits that every node enforces.
        parents: Digests of what this was derived from: captures or artifacts.
        lineage: Settings and scores worth keeping; JSON values only.

    Raises:
        InvalidInput: Two Interventions of one site and operation, or values that JSON cannot hold.
    """
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    records = []
    for item in interventions:
        tensor = f"{item.site}.{item.operation}"
        if tensor in tensors:
            raise InvalidInput(
                f"artifact {name!r} has two interventions for {tensor}; merge them first",
                kind="artifact_duplicate",
            )
        tensors[tensor] = item.direction.vector_D
        records.append(
            InterventionRecord(
                site=str(item.site),
                tensor=tensor,
                operation=item.operation,
                strength_unit=item.strength_unit,
                positions=item.positions,
                weight=float(item.weight),
                method=item.direction.method,
                sigma=float(item.direction.sigma),
                activation_norm=float(item.direction.activation_norm),
                scores={k: float(v) for k, v in item.direction.scores.items()},
            )
        )
    payload = safetensors.numpy.save(tensors)
    try:
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            kind="intervention",
            name=name,
            model=model,
            interventions=records,
            policy=policy,
            parents=list(parents),
            lineage=dict(lineage or {}),
            payload=Payload(sha256=hashlib.sha256(payload).hexdigest(), size=len(payload)),
        )
        manifest_bytes = rfc8785.dumps(manifest.model_dump())
    except (ValidationError, rfc8785.CanonicalizationError) as error:
        raise InvalidInput(f"artifact {name!r}: {error}", kind="artifact_manifest") from error
    return parse(manifest_bytes, payload)


def parse_manifest(manifest_bytes: bytes) -> Manifest:
    """Parse and check a manifest alone.

    Raises:
        InvalidInput: Too large, not canonical JSON, an unknown schema or a field out of range.
    """
    if len(manifest_bytes) > MAX_MANIFEST_BYTES:
        raise InvalidInput(
            f"manifest of {len(manifest_bytes)} bytes; at most {MAX_MANIFEST_BYTES} are accepted",
            kind="manifest_size",
        )
    try:
        value = json.loads(manifest_bytes)
        if rfc8785.dumps(value) != manifest_bytes:
            raise InvalidInput(
                "manifest is not canonical JSON (RFC 8785), so its digest would be ambiguous",
                kind="manifest_canonical",
            )
        return Manifest.model_validate(value)
    except (ValueError, RecursionError, rfc8785.CanonicalizationError) as error:
        # ValidationError and JSONDecodeError are both ValueErrors.
        raise InvalidInput(f"manifest cannot be read: {error}", kind="manifest_syntax") from error


def parse(manifest_bytes: bytes, payload_bytes: bytes) -> Artifact:
    """Parse an artifact's two parts and check them against each other.

    Raises:
        InvalidInput: The manifest is malformed, or a vector is not finite float32 [D].
        Corrupt: The payload is not the one that the manifest names, or is not safetensors.
    """
    manifest = parse_manifest(manifest_bytes)
    got = hashlib.sha256(payload_bytes).hexdigest()
    if got != manifest.payload.sha256 or len(payload_bytes) != manifest.payload.size:
        raise Corrupt(
            f"payload of artifact {manifest.name!r}: expected {manifest.payload.size} bytes with "
            f"sha256 {manifest.payload.sha256}, got {len(payload_bytes)} with {got}",
            kind="payload_digest",
        )
    try:
        tensors = safetensors.numpy.load(payload_bytes)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise Corrupt(
            f"payload of artifact {manifest.name!r} is not safetensors: {error}",
            kind="payload_format",
        ) from error
    names = [record.tensor for record in manifest.interventions]
    if sorted(names) != sorted(tensors):
        raise InvalidInput(
            f"artifact {manifest.name!r}: manifest names tensors {sorted(names)}, "
            f"payload holds {sorted(tensors)}",
            kind="payload_tensors",
        )
    interventions = tuple(
        _restore(record, tensors[record.tensor]) for record in manifest.interventions
    )
    digest = hashlib.sha256(manifest_bytes).hexdigest()
    return Artifact(digest, manifest, interventions, manifest_bytes, payload_bytes)


def _restore(record: InterventionRecord, vector: np.ndarray[Any, Any]) -> Intervention:
    if vector.dtype != np.float32:
        raise InvalidInput(
            f"tensor {record.tensor!r}: expected float32, got {vector.dtype}", kind="payload_dtype"
        )
    direction = Direction(
        site=Site.parse(record.site),
        vector_D=vector,
        sigma=record.sigma,
        activation_norm=record.activation_norm,
        method=record.method,
        scores=record.scores,
    )
    return Intervention(
        direction, record.operation, record.strength_unit, record.positions, record.weight
    )
