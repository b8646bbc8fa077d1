"""Artifacts: those of the store, with the ones asked for lately in memory.

Artifacts never change, so what is kept here needs no refreshing, and is served while the store is
away. Whether a caller may see an artifact is not known here: ask before giving it out.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from steering_service.core.artifact import Manifest, Policy, parse_manifest
from steering_service.core.errors import InvalidInput
from steering_service.server import metrics
from steering_service.server.frames import frame_at, payload_frames
from steering_service.server.once import Once
from steering_service.server.store_calls import store_call, store_call_within
from steering_service.v1 import artifact_pb2
from store.digest import check_digest, sha256_hex
from store.errors import Corrupt
from store.registry import Registry

CACHE_BYTES: Final = 256 << 20
# Of that, for manifests and signatures; the rest is for payloads.
_MANIFEST_SHARE: Final = 8
# One payload may take this part of the cache; a larger one is streamed from the store.
_PAYLOAD_SHARE: Final = 2
# Objects around the bytes of an entry, roughly.
_OVERHEAD_BYTES: Final = 2048
# Payloads read whole at the same time.
_LOADS: Final = 4
_LOAD_S: Final = 60.0
# Hits of manifests that go to the metrics at once.
_TOLD_TOGETHER: Final = 32

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What the service needs of a published artifact, without its payload.

    Attributes:
        frame: A serialised GetManifestResponse.
    """

    digest: str
    name: str
    kind: str
    model_name: str
    model_fingerprint: str
    parents: frozenset[str]
    policy: Policy
    payload_sha256: str
    payload_size: int
    frame: bytes = field(repr=False)

    @property
    def num_bytes(self) -> int:
        """About what this takes in memory."""
        return len(self.frame) + len(self.model_name) + 100 * len(self.parents) + _OVERHEAD_BYTES

    def response(self) -> artifact_pb2.GetManifestResponse:
        """Manifest, signature and payload size."""
        return artifact_pb2.GetManifestResponse.FromString(self.frame)


