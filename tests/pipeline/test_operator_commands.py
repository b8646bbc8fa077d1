"""The operator's commands against real services: what they print, and what they leave behind."""

from __future__ import annotations

import hashlib
import json
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.cli import (  # noqa: F401
    channels,
    comparing,
    operate,
    registry,
    revoking,
    status,
    verify,
)
from pipeline.cli.app import app
from pipeline.errors import OUR_ERRORS
from steering_service.client.operator import Operator
from steering_service.client.subscription import Subscription
from steering_service.core.artifact import Artifact, ModelReference, Policy, build
from steering_service.core.direction import Direction
from steering_service.core.intervention import Intervention
from steering_service.core.signing import Signer, TrustRoots, generate_key
from steering_service.core.site import Site

FINGERPRINT = "a" * 64


@dataclass
class Output:
    """What a command printed; `error` is ours that it ended with."""

    code: int
    out: str
    err: str
    error: BaseException | None

    @property
    def json(self) -> Any:
        assert self.code == 0, f"{self.err}{self.error}"
        return json.loads(self.out.splitlines()[-1])


@dataclass
class Service:
    """A `steerage serve` process over a store."""

    folder: Path
    flags: tuple[str, ...] = ()
    store: Path = field(init=False)
    address: str = "127.0.0.1:0"
    process: Any = None

    def __post_init__(self) -> None:
        self.store = self.folder / "store"

    def start(self) -> Service:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-c", "from pipeline.main import run; run()", "serve", "--json"),
                *("--store", str(self.store), "--address", self.address, *self.flags),
            ],
            stdout=subprocess.PIPE,
            stderr=(self.folder / "service.log").open("a"),
            text=True,
        )
        line = self.process.stdout.readline()
        assert line, (self.folder / "service.log").read_text()
        self.address = json.loads(line)["address"]
        return self

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(timeout=20) == 0
        self.process.stdout.close()

    def __call__(self, *arguments: object, at: bool = True, columns: int = 120) -> Output:
        """Run a command in this process, as from a shell without a terminal."""
        words = [*map(str, arguments), *(["--address", self.address] if at else [])]
        result = CliRunner().invoke(app, words, env={"COLUMNS": str(columns)})
        error = result.exception
        if error is not None and not isinstance(error, (SystemExit, *OUR_ERRORS)):
            raise error
        return Output(result.exit_code, result.stdout, result.stderr, error)


@dataclass
class Key:
    """A key pair in a folder."""

    folder: Path
    name: str = "publisher"

    def __post_init__(self) -> None:
        self.private, self.public = (self.folder / f"{self.name}.{end}" for end in ("key", "pub"))
        generate_key(self.private, self.public)
        self.signer = Signer.from_file(self.private)


