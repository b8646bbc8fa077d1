"""Operator: publish artifacts and change channels; what the CLI is built on."""

from __future__ import annotations

import queue
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Self

from steering_service.client.channel import Assignment, ChannelEntry
from steering_service.client.connection import Connection
from steering_service.core.artifact import Artifact, Manifest, parse_manifest
from steering_service.core.errors import NotFound
from steering_service.v1 import artifact_pb2, channel_pb2, watch_pb2

DEADLINE_S: Final = 10.0
CHUNK_BYTES: Final = 1 << 20
_MIN_BYTES_PER_S: Final = 256 << 10
_PAGE: Final = 500


@dataclass(frozen=True, slots=True, eq=False)
class PublishedManifest:
    """What the service knows of an artifact without its payload. Not verified: nodes do that.

    Attributes:
        manifest: Parsed.
        manifest_bytes: The canonical JSON that the digest is of.
        signature: DSSE envelope.
        payload_size: Bytes.
    """

    digest: str
    manifest: Manifest
    manifest_bytes: bytes
    signature: bytes
    payload_size: int


class Operator:
    """A client for people and scripts. Every method is one or a few calls, each with a deadline.

    All methods raise SteeringErrors with the service's message and kind: InvalidInput, NotFound,
    Conflict, Refused, Corrupt, or Unavailable when it cannot be reached.

    Args:
        address: Loopback host:port of the service.
        deadline_s: For one call; transfers get more, by their size.

    Raises:
        InvalidInput, Refused: The address is malformed or not loopback.
    """

    def __init__(self, address: str, *, deadline_s: float = DEADLINE_S) -> None:
        self._connection = Connection(address)
        self._deadline_s = deadline_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect; ends iterators of `watch` too."""
        self._connection.close()

    def publish(self, artifact: Artifact, signature: bytes) -> str:
        """Store an artifact, all or nothing. Publishing it again changes nothing.

        Args:
            artifact: From `core.artifact.build` or `parse`.
            signature: From `core.signing.Signer.sign(artifact.manifest_bytes)`.

        Returns:
            Its digest.
        """
        payload = memoryview(artifact.payload_bytes)

        def requests() -> Iterator[artifact_pb2.PublishRequest]:
            yield artifact_pb2.PublishRequest(
                header=artifact_pb2.PublishHeader(
                    manifest=artifact.manifest_bytes, signature=signature
                )
            )
            for start in range(0, len(payload), CHUNK_BYTES):
                yield artifact_pb2.PublishRequest(chunk=bytes(payload[start : start + CHUNK_BYTES]))

        timeout_s = self._deadline_s + len(payload) / _MIN_BYTES_PER_S
        with self._connection.translated():
            return self._connection.artifacts.Publish(requests(), timeout=timeout_s).digest

    def manifest(self, digest: str) -> PublishedManifest:
        """Manifest, signature and payload size of an artifact."""
        with self._connection.translated():
            answer = self._connection.artifacts.GetManifest(
                artifact_pb2.GetManifestRequest(digest=digest), timeout=self._deadline_s
            )
        return PublishedManifest(
            digest=digest,
            manifest=parse_manifest(answer.manifest),
            manifest_bytes=answer.manifest,
            signature=answer.signature,
            payload_size=answer.payload_size,
        )

    def list(self) -> Iterator[str]:
        """Digests of all artifacts, ascending."""
        token = ""
        while True:
            request = artifact_pb2.ListRequest(page_size=_PAGE, page_token=token)
            with self._connection.translated():
                page = self._connection.artifacts.List(request, timeout=self._deadline_s)
            yield from (entry.digest for entry in page.artifacts)
            token = page.next_page_token
            if not token:
                return

    def promote(
        self,
        channel: str,
        *,
        actor: str,
        reason: str,
        artifact: str | None = None,
        strength: float | None = None,
        enabled: bool | None = None,
        share: float | None = None,
        expected_revision: int | None = None,
    ) -> ChannelEntry:
        """Change a channel: one compare-and-set, never retried behind the caller's back.

        Args:
            channel: Made by its first promote.
            actor: Who, for the log.
            reason: Why, for the log.
            artifact: Digest; "" points the channel at nothing. None keeps it, as for the rest.
            strength: Within the artifact's policy; required with a channel's first artifact.
            enabled: False puts every node on the plain model.
            share: Part of the nodes that take part, 0 to 1.
            expected_revision: The revision that the caller looked at; 0: the channel is new. None
                reads it first, so only a change in between these two calls is a Conflict.

        Raises:
            Conflict: The channel was changed meanwhile: look again, then decide.
            Refused: The strength is outside the signed policy.
            NotFound: No such artifact.
        """
        if expected_revision is None:
            try:
                expected_revision = self.channel(channel).revision
            except NotFound:
                expected_revision = 0
        request = channel_pb2.PromoteRequest(
            channel=channel,
            expected_revision=expected_revision,
            artifact=artifact,
            strength=strength,
            enabled=enabled,
            share=share,
            actor=actor,
            reason=reason,
        )
        with self._connection.translated():
            answer = self._connection.channels.Promote(request, timeout=self._deadline_s)
        return ChannelEntry.from_proto(answer.entry)

    def channel(self, name: str) -> ChannelEntry:
        """A channel's present state. Raises NotFound before its first promote."""
        request = channel_pb2.GetChannelRequest(channel=name)
        with self._connection.translated():
            answer = self._connection.channels.GetChannel(request, timeout=self._deadline_s)
        return ChannelEntry.from_proto(answer.entry)

    def history(self, name: str, *, after: int = 0) -> Iterator[ChannelEntry]:
        """A channel's log, oldest first, from the revision behind `after` on.

        Raises:
            NotFound: No such channel.
            Corrupt: An entry was altered or is gone.
        """
        while True:
            request = channel_pb2.HistoryRequest(channel=name, after=after, page_size=_PAGE)
            with self._connection.translated():
                page = self._connection.channels.History(request, timeout=self._deadline_s)
            yield from map(ChannelEntry.from_proto, page.entries)
            if not page.more:
                return
            after = page.entries[-1].revision

    def channels(self) -> Iterator[str]:
        """Names of all channels, ascending."""
        token = ""
        while True:
            request = channel_pb2.ListChannelsRequest(page_size=_PAGE, page_token=token)
            with self._connection.translated():
                page = self._connection.channels.ListChannels(request, timeout=self._deadline_s)
            yield from page.channels
            token = page.next_page_token
            if not token:
                return

    def watch(self, name: str) -> Iterator[Assignment]:
        """A channel's state now and after every change, as nodes are told it; without end.

        Close the iterator, or leave the loop, to stop. A consumer that is slow skips revisions,
        and always gets the last one.

        Raises:
            Unavailable: The stream broke, as it does when the service restarts; call again to go
                on. (A node's `Subscription` does that by itself.)
        """
        outbox: queue.SimpleQueue[watch_pb2.WatchRequest | None] = queue.SimpleQueue()
        outbox.put(
            watch_pb2.WatchRequest(
                subscribe=watch_pb2.Subscribe(
                    node_id=f"operator-{uuid.uuid4().hex}", channel=name, observer=True
                )
            )
        )
        call = self._connection.watches.Watch(iter(outbox.get, None))
        try:
            with self._connection.translated():
                for response in call:
                    if response.WhichOneof("message") != "assignment":
                        continue
                    message = response.assignment
                    yield Assignment.from_proto(message)
                    report = watch_pb2.Report(
                        channel=message.channel,
                        revision=message.revision,
                        nonce=message.nonce,
                        status=watch_pb2.Report.STATUS_ACK,
                        active_revision=message.revision,
                    )
                    outbox.put(watch_pb2.WatchRequest(report=report))
        finally:
            outbox.put(None)
            call.cancel()
