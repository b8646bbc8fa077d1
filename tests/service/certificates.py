"""Real certificates for tests: authorities, and what they issue.

    authority = Authority("test authority", tmp_path / "ca")
    server = authority.issue(tmp_path / "server", "localhost", ips=("127.0.0.1",))
    alice = authority.issue(tmp_path / "alice", "alice", uris=("spiffe://prod/alice",))
    late = authority.issue(tmp_path / "late", "late", valid_s=(-7200, -3600))

Each has `certificate` and `key`, both PEM files. ECDSA P-256, since RSA keys take long to make.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY_S = 86_400


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, in files."""

    certificate: Path
    key: Path

    def bytes(self) -> tuple[bytes, bytes]:
        return self.certificate.read_bytes(), self.key.read_bytes()

    def replace(self, other: Pair) -> None:
        """Take over another pair's bytes, each file by a rename, as cert-manager and kubelet do."""
        for mine, theirs in ((self.key, other.key), (self.certificate, other.certificate)):
            fresh = mine.with_suffix(".new")
            fresh.write_bytes(theirs.read_bytes())
            os.replace(fresh, mine)


class Authority:
    """A certificate authority; `certificate` is the PEM file that trusts it."""

    def __init__(self, name: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            _builder(self._name, self._name, self._key.public_key(), (-60, DAY_S))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.certificate = folder / "ca.pem"
        self.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(
        self,
        folder: Path,
        name: str | None,
        *,
        dns: tuple[str, ...] = (),
        ips: tuple[str, ...] = (),
        uris: tuple[str, ...] = (),
        emails: tuple[str, ...] = (),
        valid_s: tuple[int, int] = (-60, DAY_S),
    ) -> Pair:
        """A certificate for both ends of a connection, from and until seconds from now."""
        folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        common = [x509.NameAttribute(NameOID.COMMON_NAME, name)] if name else []
        builder = _builder(x509.Name(common), self._name, key.public_key(), valid_s).add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        names: list[x509.GeneralName] = [
            *map(x509.DNSName, dns),
            *(x509.IPAddress(ipaddress.ip_address(ip)) for ip in ips),
            *map(x509.UniformResourceIdentifier, uris),
            *map(x509.RFC822Name, emails),
        ]
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=not common)
        pair = Pair(folder / "cert.pem", folder / "key.pem")
        pair.certificate.write_bytes(
            builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        )
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        pair.key.chmod(0o600)
        return pair


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    valid_s: tuple[int, int],
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(seconds=valid_s[0]))
        .not_valid_after(now + timedelta(seconds=valid_s[1]))
    )