def make(
    seed: int, *, sites: tuple[int, ...] = (3,), limit: float = 2.0, scale: float = 1.0
) -> Artifact:
    """An artifact of a direction a site, the same for the same seed but for their length."""
    items = []
    for layer in sites:
        vector_D = np.random.default_rng((seed, layer)).standard_normal(64).astype(np.float32)
        direction = Direction(
            Site("resid_post", layer), vector_D * np.float32(scale), 1.5, 9.0, "x"
        )
        items.append(Intervention(direction, strength_unit="direction"))
    return build(
        items,
        name=f"artifact {seed}",
        model=ModelReference(name="pocket", fingerprint=FINGERPRINT),
        policy=Policy(min_strength=-limit, max_strength=limit),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("operator")


@pytest.fixture(scope="module")
def key(folder: Path) -> Key:
    return Key(folder)


@pytest.fixture(scope="module")
def service(folder: Path, key: Key) -> Iterator[Service]:
    running = Service(folder, ("--trust", str(key.public))).start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def published(service: Service, key: Key) -> Callable[[Artifact], str]:
    def publish(artifact: Artifact) -> str:
        with Operator(service.address) as operator:
            return operator.publish(artifact, key.signer.sign(artifact.manifest_bytes))

    return publish


def wait_for(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.02)


def node(service: Service, key: Key, channel: str, name: str, cache: Path, **options: Any) -> Any:
    return Subscription(
        service.address,
        channel=channel,
        node_id=name,
        cache_dir=cache,
        trust_roots=TrustRoots.from_paths([key.public]),
        model_fingerprint=options.pop("fingerprint", FINGERPRINT),
        **options,
    )


def test_promote_takes_the_first_digits_of_a_digest(service, published):
    digest = published(make(1))
    first = service(
        "promote", "short", digest[:8], "--strength", 1, "--reason", "new", "--json"
    ).json
    assert (first["artifact"], first["revision"], first["strength"]) == (digest, 1, 1.0)
    text = service("promote", "short", "--share", 0.25, "--reason", "wider").out
    assert "share" in text
    assert "0.25" in text
    for bad, kind in (
        (digest[:7], "digest"),
        (digest.upper(), "digest"),
        ("00000000", "no_artifact"),
    ):
        refused = service("promote", "short", bad, "--strength", 1, "--reason", "x")
        assert refused.error.kind == kind
    assert service("promote", "short", "--share", 5, "--reason", "x").code == 2
    assert "nothing to change" in service("promote", "short", "--reason", "x").err


def test_promote_with_a_stale_revision_is_told_who_was_first(service):
    service("promote", "stale", "--on", "--reason", "made")
    late = service("promote", "stale", "--off", "--reason", "late", "--expect", 0)
    assert late.error.kind == "revision_taken"


def test_rollback_walks_back_and_says_what_it_restores(service, published):
    digest = published(make(2))
    service("promote", "back", digest, "--strength", 0.5, "--reason", "canary")
    service("promote", "back", "--strength", 1.5, "--reason", "too much")
    service("promote", "back", "--strength", 2, "--reason", "far too much")
    once = service("rollback", "back", "--reason", "incident 41", "--json").json
    assert (once["revision"], once["strength"], once["restores"]) == (4, 1.5, 2)
    twice = service("rollback", "back", "--reason", "not enough", "--json").json
    assert (twice["strength"], twice["restores"]) == (0.5, 1)
    named = service("rollback", "back", "--reason", "it was not that", "--to", 3, "--json").json
    assert (named["strength"], named["restores"]) == (2.0, 3)
    lines = service("log", "back").out.splitlines()
    assert len(lines) == 6
    assert "(back to r2): incident 41" in lines[3]
    assert [
        json.loads(line)["revision"]
        for line in service("log", "back", "--last", 2, "--json").out.splitlines()
    ] == [5, 6]
    assert len(service("log", "back", "--after", 5).out.splitlines()) == 1
    assert service("rollback", "back", "--reason", "x", "--to", 9).error is not None


def test_list_filters_and_show_says_who_points_at_an_artifact(service, published, key):
    parent = published(make(3))
    child = published(make(4, sites=(1, 2)))
    service("promote", "shown", child, "--strength", 1, "--reason", "x")
    lines = service("list", "--name", "artifact 3").out.splitlines()
    assert [line.split()[0] for line in lines] == [parent]
    assert service("list", "--kind", "controller").out == ""
    assert service("list", "--model", FINGERPRINT, "--json").json["model"] == "pocket"
    values = service("show", child[:10], "--trust", key.public, "--json").json
    assert values["signature_verified"]
    assert values["signed_by"] == [key.signer.key_id]
    assert [item["channel"] for item in values["channels"]] == ["shown"]
    assert len(values["manifest"]["interventions"]) == 2
    text = service("show", child).out
    assert "resid_post.1" in text
    assert "shown r1, on" in text
    assert service("show", "ffffffffffff").error.kind == "no_artifact"


def test_show_refuses_a_signature_that_is_not_trusted(service, published, folder):
    digest = published(make(5))
    stranger = Key(folder, "stranger")
    assert service("show", digest, "--trust", stranger.public).error.kind == "signature_untrusted"


def test_diff_compares_states_manifests_and_vectors(service, published, key, folder):
    old = published(make(6, sites=(1, 2)))
    new = published(make(6, sites=(2, 5), limit=1.0, scale=3.0))
    service("promote", "changed", old, "--strength", 0.5, "--share", 0.1, "--reason", "old")
    service("promote", "changed", new, "--share", 1, "--reason", "new")
    flags = ("--trust", key.public, "--cache", folder / "cache")
    values = service("diff", "changed@1", "changed", *flags, "--json").json
    assert values["state"] == {"artifact": [old, new], "share": [0.1, 1.0]}
    assert values["manifest"]["policy.max_strength"] == [2.0, 1.0]
    rows = {row["intervention"]: row for row in values["directions"]}
    assert rows["resid_post.1.add"]["change"] == "removed"
    assert rows["resid_post.5.add"]["change"] == "added"
    assert rows["resid_post.2.add"]["cosine"] == pytest.approx(1.0)
    assert rows["resid_post.2.add"]["norm_ratio"] == pytest.approx(3.0)
    text = service("diff", old[:12], new[:12], *flags).out
    assert "policy.max_strength" in text
    assert "cosine +1.0000  norm × 3" in text
    unsigned = service("diff", old, new)
    assert "cosine" not in unsigned.out
    assert "--trust" in unsigned.err
    assert service("diff", "changed", "changed@2").out.splitlines()[-1] == "no difference"
    assert service("diff", "changed@9", "changed").error.kind == "no_revision"
    assert service("diff", "changed@x", "changed").error.kind == "channel_revision"


def test_status_tells_who_runs_what_and_who_refuses_why(service, published, key, folder):
    digest = published(make(7))
    service("promote", "watched", digest, "--strength", 1, "--reason", "go")
    with (
        node(service, key, "watched", "node-a", folder / "a"),
        node(service, key, "watched", "node-b", folder / "b", fingerprint="b" * 64),
    ):
        settled = service("status", "watched", "--wait", 15, "--every", 0.1)
        assert settled.code == 3  # one refuses
        wait_for(
            lambda: service("status", "watched", "--json").json["convergence"]["connected"] == 2
        )
        shown = service("status", "watched").out.splitlines()
        assert "1/2 run r1 · 1 refuse" in shown[1]
        [a] = [line for line in shown if line.startswith("node-a")]
        [b] = [line for line in shown if line.startswith("node-b")]
        assert a.split()[1:3] == ["runs", "r1"]
        assert digest[:8] in a
        assert b.split()[1] == "refuses"
        assert "model_fingerprint r1" in b
        values = service("status", "watched", "--json").json
        assert [n["state"] for n in values["nodes"]] == ["runs", "refuses"]
        assert values["nodes"][0]["artifact"] == digest
        assert values["entry"]["reason"] == "go"
    wait_for(lambda: service("status", "watched", "--json").json["convergence"]["gone"] == 2)
    assert "no node is connected · 2 gone" in service("status", "watched").out


def test_status_waits_until_all_nodes_run_the_head(service, published, key, folder):
    service("promote", "calm", published(make(8)), "--strength", 1, "--reason", "go")
    with node(service, key, "calm", "node-a", folder / "calm") as subscription:
        wait_for(lambda: subscription.active.current.revision == 1)
        wait_for(lambda: service("status", "calm", "--json").json["convergence"]["converged"] == 1)
        done = service("status", "calm", "--wait", 15)
        assert done.code == 0, done.out
        assert "settled in" in done.out
    absent = service("status", "absent", "--wait", 0.2, "--every", 0.1)
    assert absent.code == 1
    assert "no entry yet" in absent.out


def test_a_followed_status_prints_a_line_for_each_change(service, published, folder, key):
    service("promote", "lines", published(make(9)), "--strength", 1, "--reason", "go")
    follower = subprocess.Popen(
        [
            *(sys.executable, "-c", "from pipeline.main import run; run()", "status", "lines"),
            *("--watch", "--every", "0.1", "--address", service.address),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert "no node is connected" in follower.stdout.readline()
        with node(service, key, "lines", "node-a", folder / "lines"):
            seen = ""
            while "node-a  runs" not in seen:
                seen = follower.stdout.readline()
                assert seen
    finally:
        follower.kill()
        follower.wait()
        follower.stdout.close()


def test_revoke_asks_adds_signs_and_sends(service, published, key, folder):
    bad, worse = published(make(10)), published(make(11))
    service("promote", "harmful", bad, "--strength", 1, "--reason", "go")
    flags = ("--reason", "leaks prompts", "--key", key.private)
    with node(service, key, "harmful", "node-a", folder / "harmful") as subscription:
        wait_for(lambda: subscription.active.current.artifact is not None)
        nobody = service("revoke", "--artifact", bad[:9], *flags)
        assert nobody.code == 2
        assert "--yes" in nobody.err
        assert "nodes of harmful go over to the plain model" in nobody.out
        assert service("show", bad, "--json").json["revoked"] is None
        listed = service("revoke", "--artifact", bad[:9], *flags, "--yes", "--json").json
        assert listed["serial"] == 1
        assert listed["artifacts"] == [bad]
        wait_for(lambda: subscription.active.current.artifact is None)
    assert "leaks prompts" in service("show", bad, "--json").json["revoked"]
    again = service("revoke", "--artifact", bad, *flags, "--yes")
    assert "already" in again.err
    more = service("revoke", "--artifact", worse, "--floor", "harmful=2", *flags, "--yes", "--json")
    assert more.json["serial"] == 2
    assert more.json["artifacts"] == sorted([bad, worse])
    assert more.json["floors"] == {"harmful": 2}
    assert service("promote", "harmful", bad, "--strength", 1, "--reason", "x").error is not None


def test_revoke_does_not_add_to_a_list_that_it_cannot_check(tmp_path):
    first, second = Key(tmp_path, "first"), Key(tmp_path, "second")
    service = Service(
        tmp_path, ("--trust", str(first.public), "--trust", str(second.public))
    ).start()
    try:
        flags = ("--floor", "prod=3", "--reason", "x", "--yes")
        service("revoke", *flags, "--key", first.private)
        flags = ("--floor", "prod=4", "--reason", "x", "--yes", "--key", second.private)
        assert service("revoke", *flags).error.kind == "revocations_unverified"
        assert (
            service("revoke", *flags, "--trust", second.public).error.kind == "signature_untrusted"
        )
        assert service("revoke", *flags, "--trust", first.public, "--json").json["serial"] == 2
        own = ("revoke", "--key-id", second.signer.key_id, "--reason", "x", "--yes")
        assert service(*own, "--key", second.private).error.kind == "revokes_itself"
        assert service("revoke", "--reason", "x", "--key", first.private).code == 2
        assert service("revoke", "--floor", "x", "--reason", "x", "--key", first.private).code == 2
    finally:
        service.stop()


def test_revoke_is_not_held_up_by_what_cannot_be_read(tmp_path):
    key = Key(tmp_path)
    service = Service(tmp_path, ("--trust", str(key.public))).start()
    artifact = make(13)
    with Operator(service.address) as operator:
        digest = operator.publish(artifact, key.signer.sign(artifact.manifest_bytes))
    service("promote", "prod", digest, "--strength", 1, "--reason", "go")
    service.stop()
    (service.store / "artifacts" / digest / "manifest.json").unlink()
    service.start()
    try:
        words = ("--artifact", digest, "--key-id", "0" * 64, "--reason", "x", "--yes")
        done = service("revoke", *words, "--key", key.private)
        assert done.code == 0, done.error
        assert f"artifact {digest} (unknown (no_artifact)): nodes of prod go over" in done.out
        assert "its signers are unknown (no_artifact)" in done.out
        assert "revocation list 1 is in force: 1 artifact, 1 key, 0 floors" in done.out
    finally:
        service.stop()


def test_two_people(tmp_path, monkeypatch):
    key = Key(tmp_path)
    identities = []
    for name, role in (("alice", "operator"), ("bob", "operator"), ("ci", "publisher")):
        made = CliRunner().invoke(app, ["token", str(tmp_path / f"{name}.token"), "--json"])
        digest = json.loads(made.stdout)["token_sha256"]
        identities.append(
            f'[[identity]]\nname = "{name}"\ntoken_sha256 = "{digest}"\nroles = ["{role}"]\n'
        )
    rule = '[[channel]]\nname = "prod-*"\ntwo_person = true\nalone = ["off", "rollback"]\n'
    (tmp_path / "access.toml").write_text("".join(identities) + rule)
    service = Service(
        tmp_path, ("--trust", str(key.public), "--access", str(tmp_path / "access.toml"))
    ).start()
    alice, bob, ci = (
        ("--token-file", tmp_path / f"{name}.token") for name in ("alice", "bob", "ci")
    )
    try:
        from steering_service.client.credentials import Credentials

        artifact = make(12)
        with Operator(
            service.address, credentials=Credentials(token=tmp_path / "ci.token")
        ) as operator:
            digest = operator.publish(artifact, key.signer.sign(artifact.manifest_bytes))
        change = ("promote", "prod-a", digest, "--strength", 1, "--reason", "canary")
        assert service(*change).code == 1 or service(*change).error is not None
        assert service(*change, *ci).error.kind == "access_role"
        proposed = service(*change, *alice)
        assert "not in effect yet" in proposed.out
        [command] = [line for line in proposed.out.splitlines() if "steerage approve" in line]
        proposal = command.split()[3]
        assert f"--address {service.address}" in command
        waiting = service("proposals", "prod-a", *bob)
        assert proposal in waiting.out
        assert "new: artifact" in waiting.out
        assert service("proposals", "prod-a", *bob, "--json").json["proposal"] == proposal
        own = service("approve", "prod-a", proposal, *alice)
        assert own.error is not None
        entry = service("approve", "prod-a", proposal, *bob, "--json").json
        assert (entry["actor"], entry["approver"]) == ("alice", "bob")
        assert "alice, approved by bob: canary" in service("log", "prod-a", *bob).out
        assert "nothing waits" in service("proposals", "prod-a", *bob).err
        off = service("promote", "prod-a", "--off", "--reason", "incident", *alice, "--json").json
        assert (off["revision"], off["enabled"]) == (2, False)
        wrong = service("promote", "prod-a", "--on", "--reason", "x", *alice, "--actor", "bob")
        assert wrong.error.kind == "actor_mismatch"
        monkeypatch.setenv("STEERAGE_TOKEN_FILE", str(tmp_path / "bob.token"))
        pending = service("promote", "prod-a", "--on", "--reason", "again", "--json").json
        assert pending["entry"]["actor"] == "bob"
    finally:
        service.stop()


def test_token_is_for_its_owner_only(tmp_path):
    path = tmp_path / "node.token"
    made = CliRunner().invoke(app, ["token", str(path)])
    assert made.exit_code == 0
    secret = path.read_text().strip()
    assert hashlib.sha256(secret.encode()).hexdigest() in made.stdout
    assert secret not in made.stdout + made.stderr
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = CliRunner().invoke(app, ["token", str(path)])
    assert again.exception.kind == "token_exists"
    assert path.read_text().strip() == secret


def test_credentials_that_do_not_fit_are_refused_before_anything_is_sent(service, tmp_path):
    assert service("log", "c", "--cert", tmp_path / "x.crt").error.kind == "credentials_pair"
    lonely = ("--cert", tmp_path / "x.crt", "--key-file", tmp_path / "x.key")
    assert service("log", "c", *lonely).error.kind == "credentials_ca"
    away = service("log", "c", "--address", "10.0.0.1:7433", at=False)
    assert away.error.kind == "address_insecure"


def test_gc_says_what_it_would_delete_and_asks(service, published, tmp_path):
    service("promote", "kept", published(make(13)), "--strength", 1, "--reason", "x")
    lonely = published(make(14))
    store = ("--store", service.store)
    now = ("--older-than", "0s", "--unreferenced")
    shown = service("gc", *store, *now, "--dry-run", at=False)
    assert f"artifacts/{lonely}/manifest.json" in shown.out
    assert "would be deleted" in shown.out
    asked = service("gc", *store, *now, at=False)
    assert asked.code == 2
    assert "--yes" in asked.err
    assert service("show", lonely).code == 0
    lines = service("gc", *store, *now, "--yes", "--json", at=False).out.splitlines()
    summary = json.loads(lines[-1])
    assert summary["deleted"] == summary["objects"] == len(lines) - 1 > 0
    assert "no garbage" in service("gc", *store, "--older-than", "1d", at=False).err
    assert service("gc", *store, "--older-than", "soon", at=False).code == 2
    assert service("verify", *store, at=False).code == 0


def test_verify_walks_registry_and_channels(tmp_path):
    key = Key(tmp_path)
    service = Service(tmp_path, ("--trust", str(key.public))).start()
    try:
        artifact = make(15)
        with Operator(service.address) as operator:
            digest = operator.publish(artifact, key.signer.sign(artifact.manifest_bytes))
        service("promote", "c", digest, "--strength", 1, "--reason", "one")
        service("promote", "c", "--strength", 2, "--reason", "two")
        flags = ("--reason", "x", "--key", key.private, "--yes")
        for revision in (1, 2):
            assert service("revoke", "--floor", f"c={revision}", *flags).code == 0
    finally:
        service.stop()
    store = ("--store", service.store)
    sound = service("verify", *store, "--trust", key.public, "--json", at=False).json
    assert sound["sound"]
    assert sound["registry"]["signatures_checked"]
    assert sound["registry"]["objects"] == 6  # payload, artifact, two entries, two lists
    assert "signatures not checked" in service("verify", *store, at=False).out
    entry = service.store / "channels" / "c" / "00000001.json"
    entry.write_bytes(entry.read_bytes().replace(b'"one"', b'"eno"'))
    blob = next((service.store / "blobs" / "sha256").iterdir())
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    damaged = service("verify", *store, at=False)
    assert damaged.code == 1
    assert "channel_chain" in damaged.out
    assert "blob_checksum" in damaged.out
    for list_ in (service.store / "revocations").iterdir():
        # The newest again, under every serial: what a replayed or rewritten list would be.
        list_.write_bytes((service.store / "revocations" / "00000002.json").read_bytes())
    result = service("verify", *store, "--trust", key.public, "--json", at=False)
    problems = json.loads(result.out)["registry"]["problems"]
    assert "revocations_order" in {problem["kind"] for problem in problems}
    stranger = Key(tmp_path, "stranger")
    result = service("verify", *store, "--trust", stranger.public, "--json", at=False)
    problems = json.loads(result.out)["registry"]["problems"]
    assert "signature_untrusted" in {problem["kind"] for problem in problems}


def test_what_others_wrote_moves_no_cursor(service, published):
    service(
        "promote",
        "escape",
        published(make(16)),
        "--strength",
        1,
        "--reason",
        "red\x1b[31m\nfake r9",
    )
    out = service("log", "escape").out
    assert "\x1b" not in out
    assert len(out.splitlines()) == 1


def test_output_is_plain_and_whole_when_piped(service, published):
    digest = published(make(17))
    service("promote", "piped", digest, "--strength", 1, "--reason", "a reason " * 30)
    for command in (("list",), ("show", digest), ("log", "piped"), ("status", "piped")):
        out = service(*command, columns=40).out
        assert "\x1b" not in out
        assert "…" not in out
        assert digest[:12] in out
