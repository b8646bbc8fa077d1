"""Errors to gRPC statuses: the only table, and what an error tells besides its code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

import steering_service.core.errors as core
import store.errors as stored
from steering_service.core.wire import KIND_METADATA
from steering_service.server.access import Denied, Unauthenticated
from steering_service.server.limits import Limited

DETAILS_METADATA: Final = "grpc-status-details-bin"
DOMAIN: Final = "steerage"
# Details travel in an HTTP/2 header, twice, and peers reject headers above 8 kB.
MAX_DETAIL_CHARS: Final = 1000
# Of a message that is cut, the end stays: it says what to do.
_TAIL_CHARS: Final = 300
_RETRY_S: Final = 1.0

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
    Denied: grpc.StatusCode.PERMISSION_DENIED,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    Limited: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_WAITING_HELPS: Final = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED})

FIELDS: Final = {
    "channel_name": "channel",
    "digest": "digest",
    "download_offset": "offset",
    "node_id": "subscribe.node_id",
    "page_size": "page_size",
    "promote_actor": "actor",
    "promote_reason": "reason",
    "promote_share": "share",
    "promote_strength": "strength",
    "publish_size": "header.manifest",
    "signature_size": "header.signature",
}
"""The field of the request that an INVALID_ARGUMENT of this kind is about."""

# Strings, since these are generic for the type checker only.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


def host_of(context: Context) -> str:
    """The host that a call comes from, without its port."""
    return str(context.peer()).rpartition(":")[0]


@dataclass(frozen=True, slots=True)
class Status:
    """What a failed call answers.

    Attributes:
        code: What the caller can do about it.
        kind: Stable code of the error.
        detail: A sentence: ASCII, at most about a thousand characters.
        retry_s: When to try again, in seconds; None where waiting does not help.
    """

    code: grpc.StatusCode
    kind: str
    detail: str
    retry_s: float | None

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The kind by itself, and a google.rpc.Status with ErrorInfo and what else is known."""
        details: list[Message] = [error_details_pb2.ErrorInfo(reason=self.kind, domain=DOMAIN)]
        if self.retry_s is not None:
            delay = Duration()
            delay.FromMilliseconds(max(1, round(self.retry_s * 1000)))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        if self.code is grpc.StatusCode.INVALID_ARGUMENT and self.kind in FIELDS:
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=FIELDS[self.kind], description=self.detail, reason=self.kind.upper()
            )
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        status = status_pb2.Status(code=self.code.value[0], message=self.detail)
        for detail in details:
            status.details.add().Pack(detail)
        return ((KIND_METADATA, self.kind), (DETAILS_METADATA, status.SerializeToString()))


def status_of(error: Exception) -> Status:
    """What to answer to an error; INTERNAL for one that nobody raised on purpose."""
    if not isinstance(error, core.SteeringError | stored.StoreError):
        # The message of an unforeseen error may hold anything, so it stays in the log.
        detail = "internal error of the service; its log has the traceback"
        return Status(grpc.StatusCode.INTERNAL, "internal", detail, None)
    code = next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)
    retry_s = getattr(error, "retry_s", _RETRY_S) if code in _WAITING_HELPS else None
    return Status(code, error.kind, plain(str(error)), retry_s)


def plain(text: str) -> str:
    """Text as it can travel in a header: ASCII without control characters, its middle cut out.

    Messages may quote what a caller sent, of any length and in any script.
    """
    if len(text) > MAX_DETAIL_CHARS:
        text = f"{text[: MAX_DETAIL_CHARS - _TAIL_CHARS]} ... {text[-_TAIL_CHARS:]}"
    text = text.encode("ascii", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else " " for c in text)
    # Again, since one character may have become ten.
    if len(text) > MAX_DETAIL_CHARS + 5:
        text = f"{text[: MAX_DETAIL_CHARS - _TAIL_CHARS]} ... {text[-_TAIL_CHARS:]}"
    return text
