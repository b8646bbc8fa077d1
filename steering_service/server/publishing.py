"""Publishing: one artifact from a stream of messages, all or nothing, with little in memory.

A payload of more than one piece is staged in the store as it comes, so that a stream that breaks
can be resumed on any replica, and however many publishers are slow, each costs one piece. Only the
last step has the whole payload, and few of these run at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Final

from steering_service.core.artifact import Manifest, parse, parse_manifest
from steering_service.core.errors import Conflict, Corrupt, InvalidInput, Unavailable
from steering_service.core.signing import MAX_ENVELOPE_BYTES, TrustRoots
from steering_service.server import access, metrics
from steering_service.server.revocations import RevocationList
from steering_service.server.slots import Slots
from steering_service.server.store_calls import STORE_S, store_call, store_call_within
from steering_service.v1 import artifact_pb2
from store.errors import Conflict as StoredConflict
from store.errors import StoreError
from store.registry import Registry
from store.uploads import PIECE_BYTES, Uploads

log = logging.getLogger(__name__)

# Publishers that send at the same time: one piece and one message of memory each. Of one caller
# half as many, so that whoever is slow on purpose keeps nobody else from publishing.
_RECEIVING: Final = 16
_RECEIVING_OF_ONE: Final = 8
# How long another waits for its turn.
_WAIT_S: Final = 30.0
# Whoever is slower than this, after a while, makes room for another.
_MIN_BYTES_PER_S: Final = 16 << 10
_GRACE_S: Final = 60.0
# Payloads that are checked and stored at the same time: a few times their size each.
_STORING: Final = 2
# Storing a payload takes several passes over it; a piece, or a small payload, one. What is tiny
# fails as soon as any call does: its publisher waits no longer.
_STORE_S: Final = 120.0
_PIECE_S: Final = 30.0
_SLOWEST_STORE_BYTES_PER_S: Final = 1 << 19


class Publishing:
    """Receives, checks and stores artifacts.

    Args:
        registry: Where they go.
        uploads: Where pieces wait until all are there.
        revocations: What is revoked is not published.
        trust_roots: Keys whose signatures are accepted; None accepts any.
        max_payload_bytes: Largest payload accepted.
    """

    def __init__(
        self,
        registry: Registry,
        uploads: Uploads,
        revocations: RevocationList,
        *,
        trust_roots: TrustRoots | None,
        max_payload_bytes: int,
    ) -> None:
        self._registry = registry
        self._uploads = uploads
        self._revocations = revocations
        self._trust_roots = trust_roots
        self._max_payload_bytes = max_payload_bytes
        self._receiving = Slots(
            "publishes", _RECEIVING, per_caller=_RECEIVING_OF_ONE, per_host=_RECEIVING_OF_ONE
        )
        self._storing = asyncio.Semaphore(_STORING)

    async def publish(
        self,
        requests: AsyncIterator[artifact_pb2.PublishRequest],
        who: access.Identity,
        host: str,
    ) -> str:
        """One artifact; its digest.

        Raises:
            InvalidInput, Refused, Corrupt, Conflict, Unavailable, StoreError: It is not published.
        """
        async with self._receiving.taken(who.name, host, _WAIT_S):
            first = await anext(requests, None)
            if first is None or first.WhichOneof("part") != "header":
                raise InvalidInput(
                    "a publish must start with the header; send manifest and signature first",
                    kind="publish_header",
                )
            header = first.header
            await self._revocations.ready()
            manifest, digest = await asyncio.to_thread(self._check_header, header)
            who.check_model(manifest.model.name, manifest.model.fingerprint)
            if manifest.payload.size <= PIECE_BYTES and not header.offset:
                payload = await self._receive(requests, manifest)
            else:
                await self._stage(requests, manifest, digest, header.offset)
                payload = None
        if payload is not None:
            limit_s = min(_PIECE_S, STORE_S + len(payload) / _SLOWEST_STORE_BYTES_PER_S)
            await store_call_within(limit_s, self._store, header, payload)
        else:
            async with self._storing:
                await store_call_within(_STORE_S, self._join, header, manifest, digest)
        metrics.PUBLISHES.inc()
        log.info(
            "artifact published",
            extra={"digest": digest, "payload_bytes": manifest.payload.size, "caller": who.name},
        )
        return digest

    def _check_header(self, header: artifact_pb2.PublishHeader) -> tuple[Manifest, str]:
        """The manifest of what may be published, and its digest."""
        # Before the payload is received, so that a refused publish costs its sender little.
        manifest = parse_manifest(header.manifest)
        size = manifest.payload.size
        if size > self._max_payload_bytes:
            raise InvalidInput(
                f"payload of {size} bytes; this service accepts at most {self._max_payload_bytes}",
                kind="publish_size",
            )
        if len(header.signature) > MAX_ENVELOPE_BYTES:
            raise InvalidInput(
                f"signature of {len(header.signature)} bytes; at most {MAX_ENVELOPE_BYTES} are "
                "accepted",
                kind="signature_size",
            )
        if header.offset > size:
            raise InvalidInput(
                f"offset {header.offset} is beyond the payload of {size} bytes; ask GetUpload",
                kind="publish_offset",
            )
        if self._trust_roots is not None:
            self._trust_roots.verify(header.signature, header.manifest)
        digest = hashlib.sha256(header.manifest).hexdigest()
        self._revocations.check(digest, header.manifest, header.signature)
        return manifest, digest

    async def _receive(
        self, requests: AsyncIterator[artifact_pb2.PublishRequest], manifest: Manifest
    ) -> bytes:
        """A small payload, kept in memory."""
        payload = bytearray()
        async for chunk in _chunks(requests, manifest.payload.size):
            payload += chunk
        return bytes(payload)

    async def _stage(
        self,
        requests: AsyncIterator[artifact_pb2.PublishRequest],
        manifest: Manifest,
        digest: str,
        offset: int,
    ) -> None:
        """Lay down the rest of a payload in pieces."""
        if offset:
            received = await store_call(self._uploads.received, digest)
            if offset > received:
                raise Conflict(
                    f"upload of {digest}: {received} bytes are kept, the publish goes on at "
                    f"{offset}; ask GetUpload, and send what follows",
                    kind="upload_incomplete",
                )
        piece = bytearray()
        async for chunk in _chunks(requests, manifest.payload.size - offset):
            rest = memoryview(chunk)
            while rest:
                room = PIECE_BYTES - len(piece)
                piece += rest[:room]
                rest = rest[room:]
                if len(piece) == PIECE_BYTES:
                    await self._add(digest, offset, piece)
                    offset += PIECE_BYTES
                    piece = bytearray()  # while that one is still being written, nobody changes it
        if piece:
            await self._add(digest, offset, piece)

    async def _add(self, digest: str, offset: int, piece: bytearray) -> None:
        await store_call_within(_PIECE_S, self._uploads.add, digest, offset, piece)

    def _join(self, header: artifact_pb2.PublishHeader, manifest: Manifest, digest: str) -> None:
        wanted = manifest.payload
        try:
            payload = self._uploads.read(digest, sha256=wanted.sha256, size=wanted.size)
        except StoredConflict as error:
            # Too few bytes were sent, or other ones than the manifest names.
            raise Corrupt(str(error), kind="payload_digest") from error
        try:
            self._store(header, payload)
        except (InvalidInput, Corrupt):
            self._uploads.remove(digest)  # no later attempt can make it right
            raise
        try:
            self._uploads.remove(digest)
        except StoreError as error:
            # The artifact is published; what is left is garbage, which `steerage gc` finds.
            log.warning("upload not removed", extra={"digest": digest, "kind": error.kind})

    def _store(self, header: artifact_pb2.PublishHeader, payload: bytes) -> None:
        parse(header.manifest, payload)
        self._registry.publish(header.manifest, payload, header.signature)


async def _chunks(
    requests: AsyncIterator[artifact_pb2.PublishRequest], expected: int
) -> AsyncIterator[bytes]:
    """The payload's chunks, of which no more than expected may come, and not too slowly."""
    received = 0
    slow_at = time.monotonic() + _GRACE_S
    async for request in requests:
        if request.WhichOneof("part") != "chunk" or not request.chunk:
            raise InvalidInput(
                "a publish has one header, then chunks that are not empty only",
                kind="publish_order",
            )
        received += len(request.chunk)
        if received > expected:
            raise InvalidInput(
                f"payload is larger than the {expected} bytes that are missing of what the "
                "manifest names",
                kind="publish_size",
            )
        metrics.PUBLISHED_BYTES.inc(len(request.chunk))
        yield request.chunk
        if time.monotonic() - slow_at > received / _MIN_BYTES_PER_S:
            raise Unavailable(
                f"{received} bytes in {time.monotonic() - slow_at + _GRACE_S:.0f} s are too few to "
                "keep others waiting for; ask GetUpload, and go on there",
                kind="publish_slow",
            )
