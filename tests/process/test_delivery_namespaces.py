"""A service on another network, by TLS, whose cable is pulled: two network namespaces."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import uuid

import pytest
from certificates import Authority
from delivery import SERVE, TIMES, WHO, Reader, make_artifact
from publishers import FINGERPRINT
from waiting import eventually

from steering_service.client.credentials import Credentials
from steering_service.client.operator import Operator
from steering_service.client.subscription import Subscription

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

NEAR, FAR = "10.213.77.1", "10.213.77.2"
TOKEN = "a-token-for-this-test-only"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture
def cable():
    """Two ends of a cable, one of them in a namespace; both names."""
    if shutil.which("ip") is None or os.getuid() != 0:
        pytest.skip("needs iproute2 and root")
    name = uuid.uuid4().hex[:8]
    namespace, near, far = f"steerage-{name}", f"sn{name}", f"sf{name}"
    try:
        try:
            ip("netns", "add", namespace)
            ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", namespace)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        ip("addr", "add", f"{NEAR}/30", "dev", near)
        ip("link", "set", near, "up")
        ip("-n", namespace, "addr", "add", f"{FAR}/30", "dev", far)
        ip("-n", namespace, "link", "set", far, "up")
        ip("-n", namespace, "link", "set", "lo", "up")
        yield namespace, far
    finally:
        subprocess.run(["ip", "netns", "del", namespace], capture_output=True, timeout=20)


@pytest.fixture
def service(cable, publisher, tmp_path):
    """The service's address on the other side, and what a node and an operator need for it."""
    namespace, _ = cable
    authority = Authority("a test", tmp_path / "ca")
    server = authority.issue(tmp_path / "server", "service", ips=(FAR,))
    access, token = tmp_path / "access.toml", tmp_path / "token"
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    access.write_text(
        '[[identity]]\nname = "ada"\nroles = ["operator", "publisher"]\n'
        f'token_sha256 = "{digest}"\n'
    )
    token.write_text(TOKEN)
    options = TIMES | {
        "tls_certificate": str(server.certificate),
        "tls_key": str(server.key),
        "access_policy": str(access),
    }
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [
                *("ip", "netns", "exec", namespace, sys.executable, "-c", SERVE),
                *(str(tmp_path / "store"), f"{FAR}:0"),
                *(json.dumps([str(publisher.public_key)]), json.dumps(options)),
            ],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    line = process.stdout.readline()
    assert line, (tmp_path / "log").read_text()
    yield json.loads(line)["address"], Credentials(ca=authority.certificate, token=token)
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_node_outlives_a_pulled_cable(cable, service, publisher, tmp_path):
    namespace, far = cable
    address, credentials = service
    one, two = make_artifact(1), make_artifact(2, width=1_000_000)
    with (
        Operator(address, credentials=credentials) as operator,
        Subscription(
            address,
            "prod",
            "node-1",
            tmp_path / "cache",
            publisher.roots,
            FINGERPRINT,
            credentials=credentials,
        ) as node,
    ):
        for item in (one, two):
            publisher.publish(operator, item)
        operator.promote("prod", artifact=one.digest, strength=1.0, **WHO)
        node.active.wait_for(1, 20)
        with Reader(node.active) as reader:
            ip("-n", namespace, "link", "set", far, "down")
            # Three heartbeats of 0.3 s, then the stream is taken for dead.
            eventually(lambda: not node.status.connected, 30, "the node notices")
            time.sleep(5)
            assert node.active.current.artifact.digest == one.digest
            ip("-n", namespace, "link", "set", far, "up")
            begin = time.monotonic()
            eventually(lambda: node.status.connected, 30, "connected again")
            print(f"connected again after {time.monotonic() - begin:.1f} s")
            operator.promote("prod", artifact=two.digest, strength=2.0, **WHO)
            assert node.active.wait_for(2, 30).artifact.digest == two.digest
        reader.check()
