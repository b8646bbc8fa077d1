"""Slots: memory is bounded, waiting is fair, and who keeps what it has starves only itself."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import grpc
import pytest
import secure
from waiting import eventually

from steering_service.client.credentials import Credentials
from steering_service.client.operator import Operator
from steering_service.core.errors import Unavailable
from steering_service.core.wire import KIND_METADATA
from steering_service.server import slots
from steering_service.server.slots import Slots
from steering_service.v1 import artifact_pb2

DOWNLOAD = "/steering_service.v1.ArtifactService/Download"


async def busy(taken):
    with pytest.raises(Unavailable) as caught:
        async with taken:
            pass
    return caught.value.kind == "downloads_busy"


def run(test):
    asyncio.run(asyncio.wait_for(test, timeout=30))


def test_nobody_gets_them_all():
    async def test():
        several = Slots("downloads", 8, per_caller=6, per_host=2)
        async with AsyncExitStack() as held:
            for host in ("a", "a", "b", "b", "c", "c"):
                await held.enter_async_context(several.taken("hostile", host, 0.0))
            for host in ("a", "d"):
                assert await busy(several.taken("hostile", host, 0.01))
            async with several.taken("honest", "a", 0.01), several.taken("honest", "a", 0.01):
                assert await busy(several.taken("third", "a", 0.01))  # all eight are taken
        assert several._shares == {}

    run(test())


def test_who_waits_is_served_in_order():
    async def test():
        one = Slots("downloads", 1, per_caller=1, per_host=1)
        order = []

        async def use(number):
            async with one.taken("a", "host", 20.0):
                order.append(number)
                await asyncio.sleep(0)

        async with one.taken("a", "host", 0.0):
            tasks = [asyncio.create_task(use(number)) for number in range(50)]
            await asyncio.sleep(0)
            tasks[7].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == [number for number in range(50) if number != 7]
        assert one._shares == {}

    run(test())


def test_no_more_wait_than_there_is_memory_for(monkeypatch):
    monkeypatch.setattr(slots, "_MAX_WAITING", 3)

    async def test():
        one = Slots("downloads", 1, per_caller=1, per_host=1)

        async def use():
            async with one.taken("a", "host", 20.0):
                pass

        async with one.taken("a", "host", 0.0):
            tasks = [asyncio.create_task(use()) for _ in range(3)]
            await asyncio.sleep(0)
            assert await busy(one.taken("a", "host", 20.0))
        await asyncio.gather(*tasks)

    run(test())


# The times and numbers only are smaller than the service's own.
SERVE = """
import json, sys
import steering_service.server.artifact_rpc as rpc
from steering_service.server.app import serve
rpc._DOWNLOADS_PER_HOST, rpc._WAIT_S, rpc._WAIT_BYTES_PER_S = 4, 0.5, 1 << 40
serve(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
"""


def test_downloads_that_are_not_read_keep_their_slots_and_nobody_elses(
    guarded, publisher, artifact
):
    service = guarded(
        secure.entry("honest", "publisher") + secure.entry("hostile", "publisher"), program=SERVE
    )
    large = artifact(3, width=2_500_000)  # 10 MB: more than connections take unread
    request = artifact_pb2.DownloadRequest(digest=large.digest).SerializeToString()

    def bearer(name):
        return (("authorization", f"Bearer {name}"),)

    def whole(channel, name):
        """Whether all of it came, or its status and kind."""
        call = channel.unary_stream(DOWNLOAD)(request, timeout=20, metadata=bearer(name))
        try:
            return sum(map(len, call)) >= large.manifest.payload.size
        except grpc.RpcError as error:
            return error.code().name, dict(error.trailing_metadata())[KIND_METADATA]

    token = service.folder / "token"
    token.write_text("honest")
    with Operator(service.address, credentials=Credentials(token=token)) as operator:
        publisher.publish(operator, large)
    # No larger windows than HTTP/2 begins with, and a connection for each.
    small = (("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1))
    with service.channel(options=small) as channel, service.channel(options=small) as another:
        unread = [
            channel.unary_stream(DOWNLOAD)(request, timeout=60, metadata=bearer("hostile"))
            for _ in range(4)
        ]
        for call in unread:
            next(call)
        assert whole(another, "hostile") == ("UNAVAILABLE", "downloads_busy")
        assert whole(another, "honest") is True
        # As soon as one ends, there is room.
        unread[0].cancel()
        eventually(lambda: whole(another, "hostile") is True)
        for call in unread:
            call.cancel()
