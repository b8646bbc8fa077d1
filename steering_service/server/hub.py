"""Hub: fan-out of channel heads and of revocations to watchers. The latest value wins and nothing
is queued.

No gRPC in here. One event loop owns a Hub; only the store is touched from threads.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, TypeAlias

from prometheus_client import Counter

import steering_service.core.errors as core
from steering_service.server import metrics
from steering_service.server.once import Once
from steering_service.server.revocations import RevocationList
from steering_service.server.store_calls import store_call
from steering_service.server.throttle import Throttle
from store.channels import ChannelEntry, ChannelLog
from store.errors import StoreError, Unavailable

log = logging.getLogger(__name__)

POLL_S: Final = 0.5
# Heads of channels that nobody watches any more, for nodes that come back while the store is away.
_REMEMBERED: Final = 1000
# Channels looked at at the same time.
_LOOKS: Final = 8
# Channels that do not exist yet, looked at in one round.
_ABSENT: Final = 64
_AWAY: Final = (Unavailable, core.Unavailable)
_Away: TypeAlias = Unavailable | core.Unavailable
# Bugs are logged this often, however often they show.
_BUGS_PER_S: Final = 1 / 60


class Watcher:
    """One stream's view of one channel: the head, and a wake-up call."""

    __slots__ = ("_pending", "_topic", "_waiting")

    def __init__(self, topic: Topic) -> None:
        self._topic = topic
        self._waiting: asyncio.Future[None] | None = None
        self._pending = False

    @property
    def topic(self) -> Topic:
        """What is watched."""
        return self._topic

    @property
    def head(self) -> ChannelEntry | None:
        """The newest entry known; None while the channel does not exist."""
        return self._topic.head

    def wake(self) -> None:
        """End the present or the next `wait`."""
        self._pending = True
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def wait(self) -> None:
        """Sleep until something changed or someone called `wake`."""
        # Not an asyncio.Event with a timeout: a thousand of these end at every change, and this
        # costs a fifth.
        if not self._pending:
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        self._pending = False


class Topic:
    """A channel that is watched.

    Attributes:
        head: Its newest entry known.
        frames: Serialised Assignments of the head, by nonce: watchers at the same nonce share one.
        assignments: Counts those sent, and `acks` those accepted.
    """

    __slots__ = ("acks", "assignments", "frames", "head", "watchers")

    def __init__(self, channel: str, head: ChannelEntry | None) -> None:
        self.head = head
        self.frames: dict[int, bytes] = {}
        self.watchers: set[Watcher] = set()
        self.assignments, self.acks = _counters(channel if head else metrics.OTHER)

    def move(self, head: ChannelEntry) -> None:
        """There is a later head: tell all watchers."""
        if self.head is None:
            self.assignments, self.acks = _counters(head.channel)  # from now on it exists
        self.head = head
        self.frames = {}
        metrics.REVISION.labels(metrics.CHANNEL(head.channel)).set(head.revision)
        self.wake()

    def wake(self) -> None:
        """Wake all watchers."""
        for watcher in self.watchers:
            watcher.wake()


def _counters(channel: str) -> tuple[Counter, Counter]:
    label = metrics.CHANNEL(channel)
    return metrics.ASSIGNMENTS.labels(label), metrics.ACKS.labels(label)


