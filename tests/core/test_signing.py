"""Signatures: what is accepted, and that nothing near it is."""

from __future__ import annotations

import json
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner, SSlibKey

from steering_service.core.errors import InvalidInput, NotFound, Refused
from steering_service.core.signing import PAYLOAD_TYPE, Signer, TrustRoots, generate_key

MANIFEST = b'{"kind":"intervention","name":"refusal"}'
KEY = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SIGNER = Signer(KEY)
ROOTS = TrustRoots((SSlibKey.from_crypto(KEY.public_key()),))
ENVELOPE = SIGNER.sign(MANIFEST)


def signed_by(key, payload=MANIFEST, payload_type=PAYLOAD_TYPE):
    envelope = Envelope(payload, payload_type, {})
    envelope.sign(CryptoSigner(key))
    return envelope.to_dict()


def test_keys_round_trip_through_files(tmp_path):
    key_id = generate_key(tmp_path / "key.pem", tmp_path / "key.pub")
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
    signer = Signer.from_file(tmp_path / "key.pem")
    roots = TrustRoots.from_paths([tmp_path / "key.pub"])
    assert signer.key_id == key_id
    assert roots.key_ids == (key_id,)
    assert roots.verify(signer.sign(MANIFEST), MANIFEST) == key_id


def test_keys_are_never_overwritten(tmp_path):
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    generate_key(private, public)
    before = private.read_bytes(), public.read_bytes()
    with pytest.raises(InvalidInput, match="never overwritten"):
        generate_key(private, tmp_path / "other.pub")
    with pytest.raises(InvalidInput, match="never overwritten"):
        generate_key(tmp_path / "other.pem", public)
    assert (private.read_bytes(), public.read_bytes()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["key.pem", "key.pub"]
    with pytest.raises(NotFound):
        generate_key(tmp_path / "missing" / "key.pem", public)


def test_a_folder_of_keys_is_read_and_other_files_are_not(tmp_path):
    ids = {generate_key(tmp_path / f"{i}.secret", tmp_path / f"{i}.pub") for i in range(3)}
    (tmp_path / "README").write_text("not a key")
    assert set(TrustRoots.from_paths([tmp_path]).key_ids) == ids


def test_what_is_no_trust_root(tmp_path):
    generate_key(tmp_path / "private.pem", tmp_path / "public.pub")
    with pytest.raises(InvalidInput, match="is a private key"):
        TrustRoots.from_paths([tmp_path])
    with pytest.raises(NotFound):
        TrustRoots.from_paths([tmp_path / "missing.pub"])
    (tmp_path / "empty").mkdir()
    for paths in ([], [tmp_path / "empty"]):
        with pytest.raises(InvalidInput, match="no trust root"):
            TrustRoots.from_paths(paths)
    (tmp_path / "text.pub").write_text("hello")
    curve = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "curve.pub").write_bytes(
        curve.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    (tmp_path / "curve.pem").write_bytes(
        curve.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    for name in ("text.pub", "curve.pub"):
        with pytest.raises(InvalidInput):
            TrustRoots.from_paths([tmp_path / name])
    for name in ("text.pub", "curve.pem", "public.pub"):
        with pytest.raises(InvalidInput):
            Signer.from_file(tmp_path / name)


def test_signing_is_deterministic():
    assert SIGNER.sign(MANIFEST) == ENVELOPE
    assert json.loads(ENVELOPE)["payloadType"] == PAYLOAD_TYPE


@pytest.mark.parametrize(
    ("envelope", "kind"),
    [
        (b"", "unsigned"),
        (json.dumps(json.loads(ENVELOPE) | {"signatures": []}).encode(), "unsigned"),
        (SIGNER.sign(b"another manifest"), "signature_payload"),
        (json.dumps(signed_by(KEY, payload_type="text/plain")).encode(), "signature_type"),
        (
            json.dumps(signed_by(ed25519.Ed25519PrivateKey.generate())).encode(),
            "signature_untrusted",
        ),
    ],
)
def test_refused(envelope, kind):
    with pytest.raises(Refused) as caught:
        ROOTS.verify(envelope, MANIFEST)
    assert caught.value.kind == kind


def test_a_foreign_signature_under_a_trusted_key_id_is_refused():
    forged = signed_by(ed25519.Ed25519PrivateKey.generate())
    forged["signatures"][0]["keyid"] = SIGNER.key_id
    with pytest.raises(Refused):
        ROOTS.verify(json.dumps(forged).encode(), MANIFEST)


def test_one_of_several_signatures_is_enough():
    both = signed_by(KEY)
    both["signatures"] += signed_by(ed25519.Ed25519PrivateKey.generate())["signatures"]
    both["signatures"].reverse()
    assert ROOTS.verify(json.dumps(both).encode(), MANIFEST) == SIGNER.key_id


@pytest.mark.parametrize(
    "envelope",
    [
        b"{",
        b"null",
        b"[]",
        b"[" * 100_000,
        b"\xff",
        b'{"payload": 1, "payloadType": "x", "signatures": []}',
        json.dumps(json.loads(ENVELOPE) | {"signatures": {}}).encode(),
        json.dumps(json.loads(ENVELOPE) | {"signatures": [{"keyid": "x"}]}).encode(),
        json.dumps(json.loads(ENVELOPE) | {"payload": "***"}).encode(),
        json.dumps(
            json.loads(ENVELOPE) | {"signatures": json.loads(ENVELOPE)["signatures"] * 2}
        ).encode(),
        b" " * (7 << 20),
    ],
)
def test_malformed(envelope):
    with pytest.raises(InvalidInput):
        ROOTS.verify(envelope, MANIFEST)


@given(st.integers(0, len(ENVELOPE) - 1), st.integers(1, 255))
def test_no_flipped_byte_makes_another_manifest_pass(position, flip):
    flipped = bytearray(ENVELOPE)
    flipped[position] ^= flip
    try:
        key_id = ROOTS.verify(bytes(flipped), MANIFEST)
    except (Refused, InvalidInput):
        return
    # JSON and base64 have spellings of the same value; the bytes that were signed are the same.
    assert key_id == SIGNER.key_id
    assert json.loads(flipped)["payloadType"] == PAYLOAD_TYPE


@given(st.integers(0, len(MANIFEST) - 1), st.integers(1, 255))
def test_no_other_manifest_passes(position, flip):
    flipped = bytearray(MANIFEST)
    flipped[position] ^= flip
    with pytest.raises(Refused):
        ROOTS.verify(ENVELOPE, bytes(flipped))


@given(st.binary(max_size=300))
def test_noise_never_passes_nor_breaks_out(noise):
    with pytest.raises((Refused, InvalidInput)):
        ROOTS.verify(noise, MANIFEST)
