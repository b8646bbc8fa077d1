"""The small JSON objects of an activation cache: what says that a shard counts, and that the cache
is complete.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from store.digest import canonical_json
from store.errors import Corrupt, Kind

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Record(BaseModel):
    """Base of the JSON objects: frozen, strict, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def to_bytes(self) -> bytes:
        """The object's canonical JSON."""
        return canonical_json(self.model_dump(mode="json"))


AnyRecord = TypeVar("AnyRecord", bound=Record)


class CommitRecord(Record):
    """A shard that has this record counts; one that has none may be garbage of a killed writer.

    Attributes:
        capture: Digest of the cache's capture.
        stream: Name of the stream.
        shard: Number of the shard.
        rows: First row and one past the last.
        num_bytes: Size of the shard object.
        sha256: Of the shard object's bytes.
        seconds: Timings of whoever made it, by step; the only field that may differ between runs.
    """

    schema_version: Literal[1] = 1
    capture: Digest
    stream: str
    shard: int = Field(ge=0)
    rows: tuple[int, int] = Field(strict=False)
    num_bytes: int = Field(ge=0)
    sha256: Digest
    seconds: dict[str, FiniteFloat] = {}

    @model_validator(mode="after")
    def _rows_increase(self) -> Self:
        if not 0 <= self.rows[0] < self.rows[1]:
            raise ValueError(f"rows must be increasing, got {self.rows}")
        return self


class CompleteMarker(Record):
    """Closes a cache.

    Attributes:
        capture: Digest of the cache's capture.
        num_rows: Rows a stream.
        num_shards: Shards a stream.
        num_bytes: Of all shards of all streams.
        records_sha256: Of the canonical JSON of [stream, shard, num_bytes, sha256] of all records,
            streams and shards in order; it leaves timings out, so that equal captures have equal
            markers.
    """

    schema_version: Literal[1] = 1
    capture: Digest
    num_rows: int
    num_shards: int
    num_bytes: int
    records_sha256: Digest


def parse_record(model: type[AnyRecord], data: bytes, *, where: str, kind: Kind) -> AnyRecord:
    """Read a record from its JSON.

    Raises:
        Corrupt: of the given kind, naming `where` and the first wrong field.
    """
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the whole"
        message = (
            f"{where} is not a {model.__name__}: {field}: {first['msg']}; restore it from a backup"
        )
        raise Corrupt(message, kind=kind) from error
