"""Health: open to everybody, so bounded; and no watcher misses a drain."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2

from steering_service.core.wire import KIND_METADATA
from steering_service.server import health
from steering_service.server.health import Health

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Served:
    """A Health on a server and a channel to it, in one loop."""

    async def __aenter__(self):
        self.health = Health(["known"])
        self.server = grpc.aio.server()
        self.server.add_registered_method_handlers(health.SERVICE, self.health.handlers())
        handler = grpc.method_handlers_generic_handler(health.SERVICE, self.health.handlers())
        self.server.add_generic_rpc_handlers((handler,))
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        self.channel = grpc.aio.insecure_channel(
            f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)]
        )
        return self

    async def __aexit__(self, *_):
        await self.channel.close()
        await self.server.stop(None)

    async def check(self, service=""):
        request = health_pb2.HealthCheckRequest(service=service).SerializeToString()
        call = self.channel.unary_unary(f"/{health.SERVICE}/Check")
        return health_pb2.HealthCheckResponse.FromString(await call(request, timeout=10)).status

    def watch(self, service=""):
        return self.channel.unary_stream(
            f"/{health.SERVICE}/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )(health_pb2.HealthCheckRequest(service=service), timeout=20)


async def refused(answer):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer
    return caught.value.code(), dict(caught.value.trailing_metadata()).get(KIND_METADATA)


async def left(served, number):
    """Wait until this many watches are left."""
    async with asyncio.timeout(10):
        while served.health._num_watches > number:  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.01)


def test_watchers_see_every_drain_also_after_one_of_them_has_left():
    async def run():
        async with Served() as served:
            first, second, stranger = served.watch(), served.watch("known"), served.watch("other")
            assert [(await call.read()).status for call in (first, second)] == [NOT_SERVING] * 2
            assert (await stranger.read()).status == UNKNOWN
            served.health.serve()
            assert [(await call.read()).status for call in (first, second)] == [SERVING] * 2
            assert await served.check("known") == SERVING
            second.cancel()
            await left(served, 2)
            served.health.drain()
            assert (await first.read()).status == NOT_SERVING
            assert await first.read() is grpc.aio.EOF  # a drain waits for no watcher
            assert await served.check() == NOT_SERVING
            await left(served, 0)
            assert served.health._watches == {}

    asyncio.run(asyncio.wait_for(run(), timeout=30))


def test_names_that_are_long_or_nobodys_are_not_kept():
    async def run():
        async with Served() as served:
            long = "x" * 2000
            expected = (grpc.StatusCode.INVALID_ARGUMENT, "message_size")
            assert await refused(served.watch(long).read()) == expected
            assert await refused(served.check(long)) == expected
            expected = (grpc.StatusCode.NOT_FOUND, "no_service")
            assert await refused(served.check("other")) == expected
            call = served.channel.unary_unary(f"/{health.SERVICE}/Check")
            expected = (grpc.StatusCode.INVALID_ARGUMENT, "message_syntax")
            assert await refused(call(b"\xff", timeout=10)) == expected
            assert served.health._num_watches == 0

    asyncio.run(asyncio.wait_for(run(), timeout=30))


@pytest.mark.parametrize("limit", ["MAX_WATCHES", "MAX_WATCHES_PER_HOST"])
def test_watchers_are_counted(limit, monkeypatch):
    monkeypatch.setattr(health, limit, 2)

    async def run():
        async with Served() as served:
            calls = [served.watch() for _ in range(2)]
            for call in calls:
                await call.read()
            expected = (grpc.StatusCode.RESOURCE_EXHAUSTED, "rate_limited")
            assert await refused(served.watch().read()) == expected
            assert await served.check() == NOT_SERVING
            for call in calls:
                call.cancel()
            await left(served, 0)
            again = served.watch()
            assert (await again.read()).status == NOT_SERVING
            again.cancel()

    asyncio.run(asyncio.wait_for(run(), timeout=30))
