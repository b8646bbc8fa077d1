"""mTLS: who gets through the handshake, and certificates that change under a running service."""

from __future__ import annotations

import os
import socket
import ssl
import time

import grpc
import pytest
import secure
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from waiting import eventually

from steering_service.client.credentials import Credentials
from steering_service.client.operator import Operator
from steering_service.core.errors import InvalidInput, NotFound, Refused, SteeringError
from steering_service.core.wire import KIND_METADATA
from steering_service.server.app import serve
from steering_service.server.tls import ServerTls
from steering_service.v1 import channel_pb2, channel_pb2_grpc

POLICY = f"""
[[identity]]
name = "alice"
certificate = "spiffe://test/alice"
roles = ["operator"]

[[identity]]
name = "expired"
certificate = "spiffe://test/expired"
roles = ["operator"]

[[identity]]
name = "bot"
token_sha256 = "{secure.sha256("a bot's token")}"
roles = ["reader"]
"""
BOT = (("authorization", "Bearer a bot's token"),)


def channels(channel, metadata=()):
    """The code, the kind and the words of a call."""
    stub = channel_pb2_grpc.ChannelServiceStub(channel)
    try:
        stub.ListChannels(channel_pb2.ListChannelsRequest(), timeout=5, metadata=metadata)
    except grpc.RpcError as error:
        kind = dict(error.trailing_metadata() or ()).get(KIND_METADATA)
        return error.code(), kind, error.details()
    return grpc.StatusCode.OK, None, ""


def refused_in_handshake(answer):
    code, kind, detail = answer
    return code is grpc.StatusCode.UNAVAILABLE and kind is None and "connect" in detail


@pytest.fixture(scope="module")
def service(guarded_once):
    return guarded_once(POLICY, tls=True)


def test_a_certificate_in_the_policy_is_let_in(service, pki):
    with service.channel(pki.alice) as channel:
        assert channels(channel)[0] is grpc.StatusCode.OK


def test_a_certificate_in_no_policy_entry_is_told_so(service, pki):
    with service.channel(pki.stranger) as channel:
        code, kind, detail = channels(channel)
    assert (code, kind) == (grpc.StatusCode.UNAUTHENTICATED, "certificate_unknown")
    assert "spiffe://test/stranger" in detail


@pytest.mark.parametrize("who", ["expired", "from_afar", None])
def test_bad_certificates_fail_in_the_handshake(service, pki, who):
    with service.channel(getattr(pki, who) if who else None) as channel:
        assert refused_in_handshake(channels(channel))


def test_a_client_that_expects_another_authority_does_not_connect(service, pki):
    with service.channel(pki.alice, root=pki.foreign) as channel:
        assert refused_in_handshake(channels(channel))


def test_plain_text_is_not_answered(service):
    with grpc.insecure_channel(service.address) as channel:
        assert channels(channel)[0] is grpc.StatusCode.UNAVAILABLE


def test_a_token_decides_where_there_is_one(service, pki):
    with service.channel(pki.stranger) as channel:
        assert channels(channel, BOT)[0] is grpc.StatusCode.OK
    with service.channel(pki.alice) as channel:
        wrong = (("authorization", "Bearer wrong"),)
        assert channels(channel, wrong)[:2] == (grpc.StatusCode.UNAUTHENTICATED, "token_unknown")


