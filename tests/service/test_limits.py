"""How fast callers may be, how much a connection may hold, and calls that would never end."""

from __future__ import annotations

import threading

import grpc
import pytest
import secure
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from waiting import eventually

from steering_service.core.wire import KIND_METADATA
from steering_service.server import limits
from steering_service.server.access import Identity
from steering_service.server.identities import Identities
from steering_service.server.policy import Limits, Role
from steering_service.server.throttle import Bucket
from steering_service.v1 import (
    artifact_pb2_grpc,
    channel_pb2,
    channel_pb2_grpc,
    watch_pb2,
    watch_pb2_grpc,
)


def policy(extra=""):
    return secure.entry("alice", "operator") + secure.entry("bob", "operator") + extra


def bearer(token):
    return (("authorization", f"Bearer {token}"),)


def details(error):
    """The google.rpc.Status of an error: by type name."""
    data = dict(error.trailing_metadata())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(data)
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    found = {}
    for item in status.details:
        message = getattr(error_details_pb2, item.type_url.rpartition(".")[2])()
        assert item.Unpack(message)
        found[type(message).__name__] = message
    return found


def list_channels(channel, token=None):
    channel_pb2_grpc.ChannelServiceStub(channel).ListChannels(
        channel_pb2.ListChannelsRequest(),
        timeout=10,
        metadata=bearer(token) if token is not None else (),
    )


def refused(call):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = caught.value
    return error, dict(error.trailing_metadata() or ()).get(KIND_METADATA)


def test_each_identity_has_a_rate_of_its_own(guarded):
    # Slow enough that nothing comes back while the test runs.
    service = guarded(policy("[limits]\ncalls_per_s = 0.01\nburst = 5\n"))
    with service.channel() as channel:
        for _ in range(5):
            list_channels(channel, "alice")
        error, kind = refused(lambda: list_channels(channel, "alice"))
        assert (error.code(), kind) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "rate_limited")
        found = details(error)
        assert found["ErrorInfo"].reason == "rate_limited"
        assert found["ErrorInfo"].domain == "steerage"
        assert 50 < found["RetryInfo"].retry_delay.ToSeconds() <= 100
        list_channels(channel, "bob")
        health = health_pb2_grpc.HealthStub(channel)
        for _ in range(20):
            health.Check(health_pb2.HealthCheckRequest(), timeout=5)


def test_hosts_that_do_not_say_who_they_are_have_one_too(guarded):
    service = guarded(policy())
    with service.channel() as channel:
        seen = set()
        for _ in range(limits.UNKNOWN.burst + 50):
            error, kind = refused(lambda: list_channels(channel, "guess"))
            seen.add((error.code(), kind))
        assert seen == {
            (grpc.StatusCode.UNAUTHENTICATED, "token_unknown"),
            (grpc.StatusCode.RESOURCE_EXHAUSTED, "rate_limited"),
        }
        # Whoever is known is not held up by others on the same host.
        list_channels(channel, "alice")
    # One line each only as long as they are judged.
    assert len(service.events("rpc refused")) < limits.UNKNOWN.burst + 50


def watch(channel, token, node_id):
    subscribe = watch_pb2.Subscribe(node_id=node_id, channel="prod")
    stop = threading.Event()

    def requests():
        yield watch_pb2.WatchRequest(subscribe=subscribe)
        stop.wait()

    stream = watch_pb2_grpc.WatchServiceStub(channel).Watch(
        requests(), timeout=60, metadata=bearer(token)
    )
    stream.add_done_callback(lambda _: stop.set())
    next(stream)
    return stream


def test_watch_streams_are_counted(guarded):
    service = guarded(policy("[limits]\nwatches = 2\n"))
    with service.channel() as channel:
        first, second = (watch(channel, "alice", f"n{i}") for i in range(2))
        error, kind = refused(lambda: watch(channel, "alice", "n3"))
        assert (error.code(), kind) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "rate_limited")
        other = watch(channel, "bob", "n4")
        first.cancel()

        def room():
            try:
                return watch(channel, "alice", "n5")
            except grpc.RpcError:
                return None

        third = eventually(room)
        for stream in (second, third, other):
            stream.cancel()


