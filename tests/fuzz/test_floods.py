"""Too much of everything: streams, messages, bytes, connections. Honest callers are served."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import threading
import time

import grpc
import grpc.aio
import pytest
from attack import DOCUMENTED, MIB
from delivery import WHO, make_artifact, pss_bytes
from publishers import FINGERPRINT
from waiting import eventually

from steering_service.client.fetch import fetch_artifact
from steering_service.client.subscription import Subscription
from steering_service.v1 import artifact_pb2, watch_pb2

# Half a minute of full load.
pytestmark = pytest.mark.faults

WATCH = "/steering_service.v1.WatchService/Watch"
DOWNLOAD = "/steering_service.v1.ArtifactService/Download"
PUBLISH = "/steering_service.v1.ArtifactService/Publish"
GET_CHANNEL = "/steering_service.v1.ChannelService/GetChannel"
# One connection may have 1,024 streams.
STREAMS = 1000


@pytest.fixture
def victim(make_target):
    """A service of its own: what it is left with is not the next test's."""
    return make_target()


def subscribe_bytes(node_id: str, channel: str = "prod") -> bytes:
    subscribe = watch_pb2.Subscribe(node_id=node_id, channel=channel)
    return watch_pb2.WatchRequest(subscribe=subscribe).SerializeToString()


