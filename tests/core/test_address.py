"""Address: loopback, or TLS, or nothing."""

from __future__ import annotations

import pytest

from steering_service.core.address import check_address, loopback
from steering_service.core.errors import InvalidInput, Refused


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:0", "127.0.0.1:0"),
        ("127.1.2.3:80", "127.1.2.3:80"),
        ("localhost:8780", "127.0.0.1:8780"),
        ("[::1]:8780", "[::1]:8780"),
    ],
)
def test_loopback(address, expected):
    assert loopback(address) == expected


@pytest.mark.parametrize(
    "address", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.org:1", "localhost.evil.org:1"]
)
def test_not_loopback(address):
    with pytest.raises(Refused):
        loopback(address)


@pytest.mark.parametrize(
    "address",
    [
        *("", ":1", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000", "a:-1", "a:١", "a:000001"),
        *(
            "::1:80",
            "[127.0.0.1]:80",
            "a b:1",
            "a/b:1",
            "-a:1",
            "ü.org:1",
            "a\n:1",
            "a" * 300 + ":1",
        ),
        # What gRPC would read as something else than one host and port.
        *("unix:/tmp/socket:1", "dns:///example.org:1", "xds:///a:1", "10.0.0.1:1,10.0.0.2:2"),
    ],
)
@pytest.mark.parametrize("secure", [True, False])
def test_not_an_address(address, secure):
    with pytest.raises(InvalidInput):
        check_address(address, secure=secure)


@pytest.mark.parametrize(
    "address",
    ["example.org:443", "10.0.0.1:1", "[2001:db8::1]:80", "localhost:8780", "steering_1.svc.:80"],
)
def test_with_tls_any_host_will_do(address):
    assert check_address(address, secure=True) == address
