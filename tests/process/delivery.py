"""Replicas of the service as processes, and what tests send through them and find out about them.

Used by `test_delivery_*` here and by tests/fuzz.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import publishers
from grpc_health.v1 import health_pb2, health_pb2_grpc

from steering_service.client.operator import Operator
from steering_service.core.errors import SteeringError
from store.location import Location

WHO = {"actor": "ada", "reason": "a test"}
START_S = 60
# What `steerage serve` has no flags for: tests cannot wait for its usual times.
SERVE = """
import json, sys
from steering_service.core.signing import TrustRoots
from steering_service.server.app import serve
store, address, trust, options = sys.argv[1:]
roots = TrustRoots.from_paths(json.loads(trust)) if json.loads(trust) else None
serve(store, address, trust_roots=roots, **json.loads(options))
"""
TIMES = {"poll_s": 0.1, "heartbeat_s": 0.3, "drain_s": 1.0}


@dataclass
class Replica:
    """One service process; it keeps its address over restarts, and appends to one log."""

    store: str
    log: Path
    trust: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=lambda: dict(TIMES))
    address: str = "127.0.0.1:0"
    process: subprocess.Popen[str] | None = None

    def start(self) -> Replica:
        arguments = [self.store, self.address, json.dumps(self.trust), json.dumps(self.options)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE, *arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        line = self.process.stdout.readline()
        assert line, f"the service did not start:\n{self.log.read_text()[-3000:]}"
        self.address = json.loads(line)["address"]
        return self

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def pss_bytes(self) -> int:
        """Memory of the process; what it shares with others counts by its part."""
        return pss_bytes(self.process.pid)

    def operator(self, **options: Any) -> Operator:
        return Operator(self.address, **options)

    def healthy(self, timeout_s: float = 5.0) -> bool:
        """Whether the service says that it serves."""
        with grpc.insecure_channel(self.address) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout_s, wait_for_ready=True
            )
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


make_artifact = partial(publishers.make_artifact, limit=1000.0)


def persist(action: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """Repeat an action that may be repeated until it succeeds; any SteeringError is tried again."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return action()
        except SteeringError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def pss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Pss in smaps_rollup")


# What replicas note about themselves is no state that a request could have written.
_OBSERVATIONS = ("replicas/",)


def contents(store: str) -> dict[str, str]:
    """sha256 of every object of a store by key, hidden files of a local one included."""
    root = Location.open(store)
    folder = root.local_path()
    if folder is None:
        found = {info.key: root.get(info.key) for info in root.list()}
    else:
        found = {}
        for path in sorted(folder.rglob("*")):
            # A file may be renamed under our eyes.
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return {
        key: hashlib.sha256(data).hexdigest()
        for key, data in found.items()
        if not key.startswith(_OBSERVATIONS)
    }


class Reader:
    """A thread that reads `active.current` as decoding does, and keeps what it saw.

    Attributes:
        revisions: Every revision that it saw, in the order of their appearance.
        longest_s: The longest that a read took.
        error: What a read raised; None as it should be.
    """

    def __init__(self, active: Any) -> None:
        self.revisions: list[int] = []
        self.longest_s = 0.0
        self.error: BaseException | None = None
        self._active = active
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def _read(self) -> None:
        try:
            while not self._stop.wait(0.002):
                begin = time.perf_counter()
                deployment = self._active.current
                self.longest_s = max(self.longest_s, time.perf_counter() - begin)
                if not self.revisions or deployment.revision != self.revisions[-1]:
                    self.revisions.append(deployment.revision)
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def check(self) -> None:
        """It was never kept waiting, and revisions only grew."""
        assert self.error is None
        # An attribute read takes a microsecond; a busy machine may take the processor away.
        assert self.longest_s < 1.0
        assert self.revisions == sorted(self.revisions)


@contextlib.contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    """With other environment variables, for this process and what it starts."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
