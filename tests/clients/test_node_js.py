"""A node in JavaScript, made from the protos alone: the protocol is not Python's."""

from __future__ import annotations

import importlib.util
import json
import queue
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from steering_service.client.active import UNSTEERED, identity_of
from steering_service.core.revocation import Revocations

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).parent / "node"
WHO = {"actor": "ada", "reason": "a test"}
FINGERPRINT = "a" * 64

# npm asks the network, once.
pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


def _service_tests():
    """What the service's tests start services and make artifacts with."""
    path = ROOT / "tests" / "service" / "conftest.py"
    spec = importlib.util.spec_from_file_location("service_conftest", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


service_tests = _service_tests()


class JavaScriptNode:
    """The process, and the lines that it prints."""

    def __init__(self, folder: Path, address: str, public_key: Path, node_id: str = "js-1") -> None:
        self._lines: queue.SimpleQueue[dict] = queue.SimpleQueue()
        self.seen: list[dict] = []
        self.process = subprocess.Popen(
            [
                *("node", str(folder / "subscribe.js"), "--protos", str(ROOT / "protos")),
                *("--address", address, "--channel", "prod", "--node", node_id),
                *("--trust", str(public_key), "--fingerprint", FINGERPRINT),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(json.loads(line))

    def wait_for(self, event: str, timeout_s: float = 30.0, **fields) -> dict:
        """The next line of an event with these fields."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(deadline - time.monotonic(), 0.01))
            except queue.Empty:
                pytest.fail(f"no {event} {fields}; it said {self.seen[-20:]}")
            self.seen.append(line)
            if line["event"] == event and fields.items() <= line.items():
                return line

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """The client with its dependencies."""
    for command in ("node", "npm"):
        if shutil.which(command) is None:
            pytest.skip(f"{command} is not installed; the JavaScript client needs Node.js and npm")
    folder = tmp_path_factory.mktemp("node-client")
    for name in ("package.json", "subscribe.js"):
        shutil.copy(SOURCE / name, folder)
    done = subprocess.run(
        ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    if done.returncode:
        pytest.skip(f"npm cannot install the client's packages here: {done.stderr.strip()[-500:]}")
    return folder


@pytest.fixture
def publisher(tmp_path):
    return service_tests.Publisher(tmp_path / "publisher")


@pytest.fixture
def service(tmp_path):
    service = service_tests.Service(tmp_path / "store").start()
    yield service
    service.kill()


@pytest.fixture
def operator(service):
    with service.operator() as operator:
        yield operator


@pytest.fixture
def node(installed, service, publisher):
    node = JavaScriptNode(installed, service.address, publisher.public_key)
    yield node
    node.stop()


def status_when(operator, condition, timeout_s=15.0):
    """The node's status at the service, once it is so."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = operator.nodes("prod")[0]
        if found and condition(found[0]):
            return found[0]
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def test_it_follows_three_promotes_and_the_service_sees_its_acks(
    operator, publisher, node, service
):
    # The last one comes in several parts.
    made = [service_tests.make_artifact(seed, width=w) for seed, w in enumerate((64, 64, 700_000))]
    for item in made:
        publisher.publish(operator, item)
    node.wait_for("heartbeat", head=0)
    for revision, (item, strength) in enumerate(zip(made, (1.0, -0.5, 1e-7), strict=True), start=1):
        operator.promote("prod", artifact=item.digest, strength=strength, **WHO)
        line = node.wait_for("ack", revision=revision)
        assert line["artifact"] == item.digest
        assert line["bytes"] == len(item.payload_bytes)
        # Both languages key a prefix cache alike.
        assert line["identity"] == identity_of(item, strength)
        status = status_when(operator, lambda s, r=revision: s.active_revision == r)
        assert status.identity == line["identity"]
        assert (status.node_id, status.model_fingerprint) == ("js-1", FINGERPRINT)
        assert status.client.startswith("steerage-node-js/")
    assert operator.nodes("prod")[1].converged == 1
    operator.promote("prod", enabled=False, **WHO)
    assert node.wait_for("ack", revision=4)["identity"] == UNSTEERED
    # A new replica at the same address: it comes back by itself, and misses nothing.
    service.kill()
    node.wait_for("interrupted")
    service.start()
    with service.operator() as again:
        again.promote("prod", enabled=True, **WHO)
        assert node.wait_for("ack", revision=5)["artifact"] == made[2].digest


def test_it_refuses_what_a_node_must_refuse(operator, publisher, node, tmp_path, service):
    stranger = service_tests.Publisher(tmp_path / "stranger")
    good, foreign, unsigned = (service_tests.make_artifact(seed) for seed in range(3))
    other_model = service_tests.make_artifact(3, fingerprint="b" * 64)
    publisher.publish(operator, good)
    publisher.publish(operator, other_model)
    stranger.publish(operator, foreign)
    operator.publish(unsigned, b"")
    operator.promote("prod", artifact=good.digest, strength=1.0, **WHO)
    node.wait_for("ack", revision=1)
    cases = [
        (foreign, "signature_untrusted"),
        (unsigned, "unsigned"),
        (other_model, "model_fingerprint"),
    ]
    for revision, (item, kind) in enumerate(cases, start=2):
        operator.promote("prod", artifact=item.digest, **WHO)
        node.wait_for("nack", revision=revision, kind=kind)
        status = status_when(operator, lambda s, r=revision: s.nack and s.nack.revision == r)
        assert (status.nack.kind, status.active_revision) == (kind, 1)
        assert status.refuses_head


def test_it_obeys_revocations(installed, publisher, tmp_path):
    service = service_tests.Service(tmp_path / "trusting", (str(publisher.public_key),)).start()
    item = service_tests.make_artifact(1)
    node = JavaScriptNode(installed, service.address, publisher.public_key)
    try:
        with service.operator() as operator:
            publisher.publish(operator, item)
            node.wait_for("heartbeat")
            revocations = Revocations(
                serial=1, floors={"prod": 2}, time="2026-11-22T10:00:00Z", **WHO
            )
            operator.revoke(publisher.signer.sign_revocations(revocations.to_bytes()))
            node.wait_for("revoked", serial=1)
            # An "off" below the floor is harmless, and everything above it is as before.
            operator.promote("prod", enabled=False, **WHO)
            node.wait_for("ack", revision=1)
            operator.promote("prod", artifact=item.digest, strength=1.0, enabled=True, **WHO)
            assert node.wait_for("ack", revision=2)["artifact"] == item.digest
            later = revocations.model_copy(update={"serial": 2, "artifacts": (item.digest,)})
            operator.revoke(publisher.signer.sign_revocations(later.to_bytes()))
            node.wait_for("revoked", serial=2, stopped=True)
            node.wait_for("nack", revision=2, kind="artifact_revoked")
            status = status_when(operator, lambda s: s.refuses_head)
            assert (status.active_revision, status.identity) == (0, UNSTEERED)
    finally:
        node.stop()
        service.kill()
