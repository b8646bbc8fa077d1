"""ChannelService: compare-and-set on channels, and their history."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from steering_service.core.artifact import parse_manifest
from steering_service.core.errors import Conflict, InvalidInput
from steering_service.server.artifact_rpc import page_size
from steering_service.server.hub import Hub
from steering_service.server.status import Context
from steering_service.v1 import channel_pb2, channel_pb2_grpc
from store.channels import ChannelEntry, ChannelLog
from store.errors import NotFound
from store.registry import Registry

log = logging.getLogger(__name__)

MAX_ACTOR_CHARS: Final = 200
MAX_REASON_CHARS: Final = 2000


class ChannelRpc(channel_pb2_grpc.ChannelServiceServicer):
    """The service over one channel log; for the calls see channel.proto.

    Args:
        channels: The log.
        registry: Where the artifacts that channels point at must be.
        hub: Told of every change, so that watchers need not wait for its poll.
    """

    def __init__(self, channels: ChannelLog, registry: Registry, hub: Hub) -> None:
        self._channels = channels
        self._registry = registry
        self._hub = hub

    async def Promote(
        self, request: channel_pb2.PromoteRequest, context: Context
    ) -> channel_pb2.PromoteResponse:
        """Check and append one entry."""
        entry = await asyncio.to_thread(self._promote, request)
        self._hub.offer(entry)
        log.info(
            "channel promoted",
            extra={
                "channel": entry.channel,
                "revision": entry.revision,
                "artifact": entry.artifact,
                "strength": entry.strength,
                "enabled": entry.enabled,
                "share": entry.share,
                "actor": entry.actor,
            },
        )
        return channel_pb2.PromoteResponse(entry=_to_proto(entry))

    async def GetChannel(
        self, request: channel_pb2.GetChannelRequest, context: Context
    ) -> channel_pb2.GetChannelResponse:
        """The entry of the highest revision."""
        entry = await asyncio.to_thread(self._head, request.channel)
        if entry is None:
            raise _no_channel(request.channel)
        return channel_pb2.GetChannelResponse(entry=_to_proto(entry))

    async def History(
        self, request: channel_pb2.HistoryRequest, context: Context
    ) -> channel_pb2.HistoryResponse:
        """One page of the log."""
        limit = page_size(request.page_size)
        # One more than a page tells whether there is a next one.
        entries = await asyncio.to_thread(self._history, request.channel, request.after, limit + 1)
        return channel_pb2.HistoryResponse(
            entries=[_to_proto(entry) for entry in entries[:limit]], more=len(entries) > limit
        )

    async def ListChannels(
        self, request: channel_pb2.ListChannelsRequest, context: Context
    ) -> channel_pb2.ListChannelsResponse:
        """One page of names."""
        limit = page_size(request.page_size)
        names = sorted(await asyncio.to_thread(self._channels.names))
        rest = [name for name in names if name > request.page_token]
        return channel_pb2.ListChannelsResponse(
            channels=rest[:limit], next_page_token=rest[limit - 1] if len(rest) > limit else ""
        )

    def _promote(self, request: channel_pb2.PromoteRequest) -> ChannelEntry:
        _check_text("actor", request.actor, MAX_ACTOR_CHARS)
        _check_text("reason", request.reason, MAX_REASON_CHARS)
        head = self._head(request.channel)
        revision = head.revision if head else 0
        if revision != request.expected_revision:
            raise Conflict(
                f"channel {request.channel!r} is at revision {revision}, expected "
                f"{request.expected_revision}; look at what changed, then promote again",
                kind="revision_taken",
            )
        artifact = (
            (request.artifact or None)
            if request.HasField("artifact")
            else (head.artifact if head else None)
        )
        enabled = (
            request.enabled if request.HasField("enabled") else (head.enabled if head else True)
        )
        share = request.share if request.HasField("share") else (head.share if head else 1.0)
        strength = _strength(request, head, artifact)
        if not 0.0 <= share <= 1.0:  # NaN fails this too
            raise InvalidInput(
                f"share {share}: expected a number from 0 to 1", kind="promote_share"
            )
        if not math.isfinite(strength):
            raise InvalidInput(
                f"strength {strength}: expected a finite number", kind="promote_strength"
            )
        unchanged = head is not None and (artifact, strength) == (head.artifact, head.strength)
        # Turning off must work even when the artifact itself has become unreadable.
        if artifact is not None and not (unchanged and not enabled):
            manifest = parse_manifest(self._registry.manifest(artifact))
            manifest.policy.check(strength)
        return self._channels.append(
            request.channel,
            expected_revision=request.expected_revision,
            artifact=artifact,
            strength=strength,
            enabled=enabled,
            share=share,
            actor=request.actor,
            reason=request.reason,
        )

    def _history(self, channel: str, after: int, limit: int) -> list[ChannelEntry]:
        try:
            return self._channels.history(channel, after=after, limit=limit)
        except NotFound as error:
            raise _no_channel(channel) from error

    def _head(self, channel: str) -> ChannelEntry | None:
        try:
            return self._channels.head(channel)
        except NotFound:
            return None


def _strength(
    request: channel_pb2.PromoteRequest, head: ChannelEntry | None, artifact: str | None
) -> float:
    if request.HasField("strength"):
        return request.strength
    if head is not None and head.artifact is not None:
        return head.strength
    if artifact is not None:
        raise InvalidInput(
            f"channel {request.channel!r} has no strength yet; give one with its first artifact",
            kind="promote_strength",
        )
    return 0.0


def _check_text(name: str, text: str, limit: int) -> None:
    if not text.strip() or len(text) > limit:
        raise InvalidInput(
            f"{name}: expected 1 to {limit} characters, got {len(text)}; every change says who "
            "made it and why",
            kind=f"promote_{name}",
        )


def _no_channel(name: str) -> NotFound:
    return NotFound(f"no channel {name!r}; the first promote makes it", kind="no_channel")


def _to_proto(entry: ChannelEntry) -> channel_pb2.ChannelEntry:
    time = Timestamp()
    time.FromJsonString(entry.time)
    return channel_pb2.ChannelEntry(
        channel=entry.channel,
        revision=entry.revision,
        artifact=entry.artifact or "",
        strength=entry.strength,
        enabled=entry.enabled,
        share=entry.share,
        actor=entry.actor,
        time=time,
        reason=entry.reason,
        previous=entry.previous or "",
    )
