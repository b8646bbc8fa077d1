"""Address: loopback or nothing."""

from __future__ import annotations

import pytest

from steering_service.core.address import loopback
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
    "address", ["", ":1", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000", "a:-1"]
)
def test_not_an_address(address):
    with pytest.raises(InvalidInput):
        loopback(address)
