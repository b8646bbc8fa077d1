"""Revocation lists: what they refuse, when one may replace another, and what is no list."""

from __future__ import annotations

import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner, SSlibKey

from steering_service.core.errors import InvalidInput, Refused
from steering_service.core.revocation import Revocations, parse_revocations
from steering_service.core.signing import REVOCATIONS_TYPE, Signer, TrustRoots

WHEN = {"actor": "ada", "time": "2026-11-22T10:00:00Z", "reason": "a leak"}
KEYS = [ed25519.Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in range(3)]
SIGNERS = [Signer(key) for key in KEYS]
IDS = [signer.key_id for signer in SIGNERS]
ROOTS = TrustRoots(tuple(SSlibKey.from_crypto(key.public_key()) for key in KEYS[:2]))

digests = st.sampled_from([character * 64 for character in "0123456789abcdef"])
lists = st.builds(
    lambda serial, artifacts, keys, floors: Revocations(
        serial=serial,
        artifacts=tuple(sorted(artifacts)),
        keys=tuple(sorted(keys)),
        floors=floors,
        **WHEN,
    ),
    st.integers(1, 99_999_999),
    st.sets(digests, max_size=4),
    st.sets(st.sampled_from(IDS)),
    st.dictionaries(st.sampled_from(["prod", "dev", "é"]), st.integers(1, 50)),
)


def a_list(**changes) -> Revocations:
    return Revocations(**({"serial": 1, **WHEN} | changes))


def union(one: Revocations, two: Revocations) -> Revocations:
    floors = {
        channel: max(one.floors.get(channel, 0), two.floors.get(channel, 0))
        for channel in {*one.floors, *two.floors}
    }
    return Revocations(
        serial=max(one.serial, two.serial),
        artifacts=tuple(sorted({*one.artifacts, *two.artifacts})),
        keys=tuple(sorted({*one.keys, *two.keys})),
        floors=floors,
        **WHEN,
    )


@given(lists)
def test_bytes_round_trip(revocations):
    data = revocations.to_bytes()
    assert parse_revocations(data) == revocations
    assert parse_revocations(data).to_bytes() == data


@given(lists, lists, lists)
def test_covers_is_an_order_with_unions_on_top(one, two, three):
    assert one.covers(one)
    assert union(one, two).covers(one)
    assert union(one, two).covers(two)
    if one.covers(two) and two.covers(three):
        assert one.covers(three)
    if one.covers(two) and two.covers(one):
        assert (one.artifacts, one.keys, one.floors) == (two.artifacts, two.keys, two.floors)


@given(lists, lists, digests, st.sets(st.sampled_from(IDS), min_size=1), st.integers(1, 60))
def test_a_list_that_covers_another_refuses_at_least_as_much(one, two, digest, key_ids, revision):
    def refused(revocations):
        kinds = []
        for check in (
            lambda: revocations.check_artifact(digest, sorted(key_ids)),
            lambda: revocations.check_revision("prod", revision),
        ):
            try:
                check()
                kinds.append(False)
            except Refused:
                kinds.append(True)
        return kinds

    if one.covers(two):
        pairs = zip(refused(one), refused(two), strict=True)
        assert all(mine or not other for mine, other in pairs)


def test_what_is_refused():
    revocations = a_list(artifacts=("a" * 64,), keys=(IDS[0],), floors={"prod": 5})
    for check, kind in (
        (lambda: revocations.check_artifact("a" * 64, [IDS[1]]), "artifact_revoked"),
        (lambda: revocations.check_artifact("b" * 64, [IDS[0]]), "key_revoked"),
        (lambda: revocations.check_revision("prod", 4), "revision_revoked"),
    ):
        with pytest.raises(Refused, match="ada, 2026-11-22T10:00:00Z: a leak") as caught:
            check()
        assert caught.value.kind == kind
    revocations.check_artifact("b" * 64, [IDS[1]])
    revocations.check_artifact("b" * 64, [IDS[0], IDS[1]])  # one good signature is enough
    revocations.check_revision("prod", 5)
    revocations.check_revision("dev", 1)


