"""Operator: publish artifacts and change channels; what the CLI is built on."""

from __future__ import annotations

import builtins
import queue
import uuid
from collections.abc import Callable, Iterator
from typing import Final, Self

from steering_service.client.catalog import ArtifactEntry, PublishedManifest
from steering_service.client.channel import (
    Assignment,
    ChannelEntry,
    Proposal,
    change_from_proto,
)
from steering_service.client.connection import Connection
from steering_service.client.credentials import Credentials
from steering_service.client.nodes import Convergence, NodeStatus
from steering_service.client.publishing import publish
from steering_service.core.artifact import Artifact, parse_manifest
from steering_service.core.errors import NotFound
from steering_service.v1 import artifact_pb2, channel_pb2, node_pb2, watch_pb2

DEADLINE_S: Final = 10.0
_PAGE: Final = 500


class Operator:
    """A client for people and scripts. Every method is one or a few calls, each with a deadline.

    All methods raise SteeringErrors with the service's message and kind: InvalidInput, NotFound,
    Conflict, Refused, Corrupt, or Unavailable when it cannot be reached.

    Args:
        address: host:port of the service; without TLS on loopback.
        credentials: See `Connection`.
        deadline_s: For one call; transfers get more, by their size.

    Raises:
        InvalidInput, Refused, NotFound: See `Connection`.
    """

    def __init__(
        self,
        address: str,
        *,
        credentials: Credentials | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._connection = Connection(address, credentials)
        self._deadline_s = deadline_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect; ends iterators of `watch` too."""
        self._connection.close()

    def publish(
        self,
        artifact: Artifact,
        signature: bytes,
        *,
        on_sent: Callable[[int], None] = lambda sent: None,
    ) -> str:
        """Store an artifact, all or nothing. Publishing it again changes nothing.

        What an interrupted publish has left at the service is not sent again. When the connection
        breaks, this goes on by itself, until three attempts in a row get no further.

        Args:
            artifact: From `core.artifact.build` or `parse`.
            signature: From `core.signing.Signer.sign(artifact.manifest_bytes)`.
            on_sent: Called with the bytes of the payload that are handed over so far. In another
                thread.

        Returns:
            Its digest.

        Raises:
            Conflict: It is published with another signature.
        """
        return publish(self._connection, artifact, signature, on_sent, self._deadline_s)

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

    def list(
        self,
        *,
        name_prefix: str = "",
        kind: str = "",
        model: str = "",
        parent: str = "",
    ) -> Iterator[ArtifactEntry]:
        """Artifacts in ascending order of their digests; those that match all that is given.

        Args:
            name_prefix: The name begins with this.
            kind: ``intervention`` or ``controller``.
            model: Fingerprint or name of the model.
            parent: Digest of a parent.
        """
        token = ""
        while True:
            request = artifact_pb2.ListRequest(
                page_size=_PAGE,
                page_token=token,
                name_prefix=name_prefix,
                kind=kind,
                model=model,
                parent=parent,
            )
            with self._connection.translated():
                page = self._connection.artifacts.List(request, timeout=self._deadline_s)
            yield from map(ArtifactEntry.from_proto, page.artifacts)
            token = page.next_page_token
            if not token:
                return

    def revoke(self, envelope: bytes) -> int:
        """Store a revocation list, which every node that watches gets at once.

        Args:
            envelope: From `core.signing.Signer.sign_revocations`.

        Returns:
            Its serial.

        Raises:
            Conflict: Its serial is not one above that of the present list.
            Refused: No trust root of the service signed it, or it allows what is revoked.
        """
        request = artifact_pb2.RevokeRequest(envelope=envelope)
        with self._connection.translated():
            return self._connection.artifacts.Revoke(request, timeout=self._deadline_s).serial

    def revocations(self) -> tuple[int, bytes]:
        """Serial and envelope of the present revocation list, not verified; (0, b""): none yet."""
        request = artifact_pb2.GetRevocationsRequest()
        with self._connection.translated():
            answer = self._connection.artifacts.GetRevocations(request, timeout=self._deadline_s)
        return answer.serial, answer.envelope

    def promote(
        self,
        channel: str,
        *,
        reason: str,
        actor: str | None = None,
        artifact: str | None = None,
        strength: float | None = None,
        enabled: bool | None = None,
        share: float | None = None,
        expected_revision: int | None = None,
    ) -> ChannelEntry | Proposal:
        """Change a channel: one compare-and-set, never retried behind the caller's back.

        Args:
            channel: Made by its first promote.
            reason: Why, for the log.
            actor: Who, for the log; None where the service knows its callers.
            artifact: Digest; "" points the channel at nothing. None keeps it, as for the rest.
            strength: Within the artifact's policy; required with a channel's first artifact.
            enabled: False puts every node on the plain model.
            share: Part of the nodes that take part, 0 to 1.
            expected_revision: The revision that the caller looked at; 0: the channel is new. None
                reads it first, so only a change in between these two calls is a Conflict.

        Returns:
            The entry that was appended; or a Proposal, where the channel asks for two people:
            somebody else has to `approve` it.

        Raises:
            Conflict: The channel was changed meanwhile: look again, then decide.
            Refused: The strength is outside the signed policy, or the caller may not.
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
            actor=actor or "",
            reason=reason,
        )
        with self._connection.translated():
            answer = self._connection.channels.Promote(request, timeout=self._deadline_s)
        return change_from_proto(answer)

    def rollback(
        self,
        channel: str,
        *,
        reason: str,
        actor: str | None = None,
        to_revision: int | None = None,
        expected_revision: int | None = None,
    ) -> ChannelEntry | Proposal:
        """Append an entry with the state of an earlier revision.

        Args:
            channel: It must exist.
            reason: See `promote`, as for `actor` and `expected_revision`.
            actor: See `promote`.
            to_revision: None: the revision before the present one; after a rollback, the one
                before what that restored. So one rollback after the other walks back.
            expected_revision: See `promote`.

        Returns:
            See `promote`.

        Raises:
            Conflict, Refused, NotFound: See `promote`.
        """
        if expected_revision is None:
            expected_revision = self.channel(channel).revision
        request = channel_pb2.RollbackRequest(
            channel=channel,
            expected_revision=expected_revision,
            to_revision=to_revision or 0,
            actor=actor or "",
            reason=reason,
        )
        with self._connection.translated():
            answer = self._connection.channels.Rollback(request, timeout=self._deadline_s)
        return change_from_proto(answer)

    def approve(
        self, channel: str, proposal_id: str, *, actor: str | None = None
    ) -> ChannelEntry | Proposal:
        """Append what somebody else proposed, if the channel still is where it was then.

        Args:
            channel: The proposal's.
            proposal_id: `Proposal.id`.
            actor: See `promote`.

        Raises:
            Conflict: The channel was changed since; propose again.
            Refused: The caller proposed it, or may not approve.
            NotFound: No such proposal.
        """
        request = channel_pb2.ApproveRequest(
            channel=channel, proposal_id=proposal_id, actor=actor or ""
        )
        with self._connection.translated():
            answer = self._connection.channels.Approve(request, timeout=self._deadline_s)
        return change_from_proto(answer)

    def proposals(self, channel: str) -> builtins.list[Proposal]:
        """Those that can still be approved, oldest first."""
        request = channel_pb2.ListProposalsRequest(channel=channel)
        with self._connection.translated():
            answer = self._connection.channels.ListProposals(request, timeout=self._deadline_s)
        return [Proposal.from_proto(item) for item in answer.proposals]

    def nodes(self, channel: str) -> tuple[builtins.list[NodeStatus], Convergence]:
        """Nodes of a channel in ascending order of their ids, and how far its head has come."""
        found: builtins.list[NodeStatus] = []
        token = ""
        while True:
            request = node_pb2.ListNodesRequest(channel=channel, page_size=_PAGE, page_token=token)
            with self._connection.translated():
                page = self._connection.nodes.ListNodes(request, timeout=self._deadline_s)
            found += map(NodeStatus.from_proto, page.nodes)
            token = page.next_page_token
            if not token:
                return found, Convergence.from_proto(page.convergence)

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
