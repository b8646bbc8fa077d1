"""Unary gRPC calls over one HTTP/2 connection, by a client that costs next to nothing.

On two cores a grpc.aio client is busier than the server, and would be what is measured. This one
writes frames that are the same for every call but for the stream's number, and reads no more of an
answer than its frame headers, its length and whether it ended well.
"""

from __future__ import annotations

import socket
import ssl
import struct
import sys
import time
from pathlib import Path
from typing import Final

from service_peers.wire import Job, read_job, tell

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_WINDOW_BYTES: Final = (1 << 31) - 1
_REFILL_BYTES: Final = 1 << 28


class CallFailed(Exception):
    """The server ended a call or the connection otherwise than it should."""


class Caller:
    """One connection and one method.

    Args:
        job: Address and security.
        method: Full path.
        request: The same for every call.
        expected: The answer, byte for byte; its length is checked at every call, all of it at the
            first.
    """

    def __init__(self, job: Job, method: str, request: bytes, expected: bytes) -> None:
        host, _, port = job["address"].rpartition(":")
        self._socket: socket.socket = socket.create_connection((host, int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        security = job["security"]
        if security is not None:
            context = ssl.create_default_context(cafile=security["authority"])
            context.load_cert_chain(security["client_certificate"], security["client_key"])
            context.set_alpn_protocols(["h2"])
            self._socket = context.wrap_socket(self._socket, server_hostname=host)
        # Incremental indexing: from the second call on a header is one byte.
        scheme = b"\x86" if security is None else b"\x87"
        self._first_headers = b"\x83" + scheme
        self._first_headers += b"\x44" + _text(method) + b"\x41" + _text(job["address"])
        self._first_headers += b"\x40" + _text("content-type") + _text("application/grpc")
        self._first_headers += b"\x40" + _text("te") + _text("trailers")
        self._headers = b"\x83" + scheme + bytes((0x80 | 65, 0x80 | 64, 0x80 | 63, 0x80 | 62))
        self._message = struct.pack(">BI", 0, len(request)) + request
        self._expected = struct.pack(">BI", 0, len(expected)) + expected
        self._stream = -1
        self._received: dict[int, int] = {}
        self._first_answer: bytes | None = b""
        self._unacknowledged = 0
        self._buffer = b""
        settings = struct.pack(">HI", 4, _WINDOW_BYTES)
        self._socket.sendall(
            _PREFACE
            + _frame(_SETTINGS, 0, 0, settings)
            + _frame(_WINDOW, 0, 0, struct.pack(">I", _WINDOW_BYTES - 65535))
        )

    def run(self, seconds: float, in_flight: int) -> tuple[int, float]:
        """Keep calls in flight for a time; how many ended, and within how many seconds."""
        begun = time.perf_counter()
        end = begun + seconds
        self._socket.sendall(b"".join(self._call() for _ in range(in_flight)))
        waiting, ended = in_flight, 0
        while waiting:
            done, replies = self._receive()
            ended += done
            if time.perf_counter() < end:
                replies += b"".join(self._call() for _ in range(done))
            else:
                waiting -= done
            if replies:
                self._socket.sendall(replies)
        return ended, time.perf_counter() - begun

    def _call(self) -> bytes:
        self._stream += 2
        headers = self._first_headers if self._stream == 1 else self._headers
        self._received[self._stream] = 0
        return _frame(_HEADERS, _END_HEADERS, self._stream, headers) + _frame(
            _DATA, _END_STREAM, self._stream, self._message
        )

    def _receive(self) -> tuple[int, bytes]:
        """How many calls ended, and what is to be sent in answer to other frames."""
        data = self._socket.recv(1 << 18)
        if not data:
            raise CallFailed("the server closed the connection")
        buffer = self._buffer + data
        at, done, replies = 0, 0, b""
        while len(buffer) - at >= 9:
            length = int.from_bytes(buffer[at : at + 3])
            body = at + 9
            if len(buffer) < body + length:
                break
            kind, flags = buffer[at + 3], buffer[at + 4]
            stream = int.from_bytes(buffer[at + 5 : body]) & _WINDOW_BYTES
            at = body + length
            if kind == _DATA:
                self._received[stream] += length
                self._unacknowledged += length
                if self._first_answer is not None and stream == 1:
                    self._first_answer += buffer[body:at]
            elif kind == _SETTINGS and not flags & _ACK:
                replies += _frame(_SETTINGS, _ACK, 0, b"")
            elif kind == _PING and not flags & _ACK:
                replies += _frame(_PING, _ACK, 0, buffer[body:at])
            elif kind in (_RST, _GOAWAY):
                raise CallFailed(f"frame of type {kind}: {buffer[body:at]!r}")
            if kind in (_DATA, _HEADERS) and flags & _END_STREAM:
                self._check(stream)
                done += 1
        self._buffer = buffer[at:]
        if self._unacknowledged > _REFILL_BYTES:
            replies += _frame(_WINDOW, 0, 0, struct.pack(">I", self._unacknowledged))
            self._unacknowledged = 0
        return done, replies

    def _check(self, stream: int) -> None:
        received = self._received.pop(stream)
        if received != len(self._expected):
            raise CallFailed(f"call {stream}: {received} bytes, expected {len(self._expected)}")
        if stream == 1:
            if self._first_answer != self._expected:
                raise CallFailed("the first answer has other bytes than expected")
            self._first_answer = None


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return struct.pack(">I", len(body))[1:] + struct.pack(">BBI", kind, flags, stream) + body


def _text(text: str) -> bytes:
    data = text.encode()
    assert len(data) < 127
    return bytes((len(data),)) + data


def main() -> None:
    """Warm up; then each line on stdin, "IN_FLIGHT SECONDS", is a load."""
    job = read_job()
    caller = Caller(
        job, job["method"], bytes.fromhex(job["request"]), Path(job["expected"]).read_bytes()
    )
    caller.run(job["warm_up_s"], 16)
    tell(ready=True)
    for line in sys.stdin:
        in_flight, seconds = line.split()
        calls, took = caller.run(float(seconds), int(in_flight))
        tell(calls=calls, seconds=took)


if __name__ == "__main__":
    main()
