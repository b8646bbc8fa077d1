"""WatchService: one stream a node. For the contract see watch.proto."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from steering_service.core.errors import InvalidInput, Unavailable
from steering_service.core.wire import check_node_id
from steering_service.server.hub import Hub, Watcher
from steering_service.server.status import Context
from steering_service.v1 import watch_pb2, watch_pb2_grpc
from store.channels import ChannelEntry

log = logging.getLogger(__name__)

HEARTBEAT_S: Final = 5.0
# Assignments that a node may leave unreported. Small, so that a slow node skips revisions; above
# one, so that "off" reaches a node that is still downloading the revision before.
WINDOW: Final = 8
_MAX_REASON_CHARS: Final = 1000


@dataclass(slots=True)
class _Session:
    """What the service remembers of one stream; gone with it."""

    node_id: str
    channel: str
    revision: int
    observer: bool
    nonce: int = 0
    settled: int = 0


class WatchRpc(watch_pb2_grpc.WatchServiceServicer):
    """The service over one Hub.

    Args:
        hub: Source of channel heads.
        heartbeat_s: Seconds between two heartbeats of a stream.
    """

    def __init__(self, hub: Hub, *, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._hub = hub
        self._heartbeat_s = heartbeat_s

    async def Watch(
        self, request_iterator: AsyncIterator[watch_pb2.WatchRequest], context: Context
    ) -> AsyncIterator[watch_pb2.WatchResponse]:
        """Send the latest state whenever it changes, until either side ends the stream."""
        requests = aiter(request_iterator)
        session = _session(await anext(requests, None))
        extra = {"node": session.node_id, "channel": session.channel}
        head = await self._hub.load(session.channel)
        with self._hub.watch(session.channel, head) as watcher:
            reports = asyncio.create_task(_read_reports(requests, session, watcher))
            reports.add_done_callback(lambda _: watcher.wake())
            log.info("watch started", extra=extra | {"revision": session.revision})
            try:
                async for response in self._responses(session, watcher, reports):
                    yield response
                if reports.done():
                    await reports
            finally:
                reports.cancel()
                log.info("watch ended", extra=extra | {"revision": session.revision})

    async def _responses(
        self, session: _Session, watcher: Watcher, reports: asyncio.Task[None]
    ) -> AsyncIterator[watch_pb2.WatchResponse]:
        loop = asyncio.get_running_loop()
        heartbeat_at = loop.time()
        while not reports.done():
            if self._hub.closed:
                raise Unavailable("this replica drains; subscribe again", kind="draining")
            if loop.time() >= heartbeat_at:
                heartbeat_at = loop.time() + self._heartbeat_s
                yield self._heartbeat(watcher)
            head = watcher.head
            if (
                head is not None
                and head.revision != session.revision
                and session.nonce - session.settled < WINDOW
            ):
                session.nonce += 1
                session.revision = head.revision
                yield _assignment(head, session.nonce)
                continue
            await watcher.wait(heartbeat_at - loop.time())

    def _heartbeat(self, watcher: Watcher) -> watch_pb2.WatchResponse:
        return watch_pb2.WatchResponse(
            heartbeat=watch_pb2.Heartbeat(
                head_revision=watcher.head.revision if watcher.head else 0,
                interval_ms=int(self._heartbeat_s * 1000),
            )
        )


async def _read_reports(
    requests: AsyncIterator[watch_pb2.WatchRequest], session: _Session, watcher: Watcher
) -> None:
    async for request in requests:
        if request.WhichOneof("message") != "report":
            raise InvalidInput(
                "a watch stream has one Subscribe, then Reports only; open another stream for "
                "another channel",
                kind="watch_order",
            )
        report = request.report
        if not session.settled < report.nonce <= session.nonce:
            continue  # of an Assignment already settled, or never sent
        session.settled = report.nonce
        watcher.wake()
        if session.observer:
            continue
        extra = {
            "node": session.node_id,
            "channel": session.channel,
            "revision": report.revision,
            "active_revision": report.active_revision,
        }
        if report.status == watch_pb2.Report.STATUS_NACK:
            reason = report.reason[:_MAX_REASON_CHARS]
            log.warning("node refused", extra=extra | {"kind": report.kind[:100], "reason": reason})
        else:
            log.info("node accepted", extra=extra)


def _session(first: watch_pb2.WatchRequest | None) -> _Session:
    if first is None or first.WhichOneof("message") != "subscribe":
        raise InvalidInput("a watch stream must start with Subscribe", kind="watch_order")
    subscribe = first.subscribe
    return _Session(
        check_node_id(subscribe.node_id),
        subscribe.channel,
        subscribe.active_revision,
        subscribe.observer,
    )


def _assignment(entry: ChannelEntry, nonce: int) -> watch_pb2.WatchResponse:
    return watch_pb2.WatchResponse(
        assignment=watch_pb2.Assignment(
            channel=entry.channel,
            revision=entry.revision,
            nonce=nonce,
            artifact=entry.artifact or "",
            strength=entry.strength,
            enabled=entry.enabled,
            share=entry.share,
        )
    )
