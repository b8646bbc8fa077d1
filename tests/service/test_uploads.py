"""Publishing in pieces: resumed on any replica, all or nothing, whoever dies meanwhile."""

from __future__ import annotations

import time

import grpc
import psutil
import pytest

from steering_service.client.connection import Connection
from steering_service.v1 import artifact_pb2

PIECE = 8 << 20
WIDTH = 5_000_000  # a payload of 20 MB: two pieces and a bit


@pytest.fixture
def large(publisher, artifact):
    item = artifact(7, width=WIDTH)
    return item, publisher.signer.sign(item.manifest_bytes)


def header(large, offset=0):
    item, signature = large
    return artifact_pb2.PublishRequest(
        header=artifact_pb2.PublishHeader(
            manifest=item.manifest_bytes, signature=signature, offset=offset
        )
    )


def chunks(data, start=0, stop=None):
    stop = len(data) if stop is None else stop
    for at in range(start, stop, 1 << 20):
        yield artifact_pb2.PublishRequest(chunk=data[at : min(at + (1 << 20), stop)])


def publish(connection, *requests):
    return connection.artifacts.Publish(iter(requests), timeout=60).digest


def kept(connection, large):
    request = artifact_pb2.GetUploadRequest(digest=large[0].digest)
    return connection.artifacts.GetUpload(request, timeout=10).offset


def interrupted(connection, large, data, num_bytes):
    """Send so much, wait until two pieces are kept, and break the stream."""

    def requests():
        yield header(large)
        yield from chunks(data, 0, num_bytes)
        deadline = time.monotonic() + 30
        while kept(connection, large) < 2 * PIECE:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        raise RuntimeError("the publisher goes away")

    with pytest.raises(grpc.RpcError):
        connection.artifacts.Publish(requests(), timeout=60)


def downloaded(connection, digest):
    request = artifact_pb2.DownloadRequest(digest=digest)
    return b"".join(part.chunk for part in connection.artifacts.Download(request, timeout=30))


def failure(call):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    kind = dict(caught.value.trailing_metadata())["steerage-error-kind"]
    return caught.value.code(), kind


def staged(service):
    folder = service.store / "uploads"
    # A killed writer's temporary file is for `steerage gc`.
    return [path for path in folder.rglob("*.part")] if folder.exists() else []


def test_a_publish_is_resumed_on_another_replica_after_a_kill(start, large):
    item, _ = large
    first, second = start(), start()
    with Connection(first.address) as here:
        assert kept(here, large) == 0
        interrupted(here, large, item.payload_bytes, 2 * PIECE + (1 << 20))
    first.kill()
    with Connection(second.address) as there:
        assert kept(there, large) == 2 * PIECE
        code, kind = failure(
            lambda: there.artifacts.GetManifest(
                artifact_pb2.GetManifestRequest(digest=item.digest), timeout=10
            )
        )
        assert (code, kind) == (grpc.StatusCode.NOT_FOUND, "no_artifact")
        rest = chunks(item.payload_bytes, 2 * PIECE)
        assert publish(there, header(large, 2 * PIECE), *rest) == item.digest
        assert kept(there, large) == 0
        assert downloaded(there, item.digest) == item.payload_bytes
    assert staged(second) == []


def test_wrong_pieces_are_removed_and_the_next_publish_is_whole(service, large):
    item, _ = large
    with Connection(service.address) as connection:
        wrong = bytes(PIECE) + item.payload_bytes[PIECE:]
        interrupted(connection, large, wrong, 2 * PIECE)
        rest = [*chunks(item.payload_bytes, 2 * PIECE)]
        assert failure(lambda: publish(connection, header(large, 2 * PIECE), *rest)) == (
            grpc.StatusCode.DATA_LOSS,
            "payload_digest",
        )
        assert staged(service) == []
        assert kept(connection, large) == 0
        assert not (service.store / "artifacts" / item.digest).exists()
        # Nobody need know: a publish from the start ends well, even over pieces of others.
        interrupted(connection, large, wrong, 2 * PIECE)
        assert publish(connection, header(large), *chunks(item.payload_bytes)) == item.digest
        assert downloaded(connection, item.digest) == item.payload_bytes


def test_an_offset_that_is_not_kept_is_a_conflict(service, large):
    item, _ = large
    size = len(item.payload_bytes)
    with Connection(service.address) as connection:
        for offset, expected in (
            (PIECE, (grpc.StatusCode.ABORTED, "upload_incomplete")),
            (size + 1, (grpc.StatusCode.INVALID_ARGUMENT, "publish_offset")),
        ):
            assert failure(lambda at=offset: publish(connection, header(large, at))) == expected
        # Too little and too much of what was missing.
        interrupted(connection, large, item.payload_bytes, 2 * PIECE)
        assert failure(lambda: publish(connection, header(large, 2 * PIECE))) == (
            grpc.StatusCode.DATA_LOSS,
            "payload_digest",
        )
        assert kept(connection, large) == 2 * PIECE
        rest = [*chunks(item.payload_bytes, 2 * PIECE), *chunks(b"x")]
        assert failure(lambda: publish(connection, header(large, 2 * PIECE), *rest)) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "publish_size",
        )
        assert kept(connection, large) == 2 * PIECE


@pytest.mark.parametrize("name", ["empty chunk", "second header"])
def test_a_stream_out_of_order_stores_nothing(service, large, name):
    item, _ = large
    odd = artifact_pb2.PublishRequest(chunk=b"") if name == "empty chunk" else header(large)
    with Connection(service.address) as connection:
        requests = [header(large), *chunks(item.payload_bytes, 0, 1 << 20), odd]
        assert failure(lambda: publish(connection, *requests)) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "publish_order",
        )
    assert staged(service) == []


def test_slow_publishers_cost_a_piece_of_memory_each(service, publisher, artifact):
    item = artifact(8, width=13_000_000)  # 52 MB
    large = item, publisher.signer.sign(item.manifest_bytes)
    process = psutil.Process(service.process.pid)
    with Connection(service.address) as connection:
        before = process.memory_info().rss
        done = []

        def requests():
            yield header(large)
            yield from chunks(item.payload_bytes, 0, 6 * PIECE + (1 << 20))
            while not done:
                time.sleep(0.05)

        calls = [connection.artifacts.Publish.future(requests(), timeout=60) for _ in range(4)]
        deadline = time.monotonic() + 50
        while kept(connection, large) < 6 * PIECE:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        grown = process.memory_info().rss - before
        done.append(True)
        for call in calls:
            call.cancel()
    # Each has sent 50 MB; kept is a piece, and what gRPC reads ahead.
    assert grown < 4 * 32 << 20
