"""Artifacts, immutable and named by the sha256 of their manifest.

    blobs/sha256/HEX               payloads, named by their own sha256
    artifacts/HEX/signature.json   written before the manifest
    artifacts/HEX/manifest.json    written last: the artifact exists if and only if this does

The store checks digests and sizes. Whether a signature is good is for `steering_service` to say: a
store that is compromised could not be trusted with the answer.
"""

from __future__ import annotations

import json
import re
from typing import Any

from store.digest import canonical_json, check_digest, sha256_hex
from store.errors import Conflict, Corrupt, InvalidInput, NotFound
from store.location import Location

_MAX_PAGE = 1000
_MANIFEST = re.compile(r"artifacts/([0-9a-f]{64})/manifest\.json")


class Registry:
    """Publishes and reads artifacts; safe to share between threads and processes.

    Args:
        root: Where `blobs` and `artifacts` lie.
    """

    def __init__(self, root: Location) -> None:
        self.location = root

    def publish(self, manifest: bytes, payload: bytes, signature: bytes) -> str:
        """Store an artifact; its digest. May be repeated, also after a crash at any moment.

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
        sha256, size = _payload_of(manifest, where="manifest")
        if len(payload) != size:
            message = (
                f"payload: the manifest says {size} bytes, got {len(payload)}; build the manifest "
                "again"
            )
            raise InvalidInput(message, kind="payload")
        if (actual := sha256_hex(payload)) != sha256:
            message = (
                f"payload: the manifest says sha256 {sha256}, got {actual}; build the manifest "
                "again"
            )
            raise InvalidInput(message, kind="payload")
        digest = sha256_hex(manifest)
        self._put_blob(sha256, payload)
        self._put_signature(digest, signature)
        self.location.put_same(_manifest_key(digest), manifest)
        return digest

    def manifest(self, digest: str) -> bytes:
        """The manifest's bytes.

        Raises:
            NotFound: kind "no_artifact".
            Corrupt: kind "manifest_digest", the bytes do not have this digest.
        """
        key = _manifest_key(digest)
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
            return self.location.get(_signature_key(digest))
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
        sha256, _ = self._payload(digest)
        try:
            data = self.location.get(_blob_key(sha256))
        except NotFound as error:
            raise self._lost(digest, sha256) from error
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
        sha256, size = self._payload(digest)
        if length < 0 or not 0 <= offset <= size:
            message = (
                f"payload of {digest} has {size} bytes; asked for {length} bytes from {offset}"
            )
            raise InvalidInput(message, kind="out_of_range")
        try:
            return self.location.get_range(_blob_key(sha256), offset, min(length, size - offset))
        except NotFound as error:
            raise self._lost(digest, sha256) from error
        except InvalidInput as error:
            raise self._damaged(sha256, f"fewer than {size} bytes") from error

    def list(self, *, after: str | None = None, limit: int = 100) -> list[str]:
        """Up to `limit` digests in order, those greater than `after`; page by passing the last one.

        Raises:
            InvalidInput: `after` is no digest, or the limit is not 1 to 1,000.
        """
        if not 1 <= limit <= _MAX_PAGE:
            raise InvalidInput(f"limit must be 1 to {_MAX_PAGE}, got {limit}", kind="out_of_range")
        digests: list[str] = []
        for info in self.location.list("artifacts", after=_signature_key(after) if after else None):
            if match := _MANIFEST.fullmatch(info.key):  # whatever else lies there does not count
                digests.append(match[1])
                if len(digests) == limit:
                    break
        return digests

    def _payload(self, digest: str) -> tuple[str, int]:
        return _payload_of(self.manifest(digest), where=f"manifest of {digest}")

    def _put_blob(self, sha256: str, payload: bytes) -> None:
        try:
            self.location.put_same(_blob_key(sha256), payload)
        except Conflict as error:
            raise self._damaged(sha256, "other bytes than that name promises") from error

    def _put_signature(self, digest: str, signature: bytes) -> None:
        try:
            self.location.put_same(_signature_key(digest), signature)
        except Conflict as error:
            if self.location.exists(_manifest_key(digest)):
                message = (
                    f"artifact {digest} is published with another signature, which stays; nothing "
                    "to do"
                )
                raise Conflict(message, kind="signature_differs") from error
            # Left by a publisher that was killed; signing again may give other bytes, and nobody
            # has seen the first.
            self.location.replace(_signature_key(digest), signature)

    def _lost(self, digest: str, sha256: str) -> Corrupt:
        message = (
            f"artifact {digest} in {self.location.url} has lost its payload {sha256}; publish it "
            "again"
        )
        return Corrupt(message, kind="artifact_incomplete")

    def _damaged(self, sha256: str, found: str) -> Corrupt:
        message = (
            f"{self.location.url}/{_blob_key(sha256)} is damaged: {found}; delete it and publish "
            "again"
        )
        return Corrupt(message, kind="blob_checksum")


def _manifest_key(digest: str) -> str:
    return f"artifacts/{check_digest(digest)}/manifest.json"


def _signature_key(digest: str) -> str:
    return f"artifacts/{check_digest(digest)}/signature.json"


def _blob_key(sha256: str) -> str:
    return f"blobs/sha256/{sha256}"


def _payload_of(manifest: bytes, *, where: str) -> tuple[str, int]:
    """sha256 and size of the payload that a canonical manifest names."""
    try:
        content: Any = json.loads(manifest)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{where} is not JSON: {error}", kind="manifest") from error
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
