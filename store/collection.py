"""Removing what nobody can need any more: garbage of interrupted work, and on request artifacts
that were never used.

Nothing that a channel's log names goes, nor any artifact that an open proposal names, or another
artifact as its parent.
Publishes in progress are safe as long as they take less than `older_than_s`: a publish makes what
it finds young again, and an object that has become younger than it was when it was found stays.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Final, Literal, TypeAlias

from store.ahead import map_ahead
from store.channels import ChannelLog, gap
from store.errors import Corrupt, InvalidInput, NotFound
from store.location import Location, ObjectInfo
from store.proposals import Proposals
from store.registry import Registry, manifest_key, signature_key

OLDER_THAN_S: Final = 7 * 86400.0
BOARD_AGE_S: Final = 86400.0

Reason: TypeAlias = Literal[
    "orphan_blob",  # no manifest names it
    "orphan_signature",  # of an artifact that was never published
    "unreferenced",  # an artifact that no channel ever named, and no other one as its parent
    "upload",  # of a publish that was given up
    "past_proposal",  # for a revision that another change has made
    "replica_gone",
    "leftover",  # of a writer that was killed
]

_FOLDERS = ("artifacts", "blobs", "channels", "proposals", "replicas", "revocations", "uploads")
_BATCH = 64
_HEX = re.compile(rb"[0-9a-f]{64}")
_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{64})")
_PART = re.compile(r"artifacts/([0-9a-f]{64})/(manifest|signature)\.json")
_UPLOAD = re.compile(r"(uploads/[0-9a-f]{64})/[^/]+\.part")
_PROPOSAL = re.compile(r"proposals/([^/]+)/([0-9]{8})-[0-9a-f]{16}\.json")
_BOARD = re.compile(r"replicas/[^/]+\.json")


@dataclass(frozen=True, slots=True)
class Garbage:
    """An object that may go.

    Attributes:
        key: Under the root.
        size: In bytes.
        reason: Why.
        modified: When it was written last, UTC.
    """

    key: str
    size: int
    reason: Reason
    modified: datetime


class _References:
    """What manifests and channels name, as of the last `refresh`."""

    def __init__(self, root: Location) -> None:
        self._registry = Registry(root)
        self._channels = ChannelLog(root)
        self._proposals = Proposals(root)
        self.manifests: set[str] = set()  # digests
        self.heads: dict[str, int] = {}
        self.in_channels: dict[str, str] = {}  # where, by digest
        self.in_proposals: set[str] = set()  # that can still be approved
        self.in_manifests: set[str] = set()  # payloads, parents, and whatever else is named there

    def refresh(self) -> None:
        """Read what has come since the last time; all of it, the first time.

        Raises:
            Corrupt: a manifest, an entry of a channel or a proposal is damaged or lost: nobody can
                know what it named.
        """
        artifacts = self._registry.location.list("artifacts")
        matches = (_PART.fullmatch(info.key) for info in artifacts)
        digests = [m[1] for m in matches if m and m[2] == "manifest"]
        # One that was removed is no reference any more, but one that protects too much is harmless.
        new = [digest for digest in digests if digest not in self.manifests]
        with closing(map_ahead(self._read_manifest, new)) as found:
            for manifest in found:
                self.in_manifests.update(digest.decode() for digest in _HEX.findall(manifest))
        self.manifests.update(new)
        with closing(map_ahead(self._read_entry, self._new_entries())) as entries:
            for channel, revision, artifact in entries:
                self.heads[channel] = revision
                if artifact is not None:
                    self.in_channels.setdefault(artifact, f"{channel!r} at revision {revision}")
        self.in_proposals = set(self._proposed())

    def lost(self) -> str | None:
        """A digest that a channel names and that has no manifest."""
        return next((d for d in self.in_channels if d not in self.manifests), None)

    def keeps(self, digest: str) -> bool:
        """Whether an artifact is named by a channel, an open proposal or another artifact."""
        return any(digest in s for s in (self.in_channels, self.in_proposals, self.in_manifests))

    def _proposed(self) -> Iterator[str]:
        for channel in self._proposals.channels():
            for key in self._proposals.keys(channel, after=self.heads.get(channel, 0)):
                try:
                    data = self._proposals.location.get(key)
                except NotFound:  # collected by somebody else since the listing
                    continue
                artifact = self._proposals.parse(data, key=key).artifact
                if artifact is not None:
                    yield artifact

    def _new_entries(self) -> Iterator[tuple[str, int]]:
        for channel in self._channels.names():
            seen = self.heads.get(channel, 0)
            for expected, revision in enumerate(
                self._channels.revisions(channel, after=seen), start=seen + 1
            ):
                if revision != expected:
                    raise gap(channel, expected, revision)
                yield channel, revision

    def _read_manifest(self, digest: str) -> bytes:
        try:
            return self._registry.manifest(digest)
        except NotFound:  # collected by somebody else since the listing
            return b""

    def _read_entry(self, place: tuple[str, int]) -> tuple[str, int, str | None]:
        return (*place, self._channels.entry(*place).artifact)


def find_garbage(
    root: Location,
    *,
    older_than_s: float = OLDER_THAN_S,
    unreferenced: bool = False,
    now: datetime | None = None,
) -> Generator[Garbage]:
    """Objects of registry and channels that may go; removes nothing.

    Reads every manifest and every entry of every channel, and lists the rest.

    Args:
        root: Where `blobs`, `artifacts`, `channels` and the others lie.
        older_than_s: Only what was last written longer ago; no publish may take that long. Objects
            of replicas only after a day in any case.
        unreferenced: Also artifacts that no entry of any channel ever named, and that no open
            proposal and no other artifact names. Their payloads become orphans, so that the next
            collection finds them.
        now: What to measure ages from; the present by default.

    Raises:
        InvalidInput: kind "out_of_range", the age is negative or not a number.
        Corrupt: a manifest, an entry or a proposal is damaged or lost, or an artifact that a
            channel names has lost its manifest while there are orphan payloads: so it is not known
            what may go. Nothing was yielded then.
    """
    if not older_than_s >= 0:
        message = f"older_than_s must be a number of seconds from 0, got {older_than_s}"
        raise InvalidInput(message, kind="out_of_range")
    now = now or datetime.now(UTC)
    limit = now - timedelta(seconds=min(older_than_s, 1e9))
    # Candidates before references, so that what is published meanwhile is no candidate.
    blobs = {m[1]: i for i in root.list("blobs") if (m := _BLOB.fullmatch(i.key))}
    artifacts = list(root.list("artifacts"))
    references = _References(root)
    references.refresh()
    found = chain(
        _orphan_blobs(root, blobs, references, limit),
        _artifacts(artifacts, references, limit, unreferenced=unreferenced),
        _uploads(root, limit),
        _past_proposals(root, references, limit),
        _boards(root, now - timedelta(seconds=BOARD_AGE_S)),
        _leftovers(root, limit),
    )
    yield from found


def collect(root: Location, garbage: Iterable[Garbage]) -> int:
    """Remove what `find_garbage` found, unless it was written again since; how many objects went.

    An artifact also stays if somebody began to use it since: that is looked up before it is
    removed and once more after, when it would be put back. What remains is a publish, or a
    promotion, all of which happens between two requests of the collection; `store.audit` would find
    the loss, and publishing the artifact again mends it.

    Raises:
        Corrupt: as for `find_garbage`.
    """
    num_removed = 0
    batch: list[Garbage] = []
    references: _References | None = None
    for item in garbage:
        if item.reason != "unreferenced":
            num_removed += _remove(root, item)
            continue
        batch.append(item)
        if len(batch) == _BATCH:
            references = references or _References(root)
            num_removed += _remove_artifacts(root, batch, references)
            batch = []
    if batch:
        num_removed += _remove_artifacts(root, batch, references or _References(root))
    return num_removed


def _orphan_blobs(
    root: Location, blobs: dict[str, ObjectInfo], references: _References, limit: datetime
) -> list[Garbage]:
    old = {sha256: info for sha256, info in blobs.items() if info.modified < limit}
    orphans = [info for sha256, info in old.items() if sha256 not in references.in_manifests]
    if orphans and (digest := references.lost()) is not None:
        message = (
            f"channel {references.in_channels[digest]} names artifact {digest}, which has no "
            f"manifest in {root.url}, so that its payload cannot be told from garbage; publish it "
            "again, or restore the manifest, then collect"
        )
        raise Corrupt(message, kind="artifact_incomplete")
    return list(_garbage(orphans, "orphan_blob"))


def _artifacts(
    infos: list[ObjectInfo], references: _References, limit: datetime, *, unreferenced: bool
) -> Iterator[Garbage]:
    parts: dict[str, dict[str, ObjectInfo]] = {}
    for info in infos:
        if match := _PART.fullmatch(info.key):
            parts.setdefault(match[1], {})[match[2]] = info
    for digest, part in parts.items():
        if references.keeps(digest) or any(info.modified >= limit for info in part.values()):
            continue
        if digest not in references.manifests:
            yield from _garbage(part.values(), "orphan_signature")
        elif unreferenced and "manifest" in part:
            # The manifest goes first: from then on, there is no such artifact.
            yield from _garbage((part[name] for name in sorted(part)), "unreferenced")


def _uploads(root: Location, limit: datetime) -> Iterator[Garbage]:
    uploads: dict[str, list[ObjectInfo]] = {}
    for info in root.list("uploads"):
        if match := _UPLOAD.fullmatch(info.key):
            uploads.setdefault(match[1], []).append(info)
    for pieces in uploads.values():
        if all(info.modified < limit for info in pieces):
            yield from _garbage(pieces, "upload")


def _past_proposals(root: Location, references: _References, limit: datetime) -> Iterator[Garbage]:
    for info in root.list("proposals"):
        match = _PROPOSAL.fullmatch(info.key)
        if match and info.modified < limit and int(match[2]) <= references.heads.get(match[1], 0):
            yield from _garbage([info], "past_proposal")


def _boards(root: Location, limit: datetime) -> Iterator[Garbage]:
    boards = (info for info in root.list("replicas") if _BOARD.fullmatch(info.key))
    yield from _garbage((info for info in boards if info.modified < limit), "replica_gone")


def _leftovers(root: Location, limit: datetime) -> Iterator[Garbage]:
    for folder in _FOLDERS:  # activation caches look after their own
        for info in root.child(folder).leftovers():
            if info.modified < limit:
                key = f"{folder}/{info.key}"
                yield Garbage(key, info.size, "leftover", info.modified)


def _garbage(infos: Iterable[ObjectInfo], reason: Reason) -> Iterator[Garbage]:
    return (Garbage(info.key, info.size, reason, info.modified) for info in infos)


def _remove(root: Location, item: Garbage) -> bool:
    if item.reason == "leftover":
        return root.remove_leftover(item.key)
    try:
        if root.info(item.key).modified > item.modified:
            return False  # somebody needs it after all
        root.delete(item.key)
    except NotFound:  # another collection was faster
        return False
    return True


def _remove_artifacts(root: Location, batch: list[Garbage], references: _References) -> int:
    references.refresh()
    removed: dict[str, dict[str, bytes]] = {}
    for item in batch:
        match = _PART.fullmatch(item.key)
        if not match or references.keeps(match[1]):
            continue
        if match[2] == "signature" and root.exists(manifest_key(match[1])):
            continue  # the manifest was written again since
        try:
            data = root.get(item.key)
        except NotFound:
            continue
        if _remove(root, item):
            removed.setdefault(match[1], {})[match[2]] = data
    references.refresh()
    num_removed = 0
    for digest, parts in removed.items():
        if references.keeps(digest):
            # Promoted between the two looks. The signature comes first, as in a publish.
            for name, key in (("signature", signature_key), ("manifest", manifest_key)):
                if name in parts:
                    root.put_same(key(digest), parts[name])
        else:
            num_removed += len(parts)
    return num_removed
