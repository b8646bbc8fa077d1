"""Services that are away, silent or mad, disks that are full, and two nodes of one name."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import threading
import time
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
import rfc8785
import safetensors.numpy
from publishers import FINGERPRINT
from serving import serving
from waiting import eventually

from steering_service.client.connection import Connection
from steering_service.client.disk import try_lock
from steering_service.client.download import MAX_PAYLOAD_BYTES
from steering_service.client.fetch import ArtifactCache
from steering_service.client.state import StateFile
from steering_service.client.subscription import Subscription
from steering_service.core.errors import Corrupt, InvalidInput, Refused, Unavailable
from steering_service.core.wire import KIND_METADATA
from steering_service.v1 import (
    artifact_pb2,
    artifact_pb2_grpc,
    watch_pb2,
    watch_pb2_grpc,
)
from store.channels import ChannelLog
from store.location import Location
from store.registry import Registry

WHO = {"actor": "ada", "reason": "a test"}


@pytest.fixture
def subscribe(tmp_path, publisher):
    def make(address, *, cache=tmp_path / "cache"):
        return Subscription(address, "prod", "node-1", cache, publisher.roots, FINGERPRINT)

    return make


def test_a_service_that_is_never_there_holds_nobody_up(subscribe):
    began = time.monotonic()
    with subscribe("127.0.0.1:1") as node:
        eventually(lambda: node.status.last_error is not None)
        assert node.active.current.artifact is None
        assert not node.status.connected
    assert time.monotonic() - began < 5


class Doorway:
    """A port that leads to a service, or holds whoever comes without a word."""

    def __init__(self, target: str) -> None:
        self._target = ("127.0.0.1", int(target.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.open = threading.Event()
        self.held: list[socket.socket] = []
        self.to_client = 0
        self.hold_after: int | None = None
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if not self.open.is_set():
                self.held.append(near)
                continue
            far = socket.create_connection(self._target)
            for ends in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while chunk := source.recv(1 << 16):
                if sink.getpeername() != self._target:
                    self.to_client += len(chunk)
                    if self.hold_after is not None and self.to_client > self.hold_after:
                        self.held += (source, sink)
                        self.hold_after = None
                        return  # neither closed nor forwarded
                sink.sendall(chunk)
        except OSError:
            pass
        source.close()
        sink.close()

    def close(self) -> None:
        self._listener.close()
        for end in self.held:
            end.close()


@pytest.fixture
def doorway(service):
    door = Doorway(service.address)
    yield door
    door.close()


@pytest.mark.faults
def test_a_service_that_accepts_and_says_nothing_is_left_and_tried_again(
    doorway, operator, publisher, artifact, subscribe
):
    publisher.publish(operator, artifact())
    operator.promote("prod", artifact=artifact().digest, strength=1.0, **WHO)
    with subscribe(doorway.address) as node:
        eventually(lambda: node.status.last_error is not None, 30)
        assert node.status.last_error.startswith(("watch_silent", "rpc_unavailable"))
        doorway.open.set()
        assert node.active.wait_for(1, 30).artifact.digest == artifact().digest


def test_a_download_that_stalls_goes_on_over_another_connection(
    doorway, operator, publisher, artifact, subscribe, tmp_path
):
    large = artifact(width=2_000_000)
    publisher.publish(operator, large)
    operator.promote("prod", artifact=large.digest, strength=1.0, **WHO)
    doorway.hold_after = 3_000_000
    doorway.open.set()
    with subscribe(doorway.address) as node:
        # Nothing is closed: only its own patience tells the node that the connection is dead.
        assert node.active.wait_for(1, 30).artifact.digest == large.digest
        assert doorway.held
        eventually(lambda: not list((tmp_path / "cache").glob(".*.partial")))
    assert doorway.to_client < 3_000_000 + len(large.payload_bytes)


@pytest.mark.parametrize(
    "answer",
    [
        os.urandom(4096),
        b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
        # HTTP/2 settings, then a frame that claims 16 MB of nothing known.
        b"\x00\x00\x00\x04\x00\x00\x00\x00\x00" + b"\xff\xff\xff\xee\xff\x7f\xff\xff\xff" * 100,
    ],
    ids=["noise", "http1", "frames"],
)
def test_garbage_from_the_network_changes_nothing(subscribe, answer):
    listener = socket.create_server(("127.0.0.1", 0))
    served = threading.Semaphore(0)

    def serve():
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                try:
                    peer.sendall(answer)
                    served.release()
                    peer.settimeout(0.5)
                    while peer.recv(1 << 16):
                        pass
                except OSError:
                    pass

    threading.Thread(target=serve, daemon=True).start()
    try:
        with subscribe(f"127.0.0.1:{listener.getsockname()[1]}") as node:
            for _ in range(3):  # it comes again
                assert served.acquire(timeout=20)
            eventually(lambda: node.status.last_error is not None)
            assert node.active.current.revision == 0
    finally:
        listener.close()


class Garbler(grpc.GenericRpcHandler):
    """Answers a Watch with bytes that are no message."""

    def __init__(self) -> None:
        self.calls = 0

    def service(self, details):
        def watch(requests, context):
            self.calls += 1
            yield b"\x0a\xff\xff\xff\xff\xff"
            time.sleep(1)

        return grpc.stream_stream_rpc_method_handler(watch)


def test_messages_that_do_not_parse_end_the_stream_only(subscribe):
    garbler = Garbler()
    with (
        serving(lambda server: server.add_generic_rpc_handlers((garbler,))) as address,
        subscribe(address) as node,
    ):
        eventually(lambda: garbler.calls > 2)
        eventually(lambda: node.status.last_error is not None)
        assert node.active.current.revision == 0


class Shop(artifact_pb2_grpc.ArtifactServiceServicer):
    """Gives a signed manifest, and payloads as it likes."""

    def __init__(self, manifest: bytes, signature: bytes, chunks) -> None:
        self.manifest, self.signature, self.chunks = manifest, signature, chunks
        self.sent = 0
        self.manifest_delay_s = 0.0

    def GetManifest(self, request, context):
        time.sleep(self.manifest_delay_s)
        return artifact_pb2.GetManifestResponse(manifest=self.manifest, signature=self.signature)

    def Download(self, request, context):
        for offset, chunk in self.chunks:
            yield artifact_pb2.DownloadResponse(offset=offset, chunk=chunk)
            self.sent += len(chunk)


def endless():
    offset = 0
    while True:
        yield offset, bytes(1 << 20)
        offset += 1 << 20


def altered(publisher, item, **payload):
    """The manifest of an artifact, with another payload, signed."""
    record = json.loads(item.manifest_bytes)
    record["payload"] |= payload
    manifest = rfc8785.dumps(record)
    return manifest, publisher.signer.sign(manifest)


def digest_of(manifest):
    import hashlib

    return hashlib.sha256(manifest).hexdigest()


def fetch(shop, publisher, folder):
    cache = ArtifactCache(folder, trust_roots=publisher.roots)
    with (
        serving(
            lambda server: artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(shop, server)
        ) as address,
        Connection(address) as connection,
    ):
        return cache.fetch(digest_of(shop.manifest), connection)


@pytest.mark.parametrize("size", [4 << 30, MAX_PAYLOAD_BYTES + 1])
def test_a_payload_that_is_said_to_be_huge_is_not_asked_for(publisher, artifact, tmp_path, size):
    shop = Shop(*altered(publisher, artifact(), size=size), endless())
    shop.manifest_delay_s = 1.0
    with pytest.raises(InvalidInput) as caught:
        fetch(shop, publisher, tmp_path / "cache")
    assert caught.value.kind == "payload_size"
    # What comes in before the manifest is known has an end.
    assert shop.sent < 32 << 20
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("chunks", "error", "kind"),
    [
        (lambda data: endless(), Corrupt, "download_chunk"),
        (lambda data: [(0, data + b"x")], Corrupt, "download_chunk"),
        (lambda data: [(1, data)], Corrupt, "download_chunk"),
        (lambda data: [(0, b"")], Corrupt, "download_chunk"),
        (lambda data: [(0, data[:50]), (49, data[49:])], Corrupt, "download_chunk"),
        (lambda data: [(0, data[:50])], Unavailable, "download_short"),
        (lambda data: [], Unavailable, "download_short"),
        (lambda data: [(0, bytes(len(data)))], Corrupt, "payload_digest"),
    ],
)
@pytest.mark.parametrize("delay_s", [0.0, 0.2])
def test_parts_that_were_not_asked_for(publisher, artifact, tmp_path, chunks, error, kind, delay_s):
    item = artifact()
    shop = Shop(
        item.manifest_bytes,
        publisher.signer.sign(item.manifest_bytes),
        chunks(item.payload_bytes),
    )
    shop.manifest_delay_s = delay_s
    with pytest.raises(error) as caught:
        fetch(shop, publisher, tmp_path / "cache")
    assert caught.value.kind == kind
    # At most the part that was right, to go on from.
    for left in (tmp_path / "cache").glob("*"):
        assert left.name == f".{item.digest}.partial"
        assert left.read_bytes() == item.payload_bytes[:50]


class Gate(Shop):
    """Says no to one of the two calls: a proxy, which tells no kind, or the service."""

    def __init__(self, *arguments, call, code, kind) -> None:
        super().__init__(*arguments)
        self.call, self.code, self.kind = call, code, kind

    def _pass(self, call, context) -> None:
        if call == self.call:
            if self.kind:
                context.set_trailing_metadata(((KIND_METADATA, self.kind),))
            context.abort(self.code, "no")

    def GetManifest(self, request, context):
        self._pass("GetManifest", context)
        return super().GetManifest(request, context)

    def Download(self, request, context):
        self._pass("Download", context)
        yield from super().Download(request, context)


@pytest.mark.parametrize("call", ["GetManifest", "Download"])
@pytest.mark.parametrize(
    ("code", "kind", "error"),
    [
        # What a proxy's 401, 403 and 404 become.
        (grpc.StatusCode.UNAUTHENTICATED, None, Unavailable),
        (grpc.StatusCode.PERMISSION_DENIED, None, Unavailable),
        (grpc.StatusCode.UNIMPLEMENTED, None, Unavailable),
        (grpc.StatusCode.UNAUTHENTICATED, "token_unknown", Unavailable),
        (grpc.StatusCode.PERMISSION_DENIED, "access_model", Unavailable),
        (grpc.StatusCode.FAILED_PRECONDITION, "artifact_revoked", Refused),
        (grpc.StatusCode.INVALID_ARGUMENT, "digest", InvalidInput),
    ],
)
def test_only_what_is_said_of_the_artifact_is_final(
    publisher, artifact, tmp_path, call, code, kind, error
):
    item = artifact()
    signature = publisher.signer.sign(item.manifest_bytes)
    chunks = [(0, item.payload_bytes)]
    gate = Gate(item.manifest_bytes, signature, chunks, call=call, code=code, kind=kind)
    with pytest.raises(error) as caught:
        fetch(gate, publisher, tmp_path / "cache")
    assert caught.value.kind == (kind or f"rpc_{code.name.lower()}")


def test_a_vector_that_is_not_finite_is_refused(service, operator, publisher, artifact, subscribe):
    """Past the service's own check, as who has the bucket's keys and a publisher's could do."""
    good, item = artifact(1), artifact(2)
    publisher.publish(operator, good)
    operator.promote("prod", artifact=good.digest, strength=1.0, **WHO)
    name, vector = next(iter(safetensors.numpy.load(item.payload_bytes).items()))
    payload = safetensors.numpy.save({name: np.where(vector > 1, np.nan, vector)})
    manifest, signature = altered(publisher, item, sha256=digest_of(payload), size=len(payload))
    location = Location.open(str(service.store))
    digest = Registry(location).publish(manifest, payload, signature)
    with subscribe(service.address) as node:
        node.active.wait_for(1, 5)
        ChannelLog(location).append(
            "prod",
            expected_revision=1,
            artifact=digest,
            strength=1.0,
            enabled=True,
            share=1.0,
            actor="eve",
            reason="mischief",
        )
        eventually(lambda: node.status.refused_revision == 2)
        assert node.status.last_error.startswith("direction_vector")
        assert node.active.current.artifact.digest == good.digest


