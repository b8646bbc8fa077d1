"""The harness of benchmarks/service.py: servers and drivers, each a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from service_peers.tls import Security
from steering_service.core.artifact import Artifact, ModelReference, Policy, build
from steering_service.core.direction import Direction
from steering_service.core.intervention import Intervention
from steering_service.core.signing import Signer, generate_key
from steering_service.core.site import Site
from steering_service.v1 import artifact_pb2
from store.location import Location
from store.registry import Registry

ROOT: Final = Path(__file__).resolve().parents[2]
FINGERPRINT: Final = "b" * 64
LAYERS: Final = 32

CONTESTANTS: Final = ("bare", "ours")
SMALL_BYTES: Final = 1 << 20
ACTOR: Final = "bench"

Result = dict[str, Any]


class ContestantFailed(Exception):
    """A process ended, or told something else than was expected."""


class Process:
    """A module of service_peers with a job, or a command; what it tells are lines of JSON.

    Args:
        arguments: Of the Python interpreter.
        log: Where its stderr goes; its end is quoted when the process fails.
    """

    def __init__(self, arguments: list[str], log: Path) -> None:
        self._log = log
        self._name = " ".join(arguments[:2])
        environment = {k: v for k, v in os.environ.items() if not k.startswith("STEERAGE_")}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def read(self) -> Result:
        """The next line that it tells."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            end = self._log.read_text(errors="replace")[-2000:]
            raise ContestantFailed(f"{self._name}: exit code {code}:\n{end}")
        told: Result = json.loads(line)
        return told

    def ask(self, question: str) -> None:
        """Write a line to its stdin."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{question}\n".encode())
        self._process.stdin.flush()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


@dataclass(frozen=True, slots=True)
class Published:
    """An artifact and the messages about it, as files that the bare server sends.

    Attributes:
        store: URL of a store that holds it.
        digest: Of the manifest.
        manifest: GetManifestResponse, serialised.
        payload: The payload's bytes.
    """

    store: str
    digest: str
    manifest: Path
    payload: Path


@dataclass(frozen=True, slots=True)
class Server:
    """A server that listens."""

    address: str
    process: Process


@dataclass(slots=True)
class Bench:
    """What all cases have in common.

    Attributes:
        folder: For stores, jobs and logs.
        security: Certificates and policy.
        rounds: Of which the medians are taken.
        tls: Whether to encrypt, with certificates on both sides and a policy in ours.
        watchers: Streams in the cases of many watchers.
        connections: That these share.
    """

    folder: Path
    security: Security
    rounds: int
    tls: bool
    watchers: int
    connections: int
    signer: Signer = field(init=False)
    trust: Path = field(init=False)

    def __post_init__(self) -> None:
        self.trust = self.folder / "key.pub"
        generate_key(self.folder / "key.pem", self.trust)
        self.signer = Signer.from_file(self.folder / "key.pem")

    def publish(self, num_bytes: int, *, store: Path | None = None, seed: int = 0) -> Published:
        """An artifact of about so many bytes in a store of its own, or in a given one."""
        store = store or Path(tempfile.mkdtemp(dir=self.folder))
        artifact = make_artifact(num_bytes, seed)
        signature = self.signer.sign(artifact.manifest_bytes)
        Registry(Location.open(str(store))).publish(
            artifact.manifest_bytes, artifact.payload_bytes, signature
        )
        answer = artifact_pb2.GetManifestResponse(
            manifest=artifact.manifest_bytes,
            signature=signature,
            payload_size=len(artifact.payload_bytes),
        )
        base = Path(tempfile.mkdtemp(dir=self.folder))
        (base / "answer").write_bytes(answer.SerializeToString())
        (base / "payload").write_bytes(artifact.payload_bytes)
        return Published(str(store), artifact.digest, base / "answer", base / "payload")

    @contextmanager
    def server(self, contestant: str, published: Published, *, tls: bool) -> Iterator[Server]:
        """The bare server, or ours, until the block ends."""
        start = {"bare": self.bare, "ours": self.ours}[contestant]
        with start(published, tls=tls) as process:
            yield Server(process.read()["address"], process)

    def bare(self, published: Published, *, tls: bool) -> Process:
        """The bare server; it tells its address."""
        return self.driver(
            "bare",
            manifest=str(published.manifest),
            payload=str(published.payload),
            artifact=published.digest,
            security=self.security_of(tls),
        )

    def ours(self, published: Published, *, tls: bool, address: str = "127.0.0.1:0") -> Process:
        """`steerage serve`, as operators start it; it tells its address."""
        arguments = ["-c", "from pipeline.main import run; run()", "serve", "--json"]
        arguments += ["--store", published.store, "--address", address, "--trust", str(self.trust)]
        if tls:
            arguments += ["--tls-cert", self.security.server_certificate]
            arguments += ["--tls-key", self.security.server_key]
            arguments += ["--client-ca", self.security.authority]
            arguments += ["--access", self.security.policy]
        return Process(arguments, self._log("serve"))

    def driver(self, module: str, **job: Any) -> Process:
        """A module of service_peers, with a job."""
        path = Path(tempfile.mkdtemp(dir=self.folder)) / "job.json"
        path.write_text(json.dumps(job))
        return Process(["-m", f"service_peers.{module}", str(path)], self._log(module))

    def security_of(self, tls: bool) -> Result | None:
        """What a job needs to know."""
        return asdict(self.security) if tls else None

    def _log(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder)) / f"{name}.log"


def make_artifact(num_bytes: int, seed: int = 0) -> Artifact:
    """Directions of 32 layers, as wide as it takes."""
    width = max(num_bytes // (4 * LAYERS), 8)
    generator = np.random.default_rng(seed)
    interventions = [
        Intervention(
            Direction(
                Site("resid_post", layer),
                generator.standard_normal(width).astype(np.float32),
                1.5,
                9.0,
                "difference_of_means",
            )
        )
        for layer in range(LAYERS)
    ]
    return build(
        interventions,
        name=f"bench {seed}",
        model=ModelReference(name="bench", fingerprint=FINGERPRINT),
        policy=Policy(min_strength=-4.0, max_strength=4.0),
    )


def median(runs: list[Result], key: str) -> float:
    """Of one figure of several runs."""
    return float(statistics.median(one[key] for one in runs))


def say(text: str) -> None:
    """A line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)