def test_a_watch_ends_when_its_identity_is_taken_out(guarded):
    service = guarded(policy())
    with service.channel() as channel:
        alice, bob = (watch(channel, name, f"n-{name}") for name in ("alice", "bob"))
        service.policy_file.write_text(policy().replace(secure.sha256("alice"), "0" * 64))
        with pytest.raises(grpc.RpcError) as caught:
            for _ in alice:
                pass
        kind = dict(caught.value.trailing_metadata())[KIND_METADATA]
        assert (caught.value.code(), kind) == (grpc.StatusCode.UNAVAILABLE, "access_changed")
        error, kind = refused(lambda: watch(channel, "alice", "n-alice"))
        assert (error.code(), kind) == (grpc.StatusCode.UNAUTHENTICATED, "token_unknown")
        next(bob)
        bob.cancel()


def test_metadata_is_bounded(guarded):
    service = guarded(policy())
    with service.channel(options=(("grpc.absolute_max_metadata_size", 1 << 20),)) as channel:
        error, _ = refused(lambda: list_channels(channel, "x" * 100_000))
        assert error.code() in (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.INTERNAL,
        )
        list_channels(channel, "alice")


def test_one_connection_does_not_hold_all_streams(guarded):
    service = guarded()
    with service.channel() as channel:
        stubs = watch_pb2_grpc.WatchServiceStub(channel)
        stop = threading.Event()

        def requests(number):
            subscribe = watch_pb2.Subscribe(node_id=f"n{number}", channel="prod")
            yield watch_pb2.WatchRequest(subscribe=subscribe)
            stop.wait()

        call = channel.unary_unary("/steering_service.v1.ChannelService/ListChannels")
        streams = [
            channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=60)
            for _ in range(1023)
        ]
        for stream in streams:
            next(stream)
        # The last one that has room; then no other call does, on this connection.
        last = stubs.Watch(requests(0), timeout=60)
        next(last)
        error, _ = refused(lambda: call(b"", timeout=1))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        with service.channel(options=(("grpc.use_local_subchannel_pool", 1),)) as another:
            list_channels(another)
        stop.set()


def test_a_call_without_a_deadline_ends_all_the_same(guarded):
    # So short that a call is over its time as soon as it waits for anything.
    service = guarded(options={"unary_s": 1e-9})
    with service.channel() as channel:
        stub = channel_pb2_grpc.ChannelServiceStub(channel)
        request = channel_pb2.GetChannelRequest(channel="prod")
        for timeout in (None, 1e6):
            error, kind = refused(lambda timeout=timeout: stub.GetChannel(request, timeout=timeout))
            assert (error.code(), kind) == (grpc.StatusCode.UNAVAILABLE, "call_too_long")
            assert "RetryInfo" in details(error)


def test_a_publish_that_stalls_is_ended(guarded):
    service = guarded(options={"idle_s": 0.3})
    stop = threading.Event()

    def requests():
        stop.wait()
        yield from ()

    with service.channel() as channel:
        stub = artifact_pb2_grpc.ArtifactServiceStub(channel)
        error, kind = refused(lambda: stub.Publish(requests()))
        stop.set()
    assert (error.code(), kind) == (grpc.StatusCode.UNAVAILABLE, "stream_idle")


@given(
    st.floats(0.1, 1e4),
    st.integers(1, 1000),
    st.lists(st.floats(0, 100), min_size=1, max_size=200),
)
def test_a_bucket_never_gives_more_than_rate_and_burst(rate, burst, gaps):
    bucket = Bucket(burst, 0.0)
    now, taken = 0.0, 0
    for gap in gaps:
        now += gap
        wait_s = bucket.take(rate, burst, now)
        assert 0 <= wait_s <= 1 / rate
        taken += wait_s == 0
        assert taken <= burst + rate * now + 1e-6 * len(gaps)
        if wait_s:
            # It says when there is one.
            assert bucket.take(rate, burst, now + wait_s * (1 + 1e-9)) == 0
            now += wait_s * (1 + 1e-9)
            taken += 1


def test_what_is_remembered_is_bounded():
    meter = limits.Meter()
    for number in range(limits._MAX_HOSTS + 100):
        meter.take_unknown(f"host {number}")
    assert len(meter._hosts) == limits._MAX_HOSTS
    who = Identity("a", frozenset(Role), Identities(), limits=Limits())
    with meter.watching(who):
        assert meter._watches == {"a": 1}
    assert meter._watches == {}
