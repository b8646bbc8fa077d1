"""Channels: named pointers to artifacts, kept as logs that are also their audit trails.

    channels/NAME/00000001.json, 00000002.json, ...

Each entry is created once, under the next number, so of several writers at one revision exactly one
wins, on a disk and in a bucket alike. Each names the sha256 of the one before it, so that no entry
can be altered unseen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, Any, Literal, NotRequired, Self, TypedDict, Unpack

from pydantic import (
    AfterValidator,
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from store.digest import sha256_hex
from store.errors import Conflict, Corrupt, InvalidInput, NotFound
from store.location import Location
from store.records import Digest, Record, parse_record

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62})")
_MAX_REVISION = 99_999_999  # eight digits, so that key order is revision order
_ENTRY = re.compile(r"([0-9]{8})\.json")
_LATER = ("approver", "restores")  # fields that entries have had since there was a need for them


def _check_time(text: str) -> str:
    if not text.endswith("Z") or "T" not in text:
        raise ValueError("expected UTC as in 2026-11-21T18:40:00Z")
    datetime.fromisoformat(text)
    return text


class ChannelEntry(Record):
    """One change of a channel, and its whole state from then on.

    Attributes:
        channel: Name of the channel.
        revision: 1, 2, ...; without gaps.
        artifact: Digest of the artifact, or None for none.
        strength: Factor on the artifact's own strength.
        enabled: Whether nodes apply it.
        share: Fraction of nodes that take it, 0 to 1.
        actor: Who changed it.
        time: When, RFC 3339 in UTC.
        reason: Why.
        previous: sha256 of the bytes of the entry before, "" for the first.
        approver: Who approved it, another than `actor`; None where one person was enough.
        restores: The earlier revision whose state this one has again; None: not a rollback.
    """

    schema_version: Literal[1] = 1
    channel: str
    revision: int = Field(ge=1, le=_MAX_REVISION)
    artifact: Digest | None
    strength: FiniteFloat
    enabled: bool
    share: float = Field(ge=0, le=1)
    actor: str = Field(min_length=1)
    time: Annotated[str, AfterValidator(_check_time)]
    reason: str
    previous: str = Field(pattern=r"^([0-9a-f]{64})?$")
    approver: str | None = Field(default=None, min_length=1)
    restores: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check_later(self) -> Self:
        if self.approver == self.actor:
            raise ValueError(f"{self.actor!r} cannot approve a change of its own")
        if self.restores is not None and self.restores >= self.revision:
            raise ValueError(f"revision {self.revision} cannot restore {self.restores}")
        return self

    @model_serializer(mode="wrap")
    def _leave_out(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Without what is None, so that entries from before there were these keep their bytes, also
        # inside of other records.
        fields: dict[str, Any] = handler(self)
        return {name: v for name, v in fields.items() if name not in _LATER or v is not None}


class Change(TypedDict):
    """What a caller says about an entry; for the fields see `ChannelEntry`. Without a time, it is
    now.
    """

    artifact: str | None
    strength: float
    enabled: bool
    share: float
    actor: str
    reason: str
    time: NotRequired[str | None]
    approver: NotRequired[str | None]
    restores: NotRequired[int | None]


class ChannelLog:
    """Reads and appends to channels; safe to share between threads and processes.

    Args:
        root: Where `channels` lies.
    """

    def __init__(self, root: Location) -> None:
        self.location = root
        self._last_seen: dict[
            str, int
        ] = {}  # only a hint where to start looking: heads never move back

    def append(
        self, channel: str, *, expected_revision: int, **change: Unpack[Change]
    ) -> ChannelEntry:
        """Change a channel if nobody else has since `expected_revision` (0 makes it).

        Repeating a call with the same `time` after a lost reply succeeds with the same entry.

        Raises:
            InvalidInput: kind "channel_name" or "channel_entry", a field is out of range.
            Conflict: kind "revision_taken", the head is not `expected_revision`; read it, decide
                again.
        """
        entry = self._build(channel, expected_revision, change)
        try:
            self.location.put_same(entry_key(channel, entry.revision), entry.to_bytes())
        except Conflict as error:
            raise self._taken(channel, entry.revision) from error
        return entry

    def draft(
        self, channel: str, *, expected_revision: int, **change: Unpack[Change]
    ) -> ChannelEntry:
        """What `append` would append now, which it does not. Errors as there."""
        entry = self._build(channel, expected_revision, change)
        if self.location.exists(entry_key(channel, entry.revision)):
            raise self._taken(channel, entry.revision)
        return entry

    def head(self, channel: str) -> ChannelEntry:
        """The newest entry: the state of the channel. Usually two small reads, without listing.

        Raises:
            NotFound: kind "no_channel".
        """
        revision = self._last_seen.get(check_channel(channel)) or self._last_listed(channel)
        entry = self.entry(channel, revision)
        return self._follow(entry)

    def find(self, channel: str) -> ChannelEntry | None:
        """As `head`; None for a channel that does not exist."""
        try:
            return self.head(channel)
        except NotFound:
            return None

    def newer(self, channel: str, revision: int) -> ChannelEntry | None:
        """The newest entry if it is above `revision` (0: any), else None, also without a channel.

        For whoever asks again and again: while nothing has changed, it costs one small read.

        Raises:
            InvalidInput: kind "channel_name" or "channel_entry", the revision is out of range.
            Corrupt: kind "channel_chain", an entry is unreadable or lies under a wrong name.
        """
        try:
            entry = self.entry(channel, revision + 1)
        except NotFound:
            return None
        return self._follow(entry) if revision else self.head(channel)  # which may be far above

    def entry(self, channel: str, revision: int) -> ChannelEntry:
        """One entry.

        Raises:
            NotFound: kind "no_revision".
            Corrupt: kind "channel_chain", it is unreadable or lies under a wrong name.
        """
        return self.parse(channel, revision, self.read(channel, revision))

    def read(self, channel: str, revision: int) -> bytes:
        """An entry's bytes, unchecked.

        Raises:
            NotFound: kind "no_revision".
        """
        try:
            return self.location.get(entry_key(channel, revision))
        except NotFound as error:
            message = f"channel {channel!r} has no revision {revision} in {self.location.url}"
            raise NotFound(message, kind="no_revision") from error

    def parse(self, channel: str, revision: int, data: bytes) -> ChannelEntry:
        """The entry in what `read` gave.

        Raises:
            Corrupt: kind "channel_chain", it is unreadable or lies under a wrong name.
        """
        where = f"{self.location.url}/{entry_key(channel, revision)}"
        entry = parse_record(ChannelEntry, data, where=where, kind="channel_chain")
        if (entry.channel, entry.revision) != (channel, revision) or entry.to_bytes() != data:
            message = (
                f"{where} holds revision {entry.revision} of {entry.channel!r}, or was not "
                "written by this store; "
                "restore it"
            )
            raise Corrupt(message, kind="channel_chain")
        return entry

    def history(
        self, channel: str, *, after: int = 0, limit: int | None = None
    ) -> list[ChannelEntry]:
        """Entries with revisions greater than `after`, in order, the first `limit` of them.

        Reads these and the one before them, and checks that each names the bytes of its
        predecessor; so an alteration of the newest entry alone is the only one it cannot see.

        Raises:
            NotFound: kind "no_channel".
            InvalidInput: kind "out_of_range", the limit is below 1.
            Corrupt: kind "channel_gap" or "channel_chain", naming the first bad revision.
        """
        if limit is not None and limit < 1:
            raise InvalidInput(f"limit must be 1 or more, got {limit}", kind="out_of_range")
        revisions = list(islice(self.revisions(channel, after=after), limit))
        if not revisions:
            self.head(channel)  # without a channel, this says so
            return []
        previous = self._sha256_before(channel, revisions[0], after=after)
        entries = []
        for expected, revision in enumerate(revisions, start=after + 1):
            if revision != expected:
                raise gap(channel, expected, revision)
            data = self.read(channel, revision)
            entry = self.parse(channel, revision, data)
            if entry.previous != previous:
                message = (
                    f"channel {channel!r}: revision {revision} names "
                    f"{entry.previous or 'nothing'} as the entry "
                    f"before it, found {previous or 'nothing'}; one of the two was altered, "
                    "restore the log"
                )
                raise Corrupt(message, kind="channel_chain")
            entries.append(entry)
            previous = sha256_hex(data)
        return entries

    def names(self) -> list[str]:
        """Names of the channels, sorted."""
        return [name for name in self.location.folders("channels") if is_channel(name)]

    def revisions(self, channel: str, *, after: int = 0) -> Iterator[int]:
        """Revisions above `after` that lie in the store, ascending; other files in the folder do
        not count.

        Raises:
            InvalidInput: kind "channel_name".
        """
        prefix = f"channels/{check_channel(channel)}"
        for info in self.location.list(prefix, after=entry_key(channel, after)):
            if match := _ENTRY.fullmatch(info.key.removeprefix(f"{prefix}/")):
                yield int(match[1])

    def verify(self, channel: str) -> None:
        """Check the whole log: every revision there, each naming the bytes of the one before.

        Raises:
            NotFound: kind "no_channel".
            Corrupt: kind "channel_gap" or "channel_chain", naming the first bad revision.
        """
        self.history(channel)

    def _build(self, channel: str, expected_revision: int, change: Change) -> ChannelEntry:
        previous = b""
        if expected_revision:
            try:
                previous = self.read(channel, expected_revision)
            except NotFound as error:
                message = (
                    f"channel {channel!r}: expected to be at revision {expected_revision}, which "
                    "does not exist "
                    "yet; read head() and decide again"
                )
                raise Conflict(message, kind="revision_taken") from error
        try:
            fields: dict[str, Any] = {**change, "time": change.get("time") or _now()}
            return ChannelEntry(
                channel=check_channel(channel),
                revision=expected_revision + 1,
                previous=sha256_hex(previous) if previous else "",
                **fields,
            )
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "the whole"
            given = f", got {first['input']!r}" if first["loc"] else ""
            message = f"channel {channel!r}: {field}: {first['msg']}{given}"
            raise InvalidInput(message, kind="channel_entry") from error

    def _taken(self, channel: str, revision: int) -> Conflict:
        winner = self.entry(channel, revision)
        message = (
            f"channel {channel!r}: expected to be at revision {revision - 1}, but "
            f"{winner.actor!r} made "
            f"revision {winner.revision} at {winner.time} ({winner.reason!r}); read head() "
            "and decide again"
        )
        return Conflict(message, kind="revision_taken")

    def _follow(self, entry: ChannelEntry) -> ChannelEntry:
        """The newest entry, from one that is known on."""
        while True:
            try:
                entry = self.entry(entry.channel, entry.revision + 1)
            except NotFound:
                self._last_seen[entry.channel] = entry.revision
                return entry

    def _last_listed(self, channel: str) -> int:
        last = 0
        for revision in self.revisions(channel):
            last = revision
        if not last:
            message = (
                f"no channel {channel!r} in {self.location.url}; create it, or look at names()"
            )
            raise NotFound(message, kind="no_channel")
        return last

    def _sha256_before(self, channel: str, first: int, *, after: int) -> str:
        if after == 0:
            return ""
        try:
            return sha256_hex(self.read(channel, after))
        except NotFound as error:
            raise gap(channel, after, first) from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def is_channel(channel: str) -> bool:
    """Whether this can be a channel's name."""
    return _NAME.fullmatch(channel) is not None and not channel.endswith(".")


