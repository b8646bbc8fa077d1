"""Address: where the service listens, and the rule that without TLS it is loopback."""

from __future__ import annotations

import ipaddress
import re
from typing import Final

from steering_service.core.errors import InvalidInput, Refused

# A name as DNS has them, or an IPv4 address. Strict, since gRPC reads more into a target: schemes
# such as `unix:` and `xds:`, and lists of addresses.
_NAME: Final = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")


def check_address(address: str, *, secure: bool) -> str:
    """Check an address of the form host:port.

    Without TLS anything but loopback is refused, by the service and by its clients: never a
    silently insecure connection.

    Args:
        address: Such as ``steering.example.org:8780``, ``127.0.0.1:8780`` or ``[::1]:8780``; port 0
            lets a server choose.
        secure: Whether TLS is used.

    Returns:
        The address; without TLS with a numeric host.

    Raises:
        InvalidInput: Not host:port.
        Refused: Not secure, and the host is not loopback.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and port.isascii() and port.isdigit() and len(port) < 6 and int(port) < 65536):
        raise _malformed(address)
    if not secure and host == "localhost":
        host = "127.0.0.1"
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        number = ipaddress.ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        number = None
    if (number is not None and bracketed != (number.version == 6)) or (
        number is None and _NAME.fullmatch(host) is None
    ):
        raise _malformed(address)
    if not secure and (number is None or not number.is_loopback):
        raise Refused(
            f"address {address!r} is not loopback, and without TLS nothing else is served or "
            "dialled; expected 127.0.0.1:PORT, [::1]:PORT or localhost:PORT, or TLS: for a client "
            "a CA (STEERAGE_CA), for a service a certificate, a key and an access policy",
            kind="address_insecure",
        )
    return f"{host}:{int(port)}"


def loopback(address: str) -> str:
    """`check_address` without TLS.

    Raises:
        InvalidInput: Not host:port.
        Refused: The host is not loopback.
    """
    return check_address(address, secure=False)


def _malformed(address: str) -> InvalidInput:
    return InvalidInput(
        f"address {address[:300]!r}: expected host:port, such as 127.0.0.1:8780",
        kind="address_format",
    )
