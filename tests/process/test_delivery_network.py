"""Broken networks between a node and its service: it keeps what it runs and converges after."""

from __future__ import annotations

import time
from functools import partial

import pytest
from delivery import WHO, Reader, make_artifact
from network import FINE, Fault, Proxy
from publishers import FINGERPRINT
from serving import serving
from waiting import eventually

from steering_service.client.subscription import Subscription
from steering_service.v1 import artifact_pb2, artifact_pb2_grpc, watch_pb2, watch_pb2_grpc

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

# 4 MB: several messages of 1 MiB, so that a transfer has a middle.
WIDTH = 1_000_000


@pytest.fixture
def proxy():
    opened = []

    def make(target: str, fault: Fault = FINE) -> Proxy:
        opened.append(Proxy(target, fault))
        return opened[-1]

    yield make
    for item in opened:
        item.close()


@pytest.fixture
def subscribe(publisher, tmp_path):
    def make(address: str) -> Subscription:
        return Subscription(
            address, "prod", "node-1", tmp_path / "cache", publisher.roots, FINGERPRINT
        )

    return make


@pytest.mark.parametrize(
    ("fault", "heal_s"),
    [
        # The bound is the client's longest pause before it connects again (10 s), and room.
        pytest.param(Fault(held=True), 20, id="holds everything"),
        pytest.param(Fault(lost=True), 20, id="loses everything"),
        pytest.param(Fault(refuse=True), 20, id="refuses connections"),
        pytest.param(Fault(cut_after=100), 20, id="ends every connection after 100 bytes"),
        pytest.param(Fault(reset_after=100), 20, id="resets every connection after 100 bytes"),
        pytest.param(Fault(cut_after=300_000), 20, id="ends every download"),
        pytest.param(Fault(reset_after=300_000), 20, id="resets every download"),
        pytest.param(Fault(stall_after=100), 30, id="stalls every connection"),
        # A stalled download is found out by the keepalive: 10 s, and 10 s for its answer.
        pytest.param(Fault(stall_after=300_000), 40, id="stalls every download"),
    ],
)
def test_a_node_keeps_its_last_good_artifact_and_converges_after(
    start_replica, publisher, proxy, subscribe, fault, heal_s
):
    service = start_replica()
    one, two, three = (make_artifact(seed, width=WIDTH) for seed in (1, 2, 3))
    link = proxy(service.address)
    with service.operator() as operator, subscribe(link.address) as node:
        for item in (one, two, three):
            publisher.publish(operator, item)
        operator.promote("prod", artifact=one.digest, strength=1.0, **WHO)
        node.active.wait_for(1, 20)
        with Reader(node.active) as reader:
            link.fault = fault
            if fault.refuse or fault.cut_after or fault.reset_after:
                link.reset()
            operator.promote("prod", artifact=two.digest, strength=2.0, **WHO)
            operator.promote("prod", artifact=three.digest, strength=3.0, **WHO)
            # Long enough that the node notices, tries again and fails again.
            begin = time.monotonic()
            while time.monotonic() - begin < 6:
                assert node.active.current.revision in (1, 2, 3)
                assert node.active.current.artifact is not None
                if node.active.current.revision == 1:
                    assert node.active.current.artifact.digest == one.digest
                time.sleep(0.05)
            during = node.active.current
            if not (fault.cut_after or fault.reset_after or fault.stall_after):
                assert during.revision == 1, "something passed a dead link"
            link.fault = FINE
            begin = time.monotonic()
            assert node.active.wait_for(3, heal_s).artifact.digest == three.digest
            print(f"{fault}: converged after {time.monotonic() - begin:.1f} s")
            eventually(lambda: node.status.connected, heal_s, "connected")
            assert node.active.current.strength == 3.0
        reader.check()
    assert service.alive
    assert service.healthy()


def test_every_download_ends_although_every_connection_is_cut(
    start_replica, publisher, proxy, subscribe
):
    """Each connection carries at most 1.5 MB of 4: only what is resumed ever ends."""
    service = start_replica()
    artifact = make_artifact(1, width=WIDTH)
    link = proxy(service.address, Fault(reset_after=1_500_000))
    with service.operator() as operator, subscribe(link.address) as node:
        publisher.publish(operator, artifact)
        operator.promote("prod", artifact=artifact.digest, strength=1.0, **WHO)
        assert node.active.wait_for(1, 60).artifact.digest == artifact.digest
    assert link.connections > 2


