"""Services with certificates, tokens and policies, as real processes.

def test_something(guarded, pki):
    service = guarded(POLICY, tls=True)
    with service.channel(certificate=pki.alice) as channel: ...
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import certificates
import grpc
import pytest

SERVE = """
import json, logging, sys
from steering_service.server.app import serve
from steering_service.server.logs import JsonFormatter
handler = logging.StreamHandler()
handler.setFormatter(JsonFormatter())
logging.getLogger("steering_service").addHandler(handler)
logging.getLogger("steering_service").setLevel(logging.INFO)
options = json.loads(sys.argv[3])
serve(sys.argv[1], sys.argv[2], **{"poll_s": 0.1, "heartbeat_s": 0.3, "drain_s": 1.0} | options)
"""


def sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def entry(name: str, role: str, token: str | None = None) -> str:
    """An identity of the policy, whose bearer token is its name unless told."""
    digest = sha256(name if token is None else token)
    return f'[[identity]]\nname = "{name}"\ntoken_sha256 = "{digest}"\nroles = ["{role}"]\n'


@dataclass
class Pki:
    """Two authorities; the service trusts the first."""

    folder: Path

    def __post_init__(self) -> None:
        self.authority = certificates.Authority("ours", self.folder / "ca")
        self.foreign = certificates.Authority("foreign", self.folder / "foreign-ca")
        self.server = self.authority.issue(
            self.folder / "server", "service", dns=("localhost",), ips=("127.0.0.1",)
        )
        self.alice = self.client("alice")
        self.stranger = self.client("stranger")
        self.expired = self.client("expired", valid_s=(-7200, -3600))
        self.from_afar = self.foreign.issue(
            self.folder / "afar", "alice", uris=("spiffe://test/alice",)
        )

    def client(self, name: str, **options):
        """A client certificate for ``spiffe://test/NAME``."""
        return self.authority.issue(
            self.folder / name, name, uris=(f"spiffe://test/{name}",), **options
        )


@dataclass
class Guarded:
    """One service process; `policy` and the certificates may be changed while it runs."""

    folder: Path
    pki: Pki
    policy: str | None = None
    tls: bool = False
    client_ca: bool = True
    options: dict[str, object] = field(default_factory=dict)
    environment: dict[str, str] | None = None
    program: str = SERVE
    process: subprocess.Popen[str] | None = None
    address: str = "127.0.0.1:0"

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.store = self.folder / "store"
        self.policy_file = self.folder / "access.toml"
        self.log = self.folder / "log"
        self.server = certificates.Pair(self.folder / "server.pem", self.folder / "server.key")

    def start(self) -> Guarded:
        options = dict(self.options)
        if self.policy is not None:
            self.policy_file.write_text(self.policy)
            options["access_policy"] = str(self.policy_file)
        if self.tls:
            self.server.replace(self.pki.server)
            options |= {
                "tls_certificate": str(self.server.certificate),
                "tls_key": str(self.server.key),
            }
            if self.client_ca:
                options["client_ca"] = str(self.pki.authority.certificate)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-c", self.program),
                    *(str(self.store), self.address, json.dumps(options)),
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.environment,
            )
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        self.address = json.loads(line)["address"]
        return self

    def channel(self, certificate=None, *, root=None, options=()) -> grpc.Channel:
        """A connection; with TLS if the service has it."""
        if not self.tls:
            return grpc.insecure_channel(self.address, options=options)
        chain, key = certificate.bytes() if certificate is not None else (None, None)
        root = root or self.pki.authority
        credentials = grpc.ssl_channel_credentials(root.certificate.read_bytes(), key, chain)
        # Connections are not to be shared between tests' channels.
        return grpc.secure_channel(
            self.address, credentials, options=(("grpc.use_local_subchannel_pool", 1), *options)
        )

    def events(self, name: str | None = None) -> list[dict[str, object]]:
        """What it has logged, perhaps only events of one name."""
        lines = [json.loads(x) for x in self.log.read_text().splitlines() if x.startswith("{")]
        return [line for line in lines if name is None or line["event"] == name]

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()


@pytest.fixture(scope="session")
def pki(tmp_path_factory):
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def guarded(tmp_path, pki):
    """Start services that know their callers."""
    started = []

    def make(policy: str | None = None, **settings) -> Guarded:
        service = Guarded(tmp_path / f"guarded-{len(started)}", pki, policy, **settings)
        started.append(service)
        return service.start()

    yield make
    for service in started:
        service.stop()


@pytest.fixture(scope="module")
def guarded_once(tmp_path_factory, pki):
    """As `guarded`, for a whole module."""
    started = []

    def make(policy: str | None = None, **settings) -> Guarded:
        service = Guarded(tmp_path_factory.mktemp("guarded") / "service", pki, policy, **settings)
        started.append(service)
        return service.start()

    yield make
    for service in started:
        service.stop()
