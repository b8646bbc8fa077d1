"""Health: gRPC's own protocol (grpc.health.v1), open to everybody, and so bounded by itself.

Not the servicer of grpc_health, which keeps whatever name a caller asks for as long as it watches,
and whose watchers may miss a change after one of them has left.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NoReturn

import grpc
from grpc_health.v1 import health_pb2

from steering_service.core.errors import NotFound, SteeringError
from steering_service.server.limits import Limited
from steering_service.server.messages import parser
from steering_service.server.status import Context, host_of, status_of

SERVICE: Final = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

MAX_WATCHES: Final = 4096
"""Watch streams in total; each is a few ten kB, whoever opens it."""
MAX_WATCHES_PER_HOST: Final = 1024
"""Of them from one host: as many as one connection may have, and most have one."""

_MAX_REQUEST_BYTES: Final = 1 << 10
_STATUS: Final = health_pb2.HealthCheckResponse
_SERVING: Final[bytes] = _STATUS(status=_STATUS.SERVING).SerializeToString()
_NOT_SERVING: Final[bytes] = _STATUS(status=_STATUS.NOT_SERVING).SerializeToString()
_UNKNOWN: Final[bytes] = _STATUS(status=_STATUS.SERVICE_UNKNOWN).SerializeToString()


class Health:
    """Says whether the service serves. One event loop owns it.

    It says NOT_SERVING until `serve` is called, and again from `drain` on.

    Args:
        services: Names that may be asked for, apart from "", the service as a whole. They all have
            one status.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(("", *services))
        self._parse = parser(health_pb2.HealthCheckRequest.FromString, SERVICE, _MAX_REQUEST_BYTES)
        self._answer = _NOT_SERVING
        self._changed = asyncio.Event()
        self._draining = False
        self._watches: dict[str, int] = {}  # by host
        self._num_watches = 0

    def handlers(self) -> Mapping[str, grpc.RpcMethodHandler[Any, Any]]:
        """Its methods. They take and give bytes, so that what is too long is not parsed."""
        return {
            "Check": grpc.unary_unary_rpc_method_handler(self.check),
            "Watch": grpc.unary_stream_rpc_method_handler(self.watch),
        }

    def serve(self) -> None:
        """Say SERVING."""
        self._tell(_SERVING)

    def drain(self) -> None:
        """Say NOT_SERVING to all who watch, then end their streams."""
        self._draining = True
        self._tell(_NOT_SERVING)

    async def check(self, request: bytes, context: Context) -> bytes:
        """The status of a service; NOT_FOUND if there is none of this name."""
        try:
            if self._knows(request):
                return self._answer
            raise NotFound(
                "no service of this name; ask for '' or a name that reflection lists",
                kind="no_service",
            )
        except SteeringError as error:
            await _fail(error, context)

    async def watch(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        """The status of a service, now and whenever it changes."""
        try:
            known = self._knows(request)
            with self._watching(host_of(context)):
                while True:
                    # Together, so that no change is missed while the answer is sent.
                    changed, answer, last = self._changed, self._answer, self._draining
                    yield answer if known else _UNKNOWN
                    if last:
                        return
                    await changed.wait()
        except SteeringError as error:
            await _fail(error, context)

    def _knows(self, request: bytes) -> bool:
        return self._parse(request).service in self._services

    def _tell(self, answer: bytes) -> None:
        self._answer = answer
        before, self._changed = self._changed, asyncio.Event()
        before.set()

    @contextmanager
    def _watching(self, host: str) -> Iterator[None]:
        """Count a stream while the body runs."""
        of_host = self._watches.get(host, 0)
        if of_host >= MAX_WATCHES_PER_HOST or self._num_watches >= MAX_WATCHES:
            raise Limited(
                f"{self._num_watches} Watch streams for health are open on this replica, "
                f"{of_host} of them from your host; at most {MAX_WATCHES} and "
                f"{MAX_WATCHES_PER_HOST} may be; use Check",
                kind="rate_limited",
                retry_s=10.0,
            )
        self._watches[host] = of_host + 1
        self._num_watches += 1
        try:
            yield
        finally:
            self._num_watches -= 1
            self._watches[host] -= 1
            if not self._watches[host]:
                del self._watches[host]


async def _fail(error: SteeringError, context: Context) -> NoReturn:
    status = status_of(error)
    await context.abort(status.code, status.detail, status.trailing_metadata())