def test_a_log_that_was_turned_back_is_refused(
    service, operator, publisher, artifact, subscribe, tmp_path
):
    publisher.publish(operator, artifact())
    for strength in (1.0, 0.5, 0.25):
        operator.promote("prod", artifact=artifact().digest, strength=strength, **WHO)
    with subscribe(service.address) as node:
        node.active.wait_for(3, 5)
        eventually((tmp_path / "cache/state/node-1/prod.json").exists)
        service.kill()
        (service.store / "channels/prod/00000003.json").unlink()
        service.start()
        eventually(lambda: node.status.refused_revision == 2, 30)
        assert node.status.last_error.startswith("revision_order")
        assert node.active.current.strength == 0.25
    with subscribe(service.address) as node:  # and after a restart
        eventually(lambda: node.status.refused_revision == 2, 30)
        assert node.active.current.strength == 0.25


def test_what_cannot_be_restored_still_keeps_older_revisions_out(
    service, operator, publisher, artifact, subscribe, tmp_path
):
    item = artifact()
    publisher.publish(operator, item)
    for strength in (1.0, 0.5):
        operator.promote("prod", artifact=item.digest, strength=strength, **WHO)
    with subscribe(service.address) as node:
        node.active.wait_for(2, 5)
        eventually((tmp_path / "cache/state/node-1/prod.json").exists)
    (tmp_path / "cache" / item.digest / "payload.safetensors").write_bytes(b"damaged")
    service.kill()
    second = service.store / "channels/prod/00000002.json"
    kept = second.read_bytes()
    second.unlink()
    service.start()
    with subscribe(service.address) as node:
        eventually(lambda: node.status.refused_revision == 1, 30)
        assert node.active.current.artifact is None
        service.kill()
        second.write_bytes(kept)
        service.start()
        assert node.active.wait_for(2, 30).strength == 0.5


