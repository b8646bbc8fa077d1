"""WatchService: one stream a node. For the contract see watch.proto.

What one stream can cost is bounded, whatever its client does: it has at most `WINDOW` Assignments
unsettled, its messages are read at a limited rate (gRPC's flow control holds back the rest), and
nothing of them is kept but the last values, cut to length.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import time
from collections.abc import AsyncIterator
from typing import Final

from steering_service.core.errors import InvalidInput, Unavailable
from steering_service.core.wire import check_node_id
from steering_service.server import access, metrics, telemetry
from steering_service.server.board import plain
from steering_service.server.hub import Hub, Topic, Watcher
from steering_service.server.nodes import Nodes, NodeStream
from steering_service.server.status import Context
from steering_service.server.throttle import Throttle
from steering_service.v1 import watch_pb2
from steering_service.v1.watch_pb2_grpc import WatchServiceServicer

log = logging.getLogger(__name__)

HEARTBEAT_S: Final = 5.0
# Assignments that a node may leave unreported. Small, so that a slow node skips revisions; above
# one, so that "off" reaches a node that is still downloading the revision before.
WINDOW: Final = 8
MAX_WATCHERS: Final = 20_000
"""Streams of one replica; further nodes go to another."""

_SUBSCRIBE_S: Final = 30.0
_MAX_TEXT_CHARS: Final = 200
_MAX_REASON_CHARS: Final = 1000
_MAX_KIND_CHARS: Final = 100
# A node reports on what it was sent, at most `WINDOW` at once, and sends telemetry now and then.
_MESSAGES_PER_S: Final = 20.0
_MESSAGE_BURST: Final = 100
# A change that every node refuses must not become a line for every node.
_REFUSALS_PER_S: Final = 5.0
_REFUSAL_BURST: Final = 50
_MAX_FRAMES: Final = 64


class _Session:
    """What the service remembers of one stream; gone with it."""

    __slots__ = ("beat_due", "channel", "node", "node_id", "nonce", "revision", "sent", "serial",
                 "settled", "timer")  # fmt: skip

    def __init__(self, subscribe: watch_pb2.Subscribe, node: NodeStream | None) -> None:
        self.node_id = subscribe.node_id
        self.channel = sys.intern(subscribe.channel)  # one text for all who watch it
        self.revision = subscribe.active_revision
        self.serial = subscribe.revocations_serial
        self.node = node  # None: an observer
        self.nonce = 0
        self.settled = 0
        self.beat_due = False
        self.timer: asyncio.TimerHandle | None = None  # of the next heartbeat
        # Revision of each unsettled Assignment, and when it was sent (monotonic, seconds).
        self.sent: list[tuple[int, float]] = []

    def settle(self, nonce: int) -> tuple[int, float] | None:
        """The Assignment of this nonce, which settles those before it too; None: there is none."""
        if not self.settled < nonce <= self.nonce:
            return None  # already settled, or never sent
        found = self.sent[nonce - self.settled - 1]
        del self.sent[: nonce - self.settled]
        self.settled = nonce
        return found


class WatchRpc(WatchServiceServicer):
    """The service over one Hub.

    Args:
        hub: Source of channel heads and revocations.
        nodes: Told what the nodes report.
        heartbeat_s: Seconds between two heartbeats of a stream.
        max_watchers: Streams at the same time.
    """

    def __init__(
        self,
        hub: Hub,
        nodes: Nodes,
        *,
        heartbeat_s: float = HEARTBEAT_S,
        max_watchers: int = MAX_WATCHERS,
    ) -> None:
        self._hub = hub
        self._nodes = nodes
        self._heartbeat_s = heartbeat_s
        self._max_watchers = max_watchers
        self._num_watchers = 0
        self._refusals = Throttle(_REFUSALS_PER_S, _REFUSAL_BURST)
        self._refusals_untold = 0

    async def Watch(  # type: ignore[override]  # yields what is serialised already
        self, request_iterator: AsyncIterator[watch_pb2.WatchRequest], context: Context
    ) -> AsyncIterator[bytes]:
        """Send the latest state whenever it changes, until either side ends the stream."""
        who = access.caller()
        requests = aiter(request_iterator)
        subscribe = await _subscribe(requests)
        who.check_channel(subscribe.channel)
        who.check_node(subscribe.node_id, observer=subscribe.observer)
        if self._num_watchers >= self._max_watchers:
            raise Unavailable(
                f"this replica serves {self._num_watchers} streams, which is its limit; subscribe "
                "through another one",
                kind="replica_full",
            )
        self._num_watchers += 1
        metrics.WATCHERS.inc()
        node = None
        try:
            head = await self._hub.load(subscribe.channel)
            if not subscribe.observer:
                node = self._nodes.connect(subscribe, who.name)
            session = _Session(subscribe, node)
            # A message takes a kilobyte, and what is left of it here would be kept with the stream.
            del subscribe
            with self._hub.watch(session.channel, head) as watcher:
                async for frame in self._stream(session, watcher, requests, who):
                    yield frame
        finally:
            self._num_watchers -= 1
            metrics.WATCHERS.dec()
            if node is not None:
                node.ended()

    async def _stream(
        self,
        session: _Session,
        watcher: Watcher,
        requests: AsyncIterator[watch_pb2.WatchRequest],
        who: access.Identity,
    ) -> AsyncIterator[bytes]:
        _tell("watch started", session)
        loop = asyncio.get_running_loop()
        reading = asyncio.create_task(self._read(requests, session, watcher))

        def done(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                task.exception()  # raised below, unless the client has gone already
            watcher.wake()

        reading.add_done_callback(done)

        def beat(delay_s: float) -> None:
            session.timer = loop.call_later(delay_s, beat, self._heartbeat_s)
            session.beat_due = True
            watcher.wake()

        # A fleet that comes back at once must not beat at once ever after.
        beat(random.uniform(0.5, 1.0) * self._heartbeat_s)
        try:
            while not reading.done():
                if self._hub.closed:
                    raise Unavailable("this replica drains; subscribe again", kind="draining")
                frame = self._next(session, watcher, who)
                if frame is None:
                    await watcher.wait()
                else:
                    yield frame
            await reading
        finally:
            if session.timer is not None:
                session.timer.cancel()
            reading.cancel()
            _tell("watch ended", session)

    def _next(self, session: _Session, watcher: Watcher, who: access.Identity) -> bytes | None:
        """What to send now; None: nothing."""
        if session.beat_due:
            if not access.still_valid(who):
                raise Unavailable(
                    "what this caller may do has changed; subscribe again", kind="access_changed"
                )
            session.beat_due = False
            return self._heartbeat(watcher.topic)
        revocations = self._hub.revocations
        if revocations is not None and revocations.serial > session.serial:
            session.serial = revocations.serial
            if session.node is not None:
                session.node.informed(revocations.serial)
            return revocations.frame
        head = watcher.head
        if (
            head is None
            or head.revision == session.revision
            or session.nonce - session.settled >= WINDOW
        ):
            return None
        session.nonce += 1
        session.revision = head.revision
        session.sent.append((head.revision, time.monotonic()))
        watcher.topic.assignments.inc()
        return _assignment(watcher.topic, session.nonce)

    async def _read(
        self, requests: AsyncIterator[watch_pb2.WatchRequest], session: _Session, watcher: Watcher
    ) -> None:
        """Take Reports and Telemetry, until the client ends its side."""
        throttle = Throttle(_MESSAGES_PER_S, _MESSAGE_BURST)
        async for request in requests:
            match request.WhichOneof("message"):
                case "report":
                    self._report(request.report, session, watcher)
                case "telemetry":
                    self._telemetry(request.telemetry, session, watcher)
                case _:
                    raise InvalidInput(
                        "a watch stream has one Subscribe, then Reports and Telemetry only; open "
                        "another stream for another channel",
                        kind="watch_order",
                    )
            del request  # as in `Watch`
            if delay_s := throttle.delay_s():
                await asyncio.sleep(delay_s)

    def _report(self, report: watch_pb2.Report, session: _Session, watcher: Watcher) -> None:
        if report.status not in (watch_pb2.Report.STATUS_ACK, watch_pb2.Report.STATUS_NACK):
            raise InvalidInput(
                f"a Report with status {report.status}; expected ACK or NACK", kind="report_status"
            )
        was_full = session.nonce - session.settled >= WINDOW
        settled = session.settle(report.nonce)
        if settled is None:
            return
        if was_full:
            watcher.wake()
        if session.node is None:
            return
        revision, sent_at = settled
        if report.status == watch_pb2.Report.STATUS_ACK:
            session.node.accepted(report)
            watcher.topic.acks.inc()
            metrics.ACK_SECONDS.observe(time.monotonic() - sent_at)
            if log.isEnabledFor(logging.DEBUG):
                log.debug("node accepted", extra=_extra(session, report, revision))
            return
        kind, reason = plain(report.kind, _MAX_KIND_CHARS), plain(report.reason, _MAX_REASON_CHARS)
        session.node.refused(report, revision, kind, reason)
        metrics.NACKS.labels(metrics.CHANNEL(session.channel), metrics.KIND(kind)).inc()
        if self._refusals.passes():
            extra = {"kind": kind, "reason": reason, "untold_before": self._refusals_untold}
            log.warning("node refused", extra=_extra(session, report, revision) | extra)
            self._refusals_untold = 0
        else:
            self._refusals_untold += 1  # the metric counts it, and ListNodes says it

    def _telemetry(
        self, counters: watch_pb2.Telemetry, session: _Session, watcher: Watcher
    ) -> None:
        if session.node is None or watcher.head is None:
            return
        try:
            telemetry.check(counters)
        except InvalidInput as error:
            # Counters are worth less than the stream: a node with a broken clock is still steered.
            if self._refusals.passes():
                extra = {"node": session.node_id, "kind": error.kind, "why": str(error)}
                log.warning("telemetry left out", extra=extra)
            return
        session.node.counted(counters)
        telemetry.add(counters, session.channel)

    def _heartbeat(self, topic: Topic) -> bytes:
        return watch_pb2.WatchResponse(
            heartbeat=watch_pb2.Heartbeat(
                head_revision=topic.head.revision if topic.head else 0,
                interval_ms=int(self._heartbeat_s * 1000),
            )
        ).SerializeToString()


async def _subscribe(requests: AsyncIterator[watch_pb2.WatchRequest]) -> watch_pb2.Subscribe:
    try:
        async with asyncio.timeout(_SUBSCRIBE_S):
            first = await anext(requests, None)
    except TimeoutError as error:
        raise InvalidInput(f"no Subscribe within {_SUBSCRIBE_S:g} s", kind="watch_order") from error
    if first is None or first.WhichOneof("message") != "subscribe":
        raise InvalidInput("a watch stream must start with Subscribe", kind="watch_order")
    subscribe = first.subscribe
    check_node_id(subscribe.node_id)
    for name in ("model_fingerprint", "client"):
        if (length := len(getattr(subscribe, name))) > _MAX_TEXT_CHARS:
            raise InvalidInput(
                f"Subscribe: {name} of {length} characters; at most {_MAX_TEXT_CHARS}",
                kind="subscribe_text",
            )
    return subscribe


def _tell(event: str, session: _Session) -> None:
    if log.isEnabledFor(logging.DEBUG):
        extra = {"node": session.node_id, "channel": session.channel, "revision": session.revision}
        log.debug(event, extra=extra)


def _extra(session: _Session, report: watch_pb2.Report, revision: int) -> dict[str, object]:
    return {
        "node": session.node_id,
        "channel": session.channel,
        "revision": revision,
        "active_revision": report.active_revision,
    }


def _assignment(topic: Topic, nonce: int) -> bytes:
    """The head as an Assignment of this nonce."""
    frame = topic.frames.get(nonce)
    if frame is None:
        entry = topic.head
        assert entry is not None  # nobody is assigned what does not exist
        frame = watch_pb2.WatchResponse(
            assignment=watch_pb2.Assignment(
                channel=entry.channel,
                revision=entry.revision,
                nonce=nonce,
                artifact=entry.artifact or "",
                strength=entry.strength,
                enabled=entry.enabled,
                share=entry.share,
            )
        ).SerializeToString()
        if len(topic.frames) < _MAX_FRAMES:
            topic.frames[nonce] = frame
    return frame
