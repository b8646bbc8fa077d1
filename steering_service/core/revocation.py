"""Revocations: what must not run any more, although it is signed.

A list names artifacts, keys and, for each channel, the lowest revision that may still run. Lists
are numbered and only grow: whoever has one never goes back to what allows more. The list itself is
canonical JSON in a DSSE envelope; see `core.signing`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Final, Literal

import rfc8785
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from steering_service.core.artifact import Hex
from steering_service.core.errors import InvalidInput, Refused

MAX_REVOCATIONS_BYTES: Final = 4 << 20
# Eight digits, so that the order of a store's keys is the order of the lists.
_MAX_NUMBER: Final = 99_999_999


def _sorted_unique(names: tuple[str, ...]) -> tuple[str, ...]:
    if list(names) != sorted(set(names)):
        raise ValueError("expected ascending order without duplicates")
    return names


def _utc(text: str) -> str:
    if not text.endswith("Z") or "T" not in text:
        raise ValueError("expected UTC as in 2026-11-21T18:40:00Z")
    datetime.fromisoformat(text)
    return text


Name = Annotated[str, Field(min_length=1, max_length=200)]


class Revocations(BaseModel):
    """One revocation list: all that is revoked up to its serial.

    Attributes:
        serial: Counts from 1; a higher list replaces a lower one.
        artifacts: Digests, ascending.
        keys: Ids of keys, ascending. What only these have signed is refused.
        floors: By channel the lowest revision that may run.
        actor: Who made the list.
        time: When, RFC 3339 in UTC.
        reason: Why.
    """

    # Lax about sequences alone: JSON has lists where frozen values need tuples.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[1] = 1
    serial: Annotated[int, Field(ge=1, le=_MAX_NUMBER)]
    artifacts: Annotated[tuple[Hex, ...], Field(strict=False), AfterValidator(_sorted_unique)] = ()
    keys: Annotated[tuple[Name, ...], Field(strict=False), AfterValidator(_sorted_unique)] = ()
    floors: dict[Name, Annotated[int, Field(ge=1, le=_MAX_NUMBER)]] = Field(default_factory=dict)
    actor: Name
    time: Annotated[str, AfterValidator(_utc)]
    reason: Annotated[str, Field(min_length=1, max_length=2000)]

    def to_bytes(self) -> bytes:
        """Canonical JSON (RFC 8785): what is signed."""
        return rfc8785.dumps(self.model_dump(mode="json"))

    def covers(self, older: Revocations) -> bool:
        """Whether this revokes all that another list does, so that it may replace that one."""
        return (
            set(self.artifacts) >= set(older.artifacts)
            and set(self.keys) >= set(older.keys)
            and all(
                self.floors.get(channel, 0) >= revision
                for channel, revision in older.floors.items()
            )
        )

    def check_artifact(self, digest: str, key_ids: Sequence[str]) -> None:
        """Refuse an artifact that is revoked, or that only revoked keys have signed.

        Args:
            digest: Of the artifact.
            key_ids: All trusted keys that signed it; at least one.

        Raises:
            Refused: Kind ``artifact_revoked`` or ``key_revoked``.
        """
        if digest in self.artifacts:
            raise Refused(
                f"artifact {digest} is revoked by list {self.serial} ({self._why()}); promote "
                "another one",
                kind="artifact_revoked",
            )
        if set(key_ids) <= set(self.keys):
            raise Refused(
                f"artifact {digest} is signed by revoked keys only: {', '.join(key_ids)} (list "
                f"{self.serial}, {self._why()}); sign it with another key",
                kind="key_revoked",
            )

    def check_revision(self, channel: str, revision: int) -> None:
        """Refuse a revision of a channel below its floor.

        Raises:
            Refused: Kind ``revision_revoked``.
        """
        floor = self.floors.get(channel, 0)
        if revision < floor:
            raise Refused(
                f"channel {channel!r}: revision {revision} is below {floor}, the lowest that list "
                f"{self.serial} allows ({self._why()}); promote a new revision",
                kind="revision_revoked",
            )

    def _why(self) -> str:
        return f"{self.actor}, {self.time}: {self.reason[:200]}"


def parse_revocations(data: bytes) -> Revocations:
    """Parse and check a revocation list.

    Raises:
        InvalidInput: Too large, not canonical JSON, an unknown schema or a field out of range.
    """
    if len(data) > MAX_REVOCATIONS_BYTES:
        raise InvalidInput(
            f"revocation list of {len(data)} bytes; at most {MAX_REVOCATIONS_BYTES} are accepted",
            kind="revocations_size",
        )
    try:
        value = json.loads(data)
        if rfc8785.dumps(value) != data:
            raise InvalidInput(
                "revocation list is not canonical JSON (RFC 8785); write it with "
                "Revocations.to_bytes",
                kind="revocations_canonical",
            )
        return Revocations.model_validate(value)
    except (ValidationError, ValueError, RecursionError, rfc8785.CanonicalizationError) as error:
        raise InvalidInput(
            f"revocation list cannot be read: {error}", kind="revocations_syntax"
        ) from error
