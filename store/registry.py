"""Artifacts, immutable and named by the sha256 of their manifest.

    blobs/sha256/HEX               payloads, named by their own sha256
    artifacts/HEX/signature.json   written before the manifest
    artifacts/HEX/manifest.json    written last: the artifact exists if and only if this does

The store checks digests and sizes. Whether a signature is good is for `steering_service` to say: a
store that is compromised could not be trusted with the answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from store.digest import canonical_json, check_digest, sha256_hex
from store.errors import Conflict, Corrupt, InvalidInput, NotFound
from store.location import Location

if TYPE_CHECKING:
    from typing_extensions import Buffer

READ_BYTES: Final = 8 << 20
"""Of a payload at a time: what lies in memory twice while it is read."""

_MAX_PAGE = 1000
_MANIFEST = re.compile(r"artifacts/([0-9a-f]{64})/manifest\.json")


@dataclass(frozen=True, slots=True)
class Published:
    """All of an artifact but its payload.

    Attributes:
        digest: sha256 of the manifest.
        manifest: Its bytes, verified.
        signature: Its bytes, unverified.
        payload_sha256: From the manifest.
        payload_size: In bytes, from the manifest.
    """

    digest: str
    manifest: bytes
    signature: bytes
    payload_sha256: str
    payload_size: int


class Registry:
    """Publishes and reads artifacts; safe to share between threads and processes.

    Args:
        root: Where `blobs` and `artifacts` lie.
    """

    def __init__(self, root: Location) -> None:
        self.location = root

    def publish(self, manifest: bytes, payload: Buffer, signature: bytes) -> str:
        """Store an artifact; its digest. May be repeated, also after a crash at any moment, and
        while `store.collection` is at work.

        Args:
            manifest: Canonical JSON of an object with at least {"payload": {"sha256": HEX, "size":
                BYTES}}.
            payload: The bytes that the manifest describes.
            signature: Of the manifest, in any format.

        Raises:
            InvalidInput: kind "manifest", it is not canonical or names no payload; kind "payload",
                digest or size differ.
            Conflict: kind "signature_differs", the artifact is published with another signature.
            Corrupt: kind "blob_checksum", the payload was stored before and is damaged now.
        """
        sha256, size = payload_of(manifest, where="manifest")
        if (length := memoryview(payload).nbytes) != size:
            message = (
                f"payload: the manifest says {size} bytes, got {length}; build the manifest again"
            )
            raise InvalidInput(message, kind="payload")
        if (actual := sha256_hex(payload)) != sha256:
            message = (
                f"payload: the manifest says sha256 {sha256}, got {actual}; build the manifest "
                "again"
            )
            raise InvalidInput(message, kind="payload")
        digest = sha256_hex(manifest)
        self._put_blob(sha256, payload, size)
        self._put_signature(digest, signature)
        self._put_manifest(digest, manifest)
        # A collection that had found them too old may have been just about to remove these.
        if not self.location.exists(signature_key(digest)):
            self._put_signature(digest, signature)
        if not self.location.exists(blob_key(sha256)):
            self._put_blob(sha256, payload, size)
        return digest

    def open(self, digest: str) -> Published:
        """Manifest, signature, and what the manifest says about the payload; one read of each.

        Raises:
            NotFound: kind "no_artifact".
            Corrupt: kind "manifest_digest" or "manifest", the manifest is damaged or none; kind
                "artifact_incomplete", the signature is lost.
        """
        manifest = self.manifest(digest)
        sha256, size = self._payload_in(digest, manifest)
        return Published(digest, manifest, self.signature(digest), sha256, size)

    def manifest(self, digest: str) -> bytes:
        """The manifest's bytes.

        Raises:
            NotFound: kind "no_artifact".
            Corrupt: kind "manifest_digest", the bytes do not have this digest.
        """
        key = manifest_key(digest)
        try:
            data = self.location.get(key)
        except NotFound as error:
            message = f"no artifact {digest} in {self.location.url}; publish it, or look at list()"
            raise NotFound(message, kind="no_artifact") from error
        if (actual := sha256_hex(data)) != digest:
            message = (
                f"{self.location.url}/{key} has sha256 {actual}, expected {digest}; restore it"
            )
            raise Corrupt(message, kind="manifest_digest")
        return data

    def signature(self, digest: str) -> bytes:
        """The signature's bytes, unverified.

        Raises:
            NotFound: kind "no_artifact".
            Corrupt: kind "artifact_incomplete", the artifact has lost its signature.
        """
        try:
            return self.location.get(signature_key(digest))
        except NotFound as error:
            self.manifest(digest)  # without an artifact, this says so
            message = (
                f"artifact {digest} in {self.location.url} has lost its signature; publish it again"
            )
            raise Corrupt(message, kind="artifact_incomplete") from error

    def payload_size(self, digest: str) -> int:
        """Bytes of the payload, from the manifest. Errors as for `manifest`."""
        return self._payload(digest)[1]

    def payload(self, digest: str) -> bytes:
        """The whole payload, verified.

        Raises:
            NotFound: kind "no_artifact".
            Corrupt: kind "blob_checksum" or "artifact_incomplete", the payload is damaged or lost.
        """
        sha256, size = self._payload(digest)
        data = self.read_blob(sha256, size, 0, size)
        if (actual := sha256_hex(data)) != sha256:
            raise self._damaged(sha256, f"sha256 {actual}, expected {sha256}")
        return data

    def read_payload(self, digest: str, offset: int, length: int) -> bytes:
        """A part of the payload, unverified: whoever joins the parts checks the sha256. Cut off at
        the end.

        Raises:
            InvalidInput: kind "out_of_range", negative, or the offset lies past the end.
            NotFound: kind "no_artifact".
            Corrupt: the payload is lost, or shorter than the manifest says.
        """
        return self.read_blob(*self._payload(digest), offset, length)

    def read_blob(self, sha256: str, size: int, offset: int, length: int) -> bytes:
        """Like `read_payload`, for whoever knows what the manifest says: reads nothing but the
        range, `READ_BYTES` at a time.

        Args:
            sha256: Of the payload.
            size: Of the payload, in bytes.
            offset: Where to begin.
            length: How many bytes; fewer where the payload ends.

        Raises:
            InvalidInput: kind "out_of_range", negative, or the offset lies past the end; "digest".
            Corrupt: kind "artifact_incomplete" or "blob_checksum", the payload is lost, or shorter
                than `size`.
        """
        if length < 0 or not 0 <= offset <= size:
            message = f"payload {sha256} has {size} bytes; asked for {length} bytes from {offset}"
            raise InvalidInput(message, kind="out_of_range")
        key = blob_key(sha256)
        stop = min(offset + length, size)
        try:
            if stop - offset <= READ_BYTES:
                return self.location.get_range(key, offset, stop - offset)
            data = io.BytesIO()  # grows in place, and getvalue makes no copy
            for start in range(offset, stop, READ_BYTES):
                data.write(self.location.get_range(key, start, min(READ_BYTES, stop - start)))
            return data.getvalue()
        except NotFound as error:
            message = (
                f"{self.location.url} has lost the payload {sha256}; publish the artifact again"
            )
            raise Corrupt(message, kind="artifact_incomplete") from error
        except InvalidInput as error:
            if error.kind != "out_of_range":
                raise
            raise self._damaged(sha256, f"fewer than {size} bytes") from error

    def list(self, *, after: str | None = None, limit: int = 100) -> list[str]:
        """Up to `limit` digests in order, those greater than `after`; page by passing the last one.

        Raises:
            InvalidInput: `after` is no digest, or the limit is not 1 to 1,000.
        """
        if not 1 <= limit <= _MAX_PAGE:
            raise InvalidInput(f"limit must be 1 to {_MAX_PAGE}, got {limit}", kind="out_of_range")
        return list(islice(self.digests(after=after), limit))

    def digests(self, *, after: str | None = None) -> Iterator[str]:
        """All digests in order, those greater than `after`.

        Raises:
            InvalidInput: `after` is no digest.
        """
        for info in self.location.list("artifacts", after=signature_key(after) if after else None):
            if match := _MANIFEST.fullmatch(info.key):  # whatever else lies there does not count
                yield match[1]

    def _payload(self, digest: str) -> tuple[str, int]:
        return self._payload_in(digest, self.manifest(digest))

    def _payload_in(self, digest: str, manifest: bytes) -> tuple[str, int]:
        # Its digest is right, so it is what was published; that it was canonical was checked then,
        # which costs more than reading it.
        try:
            return _payload_named(_parse(manifest, where=digest), where=digest)
        except InvalidInput as error:
            message = f"{self.location.url}/{manifest_key(digest)}: {error}; restore it"
            raise Corrupt(message, kind="manifest") from error

    def _put_blob(self, sha256: str, payload: Buffer, size: int) -> None:
        key = blob_key(sha256)
        try:
            self.location.put_new(key, payload)
        except Conflict as error:
            with contextlib.suppress(NotFound):  # just collected
                if (found := self.location.size(key)) != size:
                    raise self._damaged(sha256, f"{found} bytes, expected {size}") from error
                if (actual := self._blob_sha256(key, size)) != sha256:
                    raise self._damaged(sha256, f"sha256 {actual}") from error
            # Perhaps left by a publisher that was killed, and old: written again, it is young, and
            # so no garbage before the manifest is there to keep it.
            self.location.replace(key, payload)

    def _blob_sha256(self, key: str, size: int) -> str:
        hasher = hashlib.sha256()
        for start in range(0, size, READ_BYTES):
            hasher.update(self.location.get_range(key, start, min(READ_BYTES, size - start)))
        return hasher.hexdigest()

    def _put_manifest(self, digest: str, manifest: bytes) -> None:
        key = manifest_key(digest)
        with contextlib.suppress(NotFound):  # just collected
            if self.location.put_same(key, manifest):
                return
        self.location.replace(key, manifest)  # young again, as in _put_blob

    def _put_signature(self, digest: str, signature: bytes) -> None:
        key = signature_key(digest)
        try:
            if self.location.put_same(key, signature):
                return
        except NotFound:  # just collected
            pass
        except Conflict as error:
            if self.location.exists(manifest_key(digest)):
                message = (
                    f"artifact {digest} is published with another signature, which stays; nothing "
                    "to do"
                )
                raise Conflict(message, kind="signature_differs") from error
        # Left by a publisher that was killed; signing again may give other bytes, and nobody has
        # seen the first. If they are the same ones, they are young again, as in _put_blob.
        self.location.replace(key, signature)

    def _damaged(self, sha256: str, found: str) -> Corrupt:
        message = (
            f"{self.location.url}/{blob_key(sha256)} is damaged: {found}; delete it and publish "
            "again"
        )
        return Corrupt(message, kind="blob_checksum")


def manifest_key(digest: str) -> str:
    """Key of an artifact's manifest.

    Raises:
        InvalidInput: kind "digest".
    """
    return f"artifacts/{check_digest(digest)}/manifest.json"


def signature_key(digest: str) -> str:
    """Key of an artifact's signature.

    Raises:
        InvalidInput: kind "digest".
    """
    return f"artifacts/{check_digest(digest)}/signature.json"


def blob_key(sha256: str) -> str:
    """Key of a payload.

    Raises:
        InvalidInput: kind "digest".
    """
    return f"blobs/sha256/{check_digest(sha256)}"


def payload_of(manifest: bytes, *, where: str) -> tuple[str, int]:
    """sha256 and size of the payload that a canonical manifest names.

    Raises:
        InvalidInput: kind "manifest", it is not canonical JSON, or names no payload; "digest".
    """
    content = _parse(manifest, where=where)
    try:
        canonical = canonical_json(content)
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}", kind="manifest") from error
    if canonical != manifest:
        # One value, one digest: otherwise the same artifact could be published under many names.
        message = (
            f"{where} is not canonical JSON (RFC 8785); write it with store.digest.canonical_json"
        )
        raise InvalidInput(message, kind="manifest")
    return _payload_named(content, where=where)


def _parse(manifest: bytes, *, where: str) -> Any:
    try:
        return json.loads(manifest)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{where} is not JSON: {error}", kind="manifest") from error


def _payload_named(content: Any, *, where: str) -> tuple[str, int]:
    payload = content.get("payload") if isinstance(content, dict) else None
    if not isinstance(payload, dict) or not isinstance(payload.get("sha256"), str):
        message = f'{where}: expected an object with "payload": {{"sha256": ..., "size": ...}}'
        raise InvalidInput(message, kind="manifest")
    size = payload.get("size")
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise InvalidInput(
            f"{where}: payload.size must be a number of bytes, got {size!r}", kind="manifest"
        )
    return check_digest(payload["sha256"]), size
