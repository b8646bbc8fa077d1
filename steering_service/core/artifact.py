"""Artifact: content-addressed Interventions, perhaps with a Controller: canonical JSON manifest and
safetensors payload.

The digest of an artifact is the sha256 of its manifest, and the manifest holds the sha256 of the
payload, so one digest names everything. Only JSON and safetensors are ever parsed, never pickle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

import numpy as np
import rfc8785
import safetensors
import safetensors.numpy
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from steering_service.core.canonical import read_canonical
from steering_service.core.controller import TENSORS, Controller, Mode, check_order
from steering_service.core.direction import Direction
from steering_service.core.errors import Corrupt, InvalidInput, Refused
from steering_service.core.intervention import Intervention, Operation, Positions, StrengthUnit
from steering_service.core.site import Site
from steering_service.core.tensors import load_tensors

SCHEMA_VERSION: Final = 1
MAX_MANIFEST_BYTES: Final = 4 << 20
_CONTROLLER: Final = "controller."

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

    def factors(self, strength: float) -> tuple[float, float]:
        """What a strength may be multiplied by, so that the product stays within the limits.

        0, which is no steering, and 1 are always allowed.
        """
        ends = (self.min_strength / strength, self.max_strength / strength)
        return min(*ends, 0.0), max(*ends, 1.0)


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


class ControllerRecord(_Frozen):
    """The Controller of an artifact; its tensors are the payload's of the prefix `controller.`."""

    mode: Mode
    reads: Annotated[list[str], Field(min_length=1)]
    threshold: Finite


class Manifest(_Frozen):
    """What an artifact is; see `build` for the fields."""

    schema_version: Literal[1]
    kind: Literal["intervention", "controller"]
    name: Annotated[str, Field(min_length=1, max_length=200)]
    model: ModelReference
    interventions: Annotated[list[InterventionRecord], Field(min_length=1)]
    policy: Policy
    parents: list[Hex]
    lineage: dict[str, Any]
    payload: Payload
    controller: ControllerRecord | None = None
    """Only in manifests of the kind ``controller``; the others lack the field."""

    @model_validator(mode="after")
    def _kind_fits(self) -> Manifest:
        if (self.kind == "controller") != (self.controller is not None):
            raise ValueError(f"kind {self.kind!r} and the field `controller` do not go together")
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Artifact:
    """A parsed, checked artifact and the bytes it came from.

    Attributes:
        digest: sha256 of `manifest_bytes`, hex.
        manifest: The parsed manifest.
        interventions: In the order of the manifest.
        controller: What decides their strengths for each request, or None: they are constant.
        manifest_bytes: Canonical JSON (RFC 8785).
        payload_bytes: safetensors, one float32 [D] tensor an Intervention, and the controller's.
    """

    digest: str
    manifest: Manifest
    interventions: tuple[Intervention, ...]
    controller: Controller | None
    manifest_bytes: bytes = field(repr=False)
    payload_bytes: bytes = field(repr=False)


