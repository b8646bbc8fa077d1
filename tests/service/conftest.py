"""Real service processes on port 0, real keys, real artifacts."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest

# pytest's importlib mode puts no folder of tests on the path; the helpers beside this file:
sys.path.append(str(Path(__file__).parent))

import secure
from publishers import Publisher, make_artifact

from steering_service.client.operator import Operator

# What `steerage serve` has no flags for: tests cannot wait for its usual times.
SERVE = """
import sys
from steering_service.core.signing import TrustRoots
from steering_service.server.app import serve
store, address, *trust = sys.argv[1:]
serve(store, address, trust_roots=TrustRoots.from_paths(trust) if trust else None,
      poll_s=0.1, heartbeat_s=0.3, board_s=0.1, drain_s=1.0)
"""


@dataclass
class Service:
    """One service process over a store; `address` stays the same over restarts."""

    store: Path
    trust: tuple[str, ...] = ()
    address: str = "127.0.0.1:0"
    process: subprocess.Popen[str] | None = None

    def start(self) -> Service:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(self.store), self.address, *self.trust],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.address = json.loads(self.process.stdout.readline())["address"]
        return self

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=10)

    def operator(self) -> Operator:
        return Operator(self.address)


class CutProxy:
    """Forwards TCP to a service, cutting each connection after some bytes to the client."""

    def __init__(self, target: str, *, cut_after: int | None = None) -> None:
        self.cut_after = cut_after
        self.delay_s = 0.0  # before each piece of at most 64 KiB to the client
        self.bytes_to_client = 0
        self.connections = 0
        self._target = ("127.0.0.1", int(target.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            far = socket.create_connection(self._target)
            threading.Thread(target=self._pump, args=(near, far, None), daemon=True).start()
            threading.Thread(
                target=self._pump, args=(far, near, self.cut_after), daemon=True
            ).start()

    def _pump(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        passed = 0
        try:
            while chunk := source.recv(1 << 16):
                if self.delay_s and sink.getpeername() != self._target:
                    time.sleep(self.delay_s)
                sink.sendall(chunk)
                passed += len(chunk)
                if sink.getpeername() != self._target:
                    self.bytes_to_client += len(chunk)
                if limit is not None and passed >= limit:
                    break
        except OSError:
            pass
        for side in (source, sink):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="session")
def publisher(tmp_path_factory):
    return Publisher(tmp_path_factory.mktemp("keys") / "publisher")


@pytest.fixture
def stranger(tmp_path):
    """Somebody whose key no node trusts."""
    return Publisher(tmp_path / "stranger")


@pytest.fixture
def artifact():
    return make_artifact


@pytest.fixture
def proxy():
    opened = []

    def make(target: str, *, cut_after: int | None = None) -> CutProxy:
        opened.append(CutProxy(target, cut_after=cut_after))
        return opened[-1]

    yield make
    for item in opened:
        item.close()


@pytest.fixture
def start(tmp_path):
    """Start services; without a name they share one store."""
    services = []

    def make(*trust: str) -> Service:
        services.append(Service(tmp_path / "store", trust))
        return services[-1].start()

    yield make
    for service in services:
        service.kill()


@pytest.fixture
def service(start):
    return start()


@pytest.fixture
def operator(service):
    with service.operator() as operator:
        yield operator


@pytest.fixture(scope="session")
def shared_service(tmp_path_factory):
    """One service for all tests that use names of their own and do not stop it."""
    service = Service(tmp_path_factory.mktemp("shared") / "store").start()
    yield service
    service.kill()


@pytest.fixture(scope="session")
def shared_operator(shared_service):
    with shared_service.operator() as operator:
        yield operator


@pytest.fixture
def channel():
    """A channel that no other test uses."""
    return f"test-{uuid.uuid4().hex[:12]}"


# Fixtures: services that know their callers.
pki, guarded, guarded_once = secure.pki, secure.guarded, secure.guarded_once
