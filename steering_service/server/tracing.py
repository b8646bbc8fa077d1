"""Spans of calls, by the OpenTelemetry API alone.

Without a tracer provider (the SDK, configured by whoever runs the service, such as with
``opentelemetry-instrument steerage serve``) nothing is made and nothing is spent. A few lines of
our own instead of opentelemetry-instrumentation-grpc: that one is still a beta, keeps a span open
for the whole life of a stream, and would put a second wrapper around every call.

A span is the child of the caller's, by `traceparent` in the metadata. It holds the method, the
caller's name, the status code and the kind of an error; never a request, a token or a prompt. Watch
has none: its streams last for days.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from opentelemetry import propagate, trace
from opentelemetry.context import Context

_SCOPE: Final = "steerage"


class Tracing:
    """Makes spans, if a tracer provider was set before this is made."""

    __slots__ = ("_tracer",)

    def __init__(self) -> None:
        # The API's own provider is a proxy until somebody sets a real one.
        configured = not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
        self._tracer = trace.get_tracer(_SCOPE) if configured else None

    @property
    def enabled(self) -> bool:
        """Whether `span` may be called."""
        return self._tracer is not None

    def span(self, method: str, metadata: Sequence[tuple[str, str | bytes]]) -> trace.Span:
        """A span that has begun; whoever asked for it ends it.

        Args:
            method: As in ``/steering_service.v1.ArtifactService/GetManifest``.
            metadata: Of the call.
        """
        if self._tracer is None:
            return trace.INVALID_SPAN
        service, _, name = method[1:].partition("/")
        return self._tracer.start_span(
            method[1:],
            context=_parent(metadata),
            kind=trace.SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
        )


def end(span: trace.Span, *, caller: str, code: str, number: int, kind: str | None) -> None:
    """End a span with how the call went.

    Args:
        span: What `Tracing.span` gave.
        caller: Name of the caller, "" for none.
        code: Name of the status code.
        number: Its number on the wire.
        kind: Of the error; None for none.
    """
    span.set_attribute("rpc.grpc.status_code", number)
    span.set_attribute("steerage.caller", caller)
    if kind is not None:
        span.set_attribute("steerage.error_kind", kind)
        span.set_status(trace.StatusCode.ERROR, code)
    span.end()


def _parent(metadata: Sequence[tuple[str, str | bytes]]) -> Context:
    return propagate.extract({key: value for key, value in metadata if isinstance(value, str)})
