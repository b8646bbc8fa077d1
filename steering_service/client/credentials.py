"""Credentials: who a client is to the service, and which service it believes.

Everything is a path, and the files are read again for every new connection (the token: for every
call), so that renewed certificates and tokens are used without a restart.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from steering_service.core.errors import InvalidInput, NotFound, Refused

# Request metadata travels in HTTP/2 headers, of which peers accept about 8 kB in all.
MAX_TOKEN_CHARS: Final = 4096
_MAX_FILE_BYTES: Final = 1 << 20
_VARIABLES: Final = {
    "ca": "STEERAGE_CA",
    "certificate": "STEERAGE_CERT",
    "key": "STEERAGE_KEY",
    "token": "STEERAGE_TOKEN_FILE",
    "server_name": "STEERAGE_SERVER_NAME",
}


@dataclass(frozen=True, slots=True)
class Credentials:
    """Files with what a client shows and what it trusts. None of them: plain loopback.

    Attributes:
        ca: PEM certificates of the authorities that the service's certificate must come from. With
            it connections use TLS, without it they go to loopback only.
        certificate: PEM certificate chain of the client, its own first, for mTLS.
        key: PEM private key of `certificate`, unencrypted.
        token: File that holds a bearer token. Over the network it is sent with TLS only.
        server_name: Name to expect in the service's certificate, where it is not the address's.

    Raises:
        InvalidInput: A certificate without its key or the other way round, or one of these or a
            server name without a CA.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    token: Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise InvalidInput(
                "a client certificate needs its private key, and the other way round; give both "
                f"({_VARIABLES['certificate']} and {_VARIABLES['key']}) or neither",
                kind="credentials_pair",
            )
        if self.ca is None and (self.certificate is not None or self.server_name is not None):
            raise InvalidInput(
                "a client certificate or a server name needs TLS, and TLS needs the authority that "
                f"the service's certificate comes from: give it too ({_VARIABLES['ca']})",
                kind="credentials_ca",
            )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Credentials:
        """What STEERAGE_CA, _CERT, _KEY, _TOKEN_FILE and _SERVER_NAME say; empty ones count not.

        Args:
            environment: None: the process's.

        Raises:
            InvalidInput: They do not go together.
        """
        values = os.environ if environment is None else environment
        files = {
            name: Path(values[variable]) if values.get(variable) else None
            for name, variable in _VARIABLES.items()
            if name != "server_name"
        }
        return cls(**files, server_name=values.get(_VARIABLES["server_name"]) or None)

    @property
    def secure(self) -> bool:
        """Whether connections use TLS."""
        return self.ca is not None

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """Read the files now.

        Returns:
            For `grpc.secure_channel`; None without TLS.

        Raises:
            NotFound: A file cannot be read (kind ``credentials_file``).
            InvalidInput: A file is not what it should be, or certificate and key are no pair.
            Refused: The client's certificate is expired or not valid yet.
        """
        if self.ca is None:
            return None
        authorities = _read(self.ca, "CA")
        _certificates(authorities, self.ca, "CA")
        if self.certificate is None or self.key is None:
            return grpc.ssl_channel_credentials(root_certificates=authorities)
        chain = _read(self.certificate, "client certificate")
        key = _read(self.key, "client key")
        own = _certificates(chain, self.certificate, "client certificate")[0]
        _check_pair(own, self.certificate, key, self.key)
        _check_time(own, self.certificate)
        return grpc.ssl_channel_credentials(
            root_certificates=authorities, private_key=key, certificate_chain=chain
        )

    def bearer_token(self) -> str | None:
        """Read the token now; None without one.

        Raises:
            NotFound: The file cannot be read (kind ``credentials_file``).
            InvalidInput: It does not hold one line of visible ASCII.
        """
        if self.token is None:
            return None
        # Its content must not get into an error: messages are logged.
        text = _read(self.token, "token").decode("ascii", errors="replace").strip()
        if not 0 < len(text) <= MAX_TOKEN_CHARS or not all("!" <= char <= "~" for char in text):
            raise InvalidInput(
                f"token file {str(self.token)!r}: expected one line of 1 to {MAX_TOKEN_CHARS} "
                f"visible ASCII characters without spaces, got {len(text)} characters",
                kind="credentials_token",
            )
        return text


def _read(path: Path, what: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise NotFound(
            f"{what} file {str(path)!r} cannot be read: {error.strerror or error}",
            kind="credentials_file",
        ) from error
    if len(data) > _MAX_FILE_BYTES:
        raise InvalidInput(
            f"{what} file {str(path)!r} is larger than {_MAX_FILE_BYTES} bytes",
            kind="credentials_format",
        )
    return data


def _certificates(data: bytes, path: Path, what: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise InvalidInput(
            f"{what} file {str(path)!r} does not hold PEM certificates: {error}",
            kind="credentials_format",
        ) from error


def _check_pair(own: x509.Certificate, path: Path, key: bytes, key_path: Path) -> None:
    try:
        public = load_pem_private_key(key, password=None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidInput(
            f"client key file {str(key_path)!r} is not an unencrypted PEM private key: {error}",
            kind="credentials_format",
        ) from error
    spki = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if public.public_bytes(*spki) != own.public_key().public_bytes(*spki):
        raise InvalidInput(
            f"client key {str(key_path)!r} is not the key of certificate {str(path)!r}; renew both "
            "together",
            kind="credentials_mismatch",
        )


def _check_time(own: x509.Certificate, path: Path) -> None:
    now = datetime.now(UTC)
    if not own.not_valid_before_utc <= now <= own.not_valid_after_utc:
        raise Refused(
            f"client certificate {str(path)!r} is valid from {own.not_valid_before_utc:%F %T} to "
            f"{own.not_valid_after_utc:%F %T} UTC, and now it is {now:%F %T}; renew it, or set "
            "this machine's clock",
            kind="credentials_expired",
        )
