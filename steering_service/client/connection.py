"""Connection: one gRPC channel to the service, its stubs, and its errors in our own terms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, Final, NamedTuple, Self, cast

import grpc

from steering_service.client.credentials import Credentials
from steering_service.core.address import check_address
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
from steering_service.v1 import (
    artifact_pb2,
    artifact_pb2_grpc,
    channel_pb2_grpc,
    node_pb2_grpc,
    watch_pb2_grpc,
)

CLIENT_NAME: Final = f"steerage-python/{version('steerage')}"
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC's own reconnects stay short; the growing, jittered delay is the Subscription's.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # In spite of its name, how long a handshake may take: within 100 ms none over a WAN would end.
    ("grpc.min_reconnect_backoff_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A new Connection is a new connection, with the credentials of now.
    ("grpc.use_local_subchannel_pool", 1),
)
# Without TLS the service is on loopback, and a proxy from the environment would be wrong.
_NO_PROXY: Final = ("grpc.enable_http_proxy", 0)
_DOWNLOAD: Final = "/steering_service.v1.ArtifactService/Download"
_RATE_LIMITED: Final = "rate_limited"
_OF_THE_CALLER: Final = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
# What gRPC says where a service ends a connection in the handshake, or with TLS 1.3 just after it.
_TURNED_AWAY: Final = ("socket closed", "handshake", "connection reset", "broken pipe")
# And where it was the client who ended it.
_NOT_BELIEVED: Final = "certificate_verify_failed"

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
        address: host:port of the service.
        credentials: Their files are read here, so that a new Connection uses renewed ones; the
            token is read for each call. None, or without a CA: no TLS, and loopback only.

    Raises:
        InvalidInput, Refused: The address is malformed, or not loopback without TLS; or see
            `Credentials.channel_credentials`.
        NotFound: A file of the credentials cannot be read (kind ``credentials_file``).
    """

    __slots__ = (
        "_channel",
        "_is_anonymous",
        "address",
        "artifacts",
        "channels",
        "download",
        "nodes",
        "watches",
    )

    def __init__(self, address: str, credentials: Credentials | None = None) -> None:
        credentials = credentials or Credentials()
        self.address = check_address(address, secure=credentials.secure)
        self._is_anonymous = credentials.secure and credentials.certificate is None
        channel_credentials = credentials.channel_credentials()
        if channel_credentials is None:
            self._channel = grpc.insecure_channel(self.address, options=(*_OPTIONS, _NO_PROXY))
        else:
            name = credentials.server_name
            named = (("grpc.ssl_target_name_override", name),) if name else ()
            self._channel = grpc.secure_channel(
                self.address, channel_credentials, options=(*_OPTIONS, *named)
            )
        channel = self._channel
        if credentials.token is not None:
            channel = grpc.intercept_channel(channel, _Bearer(credentials))
        # Its answers as bytes; see `frames`.
        self.download: Any = channel.unary_stream(
            _DOWNLOAD, request_serializer=artifact_pb2.DownloadRequest.SerializeToString
        )
        self.artifacts = artifact_pb2_grpc.ArtifactServiceStub(channel)
        self.channels = channel_pb2_grpc.ChannelServiceStub(channel)
        self.nodes = node_pb2_grpc.NodeServiceStub(channel)
        self.watches = watch_pb2_grpc.WatchServiceStub(channel)

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

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """As `translated`, for a node that fetches what it is to run.

        What is wrong with the thing itself stays so. What is wrong with who asks (files of the
        credentials that are being renewed, a policy that is changed) or between the two (a proxy)
        may heal at any time, and is Unavailable here, whatever its kind.
        """
        try:
            yield
        except grpc.RpcError as error:
            translated = self.error_of(error)
            if isinstance(translated, Refused | InvalidInput) and not _is_about_the_thing(error):
                raise Unavailable(str(translated), kind=translated.kind) from error
            raise translated from error
        except (Refused, InvalidInput, NotFound) as error:
            # Raised before the call, by what reads the credentials.
            raise Unavailable(str(error), kind=error.kind) from error

    def error_of(self, error: grpc.RpcError) -> SteeringError:
        """The SteeringError that a gRPC error stands for."""
        if not hasattr(error, "trailing_metadata"):
            return Unavailable(f"service at {self.address}: {error}", kind="rpc")
        # gRPC raises objects that are RpcError and Call at once, which its types do not say.
        call = cast("grpc.Call", error)
        code = call.code()
        metadata = {item[0]: item[1] for item in call.trailing_metadata() or ()}
        kind = str(metadata.get(KIND_METADATA, f"rpc_{code.name.lower()}"))
        # Of the statuses that are not in the table, such as DEADLINE_EXCEEDED, all may heal.
        cls = Unavailable if kind == _RATE_LIMITED else _CLASSES.get(code, Unavailable)
        detail = call.details() or code.name
        if KIND_METADATA not in metadata:
            detail = f"service at {self.address} gave {code.name}: {detail}"
            if code is grpc.StatusCode.UNAVAILABLE:
                detail += "; check that it runs (`steerage serve`) and the address"
                if self._is_anonymous and _may_want_a_certificate(detail):
                    detail += (
                        ". It may want a client certificate, and none was shown: give one, with "
                        "its key (--cert and --key-file, or STEERAGE_CERT and STEERAGE_KEY)"
                    )
        return cls(detail, kind=kind)


def _may_want_a_certificate(detail: str) -> bool:
    text = detail.lower()
    return _NOT_BELIEVED not in text and any(sign in text for sign in _TURNED_AWAY)


def _is_about_the_thing(error: grpc.RpcError) -> bool:
    """Whether the service said it, of what was asked for, and not of who asks.

    Only the service tells a kind: other statuses are a proxy's, or gRPC's own.
    """
    call = cast("grpc.Call", error)
    told = any(item[0] == KIND_METADATA for item in call.trailing_metadata() or ())
    return told and call.code() not in _OF_THE_CALLER


class _CallDetails(NamedTuple):
    """What gRPC's own, private class of this purpose holds."""

    method: str
    timeout: float | None
    metadata: tuple[tuple[str, str | bytes], ...]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[type-arg, unused-ignore]
    grpc.UnaryStreamClientInterceptor,  # type: ignore[type-arg, unused-ignore]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[type-arg, unused-ignore]
    grpc.StreamStreamClientInterceptor,  # type: ignore[type-arg, unused-ignore]
):
    """Adds the token to every call.

    gRPC's own call credentials go over TLS only, and services on loopback know tokens as well.
    """

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def _call(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        token = self._credentials.bearer_token()
        metadata = (*(details.metadata or ()), ("authorization", f"Bearer {token}"))
        return continuation(
            _CallDetails(
                details.method,
                details.timeout,
                metadata,
                details.credentials,
                details.wait_for_ready,
                details.compression,
            ),
            request,
        )

    intercept_unary_unary: Any = _call
    intercept_unary_stream: Any = _call
    intercept_stream_unary: Any = _call
    intercept_stream_stream: Any = _call
