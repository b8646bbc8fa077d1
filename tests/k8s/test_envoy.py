"""The proxies' configurations: what they say, and what a real Envoy makes of them."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from steering_service.core.signing import generate_key
from steering_service.v1 import artifact_pb2, channel_pb2, watch_pb2

K8S = Path(__file__).parents[2] / "k8s"
SIDES = {"service": K8S / "base/service", "node": K8S / "node"}
SERVICE_NAME = "steerage.steerage.svc"
BIN = Path(sys.executable).parent
ENVOY = shutil.which("envoy", path=os.pathsep.join([str(BIN), os.environ.get("PATH", "")]))
needs_envoy = pytest.mark.skipif(
    ENVOY is None, reason="no envoy on the PATH: the proxies' configurations are NOT tried"
)


def config(side: str) -> Any:
    return yaml.safe_load((SIDES[side] / "envoy.yaml").read_text())["static_resources"]


def manager(listener: dict[str, Any]) -> Any:
    return listener["filter_chains"][0]["filters"][0]["typed_config"]


# What they say


def test_nodes_may_read_and_nothing_else():
    listener = next(item for item in config("service")["listeners"] if item["name"] == "nodes")
    tls = listener["filter_chains"][0]["transport_socket"]["typed_config"]
    assert tls["require_client_certificate"] is True
    (host,) = manager(listener)["route_config"]["virtual_hosts"]
    *allowed, rest = host["routes"]
    paths = {route["match"]["path"] for route in allowed}
    existing = {
        f"/{service.full_name}/{method.name}"
        for module in (artifact_pb2, channel_pb2, watch_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert paths <= existing
    assert {path.rpartition("/")[2] for path in paths} == {"Watch", "GetManifest", "Download"}
    assert rest == {"match": {"prefix": "/"}, "direct_response": {"status": 403}}


@pytest.mark.parametrize("side", SIDES)
def test_long_streams_are_not_cut(side):
    for listener in config(side)["listeners"]:
        if listener["name"] == "health":
            continue
        assert manager(listener)["stream_idle_timeout"] == "0s"
        (host,) = manager(listener)["route_config"]["virtual_hosts"]
        for route in host["routes"]:
            if "route" in route:
                assert route["route"]["timeout"] == "0s"


def test_plain_text_stays_on_loopback():
    for side in SIDES:
        for listener in config(side)["listeners"]:
            address = listener["address"]["socket_address"]["address"]
            encrypted = "transport_socket" in listener["filter_chains"][0]
            assert encrypted or listener["name"] == "health" or address == "127.0.0.1"
        (cluster,) = config(side)["clusters"]
        (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        address = endpoint["endpoint"]["address"]["socket_address"]["address"]
        assert "transport_socket" in cluster or address == "127.0.0.1"


def test_both_sides_read_their_certificates_alike():
    # kustomize reads no file outside its folder, so there are two copies.
    for name in ("identity.yaml", "authority.yaml"):
        assert (SIDES["node"] / name).read_text() == (SIDES["service"] / name).read_text()


# What Envoy makes of them


class Authority:
    """A certificate authority that writes what cert-manager would put into a Secret."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "steerage")])
        basic = x509.BasicConstraints(ca=True, path_length=0)
        self._certificate = self._sign(self._name, self._key, basic)

    def issue(self, name: str, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.DNSName(name)])
        certificate = self._sign(x509.Name([]), key, names)
        (folder / "tls.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
        (folder / "ca.crt").write_bytes(self._certificate.public_bytes(Encoding.PEM))
        (folder / "tls.key").write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )

    def _sign(self, subject: x509.Name, key: Any, extension: x509.ExtensionType) -> Any:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(extension, critical=True)
            .sign(self._key, hashes.SHA256())
        )


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a process that ends with the test."""
    processes: list[subprocess.Popen[str]] = []

    def run(*args: str | Path, **options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(a) for a in args], text=True, stderr=subprocess.DEVNULL, **options
        )
        processes.append(process)
        return process

    yield run
    for process in reversed(processes):
        process.terminate()
        process.wait(timeout=30)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def proxy(start: Start, side: str, folder: Path, ports: dict[int, int]) -> None:
    """Run a side's Envoy with the certificates of `folder`, at other ports."""
    for name in ("envoy.yaml", "identity.yaml", "authority.yaml"):
        text = (SIDES[side] / name).read_text()
        text = text.replace("/etc/envoy/", f"{folder}/").replace("/etc/steerage/tls", str(folder))
        for port, other in ports.items():
            text = text.replace(f"port_value: {port}}}", f"port_value: {other}}}")
        # There is no cluster DNS here; the name that is checked stays the same.
        text = text.replace(f"address: {SERVICE_NAME},", "address: 127.0.0.1,")
        (folder / name).write_text(text)
    flags = ("--disable-hot-restart", "--concurrency", "1")
    start(ENVOY, "-c", folder / "envoy.yaml", *flags, stdout=subprocess.DEVNULL)


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def until(condition: Callable[[], bool]) -> None:
    """Wait; pytest's own limit ends a wait for what never comes."""
    while not condition():
        time.sleep(0.1)


