"""Credentials: what clients show and trust, when files are read, and that nothing goes in clear."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from publishers import FINGERPRINT
from waiting import eventually

from steering_service.client.connection import Connection
from steering_service.client.credentials import Credentials
from steering_service.client.fetch import fetch_artifact
from steering_service.client.operator import Operator
from steering_service.client.subscription import Subscription
from steering_service.core.errors import InvalidInput, NotFound, Refused, Unavailable

TOKEN = "t0ken-of-bob"
POLICY = f"""
[[identity]]
name = "alice"
certificate = "spiffe://test/alice"
roles = ["publisher", "operator", "reader"]

[[identity]]
name = "node"
certificate = "spiffe://test/node"
roles = ["reader"]

[[identity]]
name = "bob"
token_sha256 = "{hashlib.sha256(TOKEN.encode()).hexdigest()}"
roles = ["publisher", "operator", "reader"]
"""


def shown(pki, pair, **options):
    return Credentials(
        ca=pki.authority.certificate, certificate=pair.certificate, key=pair.key, **options
    )


@pytest.fixture
def node_pair(pki, tmp_path):
    """A node's certificate, in files of this test alone."""
    pair = type(pki.server)(tmp_path / "node.pem", tmp_path / "node.key")
    pair.replace(pki.client("node"))
    return pair


@pytest.fixture
def tls(guarded):
    return guarded(POLICY, tls=True)


@pytest.fixture
def subscribe(tmp_path, publisher):
    def make(address, credentials, node_id="node-1"):
        return Subscription(
            address,
            "prod",
            node_id,
            tmp_path / "cache",
            publisher.roots,
            FINGERPRINT,
            credentials=credentials,
        )

    return make


def test_certificates_of_both_sides(tls, pki, node_pair, publisher, artifact, subscribe, tmp_path):
    item = artifact()
    with Operator(tls.address, credentials=shown(pki, pki.alice)) as operator:
        publisher.publish(operator, item)
        entry = operator.promote("prod", artifact=item.digest, strength=1.0, reason="a test")
        assert entry.actor == "alice"
        with subscribe(tls.address, shown(pki, node_pair)) as node:
            assert node.active.wait_for(1, 10).artifact.digest == item.digest
            eventually(lambda: operator.nodes("prod")[1].converged == 1)
            [status] = operator.nodes("prod")[0]
            assert (status.caller, status.model_fingerprint) == ("node", FINGERPRINT)
            assert status.client.startswith("steerage-python/")
        # What it may not is refused, and not taken for an outage.
        with (
            Operator(tls.address, credentials=shown(pki, node_pair)) as reader,
            pytest.raises(Refused),
        ):
            reader.promote("prod", strength=0.5, reason="a test")
    fetched = fetch_artifact(
        item.digest,
        tls.address,
        cache_dir=tmp_path / "tool",
        trust_roots=publisher.roots,
        model_fingerprint=FINGERPRINT,
        credentials=shown(pki, node_pair),
    )
    assert fetched.payload_bytes == item.payload_bytes


def test_an_expired_certificate_is_named_and_a_renewed_one_used_without_a_restart(
    tls, pki, node_pair, subscribe, publisher, artifact
):
    with Operator(tls.address, credentials=shown(pki, pki.alice)) as operator:
        publisher.publish(operator, artifact())
        operator.promote("prod", artifact=artifact().digest, strength=1.0, reason="a test")
    node_pair.replace(pki.expired)
    with pytest.raises(Refused, match=str(node_pair.certificate)) as caught:
        Operator(tls.address, credentials=shown(pki, node_pair))
    assert caught.value.kind == "credentials_expired"
    with subscribe(tls.address, shown(pki, node_pair)) as node:
        eventually(lambda: (node.status.last_error or "").startswith("credentials_expired"))
        node_pair.replace(pki.client("node"))
        assert node.active.wait_for(1, 30).artifact is not None


def test_files_may_come_after_the_node(tls, pki, tmp_path, subscribe):
    missing = type(pki.server)(tmp_path / "late.pem", tmp_path / "late.key")
    with subscribe(tls.address, shown(pki, missing)) as node:
        eventually(lambda: (node.status.last_error or "").startswith("credentials_file"))
        assert str(missing.certificate) in node.status.last_error
        missing.replace(pki.client("node"))
        eventually(lambda: node.status.connected, 30)


