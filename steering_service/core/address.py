"""Address: where the service listens, and the rule that without authentication it is loopback."""

from __future__ import annotations

import ipaddress

from steering_service.core.errors import InvalidInput, Refused


def loopback(address: str) -> str:
    """Check an address of the form host:port and return it with a numeric host.

    Connections are not yet encrypted or authenticated, so anything but loopback is refused, by the
    service and by its clients: never a silently insecure connection.

    Args:
        address: Such as ``127.0.0.1:8780``, ``localhost:8780`` or ``[::1]:8780``; port 0 lets a
            server choose.

    Raises:
        InvalidInput: Not host:port.
        Refused: The host is not loopback.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 65536):
        raise InvalidInput(
            f"address {address!r}: expected host:port, such as 127.0.0.1:8780",
            kind="address_format",
        )
    if host == "localhost":
        host = "127.0.0.1"
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        is_loopback = ipaddress.ip_address(bare).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise Refused(
            f"address {address!r} is not loopback, and TLS and authentication come with the next "
            "release; expected 127.0.0.1:PORT, [::1]:PORT or localhost:PORT (to reach another "
            "machine meanwhile, use an ssh tunnel or a mesh's sidecar)",
            kind="address_insecure",
        )
    return f"{host}:{int(port)}"
