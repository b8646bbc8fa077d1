"""Hub: fan-out of channel heads to watchers. The latest value wins and nothing is queued.

No gRPC in here. One event loop owns a Hub; only the store is touched from threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from store.channels import ChannelEntry, ChannelLog
from store.errors import NotFound, StoreError, Unavailable

log = logging.getLogger(__name__)

POLL_S: Final = 0.5


class Watcher:
    """One stream's view of one channel: the head, and a wake-up call."""

    __slots__ = ("_event", "_topic")

    def __init__(self, topic: _Topic) -> None:
        self._topic = topic
        self._event = asyncio.Event()

    @property
    def head(self) -> ChannelEntry | None:
        """The newest entry known; None while the channel does not exist."""
        return self._topic.head

    def wake(self) -> None:
        """End the present or the next `wait`."""
        self._event.set()

    async def wait(self, timeout_s: float) -> None:
        """Sleep until something changed, someone called `wake`, or the time is over."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            return
        self._event.clear()


class _Topic:
    __slots__ = ("head", "watchers")

    def __init__(self, head: ChannelEntry | None) -> None:
        self.head = head
        self.watchers: set[Watcher] = set()


class Hub:
    """Knows the heads of all watched channels, by being told and by polling the store.

    A change through this replica arrives by `offer`, at once; one through another replica by the
    poll, within `poll_s`.

    Args:
        channels: The log that is polled.
        poll_s: Seconds between two polls.
    """

    def __init__(self, channels: ChannelLog, *, poll_s: float = POLL_S) -> None:
        self._channels = channels
        self._poll_s = poll_s
        self._topics: dict[str, _Topic] = {}
        self._closed = False
        self._store_failing = False
        self._failing: dict[str, str] = {}  # kind of the last error, by channel

    @property
    def closed(self) -> bool:
        """True once the service drains: streams should end."""
        return self._closed

    async def load(self, channel: str) -> ChannelEntry | None:
        """A channel's head, from the store unless it is watched already; None: no such channel.

        Raises:
            StoreError: The name is not valid, or the store cannot answer.
        """
        topic = self._topics.get(channel)
        if topic is not None:
            # At most one poll old, and a thousand nodes that reconnect cost the store nothing.
            return topic.head
        return await asyncio.to_thread(self._head, channel)

    @contextmanager
    def watch(self, channel: str, head: ChannelEntry | None) -> Iterator[Watcher]:
        """Watch a channel whose head was just read with `load`."""
        topic = self._topics.setdefault(channel, _Topic(head))
        if head is not None:
            self.offer(head)
        watcher = Watcher(topic)
        topic.watchers.add(watcher)
        try:
            yield watcher
        finally:
            topic.watchers.discard(watcher)
            if not topic.watchers:
                self._topics.pop(channel, None)

    def offer(self, entry: ChannelEntry) -> None:
        """Tell all watchers of a channel, unless they already know a later entry."""
        topic = self._topics.get(entry.channel)
        if topic is None or (topic.head is not None and topic.head.revision >= entry.revision):
            return
        topic.head = entry
        for watcher in topic.watchers:
            watcher.wake()

    async def poll(self) -> None:
        """Follow changes by other replicas until cancelled; a failing store is asked again.

        A channel that cannot be read keeps none of the others from being followed.
        """
        while True:
            await asyncio.sleep(self._poll_s)
            channels = list(self._topics)
            for channel in self._failing.keys() - set(channels):
                del self._failing[channel]
            for channel in channels:
                try:
                    await self._follow(channel)
                except Unavailable as error:
                    # Each further read would wait and fail alike.
                    if not self._store_failing:
                        log.warning(
                            "store poll failed", extra={"channel": channel, "kind": error.kind}
                        )
                    self._store_failing = True
                    break
            else:
                if self._store_failing:
                    log.info("store poll recovered")
                self._store_failing = False

    async def _follow(self, channel: str) -> None:
        """Offer a channel's head; one that cannot be read is logged, once for each reason."""
        try:
            head = await asyncio.to_thread(self._channels.head, channel)
        except Unavailable:
            raise
        except StoreError as error:
            topic = self._topics.get(channel)
            absent = isinstance(error, NotFound)
            if absent and (topic is None or topic.head is None):
                return  # not made yet
            if self._failing.get(channel) != error.kind:
                log.warning("channel poll failed", extra={"channel": channel, "kind": error.kind})
            self._failing[channel] = error.kind
            return
        if self._failing.pop(channel, None) is not None:
            log.info("channel poll recovered", extra={"channel": channel})
        self.offer(head)

    def close(self) -> None:
        """Wake every watcher; their streams find `closed` and end."""
        self._closed = True
        for topic in self._topics.values():
            for watcher in topic.watchers:
                watcher.wake()

    def _head(self, channel: str) -> ChannelEntry | None:
        try:
            return self._channels.head(channel)
        except NotFound:
            return None
