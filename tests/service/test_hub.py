"""Hub: the latest value wins, nothing is queued, other replicas' changes are seen."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from steering_service.server.hub import Hub
from steering_service.server.revocations import RevocationList
from store.channels import ChannelLog
from store.errors import InvalidInput
from store.location import Location
from store.revocations import RevocationLog


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


def unreadable(path):
    """A link to itself: reading it is an error of the medium, for root too."""
    path.symlink_to(path)
    return path


async def until(watcher, revision):
    while watcher.head.revision < revision:
        await asyncio.wait_for(watcher.wait(), 10.0)


async def eventually(condition):
    async with asyncio.timeout(10.0):
        while not condition():  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.01)


def told(caplog):
    return [r.message for r in caplog.records if r.name == "steering_service.server.hub"]


def test_a_watcher_sees_only_the_latest(channels):
    async def run():
        hub = Hub(channels)
        with hub.watch("prod", await hub.load("prod")) as watcher:
            assert watcher.head is None
            entries = [append(channels, revision) for revision in (1, 2, 3)]
            for entry in (*entries, entries[0]):
                hub.offer(entry)
            await asyncio.wait_for(watcher.wait(), 5.0)
            assert watcher.head.revision == 3
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(watcher.wait(), 0.05)
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
                await asyncio.wait_for(watcher.wait(), 5.0)
            second = tmp_path / "channels/prod/00000002.json"
            second.write_bytes(b"not an entry")
            await asyncio.sleep(0.1)
            assert not poll.done()
            assert watcher.head.revision == 1
            second.unlink()
            append(channels, 2)
            while watcher.head.revision == 1:
                await asyncio.wait_for(watcher.wait(), 5.0)
        poll.cancel()

    asyncio.run(asyncio.wait_for(run(), timeout=20))
    messages = [r.message for r in caplog.records if r.name == "steering_service.server.hub"]
    assert messages == ["channel poll failed", "channel poll recovered"]


def test_a_damaged_channel_stops_no_other(channels, tmp_path, caplog):
    append(channels, 1, "bad")
    append(channels, 1, "good")

    async def run():
        hub = Hub(channels, poll_s=0.01)
        names = ("bad", "good")
        heads = {name: await hub.load(name) for name in names}
        with (
            hub.watch("bad", heads["bad"]),
            hub.watch("good", heads["good"]) as watcher,
            hub.watch("not-made-yet", None),
        ):
            (tmp_path / "channels/bad/00000002.json").write_bytes(b"not an entry")
            append(channels, 2, "good")
            poll = asyncio.create_task(hub.poll())
            while watcher.head.revision == 1:
                await asyncio.wait_for(watcher.wait(), 5.0)
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
    ]


def test_an_unavailable_store_is_told_once_and_asked_again(channels, tmp_path, caplog):
    append(channels, 1, "a")
    append(channels, 1, "b")

    async def run():
        hub = Hub(channels, poll_s=0.01)
        a, b = await hub.load("a"), await hub.load("b")
        with hub.watch("a", a) as watcher, hub.watch("b", b):
            aside, folder = tmp_path / "aside", tmp_path / "channels"
            folder.rename(aside)
            unreadable(folder)
            poll = asyncio.create_task(hub.poll())
            await eventually(lambda: caplog.records)
            folder.unlink()
            aside.rename(folder)
            append(channels, 2, "a")
            while watcher.head.revision == 1:
                await asyncio.wait_for(watcher.wait(), 5.0)
            await asyncio.sleep(0.1)
            poll.cancel()

    caplog.set_level("INFO")
    asyncio.run(asyncio.wait_for(run(), timeout=20))
    messages = [r.message for r in caplog.records if r.name == "steering_service.server.hub"]
    assert messages == ["store poll failed", "store poll recovered"]


@pytest.mark.parametrize("num_unreadable", [1, 9])
def test_channels_that_cannot_be_read_keep_no_other_from_being_followed(
    channels, tmp_path, caplog, num_unreadable
):
    caplog.set_level("INFO")
    names = [f"channel-{number:02d}" for number in range(20)]

    async def run():
        hub = Hub(channels, poll_s=0.01)
        with contextlib.ExitStack() as stack:
            for name in names:
                append(channels, 1, name)
            watchers = [stack.enter_context(hub.watch(n, await hub.load(n))) for n in names]
            bad, good = names[:num_unreadable], names[num_unreadable:]
            loops = [unreadable(tmp_path / f"channels/{name}/00000002.json") for name in bad]
            poll = asyncio.create_task(hub.poll())
            for revision in (2, 3):
                for name in good:
                    append(channels, revision, name)
                for watcher in watchers[num_unreadable:]:
                    await until(watcher, revision)
            for name, loop in zip(bad, loops, strict=True):
                loop.unlink()
                append(channels, 2, name)
            for watcher in watchers:
                await until(watcher, 2)
            poll.cancel()

    asyncio.run(asyncio.wait_for(run(), timeout=30))
    if num_unreadable == 1:
        assert told(caplog) == ["channel poll failed", "channel poll recovered"]


def test_revocations_that_cannot_be_read_keep_no_channel_from_being_followed(
    channels, tmp_path, caplog
):
    caplog.set_level("INFO")
    append(channels, 1)

    async def run():
        revocations = RevocationList(RevocationLog(Location.open(str(tmp_path))), None)
        hub = Hub(channels, revocations, poll_s=0.01)
        with hub.watch("prod", await hub.load("prod")) as watcher:
            (tmp_path / "revocations").mkdir(exist_ok=True)
            unreadable(tmp_path / "revocations/00000001.json")
            poll = asyncio.create_task(hub.poll())
            append(channels, 2)
            await until(watcher, 2)
            poll.cancel()

    asyncio.run(asyncio.wait_for(run(), timeout=30))
    assert told(caplog) == ["store poll failed"]  # once, and until they can be read


def test_a_bug_ends_no_poll(channels, monkeypatch, caplog):
    append(channels, 1, "odd")
    append(channels, 1, "prod")
    newer = channels.newer

    def broken(channel, revision):
        if channel == "odd":
            raise ZeroDivisionError
        return newer(channel, revision)

    async def run():
        hub = Hub(channels, poll_s=0.01)
        odd, prod = await hub.load("odd"), await hub.load("prod")
        with hub.watch("odd", odd) as first, hub.watch("prod", prod) as second:
            poll = asyncio.create_task(hub.poll())
            monkeypatch.setattr(channels, "newer", broken)
            for name in ("odd", "prod"):
                append(channels, 2, name)
            await until(second, 2)
            monkeypatch.setattr(hub, "_looked_at", lambda: 1 // 0)
            await eventually(lambda: len([r for r in caplog.records if r.exc_info]) == 5)
            monkeypatch.undo()
            await until(first, 2)
            poll.cancel()

    asyncio.run(asyncio.wait_for(run(), timeout=30))
    assert told(caplog) == ["store poll failed by a bug"] * 5  # and then not again and again


def test_close_wakes_everybody(channels):
    async def run():
        hub = Hub(channels)
        with hub.watch("a", None) as a, hub.watch("b", None) as b:
            waits = [asyncio.create_task(w.wait()) for w in (a, b)]
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


class Counting(ChannelLog):
    """A log that counts how often its heads are read."""

    reads = 0

    def head(self, channel):
        Counting.reads += 1
        return super().head(channel)


def test_a_thousand_that_come_at_once_read_the_store_once(tmp_path):
    log = Counting(Location.open(str(tmp_path)))
    append(log, 1)
    Counting.reads = 0

    async def run():
        hub = Hub(log)
        heads = await asyncio.gather(*(hub.load("prod") for _ in range(1000)))
        assert {head.revision for head in heads} == {1}
        assert Counting.reads == 1
        with pytest.raises(InvalidInput):
            await hub.load("../up")
        # Whoever goes away ends nobody else's read.
        tasks = [asyncio.create_task(hub.load("prod")) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one).__name__ for one in found] == [
            "CancelledError",
            "ChannelEntry",
            "ChannelEntry",
        ]

    asyncio.run(asyncio.wait_for(run(), timeout=20))


def test_watchers_of_one_head_share_its_frames(channels):
    async def run():
        hub = Hub(channels)
        append(channels, 1)
        with hub.watch("prod", await hub.load("prod")) as one, hub.watch("prod", None) as two:
            assert one.topic is two.topic
            one.topic.frames[1] = b"of revision 1"
            hub.offer(append(channels, 2))
            assert one.topic.frames == {}

    asyncio.run(run())


def test_channels_that_do_not_exist_take_turns(channels):
    append(channels, 1, "there")

    async def run():
        hub = Hub(channels)
        with contextlib.ExitStack() as stack:
            stack.enter_context(hub.watch("there", await hub.load("there")))
            names = {f"absent-{number:03d}" for number in range(200)}
            for name in sorted(names):
                stack.enter_context(hub.watch(name, None))
            rounds = [hub._looked_at() for _ in range(4)]
        assert all("there" in looked_at and len(looked_at) == 65 for looked_at in rounds)
        assert set().union(*rounds) == names | {"there"}

    asyncio.run(run())
