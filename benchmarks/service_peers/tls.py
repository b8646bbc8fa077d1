"""Certificates for the benchmark: one authority, one server, one client, and an access policy."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CLIENT: Final = "spiffe://bench/client"
# Limits that are never reached: the limiter works, and turns nobody away.
_POLICY: Final = f"""
[limits]
calls_per_s = 1000000
burst = 1000000

[[identity]]
name = "bench"
certificate = "{CLIENT}"
roles = ["reader", "publisher", "operator", "auditor"]
"""


@dataclass(frozen=True, slots=True)
class Security:
    """Paths of PEM files, and of an access policy for the client."""

    authority: str
    server_certificate: str
    server_key: str
    client_certificate: str
    client_key: str
    policy: str


def make_security(folder: Path) -> Security:
    """Write keys (P-256), certificates and a policy into a folder."""
    now = datetime.now(UTC)
    root_key = ec.generate_private_key(ec.SECP256R1())
    root_name = _name("bench authority")
    root = (
        _builder(root_name, root_name, root_key, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(root_key, hashes.SHA256())
    )
    (folder / "ca.pem").write_bytes(root.public_bytes(Encoding.PEM))
    for role, name, usage in (
        (
            "server",
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
            ExtendedKeyUsageOID.SERVER_AUTH,
        ),
        ("client", x509.UniformResourceIdentifier(CLIENT), ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder(_name(f"bench {role}"), root_name, key, now)
            .add_extension(x509.SubjectAlternativeName([name]), critical=False)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .sign(root_key, hashes.SHA256())
        )
        (folder / f"{role}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path = folder / f"{role}.key"
        path.touch(mode=0o600)
        path.write_bytes(private)
    (folder / "access.toml").write_text(_POLICY)
    return Security(
        *(
            str(folder / name)
            for name in (
                *("ca.pem", "server.pem", "server.key", "client.pem", "client.key"),
                "access.toml",
            )
        )
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=2))
    )
