"""Callers that are known and may not, and callers that guess: nothing of theirs is written."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time

import grpc
import pytest
from attack import DOCUMENTED, send
from delivery import Replica, contents, make_artifact, pss_bytes
from publishers import Publisher

from steering_service.v1 import artifact_pb2, channel_pb2, node_pb2, watch_pb2

NAMES = {
    "rita": "reader",
    "paul": "publisher",
    "pia": "publisher",
    "olga": "operator",
    "adam": "auditor",
}


def policy(channels: str) -> str:
    """Everybody's token is the name three times over."""
    return "\n".join(
        f'[[identity]]\nname = "{name}"\nroles = ["{role}"]\nchannels = ["{channels}"]\n'
        f'token_sha256 = "{hashlib.sha256((name * 3).encode()).hexdigest()}"'
        for name, role in NAMES.items()
    )


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A service with a policy, an artifact and a channel `prod`; and its publisher."""
    folder = tmp_path_factory.mktemp("guarded")
    publisher = Publisher(folder / "keys")
    access = folder / "access.toml"
    access.write_text(policy("prod*"))
    replica = Replica(str(folder / "store"), folder / "log", (str(publisher.public_key),))
    replica.options["access_policy"] = str(access)
    replica.start()
    item = make_artifact(1)
    with grpc.insecure_channel(replica.address) as channel:
        code, _, details = call(channel, "paul", "Publish", *publish_messages(publisher, item))
        assert code is grpc.StatusCode.OK, details
        code, _, details = call(channel, "olga", "Promote", promote(item.digest, 0))
        assert code is grpc.StatusCode.OK, details
    yield replica, publisher, item
    replica.kill()


SERVICES = {
    "Publish": "ArtifactService",
    "Revoke": "ArtifactService",
    "GetManifest": "ArtifactService",
    "Download": "ArtifactService",
    "Promote": "ChannelService",
    "Rollback": "ChannelService",
    "Approve": "ChannelService",
    "Watch": "WatchService",
    "ListNodes": "NodeService",
}


def call(channel, name, method, *messages, timeout_s=20):
    """One call with somebody's token."""
    path = f"/steering_service.v1.{SERVICES[method]}/{method}"
    data = tuple(message.SerializeToString() for message in messages)
    metadata = (("authorization", f"Bearer {name * 3}"),)
    return send(channel, path, data, timeout_s, metadata=metadata)


def publish_messages(publisher, item):
    header = artifact_pb2.PublishHeader(
        manifest=item.manifest_bytes, signature=publisher.sign(item)
    )
    yield artifact_pb2.PublishRequest(header=header)
    for at in range(0, len(item.payload_bytes), 1 << 20):
        yield artifact_pb2.PublishRequest(chunk=item.payload_bytes[at : at + (1 << 20)])


def promote(digest, revision, **fields):
    fields = {"channel": "prod", "strength": 1.0, "reason": "a test"} | fields
    return channel_pb2.PromoteRequest(artifact=digest, expected_revision=revision, **fields)


def test_whoever_may_not_writes_nothing(guarded):
    """Requests that would be right from somebody else."""
    replica, publisher, item = guarded
    other = make_artifact(2)
    rollback = channel_pb2.RollbackRequest(channel="prod", expected_revision=1, reason="a test")
    approve = channel_pb2.ApproveRequest(channel="prod", proposal_id="0" * 16)
    attempts = [
        *[(name, "Promote", promote(item.digest, 1)) for name in ("rita", "paul", "adam")],
        *[(name, "Rollback", rollback) for name in ("rita", "paul", "adam")],
        *[(name, "Approve", approve) for name in ("rita", "paul", "adam")],
        *[
            (name, "Publish", *publish_messages(publisher, other))
            for name in ("rita", "olga", "adam")
        ],
        *[
            (name, "Revoke", artifact_pb2.RevokeRequest(envelope=b"{}"))
            for name in ("rita", "adam")
        ],
        # Known and allowed, but not with this channel, or as somebody else.
        ("olga", "Promote", promote(item.digest, 0, channel="other")),
        ("olga", "Promote", promote(item.digest, 1, actor="rita")),
        ("olga", "ListNodes", node_pb2.ListNodesRequest(channel="other")),
        ("rita", "Watch", watch_pb2.WatchRequest(subscribe={"node_id": "n", "channel": "other"})),
        ("paul", "Watch", watch_pb2.WatchRequest(subscribe={"node_id": "n", "channel": "prod"})),
        ("adam", "Watch", watch_pb2.WatchRequest(subscribe={"node_id": "n", "channel": "prod"})),
    ]
    before = contents(replica.store)
    with grpc.insecure_channel(replica.address) as channel:
        for name, method, *messages in attempts:
            code, kind, details = call(channel, name, method, *messages)
            assert code is grpc.StatusCode.PERMISSION_DENIED, (name, method, details)
            assert kind
    assert contents(replica.store) == before
    assert replica.healthy()


