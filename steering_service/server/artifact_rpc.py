"""ArtifactService: publish, read, list, revoke. The registry keeps the bytes; this checks what
comes in, and who may see what goes out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Final

from steering_service.core.errors import InvalidInput
from steering_service.core.revocation import Revocations
from steering_service.core.signing import TrustRoots
from steering_service.server import access, metrics
from steering_service.server.artifacts import Artifacts, Known
from steering_service.server.frames import CHUNK_BYTES, chunk_frame
from steering_service.server.paging import page_size
from steering_service.server.publishing import Publishing
from steering_service.server.revocations import RevocationList
from steering_service.server.slots import Slots
from steering_service.server.status import Context, host_of
from steering_service.server.store_calls import store_call
from steering_service.v1 import artifact_pb2
from steering_service.v1.artifact_pb2_grpc import ArtifactServiceServicer
from store.digest import check_digest
from store.errors import Corrupt, NotFound
from store.uploads import Uploads

log = logging.getLogger(__name__)

# Downloads at the same time, of a chunk or two of memory each as long as they are open; the others
# wait. A call that is not read stays open until its caller or its deadline ends it: cancelled here,
# it would keep its chunk in gRPC, and its caller would not be told. So nobody gets them all.
_DOWNLOADS: Final = 128
_DOWNLOADS_PER_CALLER: Final = 96
_DOWNLOADS_PER_HOST: Final = 32
# How long they wait, longer for more; less than clients allow.
_WAIT_S: Final = 8.0
_WAIT_BYTES_PER_S: Final = 1 << 20
# Of a payload that is not kept in memory: read at once, and as much ahead of the caller.
_READ_BYTES: Final = 4 << 20
# Downloads that read like that at the same time.
_READERS: Final = 32
_READERS_PER_CALLER: Final = 24
_READERS_PER_HOST: Final = 16

# A page is handed out before it is full once it has cost this much.
_LIST_S: Final = 2.0
_LIST_READS: Final = 2000
_LIST_BYTES: Final = 1 << 20
_LIST_LOOKS: Final = 16
_MAX_FILTER_CHARS: Final = 1000
_KINDS: Final = ("", "intervention", "controller")


class ArtifactRpc(ArtifactServiceServicer):
    """The service over one registry; for the calls see artifact.proto.

    Args:
        artifacts: Where artifacts are kept, and those in memory.
        uploads: Where the pieces of a payload wait until all are there.
        revocations: The present list.
        trust_roots: Keys whose signatures are accepted on publish. None accepts any signature;
            nodes still check it against their own trust roots.
        max_payload_bytes: Largest payload accepted.
    """

    def __init__(
        self,
        artifacts: Artifacts,
        uploads: Uploads,
        revocations: RevocationList,
        *,
        trust_roots: TrustRoots | None,
        max_payload_bytes: int,
    ) -> None:
        self._artifacts = artifacts
        self._uploads = uploads
        self._revocations = revocations
        self._publishing = Publishing(
            artifacts.registry,
            uploads,
            revocations,
            trust_roots=trust_roots,
            max_payload_bytes=max_payload_bytes,
        )
        self._downloads = Slots(
            "downloads",
            _DOWNLOADS,
            per_caller=_DOWNLOADS_PER_CALLER,
            per_host=_DOWNLOADS_PER_HOST,
        )
        self._readers = Slots(
            "downloads", _READERS, per_caller=_READERS_PER_CALLER, per_host=_READERS_PER_HOST
        )

    async def Publish(
        self, request_iterator: AsyncIterator[artifact_pb2.PublishRequest], context: Context
    ) -> artifact_pb2.PublishResponse:
        """Receive, check, store."""
        digest = await self._publishing.publish(
            aiter(request_iterator), access.caller(), host_of(context)
        )
        return artifact_pb2.PublishResponse(digest=digest)

    async def GetUpload(
        self, request: artifact_pb2.GetUploadRequest, context: Context
    ) -> artifact_pb2.GetUploadResponse:
        """Bytes kept of an interrupted publish."""
        try:
            await self._artifacts.known(request.digest)
        except NotFound:
            offset = await store_call(self._uploads.received, request.digest)
            return artifact_pb2.GetUploadResponse(offset=offset)
        return artifact_pb2.GetUploadResponse()

    async def GetManifest(  # type: ignore[override]  # answers with what is serialised already
        self, request: artifact_pb2.GetManifestRequest, context: Context
    ) -> bytes:
        """Manifest, signature, payload size."""
        digest = request.digest
        known = self._artifacts.cached(digest) or await self._artifacts.known(digest)
        access.caller().check_model(known.model_name, known.model_fingerprint)
        return known.frame

    async def Download(  # type: ignore[override]  # as GetManifest
        self, request: artifact_pb2.DownloadRequest, context: Context
    ) -> AsyncIterator[bytes]:
        """The payload from an offset on."""
        known = await self._artifacts.known(request.digest)
        who = access.caller()
        who.check_model(known.model_name, known.model_fingerprint)
        offset, size = request.offset, known.payload_size
        if offset > size:
            raise InvalidInput(
                f"offset {offset} is beyond the payload of {size} bytes; start again from 0",
                kind="download_offset",
            )
        if offset == size:
            return
        host = host_of(context)
        wait_s = _WAIT_S + (size - offset) / _WAIT_BYTES_PER_S
        async with self._downloads.taken(who.name, host, wait_s):
            await self._artifacts.load(known)
            # Looked up for each chunk and not held, so that slow downloads keep nothing in memory
            # beyond the cache's budget; what was dropped meanwhile comes from the store.
            while (frame := self._artifacts.cached_frame(known, offset)) is not None:
                yield frame
                following = min((offset // CHUNK_BYTES + 1) * CHUNK_BYTES, size)
                metrics.DOWNLOADED_BYTES.inc(following - offset)
                offset = following
                if offset == size:
                    return
            async with self._readers.taken(who.name, host, wait_s):
                async for chunk in self._read_ahead(known, offset):
                    yield chunk_frame(offset, chunk)
                    offset += len(chunk)
                    metrics.DOWNLOADED_BYTES.inc(len(chunk))

    async def List(
        self, request: artifact_pb2.ListRequest, context: Context
    ) -> artifact_pb2.ListResponse:
        """One page of what matches and the caller may see."""
        who = access.caller()
        limit = page_size(request.page_size)
        _check_filters(request)
        response = artifact_pb2.ListResponse()
        after, num_bytes, num_reads = request.page_token, 0, 0
        stop_at = time.monotonic() + _LIST_S
        while True:
            wanted = min(500, _LIST_READS - num_reads)
            digests = await store_call(
                self._artifacts.registry.list, after=after or None, limit=wanted
            )
            for start in range(0, len(digests), _LIST_LOOKS):
                group = digests[start : start + _LIST_LOOKS]
                for digest, known in zip(
                    group, await asyncio.gather(*map(self._readable, group)), strict=True
                ):
                    after = digest
                    num_reads += 1
                    if known is None or not _matches(known, request):
                        continue
                    if not who.allows_model(known.model_name, known.model_fingerprint):
                        continue
                    entry = _entry(known)
                    response.artifacts.append(entry)
                    num_bytes += entry.ByteSize()
                    if len(response.artifacts) == limit or num_bytes > _LIST_BYTES:
                        break
                else:
                    if time.monotonic() < stop_at:
                        continue
                more = after != digests[-1] or len(digests) == wanted
                response.next_page_token = after if more else ""
                return response
            if len(digests) < wanted:
                return response
            if num_reads >= _LIST_READS:
                response.next_page_token = after
                return response

    async def Revoke(
        self, request: artifact_pb2.RevokeRequest, context: Context
    ) -> artifact_pb2.RevokeResponse:
        """Check and store the next revocation list; all watchers get it."""
        who = access.caller()
        serial = await self._revocations.append(request.envelope, self._check_revoker)
        log.warning("revoked", extra={"serial": serial, "caller": who.name})
        return artifact_pb2.RevokeResponse(serial=serial)

    async def GetRevocations(
        self, request: artifact_pb2.GetRevocationsRequest, context: Context
    ) -> artifact_pb2.GetRevocationsResponse:
        """The newest revocation list, at most one poll old."""
        await self._revocations.ready()
        serial, envelope = self._revocations.newest
        return artifact_pb2.GetRevocationsResponse(serial=serial, envelope=envelope)

    async def _check_revoker(self, wanted: Revocations, present: Revocations | None) -> None:
        """Whether the caller may revoke what is new in a list.

        Raises:
            Denied: It concerns a channel or a model that is not the caller's.
        """
        who = access.caller()
        if "*" in who.channels.globs and "*" in who.models.globs:
            return
        floors = present.floors if present else {}
        for channel, floor in wanted.floors.items():
            if floor > floors.get(channel, 0):
                who.check_channel(channel)
        keys = sorted({*wanted.keys} - {*(present.keys if present else ())})
        if keys:
            raise _needs_everything(f"key {keys[0]!r}", who)
        digests = sorted({*wanted.artifacts} - {*(present.artifacts if present else ())})
        for start in range(0, len(digests), _LIST_LOOKS):
            group = digests[start : start + _LIST_LOOKS]
            for digest, known in zip(
                group, await asyncio.gather(*map(self._readable, group)), strict=True
            ):
                if known is None:
                    raise _needs_everything(f"artifact {digest}, which is not here,", who)
                who.check_model(known.model_name, known.model_fingerprint)

    async def _readable(self, digest: str) -> Known | None:
        """The artifact; None if it is damaged, or gone since it was listed."""
        try:
            return await self._artifacts.known(digest)
        except (Corrupt, NotFound) as error:
            log.warning("artifact not listed", extra={"digest": digest, "kind": error.kind})
            return None

    async def _read_ahead(self, known: Known, offset: int) -> AsyncIterator[memoryview]:
        """Chunks from the store: while one piece is sent, the next one is read."""

        def read(start: int) -> asyncio.Task[bytes]:
            return asyncio.create_task(self._artifacts.read(known, start, _READ_BYTES))

        reading = read(offset)
        try:
            while offset < known.payload_size:
                piece = memoryview(await reading)
                offset += len(piece)
                if offset < known.payload_size:
                    reading = read(offset)
                for start in range(0, len(piece), CHUNK_BYTES):
                    yield piece[start : start + CHUNK_BYTES]
        finally:
            reading.cancel()


def _needs_everything(what: str, who: access.Identity) -> access.Denied:
    return access.Denied(
        f"revoking {what} concerns all channels and models, and {who.name!r} has channels "
        f"{who.channels} and models {who.models}; ask somebody who has all",
        kind="access_revoke",
    )


def _check_filters(request: artifact_pb2.ListRequest) -> None:
    if request.page_token:
        check_digest(request.page_token)
    if request.parent:
        check_digest(request.parent)
    if request.kind not in _KINDS:
        raise InvalidInput(
            f"kind {request.kind[:100]!r}: expected intervention or controller, or nothing",
            kind="list_kind",
        )
    for name in ("name_prefix", "model"):
        if (length := len(getattr(request, name))) > _MAX_FILTER_CHARS:
            raise InvalidInput(
                f"{name} of {length} characters; at most {_MAX_FILTER_CHARS}", kind="list_filter"
            )


def _matches(known: Known, request: artifact_pb2.ListRequest) -> bool:
    return (
        known.name.startswith(request.name_prefix)
        and request.kind in ("", known.kind)
        and request.model in ("", known.model_name, known.model_fingerprint)
        and (not request.parent or request.parent in known.parents)
    )


def _entry(known: Known) -> artifact_pb2.ArtifactEntry:
    return artifact_pb2.ArtifactEntry(
        digest=known.digest,
        name=known.name,
        kind=known.kind,
        # The manifest has all of it; a page must stay small, whatever was published.
        model_name=known.model_name[:_MAX_FILTER_CHARS],
        model_fingerprint=known.model_fingerprint,
        payload_size=known.payload_size,
    )
