"""TLS of the service: its certificate, its key, and the authorities of its clients, from files.

The files are looked at in every handshake, and a renewed one serves from then on; connections that
exist stay as they are. What is half-written, or does not fit together, is logged once and the old
pair stays in use.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from steering_service.core.errors import InvalidInput
from steering_service.server import metrics

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

log = logging.getLogger(__name__)

_MAX_PEM_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class ServerTls:
    """Where the service's TLS files are, all PEM.

    Attributes:
        certificate: The service's own, followed by intermediate ones.
        key: Its private key, not encrypted.
        client_ca: Authorities whose client certificates are accepted. With it every client has to
            show a certificate; without it none is asked for, and callers need bearer tokens.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """What a server listens with; follows the files.

        Raises:
            InvalidInput: The files cannot be used as they are now (kind "tls_files").
        """
        source = _Source(self)
        return grpc.dynamic_ssl_server_credentials(
            source.first,
            source.fetch,  # type: ignore[arg-type]  # None is documented: nothing new
            require_client_authentication=self.client_ca is not None,
        )


class _Source:
    """What gRPC asks in every handshake, from threads of its own."""

    def __init__(self, files: ServerTls) -> None:
        self._files = files
        self._problem: str | None = None
        self._loaded = _signatures(files)
        self.first = _configuration(files)

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """The configuration if it has changed; None leaves the present one in use."""
        try:
            seen = _signatures(self._files)
            if seen == self._loaded:
                return None
            fresh = _configuration(self._files)
        except InvalidInput as error:
            # Looked at again in the next handshake, and logged again only if it is another problem.
            if str(error) != self._problem:
                self._problem = str(error)
                metrics.RELOADS.labels("tls", "error").inc()
                extra = {"kind": error.kind, "detail": str(error), "effect": "the old ones stay"}
                log.error("tls files not taken over", extra=extra)  # noqa: TRY400
            return None
        self._loaded, self._problem = seen, None
        metrics.RELOADS.labels("tls", "ok").inc()
        log.info("tls files reread", extra={"path": str(self._files.certificate)})
        return fresh


def _paths(files: ServerTls) -> list[Path]:
    optional = [files.client_ca] if files.client_ca is not None else []
    return [files.certificate, files.key, *optional]


def _signatures(files: ServerTls) -> list[tuple[int, int, int]]:
    seen = []
    for path in _paths(files):
        try:
            status = os.stat(path)
        except OSError as error:
            raise _unusable(path, str(error.strerror)) from error
        seen.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return seen


def _configuration(files: ServerTls) -> grpc.ServerCertificateConfiguration:
    certificate, key = _bytes(files.certificate), _bytes(files.key)
    own = _certificates(files.certificate, certificate)[0]
    try:
        private = load_pem_private_key(key, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _unusable(files.key, f"not an unencrypted private key in PEM ({error})") from error
    if _spki(own.public_key()) != _spki(private.public_key()):
        raise _unusable(files.key, f"not the key of the certificate in {files.certificate}")
    metrics.TLS_EXPIRES.set(own.not_valid_after_utc.timestamp())
    authorities = None
    if files.client_ca is not None:
        authorities = _bytes(files.client_ca)
        _certificates(files.client_ca, authorities)
    return grpc.ssl_server_certificate_configuration([(key, certificate)], authorities)


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_PEM_BYTES + 1)
    except OSError as error:
        raise _unusable(path, str(error.strerror)) from error
    if len(data) > _MAX_PEM_BYTES:
        raise _unusable(path, f"larger than {_MAX_PEM_BYTES} bytes")
    return data


def _certificates(path: Path, data: bytes) -> list[x509.Certificate]:
    try:
        found = x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise _unusable(path, f"no certificate in PEM ({error})") from error
    # A file cut off inside a block still has the whole blocks before it.
    if data.count(b"-----BEGIN ") != data.count(b"-----END "):
        raise _unusable(path, "the last certificate is cut off")
    return found


def _spki(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _unusable(path: Path, problem: str) -> InvalidInput:
    return InvalidInput(f"TLS file {path}: {problem}", kind="tls_files")
