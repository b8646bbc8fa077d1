"""Hub: the latest value wins, nothing is queued, other replicas' changes are seen."""

from __future__ import annotations

import asyncio
import time

import pytest

from steering_service.server.hub import Hub
from store.channels import ChannelLog
from store.errors import InvalidInput
from store.location import Location


@pytest.fixture
def channels(tmp_path):
    return ChannelLog(Location.open(str(tmp_path)))


def append(channels, revision, channel="prod"):
    return channels.append(
        channel,
        expected_revision=revision - 1,
        artifact=None,
        strength=0.0,
        enabled=True,
        share=1.0,
        actor="ada",
        reason="a test",
    )


def test_a_watcher_sees_only_the_latest(channels):
    async def run():
        hub = Hub(channels)
        with hub.watch("prod", await hub.load("prod")) as watcher:
            assert watcher.head is None
            entries = [append(channels, revision) for revision in (1, 2, 3)]
            for entry in (*entries, entries[0]):
                hub.offer(entry)
            await watcher.wait(5.0)
            assert watcher.head.revision == 3
            started = time.monotonic()
            await watcher.wait(0.05)
            assert time.monotonic() - started >= 0.04
            # A second watcher of the channel costs no read of the store.
            append(channels, 4)
            assert (await hub.load("prod")).revision == 3
        assert (await hub.load("prod")).revision == 4

    asyncio.run(run())


def test_the_poll_follows_other_writers_and_outlives_a_failing_store(channels, tmp_path, caplog):
    caplog.set_level("INFO")

    async def run():
        hub = Hub(channels, poll_s=0.01)
        poll = asyncio.create_task(hub.poll())
        with hub.watch("prod", None) as watcher:
            append(channels, 1)
            while watcher.head is None:
                await watcher.wait(5.0)
            second = tmp_path / "channels/prod/00000002.json"
            second.write_bytes(b"not an entry")
            await asyncio.sleep(0.1)
            assert not poll.done()
            assert watcher.head.revision == 1
            second.unlink()
            append(channels, 2)
            while watcher.head.revision == 1:
                await watcher.wait(5.0)
        poll.cancel()

    asyncio.run(asyncio.wait_for(run(), timeout=20))
    messages = [r.message for r in caplog.records if r.name == "steering_service.server.hub"]
    assert messages == ["channel poll failed", "channel poll recovered"]


def test_a_damaged_channel_stops_no_other(channels, tmp_path, caplog):
    append(channels, 1, "bad")
    append(channels, 1, "good")
    append(channels, 1, "gone")

    async def run():
        hub = Hub(channels, poll_s=0.01)
        names = ("bad", "gone", "good")
        heads = {name: await hub.load(name) for name in names}
        with (
            hub.watch("bad", heads["bad"]),
            hub.watch("gone", heads["gone"]),
            hub.watch("good", heads["good"]) as watcher,
            hub.watch("not-made-yet", None),
        ):
            (tmp_path / "channels/bad/00000002.json").write_bytes(b"not an entry")
            (tmp_path / "channels/gone/00000001.json").unlink()
            append(channels, 2, "good")
            poll = asyncio.create_task(hub.poll())
            while watcher.head.revision == 1:
                await watcher.wait(5.0)
            await asyncio.sleep(0.2)
            poll.cancel()

    caplog.set_level("INFO")
    asyncio.run(asyncio.wait_for(run(), timeout=20))
    found = [
        (r.message, r.channel, r.kind)
        for r in caplog.records
        if r.name == "steering_service.server.hub"
    ]
    assert found == [
        ("channel poll failed", "bad", "channel_chain"),
        ("channel poll failed", "gone", "no_revision"),
    ]


def test_an_unavailable_store_is_told_once_and_asked_again(channels, tmp_path, caplog):
    append(channels, 1, "a")
    append(channels, 1, "b")

    async def run():
        hub = Hub(channels, poll_s=0.01)
        a, b = await hub.load("a"), await hub.load("b")
        with hub.watch("a", a) as watcher, hub.watch("b", b):
            # A link to itself: reading it is an error of the medium, for root too.
            loop = tmp_path / "channels/a/00000002.json"
            loop.symlink_to(loop)
            poll = asyncio.create_task(hub.poll())
            await asyncio.sleep(0.2)
            loop.unlink()
            append(channels, 2, "a")
            while watcher.head.revision == 1:
                await watcher.wait(5.0)
            await asyncio.sleep(0.1)
            poll.cancel()

    caplog.set_level("INFO")
    asyncio.run(asyncio.wait_for(run(), timeout=20))
    messages = [r.message for r in caplog.records if r.name == "steering_service.server.hub"]
    assert messages == ["store poll failed", "store poll recovered"]


def test_close_wakes_everybody(channels):
    async def run():
        hub = Hub(channels)
        with hub.watch("a", None) as a, hub.watch("b", None) as b:
            waits = [asyncio.create_task(w.wait(30.0)) for w in (a, b)]
            await asyncio.sleep(0)
            hub.close()
            await asyncio.wait_for(asyncio.gather(*waits), timeout=5)
            assert hub.closed

    asyncio.run(run())


def test_bad_names_are_errors_not_topics(channels):
    async def run():
        with pytest.raises(InvalidInput):
            await Hub(channels).load("../up")

    asyncio.run(run())