class Hub:
    """Knows the heads of all watched channels, by being told and by polling the store.

    A change through this replica arrives by `offer`, at once; one through another replica by the
    poll, within `poll_s`.

    Args:
        channels: The log that is polled.
        revocations: Followed by the same poll; every watcher is woken by a new list.
        poll_s: Seconds between two polls.
    """

    def __init__(
        self,
        channels: ChannelLog,
        revocations: RevocationList | None = None,
        *,
        poll_s: float = POLL_S,
    ) -> None:
        self.revocations = revocations
        self._channels = channels
        self._poll_s = poll_s
        self._topics: dict[str, Topic] = {}
        self._remembered: dict[str, ChannelEntry] = {}
        self._loading: Once[ChannelEntry | None] = Once()
        self._closed = False
        self._store_failing = False
        self._turn = 0
        self._missed = False  # something could not be looked at, though the store answers
        self._bugs = Throttle(_BUGS_PER_S, 5)
        self._failing: dict[str, str] = {}  # kind of the last error, by channel
        self._revocations_failing: str | None = None
        if revocations is not None:
            revocations.on_change(self._wake_all)

    @property
    def closed(self) -> bool:
        """True once the service drains: streams should end."""
        return self._closed

    async def load(self, channel: str) -> ChannelEntry | None:
        """A channel's head, from the store unless it is watched already; None: no such channel.

        While the store is away, a channel that was watched before has the head it had then.

        Raises:
            StoreError: The name is not valid, or the store cannot answer.
        """
        if self.revocations is not None:
            # No Assignment may go out before it is known what is revoked.
            await self.revocations.ready()
        topic = self._topics.get(channel)
        if topic is not None:
            # At most one poll old, and a thousand nodes that reconnect cost the store nothing.
            return topic.head
        try:
            return await self._loading(channel, lambda: store_call(self._channels.find, channel))
        except _AWAY as error:
            head = self._remembered.get(channel)
            if head is None:
                raise
            log.warning("head remembered", extra={"channel": channel, "kind": error.kind})
            return head

    @contextmanager
    def watch(self, channel: str, head: ChannelEntry | None) -> Iterator[Watcher]:
        """Watch a channel whose head was just read with `load`."""
        topic = self._topics.get(channel)
        if topic is None:
            topic = self._topics[channel] = Topic(channel, head)
            self._remembered.pop(channel, None)
        if head is not None:
            self.offer(head)
        watcher = Watcher(topic)
        topic.watchers.add(watcher)
        try:
            yield watcher
        finally:
            topic.watchers.discard(watcher)
            if not topic.watchers and self._topics.get(channel) is topic:
                del self._topics[channel]
                if topic.head is not None:
                    self._remember(topic.head)

    def known(self, channel: str) -> ChannelEntry | None:
        """The head of a channel that is watched here; None where it is not."""
        topic = self._topics.get(channel)
        return topic.head if topic is not None else None

    def offer(self, entry: ChannelEntry) -> None:
        """Tell all watchers of a channel, unless they already know a later entry."""
        topic = self._topics.get(entry.channel)
        if topic is None or (topic.head is not None and topic.head.revision >= entry.revision):
            return
        topic.move(entry)

    async def poll(self) -> None:
        """Follow changes by other replicas until cancelled; a failing store is asked again.

        A channel that cannot be read keeps none of the others from being followed.
        """
        while True:
            await asyncio.sleep(self._poll_s)
            started = time.perf_counter()
            try:
                await self._round()
            except _AWAY as error:
                if not self._store_failing:
                    log.warning("store poll failed", extra={"kind": error.kind, "why": str(error)})
                self._store_failing = True
                metrics.STORE_ERRORS.labels(error.kind).inc()
                continue
            except Exception as error:  # followed by nobody else, so it must go on
                self._bug(error)
                continue
            if self._store_failing:
                log.info("store poll recovered")
            self._store_failing = False
            metrics.POLL_SECONDS.observe(time.perf_counter() - started)
            if not self._missed:
                metrics.polled()

    async def _round(self) -> None:
        """Look at everything once.

        Raises:
            Unavailable: The store answers nothing any more, and each further look would wait and
                fail; or it does not say what is revoked.
        """
        for channel in self._failing.keys() - self._topics.keys():
            del self._failing[channel]
        self._missed = False
        failed = await self._follow_revocations()
        answered = self.revocations is not None and failed is None
        away: dict[str, _Away] = {}
        channels = self._looked_at()
        for start in range(0, len(channels), _LOOKS):
            group = channels[start : start + _LOOKS]
            errors = await asyncio.gather(*map(self._follow, group))
            away |= {c: error for c, error in zip(group, errors, strict=True) if error is not None}
            if None in errors:
                answered = True
            elif len(group) == _LOOKS or not answered:
                raise next(error for error in errors if error is not None)
        # The store answers, so it is these channels alone.
        for channel, error in away.items():
            metrics.STORE_ERRORS.labels(error.kind).inc()
            self._failed(channel, error)
            self._missed = True
        if failed is not None:
            raise failed

    def _looked_at(self) -> list[str]:
        """Channels to look at in this round."""
        there = [channel for channel, topic in self._topics.items() if topic.head is not None]
        absent = [channel for channel, topic in self._topics.items() if topic.head is None]
        if len(absent) > _ABSENT:
            # Anybody may wait for any number of channels that do not exist; they take turns.
            self._turn = (self._turn + _ABSENT) % len(absent)
            absent = (absent[self._turn :] + absent[: self._turn])[:_ABSENT]
        channels = there + absent
        if channels:
            # Not always the same ones last, which a round that is given up does not come to.
            begin = random.randrange(len(channels))
            channels = channels[begin:] + channels[:begin]
        return channels

    async def _follow_revocations(self) -> _Away | None:
        """Take the newest list. Returns why, if the store does not answer."""
        if self.revocations is None:
            return None
        try:
            await self.revocations.follow()
        except _AWAY as error:
            return error
        except StoreError as error:
            if self._revocations_failing != error.kind:
                log.warning("revocations poll failed", extra={"kind": error.kind})
            self._revocations_failing = error.kind
        except Exception as error:  # the channels are to be followed all the same
            self._bug(error)
        else:
            self._revocations_failing = None
        return None

    async def _follow(self, channel: str) -> _Away | None:
        """Offer a channel's head. Returns why, if the store does not answer."""
        try:
            known = self.known(channel)
            head = await store_call(
                self._channels.newer, channel, known.revision if known is not None else 0
            )
        except _AWAY as error:
            return error
        except StoreError as error:
            self._failed(channel, error)
            return None
        except Exception as error:  # the others are to be followed all the same
            self._bug(error)
            return None
        if self._failing.pop(channel, None) is not None:
            log.info("channel poll recovered", extra={"channel": channel})
        if head is not None:
            self.offer(head)
        return None

    def _failed(self, channel: str, error: StoreError | core.SteeringError) -> None:
        # Once for each reason.
        if self._failing.get(channel) != error.kind:
            log.warning("channel poll failed", extra={"channel": channel, "kind": error.kind})
        self._failing[channel] = error.kind

    def _bug(self, error: Exception) -> None:
        self._missed = True
        if self._bugs.passes():
            log.error("store poll failed by a bug", exc_info=error)

    def close(self) -> None:
        """Wake every watcher; their streams find `closed` and end."""
        self._closed = True
        self._wake_all()

    def _wake_all(self) -> None:
        for topic in self._topics.values():
            topic.wake()

    def _remember(self, head: ChannelEntry) -> None:
        self._remembered.pop(head.channel, None)
        while len(self._remembered) >= _REMEMBERED:
            del self._remembered[next(iter(self._remembered))]
        self._remembered[head.channel] = head