def test_a_common_name_counts_only_without_other_names(guarded, pki, tmp_path):
    service = guarded(
        '[[identity]]\nname = "carol"\ncertificate = "carol"\nroles = ["reader"]\n'
        '[[identity]]\nname = "dns"\ncertificate = "gpu-1.example.org"\nroles = ["reader"]\n'
        '[[identity]]\nname = "mail"\ncertificate = "dave@example.org"\nroles = ["reader"]\n'
        '[[identity]]\nname = "uri"\ncertificate = "spiffe://test/erin"\nroles = ["reader"]\n',
        tls=True,
    )
    issue = pki.authority.issue
    good = (
        issue(tmp_path / "1", "carol"),
        issue(tmp_path / "2", "x", dns=("gpu-1.example.org",)),
        issue(tmp_path / "3", None, emails=("dave@example.org",)),
    )
    bad = (
        issue(tmp_path / "4", "carol", dns=("elsewhere.example.org",)),
        issue(tmp_path / "5", "carol", ips=("10.0.0.1",)),
        issue(tmp_path / "6", "spiffe://test/erin"),
        issue(tmp_path / "7", "dave@example.org"),
        issue(tmp_path / "8", None),
    )
    for pairs, expected in ((good, None), (bad, "certificate_unknown")):
        for pair in pairs:
            with service.channel(pair) as channel:
                assert channels(channel)[1] == expected, pair


def test_tokens_alone_over_tls(guarded, pki):
    service = guarded(POLICY, tls=True, client_ca=False)
    with service.channel() as channel:
        assert channels(channel, BOT)[0] is grpc.StatusCode.OK
        assert channels(channel)[1] == "no_credentials"
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=5).status == 1
    # A certificate that nobody has verified says nothing.
    with service.channel(pki.alice) as channel:
        assert channels(channel)[1] == "no_credentials"


def test_the_client_library_speaks_it(service, pki, tmp_path):
    credentials = Credentials(
        ca=pki.authority.certificate, certificate=pki.alice.certificate, key=pki.alice.key
    )
    with Operator(service.address, credentials=credentials) as operator:
        assert list(operator.channels()) == []
    token = tmp_path / "token"
    token.write_text("wrong")
    wrong = Credentials(
        ca=pki.authority.certificate,
        certificate=pki.alice.certificate,
        key=pki.alice.key,
        token=token,
    )
    with Operator(service.address, credentials=wrong) as operator, pytest.raises(Refused) as caught:
        list(operator.channels())
    assert caught.value.kind == "token_unknown"


def serial(service, pki):
    """Which certificate the service shows now."""
    context = ssl.create_default_context(cafile=str(pki.authority.certificate))
    context.load_cert_chain(pki.alice.certificate, pki.alice.key)
    host, _, port = service.address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname=host) as wrapped,
    ):
        return x509.load_der_x509_certificate(wrapped.getpeercert(True)).serial_number


def test_a_renewed_certificate_is_used_without_a_restart(guarded, pki, tmp_path):
    service = guarded(POLICY, tls=True)
    before = serial(service, pki)
    with service.channel(pki.alice) as old:
        assert channels(old)[0] is grpc.StatusCode.OK
        service.server.replace(
            pki.authority.issue(tmp_path / "renewed", "service", ips=("127.0.0.1",))
        )
        assert serial(service, pki) != before
        # What was connected stays so.
        assert channels(old)[0] is grpc.StatusCode.OK
    with service.channel(pki.alice) as new:
        assert channels(new)[0] is grpc.StatusCode.OK
    assert len(service.events("tls files reread")) == 1
    assert service.events("tls files not taken over") == []


