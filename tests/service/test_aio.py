"""AsyncSubscription: the same node in an event loop, which is never held up."""

from __future__ import annotations

import asyncio
import time

import pytest
from publishers import FINGERPRINT

from steering_service.client.aio import AsyncSubscription
from steering_service.core.errors import InvalidInput

WHO = {"actor": "ada", "reason": "a test"}


@pytest.fixture
def subscribe(tmp_path, publisher):
    def make(address, **options):
        return AsyncSubscription(
            address, "prod", "node-1", tmp_path / "cache", publisher.roots, FINGERPRINT, **options
        )

    return make


async def longest_lag_s(done: asyncio.Event) -> float:
    """How much later than asked the loop came back, at worst."""
    longest = 0.0
    while not done.is_set():
        began = time.perf_counter()
        await asyncio.sleep(0.005)
        longest = max(longest, time.perf_counter() - began - 0.005)
    return longest


def test_it_follows_its_channel(service, operator, publisher, artifact, subscribe):
    one, two = artifact(1), artifact(2)
    for item in (one, two):
        publisher.publish(operator, item)

    async def run():
        async with subscribe(service.address) as node, asyncio.timeout(20):
            assert node.active.current.revision == 0
            waiting = [asyncio.create_task(node.changed(0)) for _ in range(3)]
            await asyncio.to_thread(
                operator.promote, "prod", artifact=one.digest, strength=1.0, **WHO
            )
            found = await asyncio.gather(*waiting)
            assert {item.artifact.digest for item in found} == {one.digest}
            await asyncio.to_thread(operator.promote, "prod", artifact=two.digest, **WHO)
            newer = await node.changed(found[0])
            assert newer.artifact.digest == two.digest
            assert await node.changed(1) is newer  # already so: no waiting
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await node.changed(newer)
            assert node.status.connected
            node.telemetry.count(newer, requests=1)
        assert node.active.current is newer

    asyncio.run(run())


def test_the_loop_never_waits_for_a_slow_fetch(
    service, operator, publisher, artifact, subscribe, proxy, tmp_path
):
    large = artifact(2, width=2_000_000)
    publisher.publish(operator, large)
    slow = proxy(service.address)
    slow.delay_s = 0.01

    async def run():
        done = asyncio.Event()
        lag = asyncio.create_task(longest_lag_s(done))
        async with subscribe(slow.address) as node, asyncio.timeout(60):
            await asyncio.to_thread(
                operator.promote, "prod", artifact=large.digest, strength=1.0, **WHO
            )
            began = time.perf_counter()
            assert (await node.changed(0)).artifact.digest == large.digest
            took_s = time.perf_counter() - began
        # From the disk as well, and out again.
        async with subscribe(slow.address) as node:
            assert node.active.current.artifact.digest == large.digest
        done.set()
        return took_s, await lag

    took_s, lag_s = asyncio.run(run())
    assert took_s > 0.5, "the fetch was not slow enough to tell"
    # The interpreter's lock is shared, so some waiting is the machine's, not ours.
    assert lag_s < 0.25, f"the loop was held up for {lag_s:.3f} s"


def test_the_loop_does_not_wait_for_a_service_that_hangs(subscribe, tmp_path):
    async def run():
        server = await asyncio.start_server(lambda r, w: asyncio.sleep(60), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        done = asyncio.Event()
        lag = asyncio.create_task(longest_lag_s(done))
        async with subscribe(f"127.0.0.1:{port}") as node:
            await asyncio.sleep(0.3)
            assert node.active.current.artifact is None
            began = time.perf_counter()
        closed_s = time.perf_counter() - began
        done.set()
        server.close()
        return closed_s, await lag

    closed_s, lag_s = asyncio.run(run())
    assert closed_s < 3
    assert lag_s < 0.25


def test_a_loop_that_is_gone_harms_nothing(service, operator, publisher, artifact, subscribe):
    publisher.publish(operator, artifact())
    kept = []

    async def run():
        node = subscribe(service.address)
        await node.__aenter__()
        kept.append(node)  # and never left

    asyncio.run(run())
    operator.promote("prod", artifact=artifact().digest, strength=1.0, **WHO)
    try:
        assert kept[0].active.wait_for(1, 10).artifact is not None
    finally:
        asyncio.run(kept[0].aclose())


def test_mistakes_show_at_once(subscribe):
    with pytest.raises(InvalidInput):
        subscribe("no address")