def test_two_seconds_of_latency_only_delay(start_replica, publisher, proxy, subscribe):
    """Heartbeats are late by as much as everything else: the stream is not taken for dead."""
    service = start_replica(heartbeat_s=1.5)
    artifact = make_artifact(1, width=WIDTH)
    link = proxy(service.address, Fault(delay_s=2.0))
    with service.operator() as operator, subscribe(link.address) as node:
        publisher.publish(operator, artifact)
        operator.promote("prod", artifact=artifact.digest, strength=1.0, **WHO)
        # Connect, subscribe, manifest and payload are a round trip of 4 s each.
        node.active.wait_for(1, 60)
        operator.promote("prod", enabled=False, **WHO)
        begin = time.monotonic()
        node.active.wait_for(2, 30)
        print(f"off after {time.monotonic() - begin:.1f} s")
        assert time.monotonic() - begin < 8
        assert node.status.connected
    assert link.connections <= 2


def test_a_flapping_network_ends_on_the_last_revision(start_replica, publisher, proxy, subscribe):
    service = start_replica()
    artifacts = [make_artifact(seed, width=WIDTH) for seed in range(2)]
    link = proxy(service.address)
    faults = [
        *(Fault(held=True), Fault(reset_after=200_000), Fault(refuse=True), Fault(lost=True)),
        *(Fault(cut_after=5000), Fault(delay_s=0.2)),
    ]
    with service.operator() as operator, subscribe(link.address) as node:
        for item in artifacts:
            publisher.publish(operator, item)
        with Reader(node.active) as reader:
            for revision in range(1, 25):
                link.fault = faults[revision % len(faults)] if revision % 2 else FINE
                if revision % 5 == 0:
                    link.reset()
                digest = artifacts[revision % 2].digest
                operator.promote("prod", artifact=digest, strength=revision / 24, **WHO)
                time.sleep(0.3)
                deployment = node.active.current
                if deployment.artifact is not None:
                    assert deployment.artifact.digest == artifacts[deployment.revision % 2].digest
                    assert deployment.strength == deployment.revision / 24
            link.fault = FINE
            assert node.active.wait_for(24, 30).artifact.digest == artifacts[0].digest
        reader.check()


class Stalling(artifact_pb2_grpc.ArtifactServiceServicer, watch_pb2_grpc.WatchServiceServicer):
    """A real service that sends half of a payload, and nothing more on that call."""

    def __init__(self, artifact, signature) -> None:
        self._artifact = artifact
        self._signature = signature
        self.downloads = 0

    def GetManifest(self, request, context):
        return artifact_pb2.GetManifestResponse(
            manifest=self._artifact.manifest_bytes,
            signature=self._signature,
            payload_size=len(self._artifact.payload_bytes),
        )

    def Download(self, request, context):
        self.downloads += 1
        half = len(self._artifact.payload_bytes) // 2
        yield artifact_pb2.DownloadResponse(offset=0, chunk=self._artifact.payload_bytes[:half])
        while context.is_active():
            time.sleep(0.05)

    def Watch(self, request_iterator, context):
        next(request_iterator)
        state = {"channel": "prod", "strength": 1.0, "enabled": True, "share": 1.0}
        yield watch_pb2.WatchResponse(heartbeat=watch_pb2.Heartbeat(interval_ms=60_000))
        yield watch_pb2.WatchResponse(
            assignment=watch_pb2.Assignment(
                **state, revision=1, nonce=1, artifact=self._artifact.digest
            )
        )
        while not self.downloads:
            time.sleep(0.02)
        time.sleep(0.5)
        yield watch_pb2.WatchResponse(
            assignment=watch_pb2.Assignment(**state | {"enabled": False}, revision=2, nonce=2)
        )
        for _ in request_iterator:
            pass


def test_off_overtakes_a_download_that_stalls(publisher, subscribe):
    artifact = make_artifact(1, width=WIDTH)
    stalling = Stalling(artifact, publisher.sign(artifact))
    add = (
        artifact_pb2_grpc.add_ArtifactServiceServicer_to_server,
        watch_pb2_grpc.add_WatchServiceServicer_to_server,
    )
    with (
        serving(*(partial(each, stalling) for each in add)) as address,
        subscribe(address) as node,
    ):
        eventually(lambda: stalling.downloads, 10, "the download")
        begin = time.monotonic()
        off = node.active.wait_for(2, 60)
        print(f"off after {time.monotonic() - begin:.1f} s")
        assert not off.enabled
        assert time.monotonic() - begin < 5