@contextmanager
def small_disk(folder, options):
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("kind", ["no folder", "full", "read-only"])
def test_a_disk_that_refuses_does_not_keep_a_node_from_following(
    service, operator, publisher, artifact, subscribe, tmp_path, kind
):
    item = artifact(width=500_000)
    publisher.publish(operator, item)
    operator.promote("prod", artifact=item.digest, strength=1.0, **WHO)

    def follow(cache):
        with subscribe(service.address, cache=cache) as node:
            assert node.active.wait_for(1, 10).artifact.digest == item.digest
            eventually(lambda: node.status.disk_error is not None)
            eventually(lambda: operator.nodes("prod")[1].converged == 1)
            operator.promote("prod", enabled=False, **WHO)
            assert node.active.wait_for(2, 10).artifact is None
            assert node.status.last_error is None

    if kind == "no folder":
        (tmp_path / "file").write_bytes(b"")
        follow(tmp_path / "file" / "cache")
        return
    options = "size=256k" if kind == "full" else "size=64m,ro"
    with small_disk(tmp_path / "disk", options) as folder:
        follow(folder / "cache" if kind == "full" else folder)


def test_a_disk_with_room_again_is_written_to(
    service, operator, publisher, artifact, subscribe, tmp_path
):
    item = artifact()
    publisher.publish(operator, item)
    operator.promote("prod", artifact=item.digest, strength=1.0, **WHO)
    (tmp_path / "cache").write_bytes(b"in the way")
    with subscribe(service.address) as node:
        node.active.wait_for(1, 10)
        eventually(lambda: node.status.disk_error is not None)
        (tmp_path / "cache").unlink()
        operator.promote("prod", strength=0.5, **WHO)
        node.active.wait_for(2, 10)
        eventually(lambda: node.status.disk_error is None)
    service.kill()
    with subscribe(service.address) as node:
        assert node.active.current.strength == 0.5