def test_half_written_files_leave_the_old_certificate_in_use(guarded, pki, tmp_path):
    service = guarded(POLICY, tls=True)
    before = serial(service, pki)
    renewed = pki.authority.issue(tmp_path / "renewed", "service", ips=("127.0.0.1",))
    certificate, key = renewed.bytes()
    steps = {
        "a certificate without its key": (service.server.certificate, certificate),
        "half a key": (service.server.key, key[: len(key) // 2]),
        "an empty key": (service.server.key, b""),
        "half a certificate": (service.server.certificate, certificate[: len(certificate) // 2]),
    }
    for step, (path, data) in steps.items():
        path.write_bytes(data)
        for _ in range(3):
            assert serial(service, pki) == before, step
    service.server.key.unlink()
    assert serial(service, pki) == before
    problems = service.events("tls files not taken over")
    assert len(problems) == len({p["detail"] for p in problems}) <= len(steps) + 1
    assert not any("PRIVATE" in p["detail"] for p in problems)
    service.server.replace(renewed)
    assert serial(service, pki) != before
    assert len(service.events("tls files reread")) == 1


def test_client_authorities_are_reread_too(guarded, pki, tmp_path):
    bundle = tmp_path / "clients.pem"
    bundle.write_bytes(pki.authority.certificate.read_bytes())
    service = guarded(POLICY, tls=True, client_ca=False, options={"client_ca": str(bundle)})
    with service.channel(pki.from_afar) as channel:
        assert refused_in_handshake(channels(channel))
    fresh = bundle.with_suffix(".new")
    fresh.write_bytes(pki.authority.certificate.read_bytes() + pki.foreign.certificate.read_bytes())
    os.replace(fresh, bundle)
    with service.channel(pki.from_afar) as channel:
        assert channels(channel)[0] is grpc.StatusCode.OK


def test_a_certificate_that_expires_ends_what_it_opened(guarded, pki):
    service = guarded(POLICY, tls=True)
    soon = pki.client("expiring", valid_s=(-60, 4))
    pair = pki.authority.issue(
        soon.key.parent, "alice", uris=("spiffe://test/alice",), valid_s=(-60, 4)
    )
    expires = time.time() + 4
    with service.channel(pair) as channel:
        assert channels(channel)[0] is grpc.StatusCode.OK
        eventually(lambda: time.time() > expires)
        assert channels(channel)[:2] == (
            grpc.StatusCode.UNAUTHENTICATED,
            "certificate_expired",
        )


@pytest.mark.parametrize(
    ("address", "options", "kind"),
    [
        ("0.0.0.0:0", (), "address_insecure"),
        ("0.0.0.0:0", ("access_policy",), "address_insecure"),
        ("0.0.0.0:0", ("tls_certificate", "tls_key", "client_ca"), "address_insecure"),
        ("[::]:0", ("tls_certificate", "tls_key"), "address_insecure"),
        ("127.0.0.1:0", ("tls_certificate",), "tls_files"),
        ("127.0.0.1:0", ("tls_key",), "tls_files"),
        ("127.0.0.1:0", ("client_ca",), "tls_files"),
    ],
)
def test_nothing_is_listened_on_without_authentication(tmp_path, pki, address, options, kind):
    policy = tmp_path / "access.toml"
    policy.write_text(POLICY)
    every = {
        "access_policy": policy,
        "tls_certificate": pki.server.certificate,
        "tls_key": pki.server.key,
        "client_ca": pki.authority.certificate,
    }
    chosen = {name: every[name] for name in options}
    with pytest.raises(SteeringError) as caught:
        serve(str(tmp_path / "store"), address, **chosen)
    assert caught.value.kind == kind
    assert not (tmp_path / "store").exists()


def test_metrics_are_for_loopback_only(tmp_path):
    with pytest.raises(Refused):
        serve(str(tmp_path / "store"), metrics_address="0.0.0.0:0")


def test_a_service_for_the_network_needs_both(guarded, pki):
    service = guarded(POLICY, tls=True, address="0.0.0.0:0")
    service.address = f"127.0.0.1:{service.address.rpartition(':')[2]}"
    with service.channel(pki.alice) as channel:
        assert channels(channel)[0] is grpc.StatusCode.OK


def test_files_that_do_not_fit_stop_the_start(tmp_path, pki):
    other = pki.client("other")
    for certificate, key in (
        (pki.server.certificate, other.key),
        (pki.server.key, pki.server.key),
        (pki.server.certificate, pki.server.certificate),
        (tmp_path / "nowhere", pki.server.key),
    ):
        with pytest.raises(InvalidInput) as caught:
            ServerTls(certificate, key, pki.authority.certificate).credentials()
        assert caught.value.kind == "tls_files"


def test_a_missing_policy_stops_the_start(tmp_path):
    with pytest.raises((InvalidInput, NotFound)):
        serve(str(tmp_path / "store"), access_policy=tmp_path / "nowhere.toml")
