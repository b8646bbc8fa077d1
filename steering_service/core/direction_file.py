"""Direction files: one safetensors file with the vector, and a JSON header in its metadata.

Shapes: D width of the site.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import rfc8785
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steering_service.core.errors import Corrupt, InvalidInput, NotFound

SCHEMA_VERSION: Final = 1
_HEADER: Final = "steerage.direction"
_TENSOR: Final = "vector"

Finite = Annotated[float, Field(allow_inf_nan=False)]


class DirectionRecord(BaseModel):
    """What a file says of its vector; see `Direction` for the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[1]
    site: str
    sigma: Annotated[Finite, Field(ge=0)] | None
    activation_norm: Annotated[Finite, Field(ge=0)]
    method: str
    scores: dict[str, Finite]
    lineage: dict[str, Any]
    digest: str

    def check(self, path: str | Path, digest: str) -> None:
        """Refuse content that is not what the file was written with.

        Raises:
            Corrupt: kind "direction_digest".
        """
        if digest != self.digest:
            raise Corrupt(
                f"direction file {path}: expected content with digest {self.digest}, got {digest}; "
                "the file was edited or damaged",
                kind="direction_digest",
            )


def write(path: Path, vector_D: NDArray[np.float32], fields: Mapping[str, Any]) -> None:
    """Write a direction.

    Args:
        path: Of the file; one that is there is replaced.
        vector_D: Float32 [D].
        fields: Of `DirectionRecord`, without the schema.

    Raises:
        InvalidInput: kind "direction_json", a field holds what JSON cannot.
    """
    try:
        header = rfc8785.dumps({"schema_version": SCHEMA_VERSION, **fields}).decode()
    except (rfc8785.CanonicalizationError, UnicodeEncodeError) as error:
        raise InvalidInput(
            f"direction file {path}: scores and lineage must be JSON values: {error}",
            kind="direction_json",
        ) from error
    path.write_bytes(safetensors.numpy.save({_TENSOR: vector_D}, metadata={_HEADER: header}))


def read(path: Path) -> tuple[NDArray[np.float32], DirectionRecord]:
    """Read a direction: float32 [D] and its record.

    Raises:
        NotFound, Corrupt, InvalidInput: See `Direction.load`.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise NotFound(
            f"direction file {path} is not a file: {error.strerror}", kind="direction_file"
        ) from error
    try:
        tensors = safetensors.numpy.load(content)
        metadata = _metadata(content)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, struct.error) as error:
        raise Corrupt(
            f"direction file {path} is not a whole safetensors file: {error}",
            kind="direction_format",
        ) from error
    if _HEADER not in metadata or list(tensors) != [_TENSOR]:
        raise InvalidInput(
            f"direction file {path}: expected one tensor {_TENSOR!r} and the metadata "
            f"{_HEADER!r}, as Direction.save writes them; got the tensors {sorted(tensors)} and "
            f"the metadata {sorted(metadata)}",
            kind="direction_format",
        )
    try:
        record = DirectionRecord.model_validate(json.loads(metadata[_HEADER]))
    except (ValidationError, ValueError, RecursionError) as error:
        raise InvalidInput(
            f"direction file {path}: its header cannot be read: {error}", kind="direction_format"
        ) from error
    if tensors[_TENSOR].dtype != np.float32:
        raise InvalidInput(
            f"direction file {path}: expected a float32 vector, got {tensors[_TENSOR].dtype}",
            kind="direction_format",
        )
    return tensors[_TENSOR], record


def _metadata(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: its reader of bytes does not give it."""
    (size,) = struct.unpack_from("<Q", content)
    header: dict[str, Any] = json.loads(content[8 : 8 + size])
    return dict(header.get("__metadata__", {}))