def build(
    interventions: Sequence[Intervention],
    *,
    name: str,
    model: ModelReference,
    policy: Policy,
    controller: Controller | None = None,
    parents: Sequence[str] = (),
    lineage: Mapping[str, Any] | None = None,
) -> Artifact:
    """Make an artifact. The same input gives the same bytes and so the same digest.

    Args:
        interventions: At least one, at most one for a Site and operation.
        name: For people; not unique.
        model: The model that the directions were fitted on.
        policy: Strength limits that every node enforces.
        controller: Decides for each request how strongly each Intervention acts.
        parents: Digests of what this was derived from: captures or artifacts.
        lineage: Settings and scores worth keeping; JSON values only.

    Raises:
        InvalidInput: Two Interventions of one site and operation, a direction whose sigma was not
            measured, values that JSON cannot hold, or a controller that weighs another number of
            Interventions or reads what comes after them.
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
        if item.direction.sigma is None:
            raise InvalidInput(
                f"artifact {name!r}: the sigma of the direction at {item.site} was not measured "
                f"(method {item.direction.method}), and a manifest says it; measure it on a cache "
                "with pipeline.notebook.measure",
                kind="sigma_missing",
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
    record = None
    if controller is not None:
        tensors |= {f"{_CONTROLLER}{key}": value for key, value in controller.tensors().items()}
        record = ControllerRecord(
            mode=controller.mode,
            reads=[str(site) for site in controller.reads],
            threshold=float(controller.threshold),
        )
    payload = safetensors.numpy.save(tensors)
    try:
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            kind="intervention" if controller is None else "controller",
            name=name,
            model=model,
            interventions=records,
            policy=policy,
            parents=list(parents),
            lineage=dict(lineage or {}),
            payload=Payload(sha256=hashlib.sha256(payload).hexdigest(), size=len(payload)),
            controller=record,
        )
        values = manifest.model_dump()
        if record is None:
            del values["controller"]
        manifest_bytes = rfc8785.dumps(values)
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
        value, canonical = read_canonical(manifest_bytes)
        if not canonical:
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
    sha256 = hashlib.sha256(payload_bytes).hexdigest()
    return assemble(parse_manifest(manifest_bytes), manifest_bytes, payload_bytes, sha256)


def assemble(
    manifest: Manifest, manifest_bytes: bytes, payload_bytes: bytes, payload_sha256: str
) -> Artifact:
    """As `parse`, for whoever parsed the manifest and hashed the payload while it came in.

    Args:
        manifest: Of `manifest_bytes`, by `parse_manifest`.
        manifest_bytes: Canonical JSON.
        payload_bytes: safetensors.
        payload_sha256: Hex, of these very `payload_bytes`.

    Raises:
        InvalidInput, Corrupt: See `parse`.
    """
    if payload_sha256 != manifest.payload.sha256 or len(payload_bytes) != manifest.payload.size:
        raise Corrupt(
            f"payload of artifact {manifest.name!r}: expected {manifest.payload.size} bytes with "
            f"sha256 {manifest.payload.sha256}, got {len(payload_bytes)} with {payload_sha256}",
            kind="payload_digest",
        )
    try:
        tensors = load_tensors(payload_bytes)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise Corrupt(
            f"payload of artifact {manifest.name!r} is not safetensors: {error}",
            kind="payload_format",
        ) from error
    names = [record.tensor for record in manifest.interventions]
    if manifest.controller is not None:
        names += [f"{_CONTROLLER}{name}" for name in TENSORS]
    if sorted(names) != sorted(tensors):
        raise InvalidInput(
            f"artifact {manifest.name!r}: manifest names tensors {sorted(names)}, "
            f"payload holds {sorted(tensors)}",
            kind="payload_tensors",
        )
    interventions = tuple(_restore(record, tensors) for record in manifest.interventions)
    controller = _restore_controller(manifest, tensors)
    digest = hashlib.sha256(manifest_bytes).hexdigest()
    return Artifact(digest, manifest, interventions, controller, manifest_bytes, payload_bytes)


def _restore_controller(
    manifest: Manifest, tensors: Mapping[str, np.ndarray[Any, Any]]
) -> Controller | None:
    record = manifest.controller
    if record is None:
        return None
    w1, b1, w2, b2 = (_float32(f"{_CONTROLLER}{name}", tensors) for name in TENSORS)
    reads = tuple(Site.parse(text) for text in record.reads)
    controller = Controller(reads, w1, b1, w2, b2, threshold=record.threshold, mode=record.mode)
    if controller.num_interventions != len(manifest.interventions):
        raise InvalidInput(
            f"artifact {manifest.name!r}: its controller weighs {controller.num_interventions} "
            f"interventions, and the artifact has {len(manifest.interventions)}",
            kind="controller_outputs",
        )
    check_order(reads, tuple(Site.parse(item.site) for item in manifest.interventions))
    return controller


def _float32(name: str, tensors: Mapping[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    if tensors[name].dtype != np.float32:
        raise InvalidInput(
            f"tensor {name!r}: expected float32, got {tensors[name].dtype}", kind="payload_dtype"
        )
    return tensors[name]


def _restore(
    record: InterventionRecord, tensors: Mapping[str, np.ndarray[Any, Any]]
) -> Intervention:
    vector = _float32(record.tensor, tensors)
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
