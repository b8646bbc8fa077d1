"""Servers of a test's own, for what no sound service says. Tests of other folders use this too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager

import grpc


@contextmanager
def serving(*add: Callable[[grpc.Server], None]) -> Iterator[str]:
    """The address of a server to which all of these have added something."""
    server = grpc.server(
        futures.ThreadPoolExecutor(32), options=[("grpc.max_send_message_length", -1)]
    )
    for each in add:
        each(server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