def steerage(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BIN / "steerage", *args], capture_output=True, text=True, timeout=60)


@needs_envoy
@pytest.mark.timeout(120)
def test_a_node_follows_through_both_proxies(start, tmp_path):
    local, door, health, near, far, wrong, alien = free_ports(7)
    ours, other = Authority(), Authority()
    ours.issue(SERVICE_NAME, tmp_path / "service")
    ours.issue("node", tmp_path / "node")
    ours.issue("node", tmp_path / "impostor")
    other.issue("node", tmp_path / "stranger")

    def answer(path: str) -> int:
        try:
            url = f"http://127.0.0.1:{health}{path}"
            status: int = urllib.request.urlopen(url, timeout=5).status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0
        return status

    # The proxy comes first, as a sidecar does; it runs, and is not ready for the service.
    proxy(start, "service", tmp_path / "service", {7443: door, 8080: health, 7433: local})
    until(lambda: answer("/alive") == 200)
    assert answer("/ready") == 503
    generate_key(tmp_path / "publisher.key", tmp_path / "publisher.pub")
    args = ("--store", tmp_path / "store", "--address", f"127.0.0.1:{local}", "--json")
    service = start(
        *(BIN / "steerage", "serve", *args, "--trust", tmp_path / "publisher.pub"),
        stdout=subprocess.DEVNULL,
    )
    until(lambda: answer("/ready") == 200)

    def promote(port: int, share: str) -> subprocess.CompletedProcess[str]:
        where = ("--address", f"127.0.0.1:{port}", "--json")
        return steerage("promote", "demo", "--off", "--share", share, "--reason", "try", *where)

    assert promote(local, "1").returncode == 0
    proxy(start, "node", tmp_path / "node", {7433: near, 7443: door})
    until(lambda: listens(near))
    assert "rpc_permission_denied" in promote(near, "0.1").stderr
    watching = start(
        *(BIN / "steerage", "watch", "demo", "--address", f"127.0.0.1:{near}", "--json"),
        stdout=subprocess.PIPE,
    )
    assert json.loads(watching.stdout.readline())["share"] == 1
    assert promote(local, "0.5").returncode == 0
    assert json.loads(watching.stdout.readline())["share"] == 0.5

    # A node with another authority's certificate, and a service that shows a node's certificate.
    proxy(start, "service", tmp_path / "impostor", {7443: alien, 8080: 0, 7433: local})
    misled = tmp_path / "misled"
    shutil.copytree(tmp_path / "node", misled)
    proxy(start, "node", tmp_path / "stranger", {7433: far, 7443: door})
    proxy(start, "node", misled, {7433: wrong, 7443: alien})
    until(lambda: listens(alien))
    for port in (far, wrong):
        until(partial(listens, port))
        refused = steerage("watch", "demo", "--address", f"127.0.0.1:{port}")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "rpc_unavailable" in refused.stderr

    # Draining: the watch ends with a word, not with a cut connection.
    service.send_signal(signal.SIGTERM)
    assert service.wait(timeout=30) == 0
    assert watching.wait(timeout=30) == 1
    until(lambda: answer("/ready") == 503)
