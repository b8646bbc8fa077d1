"""Errors of the store, grouped by what a handler would do.

    StoreError
    ├── NotFound       it is not there: check the name, or make it first
    ├── Conflict       somebody was first, or the name holds other bytes: read again, then decide
    ├── InvalidInput   the caller must change the request: retrying cannot help
    ├── Corrupt        stored bytes are not what was written: restore or rebuild them
    └── Unavailable    the disk, bucket or network failed: free space or retry later

Every error carries `kind`, a stable string for programs (the message is for people). Kinds are
append-only: once released, a kind is never renamed or reused, because dashboards and retry rules
match on it.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

Kind = Literal[
    # NotFound
    "no_object",
    "no_cache",
    "no_stream",
    "no_layer",
    "no_shard",
    "not_committed",
    "no_artifact",
    "no_channel",
    "no_revision",
    "no_proposal",
    "no_revocations",
    # Conflict
    "exists",
    "differs",
    "not_deterministic",
    "cache_differs",
    "signature_differs",
    "revision_taken",
    "upload_incomplete",
    "upload_differs",
    "serial_taken",
    "incomplete",
    # InvalidInput
    "url",
    "key",
    "out_of_range",
    "not_a_directory",
    "permission_denied",
    "memory_location",
    "digest",
    "json",
    "layout",
    "values",
    "rows",
    "index",
    "file_name",
    "manifest",
    "payload",
    "channel_name",
    "channel_entry",
    # Corrupt
    "shard_checksum",
    "shard_index",
    "shard_size",
    "shard_missing",
    "array_metadata",
    "capture_digest",
    "record",
    "complete_marker",
    "quarantine",
    "blob_checksum",
    "manifest_digest",
    "artifact_incomplete",
    "channel_chain",
    "channel_gap",
    "proposal",
    "revocation_gap",
    # Unavailable
    "no_space",
    "no_hard_links",
    "io",
    "object_store",
]

KINDS: frozenset[str] = frozenset(get_args(Kind))


REPAIR: Final = (
    "run `steerage verify`, which finds every damaged shard, then `steerage extract RUN.toml`, "
    "which computes only those again"
)
"""What to do about a damaged shard; ends the message of every error about one."""


class StoreError(Exception):
    """Base of every error the store raises on purpose.

    Attributes:
        kind: Stable code, one of `KINDS`.
    """

    def __init__(self, message: str, *, kind: Kind) -> None:
        super().__init__(message)
        self.kind: Kind = kind

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions pickle as cls(*args), which would drop the keyword; Ray pickles the errors of
        # its workers.
        return _rebuild, (type(self), str(self), self.kind)


class NotFound(StoreError):
    """The thing asked for is not there."""


class Conflict(StoreError):
    """Another writer was first, or a name that may be written once holds other bytes."""


class InvalidInput(StoreError):
    """The request cannot succeed as it is."""


class Corrupt(StoreError):
    """Stored bytes do not match their checksum, digest or record."""


class Unavailable(StoreError):
    """The medium failed; nothing is wrong with the request."""


def _rebuild(cls: type[StoreError], message: str, kind: Kind) -> StoreError:
    return cls(message, kind=kind)
