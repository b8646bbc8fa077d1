"""ArtifactService: publish, read, list. The registry keeps the bytes, this checks what comes in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Final

from steering_service.core.artifact import parse, parse_manifest
from steering_service.core.errors import InvalidInput
from steering_service.core.signing import MAX_ENVELOPE_BYTES, TrustRoots
from steering_service.server.status import Context
from steering_service.v1 import artifact_pb2, artifact_pb2_grpc
from store.registry import Registry

log = logging.getLogger(__name__)

CHUNK_BYTES: Final = 1 << 20
# The registry lists at most 1000, and one more than a page tells whether there is a next one.
MAX_PAGE: Final = 500
DEFAULT_PAGE: Final = 100


class ArtifactRpc(artifact_pb2_grpc.ArtifactServiceServicer):
    """The service over one registry; for the calls see artifact.proto.

    Args:
        registry: Where artifacts are kept.
        trust_roots: Keys whose signatures are accepted on publish. None accepts any signature;
            nodes still check it against their own trust roots.
        max_payload_bytes: Largest payload accepted; a publish is held in memory until stored.
    """

    def __init__(
        self, registry: Registry, *, trust_roots: TrustRoots | None, max_payload_bytes: int
    ) -> None:
        self._registry = registry
        self._trust_roots = trust_roots
        self._max_payload_bytes = max_payload_bytes

    async def Publish(
        self, request_iterator: AsyncIterator[artifact_pb2.PublishRequest], context: Context
    ) -> artifact_pb2.PublishResponse:
        """Receive, check, store."""
        requests = aiter(request_iterator)
        first = await anext(requests, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidInput(
                "a publish must start with the header; send manifest and signature first",
                kind="publish_header",
            )
        manifest, signature = first.header.manifest, first.header.signature
        expected = await asyncio.to_thread(self._check_header, manifest, signature)
        payload = bytearray()
        async for request in requests:
            if request.WhichOneof("part") != "chunk":
                raise InvalidInput(
                    "a publish has one header, then chunks only", kind="publish_order"
                )
            payload += request.chunk
            if len(payload) > expected:
                raise InvalidInput(
                    f"payload is larger than the {expected} bytes that the manifest names",
                    kind="publish_size",
                )
        digest = await asyncio.to_thread(self._store, manifest, bytes(payload), signature)
        log.info("artifact published", extra={"digest": digest, "payload_bytes": len(payload)})
        return artifact_pb2.PublishResponse(digest=digest)

    async def GetManifest(
        self, request: artifact_pb2.GetManifestRequest, context: Context
    ) -> artifact_pb2.GetManifestResponse:
        """Manifest, signature, payload size."""
        return await asyncio.to_thread(self._manifest, request.digest)

    async def Download(
        self, request: artifact_pb2.DownloadRequest, context: Context
    ) -> AsyncIterator[artifact_pb2.DownloadResponse]:
        """The payload from an offset on."""
        size = await asyncio.to_thread(self._registry.payload_size, request.digest)
        offset = request.offset
        if offset > size:
            raise InvalidInput(
                f"offset {offset} is beyond the payload of {size} bytes; start again from 0",
                kind="download_offset",
            )
        while offset < size:
            chunk = await asyncio.to_thread(
                self._registry.read_payload,
                request.digest,
                offset,
                min(CHUNK_BYTES, size - offset),
            )
            yield artifact_pb2.DownloadResponse(offset=offset, chunk=chunk)
            offset += len(chunk)

    async def List(
        self, request: artifact_pb2.ListRequest, context: Context
    ) -> artifact_pb2.ListResponse:
        """One page of digests."""
        limit = page_size(request.page_size)
        digests = await asyncio.to_thread(
            self._registry.list, after=request.page_token or None, limit=limit + 1
        )
        page = digests[:limit]
        return artifact_pb2.ListResponse(
            artifacts=[artifact_pb2.ArtifactEntry(digest=digest) for digest in page],
            next_page_token=page[-1] if len(digests) > limit else "",
        )

    def _check_header(self, manifest: bytes, signature: bytes) -> int:
        # Before the payload is received, so that a refused publish costs its sender little.
        size = parse_manifest(manifest).payload.size
        if size > self._max_payload_bytes:
            raise InvalidInput(
                f"payload of {size} bytes; this service accepts at most {self._max_payload_bytes}",
                kind="publish_size",
            )
        if len(signature) > MAX_ENVELOPE_BYTES:
            raise InvalidInput(
                f"signature of {len(signature)} bytes; at most {MAX_ENVELOPE_BYTES} are accepted",
                kind="signature_size",
            )
        if self._trust_roots is not None:
            self._trust_roots.verify(signature, manifest)
        return size

    def _store(self, manifest: bytes, payload: bytes, signature: bytes) -> str:
        parse(manifest, payload)
        return self._registry.publish(manifest, payload, signature)

    def _manifest(self, digest: str) -> artifact_pb2.GetManifestResponse:
        return artifact_pb2.GetManifestResponse(
            manifest=self._registry.manifest(digest),
            signature=self._registry.signature(digest),
            payload_size=self._registry.payload_size(digest),
        )


def page_size(asked: int) -> int:
    """Entries on a page: the default for 0.

    Raises:
        InvalidInput: Above the maximum.
    """
    if asked > MAX_PAGE:
        raise InvalidInput(f"page_size {asked}; at most {MAX_PAGE}", kind="page_size")
    return asked or DEFAULT_PAGE