@pytest.mark.parametrize("which", ["from_afar", "stranger", None])
def test_who_is_not_known_gets_nowhere(tls, pki, which):
    if which is None:
        credentials = Credentials(ca=pki.authority.certificate)
    else:
        credentials = shown(pki, getattr(pki, which))
    with (
        Operator(tls.address, credentials=credentials) as operator,
        pytest.raises((Refused, Unavailable)) as caught,
    ):
        list(operator.channels())
    assert ("--cert and --key-file" in str(caught.value)) == (which is None)


def test_a_service_that_is_not_ours_is_not_talked_to(tls, pki):
    """Its certificate is of another authority, or of another name."""
    foreign = Credentials(ca=pki.foreign.certificate)
    renamed = shown(pki, pki.alice, server_name="steering.example.org")
    for credentials in (foreign, renamed):
        with (
            Operator(tls.address, credentials=credentials) as operator,
            pytest.raises(Unavailable) as caught,
        ):
            list(operator.channels())
        assert "--key-file" not in str(caught.value)


def test_the_name_in_the_certificate_may_be_given(tls, pki):
    with Operator(
        tls.address, credentials=shown(pki, pki.alice, server_name="localhost")
    ) as operator:
        assert list(operator.channels()) == []
    port = tls.address.rpartition(":")[2]
    with Operator(f"localhost:{port}", credentials=shown(pki, pki.alice)) as operator:
        assert list(operator.channels()) == []


def test_with_tls_on_one_side_only_nothing_passes(tls, pki, shared_service):
    with Operator(tls.address) as plain, pytest.raises(Unavailable):
        list(plain.channels())
    with (
        Operator(shared_service.address, credentials=shown(pki, pki.alice)) as secure,
        pytest.raises(Unavailable),
    ):
        list(secure.channels())


@pytest.mark.parametrize("over_tls", [False, True])
def test_tokens_are_read_for_each_call(
    guarded, pki, publisher, artifact, subscribe, tmp_path, over_tls
):
    service = guarded(POLICY, tls=over_tls, client_ca=False)
    token = tmp_path / "token"
    credentials = Credentials(ca=pki.authority.certificate if over_tls else None, token=token)
    with Operator(service.address, credentials=credentials) as operator:
        with pytest.raises(NotFound) as caught:
            list(operator.channels())
        assert caught.value.kind == "credentials_file"
        token.write_text("not-it\n")
        with pytest.raises(Refused) as caught:
            list(operator.channels())
        assert "not-it" not in str(caught.value)
        with subscribe(service.address, credentials) as node:
            eventually(lambda: node.status.last_error is not None)
            token.write_text(f"{TOKEN}\n")
            # Every kind of call: stream of requests, of answers, of both, and none.
            item = artifact()
            publisher.publish(operator, item)
            entry = operator.promote("prod", artifact=item.digest, strength=1.0, reason="a test")
            assert entry.actor == "bob"
            assert node.active.wait_for(1, 30).artifact.digest == item.digest


def test_a_token_that_is_being_rewritten_ends_nothing(
    guarded, publisher, artifact, subscribe, tmp_path
):
    """An empty file for a moment, just when an artifact is fetched."""
    service = guarded(POLICY)
    (tmp_path / "operator").write_text(TOKEN)
    token = tmp_path / "token"
    token.write_text(TOKEN)
    items = artifact(1), artifact(2)
    with Operator(
        service.address, credentials=Credentials(token=tmp_path / "operator")
    ) as operator:
        for item in items:
            publisher.publish(operator, item)
        operator.promote("prod", artifact=items[0].digest, strength=1.0, reason="a test")
        with subscribe(service.address, Credentials(token=token)) as node:
            node.active.wait_for(1, 10)
            token.write_text("")
            operator.promote("prod", artifact=items[1].digest, reason="a test")
            eventually(lambda: node.status.refused_revision == 2)
            assert node.status.last_error.startswith("credentials_token")
            token.write_text(TOKEN)
            assert node.active.wait_for(2, 30).artifact.digest == items[1].digest


