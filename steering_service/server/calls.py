"""What happens around every call: who is it, may they, how did it end.

In order: the caller is found, counted against its limits, and its role checked; only then is the
request parsed and the handler begun. Afterwards an error becomes a status, and the call is counted,
timed, traced and logged.

No interceptor, since gRPC runs those as coroutines of their own for every call, and because every
method must pass through here: servicers are added to `Calls`, and only `Calls` to the server.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from time import monotonic
from typing import Any, Final, NoReturn, TypeAlias

import grpc
import grpc.aio
from opentelemetry import trace

import store.errors as stored
from steering_service.core.errors import Unavailable
from steering_service.core.wire import MAX_MESSAGE_BYTES
from steering_service.server import access, metrics, tracing
from steering_service.server.callers import Callers, Metadata, Standing
from steering_service.server.deadlines import Deadlines
from steering_service.server.limits import Limited, Meter
from steering_service.server.messages import Messages, parser
from steering_service.server.status import Context, status_of

log = logging.getLogger(__name__)

# Seconds that a unary call gets if its caller sets no deadline, or a later one; and that a Publish
# waits for its next message.
UNARY_S: Final = 60.0
IDLE_S: Final = 60.0
# What a request may have, other than those that carry artifacts and envelopes.
MAX_REQUEST_BYTES: Final = 64 << 10
_ARTIFACTS: Final = "/steering_service.v1.ArtifactService/"
_CHANNELS: Final = "/steering_service.v1.ChannelService/"
_LARGE: Final = frozenset({_ARTIFACTS + "Publish", _ARTIFACTS + "Revoke"})
# Logged even when all is well; the others only when they fail, are slow, or on DEBUG.
_CHANGES: Final = frozenset(
    {
        *(_ARTIFACTS + name for name in ("Publish", "Revoke")),
        *(_CHANNELS + name for name in ("Promote", "Rollback", "Approve")),
    }
)
_SLOW_S: Final = 1.0
# Not worth a line each, since they are caused by callers and may be many; metrics count them.
_QUIET: Final = frozenset({grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED})
_OK: Final = grpc.StatusCode.OK

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

# The metadata of the present call. gRPC gives it with the method's name; handlers would have it
# decoded again.
_METADATA: ContextVar[Metadata] = ContextVar("steerage_metadata")


class _Method:
    """What is the same for all calls of a method."""

    __slots__ = ("is_change", "is_watch", "max_request", "name", "stats")

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_watch = name.endswith("/Watch")
        self.is_change = name in _CHANGES
        self.max_request = MAX_MESSAGE_BYTES if name in _LARGE else MAX_REQUEST_BYTES
        self.stats = metrics.method_stats(name, timed=not self.is_watch)


class _Call:
    """One call, from its arrival to its end."""

    __slots__ = ("_began", "_context", "_method", "code", "kind", "span", "standing")

    def __init__(self, method: _Method, context: Context) -> None:
        self._began = monotonic()
        self._method = method
        self._context = context
        self.standing: Standing | None = None
        self.span: trace.Span | None = None
        # Unless told otherwise: the client went, or its deadline came.
        self.code = grpc.StatusCode.CANCELLED
        self.kind: str | None = None

    def admit(self, callers: Callers, spans: tracing.Tracing) -> access.Identity:
        """Find the caller, count the call, check the role.

        Raises:
            Unauthenticated, Limited, Denied: It goes no further.
        """
        metadata, method = _METADATA.get(), self._method
        if spans.enabled and not method.is_watch:
            self.span = spans.span(method.name, metadata)
        if method.is_watch:
            _METADATA.set(())  # it would stay as long as the stream, a kilobyte each
        self.standing = callers.find(metadata, self._context, self._began)
        self.standing.admit(method.name, self._began)
        identity = self.standing.identity
        access.set_caller(identity)
        return identity

    async def fail(self, error: Exception) -> NoReturn:
        """Answer an error."""
        status = status_of(error)
        self.code, self.kind = status.code, status.kind
        if status.code is grpc.StatusCode.INTERNAL:
            log.error(
                "rpc failed", exc_info=error, extra={"method": self._method.name, "kind": self.kind}
            )
        if isinstance(error, stored.Unavailable | stored.Corrupt):
            metrics.STORE_ERRORS.labels(error.kind).inc()
        if isinstance(error, access.Denied | access.Unauthenticated | Limited):
            metrics.REJECTED.labels(status.kind).inc()
        await self._context.abort(status.code, status.detail, status.trailing_metadata())

    def aborted(self) -> None:
        """The handler has answered an error itself."""
        self.code = self._context.code()

    def end(self) -> None:
        """Count, time, trace and log it."""
        duration_s = monotonic() - self._began
        if self.code is grpc.StatusCode.CANCELLED and self._context.time_remaining() == 0:
            self.code = grpc.StatusCode.DEADLINE_EXCEEDED
        method, code = self._method, self.code
        method.stats.ended(code.name, duration_s)
        if code is _OK:
            loud = method.is_change or (duration_s > _SLOW_S and not method.is_watch)
        else:
            loud = code not in _QUIET
        if loud or self.span is not None or log.isEnabledFor(logging.DEBUG):
            self._tell(duration_s, logging.INFO if loud else logging.DEBUG)

    def _tell(self, duration_s: float, level: int) -> None:
        name = self.standing.identity.name if self.standing is not None else ""
        if self.span is not None:
            number = self.code.value[0]
            tracing.end(self.span, caller=name, code=self.code.name, number=number, kind=self.kind)
        extra = {
            "method": self._method.name,
            "code": self.code.name,
            "caller": name,
            "duration_s": round(duration_s, 6),
        }
        if self.kind is not None:
            extra["kind"] = self.kind
        log.log(level, "rpc done" if self.code is _OK else "rpc refused", extra=extra)


class Calls(grpc.GenericRpcHandler):  # type: ignore[misc, unused-ignore]
    """All methods of a server, each behind the same door; those open to all are left alone.

    It takes what generated ``add_..._to_server`` functions add:

        calls = Calls(callers, meter, tracing)
        artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(servicer, calls)
        server.add_generic_rpc_handlers((calls,))

    Args:
        callers: Finds who calls.
        meter: Counts their Watch streams.
        spans: Makes spans, if anybody collects them.
        unary_s: Seconds that a unary call gets if its deadline is not sooner.
        idle_s: Seconds that a Publish waits for its next message.
    """

    def __init__(
        self,
        callers: Callers,
        meter: Meter,
        spans: tracing.Tracing,
        *,
        unary_s: float = UNARY_S,
        idle_s: float = IDLE_S,
    ) -> None:
        self._callers = callers
        self._meter = meter
        self._spans = spans
        self._deadlines = Deadlines(unary_s)
        self._idle_s = idle_s
        self._handlers: dict[str, Handler] = {}

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        """Take the methods of a service."""
        for short, handler in handlers.items():
            name = f"/{service}/{short}"
            opened = name.startswith(access.OPEN)
            self._handlers[name] = handler if opened else self._guarded(handler, _Method(name))

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Nothing: generated code adds the same methods a second time, for older servers."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        """The guarded handler of a method; None, and so UNIMPLEMENTED, if there is none."""
        _METADATA.set(handler_call_details.invocation_metadata)
        return self._handlers.get(handler_call_details.method)

    def _guarded(self, handler: Handler, method: _Method) -> Handler:
        """The same handler with all that.

        gRPC hands over bytes, which are parsed inside: a request that does not parse would get
        UNKNOWN from gRPC, as if the service were at fault, and one that is denied is not parsed.
        """
        return (self._stream if handler.response_streaming else self._single)(handler, method)

    def _single(self, handler: Handler, method: _Method) -> Handler:
        """Of a call with one response."""
        callers, spans = self._callers, self._spans
        parse = parser(handler.request_deserializer, method.name, method.max_request)
        inner: Any = handler.stream_unary if handler.request_streaming else handler.unary_unary
        # A stream of requests ends when it brings nothing; see `Messages`.
        deadlines = None if handler.request_streaming else self._deadlines

        async def single(request: Any, context: Context) -> object:
            call = _Call(method, context)
            timed = None
            try:
                call.admit(callers, spans)
                if deadlines is None:
                    answer = inner(Messages(request, parse, self._idle_s), context)
                else:
                    answer = inner(parse(request), context)
                    if not _ends_within(deadlines.limit_s, context):
                        timed = deadlines.begin()
                if call.span is not None:
                    answer = _traced(answer, call.span)
                response = await answer
            except grpc.aio.AbortError:
                call.aborted()
                raise
            except asyncio.CancelledError:
                if deadlines is None or timed is None or not deadlines.missed(timed):
                    raise
                await call.fail(_too_long(deadlines.limit_s))
            except Exception as error:
                await call.fail(error)
            else:
                call.code = _OK
                return response
            finally:
                if deadlines is not None and timed is not None:
                    deadlines.end(timed)
                call.end()

        make = (
            grpc.stream_unary_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return make(single, None, _serializer(handler))

    def _stream(self, handler: Handler, method: _Method) -> Handler:
        """Of a call with a stream of responses."""
        callers, spans = self._callers, self._spans
        parse = parser(handler.request_deserializer, method.name, method.max_request)
        inner: Any = handler.stream_stream if handler.request_streaming else handler.unary_stream
        requests_too = handler.request_streaming

        async def stream(request: Any, context: Context) -> AsyncIterator[object]:
            call = _Call(method, context)
            try:
                identity = call.admit(callers, spans)
                read = Messages(request, parse, None) if requests_too else parse(request)
                with self._meter.watching(identity) if method.is_watch else nullcontext():
                    async for response in inner(read, context):
                        yield response
            except grpc.aio.AbortError:
                call.aborted()
                raise
            except Exception as error:
                await call.fail(error)
            else:
                call.code = _OK
            finally:
                call.end()

        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_stream_rpc_method_handler
        )
        return make(stream, None, _serializer(handler))


def _serializer(handler: Handler) -> Callable[[Any], bytes]:
    """Messages to bytes; what a handler has serialised before, to send it many times, stays."""
    serialise: Any = handler.response_serializer
    return lambda response: response if type(response) is bytes else serialise(response)


def _ends_within(limit_s: float, context: Context) -> bool:
    """Whether the caller's own deadline comes soon enough, which gRPC sees to."""
    remaining_s = context.time_remaining()
    return remaining_s is not None and remaining_s <= limit_s


def _too_long(limit_s: float) -> Unavailable:
    return Unavailable(
        f"the call was not done after {limit_s:g} s, which is the most a call gets; a change may "
        "still have been made, so read before trying again",
        kind="call_too_long",
    )


async def _traced(answer: Awaitable[object], span: trace.Span) -> object:
    with trace.use_span(span, record_exception=False, set_status_on_exception=False):
        return await answer
