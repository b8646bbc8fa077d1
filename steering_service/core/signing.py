"""Signing: DSSE envelopes around manifests and revocation lists, and the keys that a node trusts.

A signature is a DSSE envelope (https://github.com/secure-systems-lab/dsse) as canonical JSON with
one ed25519 signature; its payload is the manifest, byte for byte. The manifest names the payload's
sha256, so the signature covers the whole artifact. The payload type keeps the two kinds apart: the
signature of a manifest is never one of a revocation list.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import rfc8785
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, Key, SSlibKey

from steering_service.core.artifact import MAX_MANIFEST_BYTES
from steering_service.core.errors import InvalidInput, NotFound, Refused
from steering_service.core.revocation import Revocations, parse_revocations

PAYLOAD_TYPE: Final = "application/vnd.steerage.manifest.v1+json"
REVOCATIONS_TYPE: Final = "application/vnd.steerage.revocations.v1+json"
# Base64 makes four bytes of three; the rest is room for the signatures.
MAX_ENVELOPE_BYTES: Final = MAX_MANIFEST_BYTES * 4 // 3 + (64 << 10)
_KEY_SUFFIXES: Final = (".pub", ".pem")


class _SignatureRecord(BaseModel):
    model_config = ConfigDict(strict=True)

    keyid: str
    sig: str


class _EnvelopeRecord(BaseModel):
    """The DSSE fields, checked for type before the library sees them; others are ignored."""

    model_config = ConfigDict(strict=True)

    payload: str
    payloadType: str
    signatures: list[_SignatureRecord] = Field(max_length=16)


def generate_key(private_path: str | os.PathLike[str], public_path: str | os.PathLike[str]) -> str:
    """Make an ed25519 key pair as PEM files, the private one for the owner only (0600).

    Returns:
        The key id.

    Raises:
        InvalidInput: One of the files exists: a key is never overwritten.
        NotFound: A folder does not exist.
    """
    private = Ed25519PrivateKey.generate()
    private_pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public_pem = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    _write_new(Path(private_path), private_pem, mode=0o600)
    try:
        _write_new(Path(public_path), public_pem, mode=0o644)
    except (InvalidInput, NotFound):
        Path(private_path).unlink()
        raise
    return str(SSlibKey.from_crypto(private.public_key()).keyid)


class Signer:
    """Signs manifests and revocation lists with one private key. Use `Signer.from_file`."""

    __slots__ = ("_signer",)

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self._signer = CryptoSigner(private_key)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Signer:
        """Read an ed25519 private key, unencrypted PKCS#8 PEM as `generate_key` writes it.

        Raises:
            NotFound: No such file.
            InvalidInput: Not such a key.
        """
        try:
            key = load_pem_private_key(_read(Path(path)), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise InvalidInput(
                f"{str(path)!r} is not an unencrypted PEM private key: {error}; make one with "
                "`steerage keygen`",
                kind="key_format",
            ) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise InvalidInput(
                f"{str(path)!r}: expected an ed25519 private key, got {type(key).__name__}",
                kind="key_type",
            )
        return cls(key)

    @property
    def key_id(self) -> str:
        """64 hex digits: the name that `TrustRoots.verify` returns."""
        return str(self._signer.public_key.keyid)

    def sign(self, manifest_bytes: bytes) -> bytes:
        """The DSSE envelope as canonical JSON. The same input gives the same bytes."""
        return self._envelope(manifest_bytes, PAYLOAD_TYPE)

    def sign_revocations(self, revocations: bytes) -> bytes:
        """The DSSE envelope around a revocation list, from `Revocations.to_bytes`.

        Raises:
            InvalidInput: It is not one.
        """
        parse_revocations(revocations)
        return self._envelope(revocations, REVOCATIONS_TYPE)

    def _envelope(self, payload: bytes, payload_type: str) -> bytes:
        envelope = Envelope(payload, payload_type, {})
        envelope.sign(self._signer)
        return rfc8785.dumps(envelope.to_dict())


@dataclass(frozen=True, slots=True, eq=False)
class TrustRoots:
    """The public keys whose signatures count. Use `TrustRoots.from_paths`.

    Raises:
        InvalidInput: No key at all: nothing could ever be accepted.
    """

    keys: tuple[Key, ...]

    def __post_init__(self) -> None:
        if not self.keys:
            raise InvalidInput(
                "no trust root given; expected at least one ed25519 public key (*.pub or *.pem)",
                kind="trust_roots_empty",
            )

    @classmethod
    def from_paths(cls, paths: Iterable[str | os.PathLike[str]]) -> TrustRoots:
        """Read public keys from PEM files, and from the *.pub and *.pem files of folders.

        Raises:
            NotFound: A path does not exist.
            InvalidInput: A file is not an ed25519 public key, or no key was found.
        """
        keys: dict[str, Key] = {}
        for path in map(Path, paths):
            files = (
                sorted(f for f in path.iterdir() if f.suffix in _KEY_SUFFIXES)
                if path.is_dir()
                else [path]
            )
            for file in files:
                key = SSlibKey.from_crypto(_public_key(file))
                keys[key.keyid] = key
        return cls(tuple(keys[key_id] for key_id in sorted(keys)))

    @property
    def key_ids(self) -> tuple[str, ...]:
        """Sorted ids of the keys."""
        return tuple(key.keyid for key in self.keys)

    def verify(self, envelope_bytes: bytes, manifest_bytes: bytes) -> str:
        """Check that a trusted key signed exactly this manifest.

        Args:
            envelope_bytes: DSSE envelope as JSON; empty means unsigned.
            manifest_bytes: The manifest that is about to be used.

        Returns:
            Id of the key that signed.

        Raises:
            Refused: Unsigned, signed by other keys, for another payload, or of another type.
            InvalidInput: Not a DSSE envelope.
        """
        return self.signers(envelope_bytes, manifest_bytes)[0]

    def signers(self, envelope_bytes: bytes, manifest_bytes: bytes) -> tuple[str, ...]:
        """All trusted keys that signed exactly this manifest.

        Returns:
            Sorted ids, at least one.

        Raises:
            Refused, InvalidInput: See `verify`.
        """
        envelope = _open(envelope_bytes, PAYLOAD_TYPE)
        if envelope.payload != manifest_bytes:
            raise Refused(
                f"signature covers other bytes ({len(envelope.payload)}) than the manifest "
                f"({len(manifest_bytes)}); get the signature that belongs to this artifact",
                kind="signature_payload",
            )
        return self._accepted(envelope, self.keys)

    def verify_revocations(
        self, envelope_bytes: bytes, *, revoked: Collection[str] = ()
    ) -> Revocations:
        """The revocation list of an envelope that a trusted key signed.

        Args:
            envelope_bytes: DSSE envelope as JSON.
            revoked: Ids of keys that count no more: those of the list that this one is to replace.
                So a stolen key, once revoked, cannot revoke anything itself.

        Raises:
            Refused: Unsigned, signed by other or revoked keys, or of another type.
            InvalidInput: Not a DSSE envelope, or not a revocation list inside.
        """
        envelope = _open(envelope_bytes, REVOCATIONS_TYPE)
        self._accepted(envelope, tuple(key for key in self.keys if key.keyid not in revoked))
        return parse_revocations(envelope.payload)

    def _accepted(self, envelope: Envelope, keys: tuple[Key, ...]) -> tuple[str, ...]:
        accepted = []
        for key in keys:
            # One at a time, since the library stops at the first one that is enough.
            with suppress(VerificationError):
                accepted += envelope.verify([key], threshold=1)
        if not accepted:
            raise Refused(
                "no signature by a trusted key: signed by "
                f"{', '.join(keyid[:100] for keyid in envelope.signatures)}, "
                f"trusted are {', '.join(key.keyid for key in keys) or 'none'}; sign with a "
                "trusted key, or add the publisher's public key to the trust roots",
                kind="signature_untrusted",
            )
        return tuple(sorted(accepted))


def _open(envelope_bytes: bytes, payload_type: str) -> Envelope:
    """The envelope, not verified yet.

    Raises:
        Refused: Unsigned, or of another type.
        InvalidInput: Not a DSSE envelope.
    """
    if not envelope_bytes:
        raise _unsigned()
    record = _parse_envelope(envelope_bytes)
    if record.payloadType != payload_type:
        raise Refused(
            f"signature is for payload type {record.payloadType[:100]!r}; expected "
            f"{payload_type!r}",
            kind="signature_type",
        )
    if not record.signatures:
        raise _unsigned()
    try:
        return Envelope.from_dict(record.model_dump())
    except ValueError as error:
        raise InvalidInput(
            f"signature is not a DSSE envelope: {error}", kind="signature_format"
        ) from error


def _unsigned() -> Refused:
    return Refused("there is no signature; sign with a key that the nodes trust", kind="unsigned")


def _parse_envelope(envelope_bytes: bytes) -> _EnvelopeRecord:
    if len(envelope_bytes) > MAX_ENVELOPE_BYTES:
        raise InvalidInput(
            f"signature of {len(envelope_bytes)} bytes; at most {MAX_ENVELOPE_BYTES} are accepted",
            kind="signature_size",
        )
    try:
        record = _EnvelopeRecord.model_validate(json.loads(envelope_bytes))
        # The library decodes leniently (it skips stray characters); here one text is one payload.
        base64.b64decode(record.payload, validate=True)
        for signature in record.signatures:
            base64.b64decode(signature.sig, validate=True)
    except (ValidationError, ValueError, RecursionError) as error:
        raise InvalidInput(
            f"signature is not a DSSE envelope in JSON: {error}", kind="signature_format"
        ) from error
    return record


def _public_key(path: Path) -> Ed25519PublicKey:
    data = _read(path)
    if b"PRIVATE KEY" in data:
        raise InvalidInput(
            f"{str(path)!r} is a private key; trust roots are public keys, and a private key must "
            "not be where nodes can read it",
            kind="key_private",
        )
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidInput(
            f"{str(path)!r} is not a PEM public key: {error}", kind="key_format"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidInput(
            f"{str(path)!r}: expected an ed25519 public key, got {type(key).__name__}",
            kind="key_type",
        )
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotFound(
            f"key file {str(path)!r} cannot be read: {error}", kind="key_file"
        ) from error


def _write_new(path: Path, data: bytes, *, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise InvalidInput(
            f"{str(path)!r} exists; keys are never overwritten: choose another name",
            kind="key_exists",
        ) from error
    except OSError as error:
        raise NotFound(f"cannot write {str(path)!r}: {error}", kind="key_folder") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
