"""The object store stops for a while: what is cached is served, writes fail soon, all heals."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from delivery import WHO, Reader, make_artifact, persist
from publishers import FINGERPRINT
from waiting import eventually

from steering_service.client.connection import Connection
from steering_service.client.subscription import Subscription
from steering_service.core.errors import SteeringError, Unavailable
from steering_service.v1 import artifact_pb2, watch_pb2
from store.channels import ChannelLog
from store.location import Location

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

OUTAGE_S = 60
# How long a write may take to fail, and the service to be whole again.
FAIL_S = 12
HEAL_S = 20


class Heartbeats(threading.Thread):
    """Listens to a stream, and measures the pauses between what it hears."""

    def __init__(self, address: str, channel: str) -> None:
        super().__init__(daemon=True)
        self.longest_s = 0.0
        self.heard = 0
        self.error: BaseException | None = None
        self.stop = threading.Event()
        self._connection = Connection(address)
        self._channel = channel

    def run(self) -> None:
        try:
            subscribe = watch_pb2.Subscribe(node_id="listener", channel=self._channel)
            requests = [watch_pb2.WatchRequest(subscribe=subscribe)]

            def asked():
                yield from requests
                self.stop.wait()

            last = time.monotonic()
            for _ in self._connection.watches.Watch(asked()):
                now = time.monotonic()
                self.longest_s = max(self.longest_s, now - last)
                last = now
                self.heard += 1
        except BaseException as error:
            self.error = None if self.stop.is_set() else error

    def close(self) -> None:
        self.stop.set()
        self._connection.close()
        self.join(10)


class Pulse(threading.Thread):
    """Asks for the health again and again; the longest that an answer took."""

    def __init__(self, replica) -> None:
        super().__init__(daemon=True)
        self.longest_s = 0.0
        self.failures: list[object] = []
        self.stop = threading.Event()
        self._replica = replica

    def run(self) -> None:
        while not self.stop.wait(0.2):
            begin = time.monotonic()
            try:
                if not self._replica.healthy():
                    self.failures.append("not serving")
            except Exception as error:
                self.failures.append(error)
            self.longest_s = max(self.longest_s, time.monotonic() - begin)


@pytest.fixture(params=["frozen", "killed"])
def outage(request, gateway):
    """Begin and end of the object store's absence."""
    begin, end = {
        "frozen": (gateway.freeze, gateway.thaw),
        "killed": (gateway.kill, gateway.restart),
    }[request.param]
    began = []

    def start():
        began.append(True)
        begin()

    def stop():
        began.clear()
        end()

    yield start, stop
    if began:
        end()


def timed(action):
    """What an action raised, and how long it took."""
    begin = time.monotonic()
    try:
        action()
    except SteeringError as error:
        return error, time.monotonic() - begin
    return None, time.monotonic() - begin


def test_reads_and_watches_go_on_without_the_object_store(
    bucket, outage, publisher, start_replica, tmp_path
):
    begin, end = outage
    replica = start_replica(bucket)
    pid = replica.process.pid
    artifact, later = make_artifact(1, width=600_000), make_artifact(2)
    with (
        replica.operator(deadline_s=FAIL_S) as operator,
        Subscription(
            replica.address, "prod", "node", tmp_path / "node", publisher.roots, FINGERPRINT
        ) as node,
    ):
        publisher.publish(operator, artifact)
        operator.promote("prod", artifact=artifact.digest, strength=1.0, **WHO)
        node.active.wait_for(1, 20)
        heartbeats, pulse = Heartbeats(replica.address, "prod"), Pulse(replica)
        with Reader(node.active) as reader:
            heartbeats.start()
            pulse.start()
            eventually(lambda: heartbeats.heard > 2, 10, "heartbeats")
            begin()
            began = time.monotonic()
            # More at once than a pool of threads would hold by accident.
            actions = {
                "promote": lambda: operator.promote(
                    "prod", strength=0.25, expected_revision=1, **WHO
                ),
                "promote a new one": lambda: operator.promote("new", expected_revision=0, **WHO),
                "publish": lambda: publisher.publish(operator, later),
                "list": lambda: list(operator.list()),
                "list channels": lambda: list(operator.channels()),
            }
            with ThreadPoolExecutor(12 * len(actions)) as pool:
                failing = [
                    (name, pool.submit(timed, action))
                    for name, action in actions.items()
                    for _ in range(12)
                ]
                rounds = 0
                while time.monotonic() - began < OUTAGE_S:
                    rounds += 1
                    read_cached(replica, artifact, publisher, tmp_path / f"fresh-{rounds}")
                    time.sleep(0.5)
                results = [(name, *future.result()) for name, future in failing]
            assert rounds > 5
            slowest = {name: max(s for n, _, s in results if n == name) for name in actions}
            kinds = {(name, getattr(error, "kind", None)) for name, error, _ in results}
            print(f"writes failed within {slowest} s: {kinds}")
            assert all(type(error) is Unavailable for _, error, _ in results), kinds
            # Said by the service, not by the client's own deadline.
            assert {kind for _, kind in kinds} <= {"object_store", "store_busy", "store_timeout"}
            assert max(slowest.values()) < FAIL_S
            assert replica.process.pid == pid
            assert replica.alive
            end()
            healed = time.monotonic()
            persist(lambda: operator.promote("prod", strength=0.5, **WHO), HEAL_S)
            print(f"healed after {time.monotonic() - healed:.1f} s")
            persist(lambda: publisher.publish(operator, later), HEAL_S)
            last = operator.channel("prod").revision
            node.active.wait_for(last, HEAL_S)
            # Whoever changes the bucket elsewhere is heard of again.
            log = ChannelLog(Location.open(bucket))
            log.append(
                "prod",
                expected_revision=last,
                artifact=None,
                strength=0.0,
                enabled=False,
                share=1.0,
                **WHO,
            )
            assert not node.active.wait_for(last + 1, HEAL_S).enabled
            log.verify("prod")
            pulse.stop.set()
            pulse.join()
            heartbeats.close()
        reader.check()
        print(f"longest pause {heartbeats.longest_s:.2f} s, health {pulse.longest_s:.2f} s")
        assert heartbeats.error is None
        # The interval is 0.3 s, and a node's patience three of them; the machine has its moments.
        assert heartbeats.longest_s < 3.0
        assert pulse.failures == []
        assert pulse.longest_s < 3.0
        assert replica.process.pid == pid


def read_cached(replica, artifact, publisher, folder) -> None:
    """Manifest, payload and a new node of a watched channel, each well before the store's time."""
    with Connection(replica.address) as connection:
        begin = time.monotonic()
        answer = connection.artifacts.GetManifest(
            artifact_pb2.GetManifestRequest(digest=artifact.digest), timeout=5
        )
        assert answer.manifest == artifact.manifest_bytes
        request = artifact_pb2.DownloadRequest(digest=artifact.digest, offset=100)
        chunks = [reply.chunk for reply in connection.artifacts.Download(request, timeout=5)]
        assert b"".join(chunks) == artifact.payload_bytes[100:]
        assert time.monotonic() - begin < 5
    with Subscription(
        replica.address, "prod", "node-2", folder, publisher.roots, FINGERPRINT
    ) as node:
        assert node.active.wait_for(1, 5).artifact.digest == artifact.digest
