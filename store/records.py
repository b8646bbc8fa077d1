"""The small JSON objects of an activation cache: what says that a shard counts, which of its rows
do not, that it is damaged, and that the cache is complete.
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
        quarantine: sha256 of the shard's `QuarantineRecord`; None where every row counts.
    """

    schema_version: Literal[1] = 1
    capture: Digest
    stream: str
    shard: int = Field(ge=0)
    rows: tuple[int, int] = Field(strict=False)
    num_bytes: int = Field(ge=0)
    sha256: Digest
    seconds: dict[str, FiniteFloat] = {}
    quarantine: Digest | None = None

    def to_bytes(self) -> bytes:
        """The object's canonical JSON; without `quarantine` if that is None, as before there was
        one.
        """
        left_out = {"quarantine"} if self.quarantine is None else set()
        return canonical_json(self.model_dump(mode="json", exclude=left_out))

    @model_validator(mode="after")
    def _rows_increase(self) -> Self:
        if not 0 <= self.rows[0] < self.rows[1]:
            raise ValueError(f"rows must be increasing, got {self.rows}")
        return self


class QuarantinedRow(Record):
    """A row whose values are NaN, and why."""

    row: int = Field(ge=0)
    reason: str = Field(min_length=1)


class QuarantineRecord(Record):
    """The rows of a shard that do not count. A shard that has none has no such record.

    Attributes:
        capture: Digest of the cache's capture.
        shard: Number of the shard, in every stream.
        rows: In increasing order.
    """

    schema_version: Literal[1] = 1
    capture: Digest
    shard: int = Field(ge=0)
    rows: tuple[QuarantinedRow, ...] = Field(min_length=1, strict=False)


class DamageMark(Record):
    """Left by whoever found a shard damaged, for whoever repairs it.

    Attributes:
        capture: Digest of the cache's capture.
        stream: Name of the stream.
        shard: Number of the shard.
        kind: One of `store.errors.KINDS`.
        detail: For people.
    """

    schema_version: Literal[1] = 1
    capture: Digest
    stream: str
    shard: int = Field(ge=0)
    kind: str
    detail: str


class CompleteMarker(Record):
    """Closes a cache.

    Attributes:
        capture: Digest of the cache's capture.
        num_rows: Rows a stream.
        num_shards: Shards a stream.
        num_bytes: Of all shards of all streams.
        records_sha256: Of the canonical JSON of [stream, shard, num_bytes, sha256] of all records,
            streams and shards in order, each followed by the record's `quarantine` if it has one;
            it leaves timings out, so that equal captures have equal markers.
    """

    schema_version: Literal[1] = 1
    capture: Digest
    num_rows: int
    num_shards: int
    num_bytes: int
    records_sha256: Digest


def parse_record(
    model: type[AnyRecord],
    data: bytes,
    *,
    where: str,
    kind: Kind,
    way_on: str = "restore it from a backup",
) -> AnyRecord:
    """Read a record from its JSON.

    Raises:
        Corrupt: of the given kind, naming `where`, the first wrong field and the `way_on`.
    """
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the whole"
        message = f"{where} is not a {model.__name__}: {field}: {first['msg']}; {way_on}"
        raise Corrupt(message, kind=kind) from error
