"""Errors to gRPC statuses: the only table, and the interceptor that applies it to every call."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Any, Final, NoReturn, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

import steering_service.core.errors as core
import store.errors as stored
from steering_service.core.wire import KIND_METADATA

log = logging.getLogger(__name__)

OUR_METHODS: Final = "/steering_service.v1."
# Details travel in an HTTP/2 header, and peers reject headers above about 8 kB.
MAX_DETAIL_CHARS: Final = 1000

STATUS: Final[dict[type[Exception], grpc.StatusCode]] = {
    core.InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    core.NotFound: grpc.StatusCode.NOT_FOUND,
    core.Conflict: grpc.StatusCode.ABORTED,
    core.Refused: grpc.StatusCode.FAILED_PRECONDITION,
    core.Corrupt: grpc.StatusCode.DATA_LOSS,
    core.Unavailable: grpc.StatusCode.UNAVAILABLE,
    stored.InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    stored.NotFound: grpc.StatusCode.NOT_FOUND,
    stored.Conflict: grpc.StatusCode.ABORTED,
    stored.Corrupt: grpc.StatusCode.DATA_LOSS,
    stored.Unavailable: grpc.StatusCode.UNAVAILABLE,
}

# Strings, since these are generic for the type checker only.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]


class StatusInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg, unused-ignore]
    """Turns errors of this project's handlers into statuses; a bug becomes INTERNAL, logged."""

    async def intercept_service(  # type: ignore[override, unused-ignore]
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        """Wrap the handler, if it is one of ours."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or not method.startswith(OUR_METHODS):
            return handler
        return _wrapped(handler, method)


def _wrapped(handler: Handler, method: str) -> Handler:
    """The same handler with errors made statuses, also those of messages that do not parse.

    gRPC would answer these with UNKNOWN, as if the service were at fault; so it hands over bytes
    here, and they are parsed inside.
    """
    inner: Any
    parse = handler.request_deserializer
    read = _Messages if handler.request_streaming else _parsed
    if handler.response_streaming:
        inner = handler.stream_stream if handler.request_streaming else handler.unary_stream

        async def stream(request: Any, context: Context) -> AsyncIterator[object]:
            try:
                async for response in inner(read(request, parse), context):
                    yield response
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await _abort(context, error, method)

        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_stream_rpc_method_handler
        )
        return make(stream, None, handler.response_serializer)

    inner = handler.stream_unary if handler.request_streaming else handler.unary_unary

    async def unary(request: Any, context: Context) -> object:
        try:
            return await inner(read(request, parse), context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            return await _abort(context, error, method)

    make_unary = (
        grpc.stream_unary_rpc_method_handler
        if handler.request_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    return make_unary(unary, None, handler.response_serializer)


def _parsed(data: bytes, parse: Any) -> object:
    try:
        return parse(data)
    except DecodeError as error:
        raise core.InvalidInput(
            f"the request of {len(data)} bytes is not the message that this call takes: {error}",
            kind="message_syntax",
        ) from error


class _Messages:
    """Messages of a request stream, from their bytes."""

    __slots__ = ("_bytes", "_parse")

    def __init__(self, requests: AsyncIterable[bytes], parse: Any) -> None:
        self._bytes = aiter(requests)
        self._parse = parse

    def __aiter__(self) -> _Messages:
        return self

    async def __anext__(self) -> object:
        return _parsed(await anext(self._bytes), self._parse)


async def _abort(context: Context, error: Exception, method: str) -> NoReturn:
    if isinstance(error, core.SteeringError | stored.StoreError):
        code = STATUS[type(error)]
        detail, kind = str(error), error.kind
        log.info("rpc refused", extra={"method": method, "kind": kind, "code": code.name})
    else:
        code, kind = grpc.StatusCode.INTERNAL, "internal"
        # The message of an unforeseen error may hold anything, so it stays in the log.
        detail = "internal error of the service; its log has the traceback"
        log.error("rpc failed", exc_info=error, extra={"method": method, "kind": kind})
    if len(detail) > MAX_DETAIL_CHARS:
        detail = detail[:MAX_DETAIL_CHARS] + "..."
    await context.abort(code, detail, ((KIND_METADATA, kind),))