@pytest.mark.parametrize(
    "change",
    [
        {"serial": 0},
        {"serial": 1.0},
        {"serial": True},
        {"serial": 100_000_000},
        {"schema_version": 2},
        {"artifacts": ("b" * 64, "a" * 64)},
        {"artifacts": ("a" * 64, "a" * 64)},
        {"artifacts": ("A" * 64,)},
        {"artifacts": ("../x",)},
        {"keys": ("b", "a")},
        {"keys": ("",)},
        {"floors": {"prod": 0}},
        {"floors": {"prod": 1.5}},
        {"floors": {"": 1}},
        {"actor": ""},
        {"reason": ""},
        {"time": "yesterday"},
        {"time": "2026-11-22T10:00:00"},
        {"extra": 1},
    ],
)
def test_what_is_no_list(change):
    with pytest.raises(ValidationError):
        a_list(**change)


GOOD = a_list(artifacts=("a" * 64,), floors={"prod": 5}).to_bytes()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "revocations_syntax"),
        (b"null", "revocations_syntax"),
        (b"[" * 100_000, "revocations_syntax"),
        (b"\xff", "revocations_syntax"),
        (GOOD.replace(b'"serial":1', b'"serial":-1'), "revocations_syntax"),
        (GOOD.replace(b'"serial":1', b'"serial":1e999'), "revocations_syntax"),
        (GOOD.replace(b'"serial":1', b'"serial":' + b"9" * 5000), "revocations_syntax"),
        (GOOD.replace(b'"serial":1', b'"serial":1.0'), "revocations_canonical"),
        (GOOD.replace(b'"serial":1', b'"serial":2,"serial":1'), "revocations_canonical"),
        (GOOD + b" ", "revocations_canonical"),
        (b" " * (5 << 20), "revocations_size"),
    ],
)
def test_malformed_bytes(data, kind):
    with pytest.raises(InvalidInput) as caught:
        parse_revocations(data)
    assert caught.value.kind == kind


@given(st.binary(max_size=200))
def test_noise_is_invalid(noise):
    with pytest.raises(InvalidInput):
        parse_revocations(noise)


def test_a_signed_list_is_verified():
    revocations = a_list(artifacts=("a" * 64,))
    envelope = SIGNERS[0].sign_revocations(revocations.to_bytes())
    assert ROOTS.verify_revocations(envelope) == revocations
    with pytest.raises(InvalidInput):
        SIGNERS[0].sign_revocations(b"{}")


def test_a_list_of_a_stranger_is_refused():
    envelope = SIGNERS[2].sign_revocations(GOOD)
    with pytest.raises(Refused) as caught:
        ROOTS.verify_revocations(envelope)
    assert caught.value.kind == "signature_untrusted"
    with pytest.raises(Refused) as caught:
        ROOTS.verify_revocations(b"")
    assert caught.value.kind == "unsigned"


def test_a_key_that_is_revoked_revokes_nothing():
    envelope = SIGNERS[0].sign_revocations(GOOD)
    for revoked in ([IDS[0]], IDS):
        with pytest.raises(Refused) as caught:
            ROOTS.verify_revocations(envelope, revoked=revoked)
        assert caught.value.kind == "signature_untrusted"
    assert ROOTS.verify_revocations(envelope, revoked=[IDS[1]]).serial == 1


def test_manifests_and_lists_are_never_taken_for_each_other():
    with pytest.raises(Refused) as caught:
        ROOTS.verify_revocations(SIGNERS[0].sign(GOOD))
    assert caught.value.kind == "signature_type"
    with pytest.raises(Refused) as caught:
        ROOTS.verify(SIGNERS[0].sign_revocations(GOOD), GOOD)
    assert caught.value.kind == "signature_type"


def test_a_signed_text_that_is_no_list_is_invalid():
    envelope = Envelope(b"{}", REVOCATIONS_TYPE, {})
    envelope.sign(CryptoSigner(KEYS[0]))
    with pytest.raises(InvalidInput):
        ROOTS.verify_revocations(json.dumps(envelope.to_dict()).encode())


def test_all_trusted_signers_are_named():
    manifest = b"{}"
    envelope = Envelope(manifest, "application/vnd.steerage.manifest.v1+json", {})
    for key in KEYS:
        envelope.sign(CryptoSigner(key))
    data = json.dumps(envelope.to_dict()).encode()
    assert ROOTS.signers(data, manifest) == tuple(sorted(IDS[:2]))
    assert ROOTS.signers(SIGNERS[1].sign(manifest), manifest) == (IDS[1],)