def check_channel(channel: str) -> str:
    """Return `channel` unchanged if it is a channel's name.

    Raises:
        InvalidInput: kind "channel_name", it is not.
    """
    if not isinstance(channel, str) or not is_channel(channel):
        message = (
            f"bad channel name {channel!r}: expected 1 to 63 of a-z, 0-9, dot, underscore and "
            "hyphen, beginning with "
            "a letter or digit, not ending in a dot"
        )
        raise InvalidInput(message, kind="channel_name")
    return channel


def entry_key(channel: str, revision: int) -> str:
    """Key of an entry; revision 0 is where the log begins.

    Raises:
        InvalidInput: kind "channel_name" or "channel_entry", the revision is out of range.
    """
    if not 0 <= revision <= _MAX_REVISION:
        message = f"channel {channel!r}: revisions are 0 to {_MAX_REVISION}, got {revision}"
        raise InvalidInput(message, kind="channel_entry")
    return f"channels/{check_channel(channel)}/{revision:08d}.json"


def gap(channel: str, revision: int, later: int) -> Corrupt:
    """The error for a log in which `revision` is missing and `later` is the next one there."""
    message = (
        f"channel {channel!r}: revision {revision} is gone, revision {later} is there; restore it"
    )
    return Corrupt(message, kind="channel_gap")