@pytest.mark.parametrize("address", ["example.org:443", "10.0.0.1:80", "0.0.0.0:1"])
def test_nothing_goes_over_a_network_in_clear(address, tmp_path, subscribe):
    (tmp_path / "token").write_text("t")
    for credentials in (None, Credentials(), Credentials(token=tmp_path / "token")):
        for make in (
            lambda c: Operator(address, credentials=c),
            lambda c: Connection(address, c),
            lambda c: subscribe(address, c),
        ):
            with pytest.raises(Refused) as caught:
                make(credentials)
            assert caught.value.kind == "address_insecure"


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"certificate": "c"}, "credentials_pair"),
        ({"key": "k", "ca": "a"}, "credentials_pair"),
        ({"certificate": "c", "key": "k"}, "credentials_ca"),
        ({"server_name": "s"}, "credentials_ca"),
        ({"server_name": "s", "token": "t"}, "credentials_ca"),
    ],
)
def test_what_does_not_go_together(fields, kind):
    paths = {k: Path(v) if k != "server_name" else v for k, v in fields.items()}
    with pytest.raises(InvalidInput) as caught:
        Credentials(**paths)
    assert caught.value.kind == kind


def test_the_environment():
    names = {
        "STEERAGE_CA": "/ca",
        "STEERAGE_CERT": "/cert",
        "STEERAGE_KEY": "/key",
        "STEERAGE_TOKEN_FILE": "/token",
        "STEERAGE_SERVER_NAME": "name",
    }
    assert Credentials.from_environment(names) == Credentials(
        Path("/ca"), Path("/cert"), Path("/key"), Path("/token"), "name"
    )
    assert Credentials.from_environment({}) == Credentials()
    assert Credentials.from_environment(dict.fromkeys(names, "")) == Credentials()
    assert not Credentials().secure


def test_files_that_are_not_what_they_should_be(pki, tmp_path):
    noise, big = tmp_path / "noise", tmp_path / "big"
    noise.write_text("hello")
    big.write_bytes(b"x" * (2 << 20))
    ca, alice = pki.authority.certificate, pki.alice
    missing = tmp_path / "missing"
    cases = [
        ((missing, None, None), NotFound, "credentials_file", missing),
        ((tmp_path, None, None), NotFound, "credentials_file", tmp_path),
        ((noise, None, None), InvalidInput, "credentials_format", noise),
        ((big, None, None), InvalidInput, "credentials_format", big),
        ((alice.key, None, None), InvalidInput, "credentials_format", alice.key),
        ((ca, missing, alice.key), NotFound, "credentials_file", missing),
        ((ca, noise, alice.key), InvalidInput, "credentials_format", noise),
        ((ca, alice.certificate, missing), NotFound, "credentials_file", missing),
        ((ca, alice.certificate, noise), InvalidInput, "credentials_format", noise),
        ((ca, alice.certificate, alice.certificate), InvalidInput, "credentials_format", alice),
        ((ca, alice.certificate, pki.stranger.key), InvalidInput, "credentials_mismatch", alice),
    ]
    for files, error, kind, named in cases:
        with pytest.raises(error) as caught:
            Credentials(*files).channel_credentials()
        assert caught.value.kind == kind, files
        assert str(getattr(named, "certificate", named)) in str(caught.value)


@pytest.mark.parametrize("text", ["", " \n", "two words", "two\nlines", "ü", "x" * 5000, "a\x00b"])
def test_what_is_no_token(tmp_path, text):
    (tmp_path / "token").write_text(text)
    with pytest.raises(InvalidInput) as caught:
        Credentials(token=tmp_path / "token").bearer_token()
    assert caught.value.kind == "credentials_token"
    assert not text.strip() or text not in str(caught.value)


def test_too_many_calls_are_a_matter_of_waiting(guarded, pki):
    limits = "\n[limits]\ncalls_per_s = 1\nburst = 2\n"
    service = guarded(POLICY + limits, tls=True)
    with Operator(service.address, credentials=shown(pki, pki.alice)) as operator:
        with pytest.raises(Unavailable) as caught:
            [list(operator.channels()) for _ in range(20)]
        assert caught.value.kind == "rate_limited"