def test_guessing_tokens_is_slow_and_costs_others_nothing(guarded):
    replica, _, item = guarded
    request = artifact_pb2.GetManifestRequest(digest=item.digest)
    codes = set()
    stop = threading.Event()

    def guess():
        with grpc.insecure_channel(replica.address) as channel:
            for number in itertools.count():
                if stop.is_set():
                    return
                codes.add(call(channel, f"guess-{number}", "GetManifest", request)[0])

    threads = [threading.Thread(target=guess) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        with grpc.insecure_channel(replica.address) as channel:
            longest = 0.0
            for _ in range(20):
                begin = time.monotonic()
                code, _, details = call(channel, "rita", "GetManifest", request)
                longest = max(longest, time.monotonic() - begin)
                assert code is grpc.StatusCode.OK, details
                time.sleep(0.05)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert codes == {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert longest < 5


def test_one_caller_cannot_take_every_publishers_place(guarded):
    """Slow-loris: forty publishes of one caller trickle; another caller gets through at once."""
    replica, publisher, _ = guarded
    slow, quick = make_artifact(7, width=100_000), make_artifact(8)
    stop = threading.Event()
    codes = []

    def trickle():
        header = next(publish_messages(publisher, slow))
        yield header.SerializeToString()
        for at in itertools.count():
            chunk = artifact_pb2.PublishRequest(chunk=slow.payload_bytes[at : at + 1])
            yield chunk.SerializeToString()
            if stop.wait(0.5):
                return

    before = pss_bytes(replica.process.pid)
    path = "/steering_service.v1.ArtifactService/Publish"
    metadata = (("authorization", "Bearer " + "paul" * 3),)
    with grpc.insecure_channel(replica.address) as channel:
        calls = [
            channel.stream_stream(path)(trickle(), metadata=metadata, timeout=60) for _ in range(40)
        ]
        time.sleep(1)
        begin = time.monotonic()
        code, _, details = call(channel, "pia", "Publish", *publish_messages(publisher, quick))
        print(f"an honest publish took {time.monotonic() - begin:.1f} s")
        stop.set()
        for slow_call in calls:
            if slow_call.done():
                codes.append(slow_call.code())
            slow_call.cancel()
    assert code is grpc.StatusCode.OK, details
    assert set(codes) <= DOCUMENTED
    assert pss_bytes(replica.process.pid) - before < 64 << 20
    assert slow.digest not in str(contents(replica.store).keys())


def test_one_reader_cannot_take_every_downloads_place(guarded):
    """A hundred and fifty downloads that nobody reads; another caller's is answered at once."""
    replica, publisher, _ = guarded
    item = make_artifact(9, width=4_000_000)
    request = artifact_pb2.DownloadRequest(digest=item.digest)
    path = "/steering_service.v1.ArtifactService/Download"
    metadata = (("authorization", "Bearer " + "rita" * 3),)
    with grpc.insecure_channel(replica.address) as channel:
        code, _, details = call(channel, "paul", "Publish", *publish_messages(publisher, item))
        assert code is grpc.StatusCode.OK, details
        channels = [
            grpc.insecure_channel(replica.address, [("grpc.use_local_subchannel_pool", 1)])
            for _ in range(150)
        ]
        calls = [
            each.unary_stream(path)(request.SerializeToString(), metadata=metadata, timeout=60)
            for each in channels
        ]
        time.sleep(2)
        begin = time.monotonic()
        code, _, details = call(channel, "olga", "Download", request)
        print(f"an honest download took {time.monotonic() - begin:.1f} s")
        for each in calls:
            each.cancel()
        for each in channels:
            each.close()
    assert code is grpc.StatusCode.OK, details
    assert replica.healthy()
