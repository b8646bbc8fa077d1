"""Connection: one gRPC channel to the service, its stubs, and its errors in our own terms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Self, cast

import grpc

from steering_service.core.address import loopback
from steering_service.core.errors import (
    Conflict,
    Corrupt,
    InvalidInput,
    NotFound,
    Refused,
    SteeringError,
    Unavailable,
)
from steering_service.core.wire import KIND_METADATA, MAX_MESSAGE_BYTES
from steering_service.v1 import artifact_pb2_grpc, channel_pb2_grpc, watch_pb2_grpc

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC's own reconnects stay short; the growing, jittered delay is the Subscription's.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Loopback only, so a proxy from the environment would be wrong.
    ("grpc.enable_http_proxy", 0),
)

_CLASSES: Final[dict[grpc.StatusCode, type[SteeringError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInput,
    grpc.StatusCode.OUT_OF_RANGE: InvalidInput,
    grpc.StatusCode.UNIMPLEMENTED: InvalidInput,
    # From gRPC itself: a message above the limit.
    grpc.StatusCode.RESOURCE_EXHAUSTED: InvalidInput,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ABORTED: Conflict,
    grpc.StatusCode.FAILED_PRECONDITION: Refused,
    grpc.StatusCode.PERMISSION_DENIED: Refused,
    grpc.StatusCode.UNAUTHENTICATED: Refused,
    grpc.StatusCode.DATA_LOSS: Corrupt,
}


class Connection:
    """A lazily connected channel. Safe to use from several threads.

    Args:
        address: Loopback host:port of the service.

    Raises:
        InvalidInput, Refused: The address is malformed or not loopback.
    """

    __slots__ = ("_channel", "address", "artifacts", "channels", "watches")

    def __init__(self, address: str) -> None:
        self.address = loopback(address)
        self._channel = grpc.insecure_channel(self.address, options=_OPTIONS)
        self.artifacts = artifact_pb2_grpc.ArtifactServiceStub(self._channel)
        self.channels = channel_pb2_grpc.ChannelServiceStub(self._channel)
        self.watches = watch_pb2_grpc.WatchServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel all calls in progress and disconnect."""
        self._channel.close()

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Raise gRPC errors of the body as SteeringErrors, with the service's message and kind."""
        try:
            yield
        except grpc.RpcError as error:
            raise self.error_of(error) from error

    def error_of(self, error: grpc.RpcError) -> SteeringError:
        """The SteeringError that a gRPC error stands for."""
        if not hasattr(error, "trailing_metadata"):
            return Unavailable(f"service at {self.address}: {error}", kind="rpc")
        # gRPC raises objects that are RpcError and Call at once, which its types do not say.
        call = cast("grpc.Call", error)
        code = call.code()
        metadata = {item[0]: item[1] for item in call.trailing_metadata() or ()}
        kind = str(metadata.get(KIND_METADATA, f"rpc_{code.name.lower()}"))
        cls = _CLASSES.get(code, Unavailable)
        detail = call.details() or code.name
        if KIND_METADATA not in metadata:
            detail = f"service at {self.address} gave {code.name}: {detail}"
            if code is grpc.StatusCode.UNAVAILABLE:
                detail += "; check that it runs (`steerage serve`) and the address"
        return cls(detail, kind=kind)
