"""Publish: one artifact into the registry, over connections that break."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Final

from steering_service.client.connection import Connection
from steering_service.core.artifact import Artifact
from steering_service.core.errors import NotFound, Unavailable
from steering_service.v1 import artifact_pb2

CHUNK_BYTES: Final = 1 << 20
# The service keeps an interrupted payload in pieces of this size, and smaller ones not at all.
_RESUMABLE_BYTES: Final = 8 << 20
_MIN_BYTES_PER_S: Final = 256 << 10
_STUCK_ATTEMPTS: Final = 3


def publish(
    connection: Connection,
    artifact: Artifact,
    signature: bytes,
    on_sent: Callable[[int], None],
    deadline_s: float,
) -> str:
    """See `Operator.publish`."""
    size, digest = len(artifact.payload_bytes), artifact.digest
    resumable = size > _RESUMABLE_BYTES
    offset = _received(connection, digest, deadline_s) if resumable else 0
    stuck = 0
    while True:
        timeout_s = deadline_s + (size - offset) / _MIN_BYTES_PER_S
        requests = _requests(artifact, signature, offset, on_sent)
        try:
            with connection.translated():
                return connection.artifacts.Publish(requests, timeout=timeout_s).digest
        except Unavailable:
            stuck += 1
            # Small ones are sent again as a whole, by whoever wants that.
            if not resumable or stuck == _STUCK_ATTEMPTS:
                raise
        # The service may still be storing what it has received.
        time.sleep(random.uniform(0.1, 0.4) * 2**stuck)
        if _is_published(connection, digest, signature, deadline_s):
            return digest  # only the answer was lost
        kept = _received(connection, digest, deadline_s)
        stuck = 0 if kept > offset else stuck
        offset = kept


def _is_published(connection: Connection, digest: str, signature: bytes, deadline_s: float) -> bool:
    request = artifact_pb2.GetManifestRequest(digest=digest)
    try:
        with connection.translated():
            answer = connection.artifacts.GetManifest(request, timeout=deadline_s)
    except NotFound:
        return False
    return answer.signature == signature


def _received(connection: Connection, digest: str, deadline_s: float) -> int:
    """Bytes of the payload that the service has from before."""
    request = artifact_pb2.GetUploadRequest(digest=digest)
    with connection.translated():
        return connection.artifacts.GetUpload(request, timeout=deadline_s).offset


def _requests(
    artifact: Artifact, signature: bytes, offset: int, on_sent: Callable[[int], None]
) -> Iterator[artifact_pb2.PublishRequest]:
    """The messages of one Publish call that leaves out the first `offset` bytes of the payload."""
    header = artifact_pb2.PublishHeader(
        manifest=artifact.manifest_bytes, signature=signature, offset=offset
    )
    yield artifact_pb2.PublishRequest(header=header)
    payload = memoryview(artifact.payload_bytes)
    for start in range(offset, len(payload), CHUNK_BYTES):
        # gRPC asks for the next part when it has taken the one before.
        on_sent(start)
        yield artifact_pb2.PublishRequest(chunk=bytes(payload[start : start + CHUNK_BYTES]))
    on_sent(len(payload))
