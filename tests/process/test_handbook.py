"""docs/delivery.md does what it says: its commands make the keys, and a rollout goes through."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.cli import channels, revoking, status  # noqa: F401
from pipeline.cli.app import app
from pipeline.errors import OUR_ERRORS
from steering_service.client.credentials import Credentials
from steering_service.client.operator import Operator
from steering_service.client.subscription import Subscription
from steering_service.core.artifact import ModelReference, Policy, build
from steering_service.core.direction import Direction
from steering_service.core.intervention import Intervention
from steering_service.core.signing import Signer, TrustRoots
from steering_service.core.site import Site
from steering_service.server.policy import parse_policy

REPOSITORY = Path(__file__).parents[2]
STEERAGE = Path(sys.executable).with_name("steerage")
NODES = ("node-01", "node-02", "node-03")

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def blocks(page: str) -> list[str]:
    """The shell commands of a page, in order."""
    return re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What sections 1 to 3 leave: certificates, keys, tokens and the policy."""
    folder = tmp_path_factory.mktemp("handbook")
    page = (REPOSITORY / "docs/delivery.md").read_text()
    certificates, keys, policy = blocks(page)[:3]
    environment = os.environ | {"PATH": f"{STEERAGE.parent}:{os.environ['PATH']}"}
    for script in (certificates, keys, policy):
        subprocess.run(
            ["bash", "-euc", script], cwd=folder, env=environment, check=True, capture_output=True
        )
    return folder


@pytest.fixture(scope="module")
def service(folder):
    process = subprocess.Popen(
        [
            *(STEERAGE, "serve", "--store", "store", "--address", "127.0.0.1:0", "--json"),
            *("--trust", "publisher.pub", "--trust", "security.pub", "--access", "access.toml"),
            *("--tls-cert", "service.crt", "--tls-key", "service.key", "--client-ca", "ca.crt"),
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    port = json.loads(process.stdout.readline())["address"].rpartition(":")[2]
    yield f"localhost:{port}"
    process.terminate()
    assert process.wait(timeout=20) == 0
    process.stdout.close()


def credentials(folder, name, token=None):
    return Credentials(
        ca=folder / "ca.crt",
        certificate=folder / f"{name}.crt",
        key=folder / f"{name}.key",
        token=folder / f"{token}.token" if token else None,
    )


@pytest.fixture
def run(folder, service, monkeypatch):
    monkeypatch.chdir(folder)

    def run(who, *arguments, token=None):
        """A command as somebody, by the environment that the handbook sets: its result or error."""
        environment = {
            "STEERAGE_ADDRESS": service,
            "STEERAGE_CA": "ca.crt",
            "STEERAGE_CERT": f"{who}.crt",
            "STEERAGE_KEY": f"{who}.key",
        } | ({"STEERAGE_TOKEN_FILE": f"{token}.token"} if token else {})
        done = CliRunner().invoke(app, [*arguments, "--json"], env=environment)
        if isinstance(done.exception, OUR_ERRORS):
            return done.exception.kind
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_three_nodes_two_people_and_a_staged_rollout(folder, service, run):
    vector_D = np.random.default_rng(0).standard_normal(8).astype(np.float32)
    artifact = build(
        [Intervention(Direction(Site("resid_post", 1), vector_D, 1.0, 1.0, "x"))],
        name="refusal",
        model=ModelReference(name="pocket", fingerprint="a" * 64),
        policy=Policy(min_strength=-1, max_strength=1),
    )
    with Operator(service, credentials=credentials(folder, "ci")) as operator:
        signature = Signer.from_file(folder / "publisher.key").sign(artifact.manifest_bytes)
        digest = operator.publish(artifact, signature)
    nodes = [
        Subscription(
            service,
            channel="prod-pocket",
            node_id=name,
            cache_dir=folder / "cache" / name,
            trust_roots=TrustRoots.from_paths([folder / "publisher.pub", folder / "security.pub"]),
            model_fingerprint="a" * 64,
            credentials=credentials(folder, "node", name),
        )
        for name in NODES
    ]
    for node in nodes:
        node.__enter__()
    try:
        # Where the three stand is what the page says: 3.7, 18 and 97 %.
        for share, steered in ((0.05, 1), (0.5, 2), (1, 3)):
            change = ("promote", "prod-pocket", digest[:8], "--strength", "0.5")
            proposed = run("alice", *change, "--share", str(share), "--reason", "wider")
            approve = ("approve", "prod-pocket", proposed["proposal"])
            assert run("alice", *approve) == "approver_is_proposer"
            assert run("bob", *approve)["revision"] == proposed["entry"]["revision"]
            status = run("alice", "status", "prod-pocket", "--wait", "20", "--every", "0.1")
            assert status["convergence"]["converged"] == 3
            assert sum(n.active.current.artifact is not None for n in nodes) == steered
        off = ("promote", "prod-pocket", "--off", "--reason", "x")
        assert run("ci", *off) == "access_role"
        assert run("node", *off, token="dashboard") == "access_role"
        assert run("node", "log", "prod-pocket", "--last", "1", token="dashboard")["revision"] == 3
        back = run("alice", "rollback", "prod-pocket", "--reason", "refuses too much")
        assert (back["restores"], back["share"]) == (2, 0.5)
        listed = run(
            "alice", "revoke", "--artifact", digest[:8], "--reason", "leaks prompts",
            "--key", "security.key", "--yes",
        )  # fmt: skip
        assert listed["serial"] == 1
        wait_for(lambda: all(n.active.current.artifact is None for n in nodes))
    finally:
        for node in nodes:
            node.close()


def test_a_node_may_not_watch_as_another_one(folder, service):
    with Subscription(
        service,
        channel="prod-pocket",
        node_id="node-02",
        cache_dir=folder / "cache" / "thief",
        trust_roots=TrustRoots.from_paths([folder / "publisher.pub"]),
        model_fingerprint="a" * 64,
        credentials=credentials(folder, "node", "node-01"),
    ) as subscription:
        wait_for(lambda: "access_node" in (subscription.status.last_error or ""))


def test_the_example_policy_is_one():
    policy = parse_policy((REPOSITORY / "examples/access.toml").read_bytes())
    assert {role for identity in policy.identity for role in identity.roles} == {
        "reader",
        "publisher",
        "operator",
        "auditor",
    }


def wait_for(condition, timeout_s=20.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.02)
