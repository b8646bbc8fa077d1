"""Checking a whole registry with its channels: digests, sizes, signatures, chains.

What it cannot see by itself: an alteration of a channel's newest entry that is still a valid entry,
as no other entry names its bytes yet; an entry, or a revocation list, cut off at a log's end; and
whether signatures are good, for which it is given functions that know the keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

from store.ahead import map_ahead
from store.channels import ChannelEntry, ChannelLog, entry_key, gap
from store.digest import sha256_hex
from store.errors import Corrupt, InvalidInput, NotFound, StoreError, Unavailable
from store.location import Location
from store.proposals import Proposals
from store.registry import READ_BYTES, Registry, blob_key, manifest_key, payload_of, signature_key
from store.revocations import RevocationLog, revocation_key

VerifySignature = Callable[[bytes, bytes], object]
"""Takes envelope and manifest; raises an error with a `kind` if the signature is not good."""
VerifyRevocations = Callable[[int, bytes], object]
"""Takes serial and envelope; raises an error with a `kind` if the list is not good."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        key: Of the object, under the root.
        kind: One of `store.errors.KINDS`, or that of the error which a given function raised.
        detail: For people: what, where, expected and found, what to do.
    """

    key: str
    kind: str
    detail: str


def audit(
    root: Location,
    *,
    verify_signature: VerifySignature | None = None,
    verify_revocations: VerifyRevocations | None = None,
    on_checked: Callable[[int], None] = lambda num_bytes: None,
) -> Iterator[Finding]:
    """Yield what is wrong in the order of payloads, artifacts, channels, proposals and revocation
    lists; nothing for a sound store. Reads all of it, with a few threads, payloads a piece at a
    time; what is published meanwhile may be checked or not.

    Args:
        root: Where `blobs`, `artifacts`, `channels` and the others lie.
        verify_signature: Checks a manifest's signature; None leaves that out.
        verify_revocations: Checks a revocation list; called in the order of serials. None leaves
            that out.
        on_checked: Called with the bytes of each object that was checked.

    Raises:
        Unavailable: a bucket or the network failed; a disk that cannot be read is a finding.
    """
    blobs = _Blobs(root)
    yield from blobs.check(on_checked)
    artifacts = _Artifacts(root, verify_signature)
    yield from artifacts.check(blobs, on_checked)
    yield from _check_channels(root, artifacts.digests, on_checked)
    yield from _check_proposals(root, on_checked)
    yield from _check_revocations(root, verify_revocations, on_checked)


class _Blobs:
    """The payloads; `sizes` has those that were looked at, by sha256."""

    def __init__(self, root: Location) -> None:
        self._root = root
        self.sizes: dict[str, int] = {}

    def check(self, on_checked: Callable[[int], None]) -> Iterator[Finding]:
        infos = {info.key.removeprefix("blobs/sha256/"): info for info in self._root.list("blobs")}
        names = [name for name, info in infos.items() if _is_blob(name, info.key)]
        with closing(map_ahead(self.look_at, names)) as findings:
            for sha256, finding in zip(names, findings, strict=True):
                on_checked(self.sizes.get(sha256, 0))
                if finding:
                    yield finding

    def look_at(self, sha256: str) -> Finding | None:
        """What is wrong with a payload, if it is there."""
        key = blob_key(sha256)
        hasher = hashlib.sha256()
        try:
            size = self._root.size(key)
            self.sizes[sha256] = size
            for start in range(0, size, READ_BYTES):
                hasher.update(self._root.get_range(key, start, min(READ_BYTES, size - start)))
        except NotFound:  # collected since the listing; if an artifact needs it, that says so
            self.sizes.pop(sha256, None)
            return None
        except StoreError as error:
            return _finding(key, error)
        if (actual := hasher.hexdigest()) == sha256:
            return None
        detail = (
            f"{self._root.url}/{key} has sha256 {actual}, {size} bytes; delete it and publish its "
            "artifacts again"
        )
        return Finding(key, "blob_checksum", detail)


class _Artifacts:
    """The artifacts; `digests` has all that exist, damaged ones too."""

    def __init__(self, root: Location, verify_signature: VerifySignature | None) -> None:
        self._registry = Registry(root)
        self._verify = verify_signature
        self.digests: set[str] = set()

    def check(self, blobs: _Blobs, on_checked: Callable[[int], None]) -> Iterator[Finding]:
        digests = list(self._registry.digests())
        self.digests.update(digests)
        with closing(map_ahead(lambda digest: self._look_at(digest, blobs), digests)) as found:
            for num_bytes, findings in found:
                on_checked(num_bytes)
                yield from findings

    def _look_at(self, digest: str, blobs: _Blobs) -> tuple[int, list[Finding]]:
        """Bytes of manifest and signature, and what is wrong."""
        findings = []
        manifest = signature = b""
        try:
            manifest = self._registry.manifest(digest)
            findings += self._look_at_payload(digest, manifest, blobs)
        except NotFound:  # collected since the listing
            return 0, []
        except StoreError as error:
            findings.append(_finding(manifest_key(digest), error))
        try:
            signature = self._registry.signature(digest)
            if manifest and self._verify:
                self._verify(signature, manifest)
        except Exception as error:
            if isinstance(error, Corrupt) and error.kind == "manifest_digest":
                # Said above; the signature is gone besides.
                error = Corrupt(f"artifact {digest} has no signature", kind="artifact_incomplete")
            findings.append(_finding(signature_key(digest), error))
        return len(manifest) + len(signature), findings

    def _look_at_payload(self, digest: str, manifest: bytes, blobs: _Blobs) -> list[Finding]:
        url = self._registry.location.url
        try:
            sha256, size = payload_of(manifest, where=f"{url}/{manifest_key(digest)}")
        except InvalidInput as error:
            return [_finding(manifest_key(digest), error)]
        key = blob_key(sha256)
        # Published since the payloads were checked, perhaps.
        finding = None if sha256 in blobs.sizes else blobs.look_at(sha256)
        if finding:
            return [finding]
        if (found := blobs.sizes.get(sha256)) is None:
            detail = f"artifact {digest} in {url} has lost its payload {sha256}; publish it again"
            return [Finding(key, "artifact_incomplete", detail)]
        if found != size:
            detail = f"{url}/{key} has {found} bytes, artifact {digest} says {size}"
            return [Finding(key, "payload", detail)]
        return []


def _check_channels(
    root: Location, digests: set[str], on_checked: Callable[[int], None]
) -> Iterator[Finding]:
    log = ChannelLog(root)
    for channel in log.names():
        yield from _check_channel(log, channel, digests, on_checked)


def _check_channel(
    log: ChannelLog, channel: str, digests: set[str], on_checked: Callable[[int], None]
) -> Iterator[Finding]:
    def read(revision: int) -> tuple[bytes, ChannelEntry | Finding]:
        return _read_entry(log, channel, revision)

    url = log.location.url
    revisions = list(log.revisions(channel))
    previous: str | None = ""  # None: it cannot be known, which was said already
    with closing(map_ahead(read, revisions)) as found:
        for before, revision, (data, entry) in zip([0, *revisions], revisions, found, strict=False):
            on_checked(len(data))
            key = entry_key(channel, revision)
            if revision != before + 1:
                gone = entry_key(channel, before + 1)
                yield Finding(gone, "channel_gap", str(gap(channel, before + 1, revision)))
                previous = None
            if isinstance(entry, Finding):
                yield entry
                previous = None
                continue
            if previous is not None and entry.previous != previous:
                detail = (
                    f"{url}/{key} names {entry.previous or 'nothing'} as the entry before it, "
                    f"found {previous or 'nothing'}; one of the two was altered, restore the log"
                )
                yield Finding(key, "channel_chain", detail)
            previous = sha256_hex(data)
            if entry.artifact is not None and not _is_there(log.location, entry.artifact, digests):
                detail = (
                    f"{url}/{key} names artifact {entry.artifact}, which is not there; publish it "
                    "again"
                )
                yield Finding(key, "no_artifact", detail)


def _read_entry(
    log: ChannelLog, channel: str, revision: int
) -> tuple[bytes, ChannelEntry | Finding]:
    try:
        data = log.read(channel, revision)
        return data, log.parse(channel, revision, data)
    except StoreError as error:
        return b"", _finding(entry_key(channel, revision), error)


def _is_there(root: Location, digest: str, digests: set[str]) -> bool:
    if digest not in digests and root.exists(manifest_key(digest)):
        digests.add(digest)  # published since the artifacts were checked
    return digest in digests


def _check_proposals(root: Location, on_checked: Callable[[int], None]) -> Iterator[Finding]:
    proposals = Proposals(root)

    def look_at(key: str) -> tuple[int, Finding | None]:
        try:
            data = root.get(key)
            proposals.parse(data, key=key)
        except NotFound:  # collected since the listing
            return 0, None
        except StoreError as error:
            return 0, _finding(key, error)
        return len(data), None

    keys = [key for channel in proposals.channels() for key in proposals.keys(channel)]
    with closing(map_ahead(look_at, keys)) as found:
        for num_bytes, finding in found:
            on_checked(num_bytes)
            if finding:
                yield finding


def _check_revocations(
    root: Location, verify: VerifyRevocations | None, on_checked: Callable[[int], None]
) -> Iterator[Finding]:
    log = RevocationLog(root)
    following = 1
    for serial in log.serials():
        for missing in range(following, serial):
            key = revocation_key(missing)
            detail = f"{root.url}/{key} is gone, serial {serial} is there; restore it"
            yield Finding(key, kind="revocation_gap", detail=detail)
        following = serial + 1
        try:
            envelope = log.get(serial)
            on_checked(len(envelope))
            if verify:
                verify(serial, envelope)
        except Exception as error:
            yield _finding(revocation_key(serial), error)


def _is_blob(name: str, key: str) -> bool:
    try:
        return blob_key(name) == key
    except InvalidInput:  # something else that lies there
        return False


def _finding(key: str, error: Exception) -> Finding:
    """What an error says about an object; raises it again if it says nothing about one."""
    if isinstance(error, Unavailable) and error.kind != "io":
        raise error  # a bad sector is damage; a network that is down says nothing
    kind = getattr(error, "kind", None)
    if not isinstance(kind, str):
        raise error  # a bug: errors that are raised on purpose have a kind
    return Finding(key, kind, str(error))