def own_channel(address: str) -> grpc.aio.Channel:
    """A connection that is shared with no other channel."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    return grpc.aio.insecure_channel(address, options=options)


async def end(calls, channels) -> None:
    """Cancel calls, and let their streams be gone before the loop is."""
    for call in calls:
        call.cancel()
    await asyncio.gather(*[call.code() for call in calls])
    for channel in channels:
        await channel.close()


@contextlib.contextmanager
def honest(target, tmp_path):
    """While the body runs, an honest node is served: each change reaches it soon."""
    replica = target.replica
    with (
        replica.operator() as operator,
        Subscription(
            replica.address,
            "prod",
            "honest",
            tmp_path / "honest",
            target.publisher.roots,
            FINGERPRINT,
        ) as node,
    ):
        node.active.wait_for(operator.channel("prod").revision, 20)
        stop, longest, errors = threading.Event(), [0.0], []

        def change():
            number = 0
            while not stop.wait(0.25):
                number += 1
                begin = time.monotonic()
                try:
                    entry = operator.promote("prod", strength=float(number % 100), **WHO)
                    node.active.wait_for(entry.revision, 30)
                except Exception as error:
                    errors.append(error)
                    return
                longest[0] = max(longest[0], time.monotonic() - begin)

        thread = threading.Thread(target=change)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        assert errors == []
        print(f"a change took {longest[0]:.2f} s at most")
        assert longest[0] < 10


@pytest.mark.timeout(300)
def test_ten_thousand_half_open_streams(make_target, tmp_path):
    """Half of them say nothing at all, half subscribe and never read."""
    # The usual interval: ten thousand streams would have three heartbeats each a second.
    victim = make_target(heartbeat_s=5.0)
    pid = victim.pid

    async def wave(seconds: float) -> tuple[int, int]:
        """How many streams the service ended, and its memory before the others were."""
        channels = [own_channel(victim.replica.address) for _ in range(10)]
        calls = []
        for number in range(10 * STREAMS):
            call = channels[number % 10].stream_stream(WATCH)()
            calls.append(call)
            if number % 2:
                await call.write(subscribe_bytes(f"node-{number}"))
            if number % 200 == 0:
                # gRPC itself cancels streams when more than a thousand wait to be accepted.
                assert await asyncio.to_thread(victim.replica.healthy, 20)
        refused = sum(call.done() for call in calls)
        print(f"{refused} of {len(calls)} were not accepted")
        assert refused < len(calls) / 10
        await asyncio.sleep(seconds)
        memory = pss_bytes(pid)
        ended = [call for call in calls if call.done()]
        assert {await call.code() for call in ended} <= DOCUMENTED | {grpc.StatusCode.CANCELLED}
        await end(calls, channels)
        return len(ended) - refused, memory

    before = pss_bytes(pid)
    with honest(victim, tmp_path):
        # Longer than a stream may wait with its Subscribe.
        ended, full = asyncio.run(wave(32))
        print(f"{ended} ended, {(full - before) / 10 / STREAMS:.0f} bytes a stream")
        assert ended > 4 * STREAMS, "streams that say nothing stay"
        assert full - before < 10 * STREAMS * 100_000
        first = pss_bytes(pid)
        asyncio.run(wave(2))
        # Python gives little back to the system, and needs no more the second time.
        eventually(lambda: pss_bytes(pid) < max(first, full) * 1.25, 20, "memory is used again")
    assert victim.replica.healthy()


@pytest.mark.timeout(120)
def test_downloads_that_are_never_read(victim, tmp_path):
    item = make_artifact(1, width=4_000_000)  # 16 MB
    with victim.replica.operator() as operator:
        victim.publisher.publish(operator, item)
    request = artifact_pb2.DownloadRequest(digest=item.digest).SerializeToString()

    async def open_all() -> int:
        channels = [own_channel(victim.replica.address) for _ in range(200)]
        calls = [channel.unary_stream(DOWNLOAD)(request) for channel in channels]
        for channel in channels:
            await channel.channel_ready()
        # Only as many begin as one host may have; the others wait.
        await asyncio.wait(
            [asyncio.create_task(call.wait_for_connection()) for call in calls], timeout=3
        )
        memory = pss_bytes(victim.pid)
        await end(calls, channels)
        return memory

    before = pss_bytes(victim.pid)
    with honest(victim, tmp_path):
        during = asyncio.run(open_all())
        print(f"{(during - before) / MIB:.0f} MiB for 200 downloads that nobody reads")
        # Of 32, two chunks of 1 MiB each, and not the payload each.
        assert during - before < 200 * MIB
        # Their places are free again.
        begin = time.monotonic()
        fetch_artifact(
            item.digest,
            victim.replica.address,
            cache_dir=tmp_path / "fetched",
            trust_roots=victim.publisher.roots,
            model_fingerprint=FINGERPRINT,
        )
        assert time.monotonic() - begin < 10
    assert victim.replica.healthy()


@pytest.mark.parametrize("kind", ["reports", "telemetry", "stale reports"])
def test_floods_on_a_stream(victim, tmp_path, kind):
    """As fast as the network takes them, from ten streams at once."""
    counters = watch_pb2.DeploymentCounters(
        revision=2**64 - 1, identity="x" * 200, requests=2**64 - 1, generated_tokens=2**64 - 1
    )
    telemetry = watch_pb2.Telemetry(deployments=[counters] * 100)
    status = watch_pb2.Report.STATUS_NACK if kind == "reports" else watch_pb2.Report.STATUS_ACK
    message = watch_pb2.WatchRequest(
        report=watch_pb2.Report(status=status, kind="k", reason="r" * 5000)
    )
    sent = [0]

    def messages(number: int):
        yield subscribe_bytes(f"node-{number}")
        for nonce in itertools.count(1):
            message.report.nonce = nonce if kind == "reports" else 2**64 - 1
            if kind == "telemetry":
                message.telemetry.CopyFrom(telemetry)
            sent[0] += 1
            yield message.SerializeToString()

    def flood() -> None:
        with grpc.insecure_channel(victim.replica.address) as channel:
            calls = [channel.stream_stream(WATCH)(messages(number)) for number in range(10)]
            time.sleep(4)
            for call in calls:
                assert call.is_active() or call.code() in DOCUMENTED
                call.cancel()

    before, logged = pss_bytes(victim.pid), victim.replica.log.stat().st_size
    with honest(victim, tmp_path):
        flood()
    print(f"{sent[0]} messages were taken")
    assert pss_bytes(victim.pid) - before < 64 * MIB
    assert victim.replica.log.stat().st_size - logged < 2 * MIB, "the log takes what is sent"
    assert victim.replica.healthy()


def test_messages_that_unpack_to_gigabytes(victim):
    """gRPC unpacks what is compressed: 300 MB of zeros are 300 kB on the wire."""
    options = [("grpc.max_send_message_length", -1)]
    with (
        victim.unharmed(grown_bytes=200 * MIB),
        grpc.insecure_channel(
            victim.replica.address, options=options, compression=grpc.Compression.Gzip
        ) as channel,
    ):
        for method in (GET_CHANNEL, PUBLISH, WATCH):
            call = channel.stream_stream(method)(iter([b"\0" * 300_000_000]), timeout=30)
            with pytest.raises(grpc.RpcError):
                list(call)
            assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, call.details()


def test_metadata_that_is_too_long_or_odd(victim):
    cases = {
        "long": [("x", "y" * 100_000)],
        "many": [(f"x-{number}", "y" * 50) for number in range(1000)],
        "no token": [("authorization", "Bearer ")],
        "a long token": [("authorization", "Bearer " + "x" * 7000)],
        "two tokens": [("authorization", "Bearer a"), ("authorization", "Bearer b")],
        "another scheme": [("authorization", "Basic YTpi")],
        "a trace that is none": [("traceparent", "00-zz-zz-zz"), ("tracestate", "=" * 600)],
        "binary": [("grpc-trace-bin", b"\xff" * 100), ("x-bin", b"\0" * 1000)],
        "a time that is none": [("grpc-previous-rpc-attempts", "-1")],
    }
    with victim.unharmed(), grpc.insecure_channel(victim.replica.address) as channel:
        for name, metadata in cases.items():
            call = channel.unary_unary(GET_CHANNEL).future(
                b"\n\x04prod", metadata=metadata, timeout=5
            )
            assert call.code() in DOCUMENTED, (name, call.details())
            assert call.code() is not grpc.StatusCode.OK or name not in {"long", "many"}


def test_bytes_that_are_not_http2(victim):
    host, _, port = victim.replica.address.rpartition(":")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    frames = {
        "nothing": b"",
        "noise": bytes(range(256)) * 100,
        "HTTP/1": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n",
        "TLS": bytes.fromhex("16030100c8010000c40303") + b"\0" * 200,
        "half a preface": preface[:10],
        "a frame of 16 MB": preface + b"\xff\xff\xff\0\0\0\0\0\1",
        "settings without end": preface + b"\0\0\6\4\0\0\0\0\0\0\1\xff\xff\xff\xff" * 20_000,
        "pings without end": preface
        + b"\0\0\0\4\0\0\0\0\0"
        + b"\0\0\x08\6\0\0\0\0\0AAAAAAAA" * 20_000,
        "headers without end": preface
        + b"\0\0\0\4\0\0\0\0\0\0\0\1\1\0\0\0\0\1\x82"
        + b"\0\0\1\x09\0\0\0\0\1\x82" * 20_000,
        "a window that overflows": preface
        + b"\0\0\0\4\0\0\0\0\0\0\0\4\x08\0\0\0\0\0\x7f\xff\xff\xff" * 2,
        "resets without end": preface
        + b"\0\0\0\4\0\0\0\0\0"
        + b"".join(
            b"\0\0\1\1\4"
            + number.to_bytes(4)
            + b"\x82\0\0\4\3\0"
            + number.to_bytes(4)[1:]
            + b"\0\0\0\x08"
            for number in range(1, 4001, 2)
        ),
    }
    with victim.unharmed():
        for data in frames.values():
            with socket.create_connection((host, int(port)), 5) as connection:
                connection.settimeout(5)
                try:
                    connection.sendall(data)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1 << 16):
                        pass
                except OSError:
                    pass
            assert victim.replica.healthy()


def test_connections_that_do_nothing(victim, tmp_path):
    host, _, port = victim.replica.address.rpartition(":")
    idle = []
    try:
        with honest(victim, tmp_path):
            for _ in range(500):
                idle.append(socket.create_connection((host, int(port)), 5))
            assert victim.replica.healthy()
            time.sleep(2)
    finally:
        for connection in idle:
            connection.close()


def test_a_thousand_names_of_channels_that_do_not_exist(victim, tmp_path):
    """Each is looked for in the store; the honest one is followed all the same."""

    async def attack() -> None:
        async with own_channel(victim.replica.address) as channel:
            calls = [channel.stream_stream(WATCH)() for _ in range(STREAMS)]
            for number, call in enumerate(calls):
                await call.write(subscribe_bytes(f"node-{number}", f"nothing-{number}"))
            await asyncio.sleep(4)
            await end(calls, [])

    with victim.unharmed(written=True, grown_bytes=200 * MIB), honest(victim, tmp_path):
        asyncio.run(attack())