def test_a_lock_that_is_not_given_back_holds_nobody_up(
    service, operator, publisher, artifact, tmp_path
):
    """Another process of this node was stopped in the middle of a write."""
    publisher.publish(operator, artifact())
    lock = tmp_path / "cache/state/node-1/prod.lock"
    held = try_lock(lock)
    try:
        with Subscription(
            service.address,
            "prod",
            "node-1",
            tmp_path / "cache",
            publisher.roots,
            FINGERPRINT,
            telemetry_s=0.2,
        ) as node:
            operator.promote("prod", artifact=artifact().digest, strength=1.0, **WHO)
            node.active.wait_for(1, 10)
            eventually(lambda: node.status.disk_error is not None)
            assert str(lock) in node.status.disk_error
            operator.promote("prod", enabled=False, **WHO)
            assert not node.active.wait_for(2, 10).enabled
            eventually(lambda: operator.nodes("prod")[1].converged == 1)
            os.close(held)
            held = None
            # Tried again by itself.
            eventually(lambda: node.status.disk_error is None)
            assert StateFile(lock.with_suffix(".json")).read().revision == 2
    finally:
        if held is not None:
            os.close(held)


def test_two_of_one_name_are_warned_and_both_follow(
    service, operator, publisher, artifact, subscribe, caplog, tmp_path
):
    item = artifact()
    publisher.publish(operator, item)
    with caplog.at_level(logging.WARNING), subscribe(service.address) as one:
        assert "node id in use" not in caplog.messages
        with subscribe(service.address) as two:
            assert "node id in use" in caplog.messages
            for revision in range(1, 6):
                operator.promote("prod", artifact=item.digest, strength=revision / 5, **WHO)
            for node in (one, two):
                assert node.active.wait_for(5, 10).strength == 1.0
    state = json.loads((tmp_path / "cache/state/node-1/prod.json").read_text())
    assert state["revision"] == 5
    caplog.clear()
    with caplog.at_level(logging.WARNING), subscribe(service.address):
        assert "node id in use" not in caplog.messages


class Hoarder(watch_pb2_grpc.WatchServiceServicer):
    """Tells absurd intervals and floods with heartbeats."""

    def Watch(self, request_iterator, context):
        for _ in range(2000):
            yield watch_pb2.WatchResponse(
                heartbeat=watch_pb2.Heartbeat(interval_ms=(1 << 32) - 1, head_revision=1 << 63)
            )
        yield watch_pb2.WatchResponse(
            assignment=watch_pb2.Assignment(channel="prod", revision=(1 << 64) - 1, nonce=1)
        )
        time.sleep(1)


def test_absurd_numbers_do_no_harm(subscribe):
    with (
        serving(
            lambda server: watch_pb2_grpc.add_WatchServiceServicer_to_server(Hoarder(), server)
        ) as address,
        subscribe(address) as node,
    ):
        assert node.active.wait_for((1 << 64) - 1, 20).artifact is None