class ByteCache(Generic[T]):
    """The values used last, up to a number of bytes.

    Args:
        budget_bytes: What all values together may take.
    """

    __slots__ = ("_budget_bytes", "_entries", "num_bytes")

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._entries: OrderedDict[str, tuple[T, int]] = OrderedDict()
        self.num_bytes = 0

    def get(self, key: str) -> T | None:
        """The value, which counts as used now."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: str, value: T, num_bytes: int) -> None:
        """Keep a value, unless it alone is beyond the budget; those used longest ago go."""
        if num_bytes > self._budget_bytes:
            return
        _, before = self._entries.pop(key, (None, 0))
        self._entries[key] = value, num_bytes
        self.num_bytes += num_bytes - before
        while self.num_bytes > self._budget_bytes:
            _, (_, freed) = self._entries.popitem(last=False)
            self.num_bytes -= freed


class Artifacts:
    """Reads artifacts through a cache. One event loop owns it.

    Args:
        registry: Where they are kept.
        cache_bytes: Memory for manifests, signatures and payloads.
    """

    def __init__(self, registry: Registry, *, cache_bytes: int = CACHE_BYTES) -> None:
        self.registry = registry
        manifests = cache_bytes // _MANIFEST_SHARE
        self._known: ByteCache[Known] = ByteCache(manifests)
        self._payloads: ByteCache[tuple[bytes, ...]] = ByteCache(cache_bytes - manifests)
        self._largest = (cache_bytes - manifests) // _PAYLOAD_SHARE
        self._opening: Once[Known] = Once()
        self._loading: Once[None] = Once()
        self._loads = asyncio.Semaphore(_LOADS)
        self._untold_hits = 0
        self._hits = {what: metrics.CACHE_HITS.labels(what) for what in ("manifest", "payload")}
        self._misses = {what: metrics.CACHE_MISSES.labels(what) for what in ("manifest", "payload")}

    def cached(self, digest: str) -> Known | None:
        """The artifact if it is in memory."""
        known = self._known.get(digest)
        if known is not None:
            # Counting one by one would be a part of the call's cost that can be seen.
            self._untold_hits += 1
            if self._untold_hits == _TOLD_TOGETHER:
                self._hits["manifest"].inc(_TOLD_TOGETHER)
                self._untold_hits = 0
        return known

    async def known(self, digest: str) -> Known:
        """The artifact, its manifest checked against its digest.

        Raises:
            InvalidInput: Not a digest.
            StoreError: There is none, it is damaged, or the store cannot answer.
        """
        known = self.cached(digest)
        if known is None:
            self._misses["manifest"].inc()
            known = await self._opening(digest, lambda: self.stored(digest))
        return known

    async def stored(self, digest: str) -> Known:
        """As `known`, from the store in any case: garbage collection may have taken what is in
        memory, and nobody should be pointed at that.
        """
        check_digest(digest)
        known = await store_call(self._read, digest)
        self._known.put(digest, known, known.num_bytes)
        return known

    def cached_frame(self, known: Known, offset: int) -> bytes | None:
        """The serialised DownloadResponse at an offset, if the payload is in memory."""
        frames = self._payloads.get(known.payload_sha256)
        return frame_at(frames, offset, known.payload_size) if frames is not None else None

    async def load(self, known: Known) -> None:
        """Get the payload into memory, verified; nothing if it is too large to be kept there.

        Raises:
            StoreError: It is damaged or lost, or the store cannot answer.
        """
        if self._payloads.get(known.payload_sha256) is not None:
            self._hits["payload"].inc()
            return
        self._misses["payload"].inc()
        if known.payload_size <= self._largest:
            await self._loading(known.payload_sha256, lambda: self._load(known))

    async def read(self, known: Known, offset: int, length: int) -> bytes:
        """A part of the payload from the store, unverified.

        Raises:
            StoreError: It is lost or too short, or the store cannot answer.
        """
        return await store_call(
            self.registry.read_blob, known.payload_sha256, known.payload_size, offset, length
        )

    async def _load(self, known: Known) -> None:
        async with self._loads:
            frames = await store_call_within(_LOAD_S, self._read_payload, known)
        self._payloads.put(
            known.payload_sha256, frames, known.payload_size + _OVERHEAD_BYTES * (len(frames) + 1)
        )

    def _read(self, digest: str) -> Known:
        published = self.registry.open(digest)
        try:
            manifest = parse_manifest(published.manifest)
        except InvalidInput as error:
            # Its digest is right, so it was published like this, by something else than this.
            raise Corrupt(
                f"artifact {digest} has a manifest that is none: {error}", kind="manifest_digest"
            ) from error
        return _known(digest, manifest, published.manifest, published.signature)

    def _read_payload(self, known: Known) -> tuple[bytes, ...]:
        data = self.registry.read_blob(
            known.payload_sha256, known.payload_size, 0, known.payload_size
        )
        if (actual := sha256_hex(data)) != known.payload_sha256:
            raise Corrupt(
                f"payload of artifact {known.digest} has sha256 {actual}, expected "
                f"{known.payload_sha256}; `steerage verify` says what else is damaged; delete it "
                "and publish again",
                kind="blob_checksum",
            )
        return payload_frames(data)


def _known(digest: str, manifest: Manifest, manifest_bytes: bytes, signature: bytes) -> Known:
    return Known(
        digest=digest,
        name=manifest.name,
        kind=manifest.kind,
        model_name=manifest.model.name,
        model_fingerprint=manifest.model.fingerprint,
        parents=frozenset(manifest.parents),
        policy=manifest.policy,
        payload_sha256=manifest.payload.sha256,
        payload_size=manifest.payload.size,
        frame=artifact_pb2.GetManifestResponse(
            manifest=manifest_bytes, signature=signature, payload_size=manifest.payload.size
        ).SerializeToString(),
    )
