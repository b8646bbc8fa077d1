"""A service under attack, and what proves that it came to no harm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from delivery import WHO, Replica, contents, make_artifact, pss_bytes
from publishers import Publisher

from steering_service.core.artifact import Artifact
from steering_service.core.wire import KIND_METADATA

# artifact.proto's table, without INTERNAL, which is a bug.
DOCUMENTED = frozenset(
    {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DATA_LOSS,
        grpc.StatusCode.UNAVAILABLE,
    }
)
MIB = 1 << 20


@dataclass
class Target:
    """A service under attack, with one artifact and one channel in it."""

    replica: Replica
    publisher: Publisher
    artifact: Artifact = field(default_factory=make_artifact)

    def __post_init__(self) -> None:
        self.pid = self.replica.process.pid
        with self.replica.operator() as operator:
            self.publisher.publish(operator, self.artifact)
            operator.promote("prod", artifact=self.artifact.digest, strength=1.0, **WHO)
        self.channel = grpc.insecure_channel(
            self.replica.address,
            # Ours would refuse to send what the service must refuse to take.
            options=(
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", -1),
            ),
        )

    def send(
        self, method: str, *messages: bytes, timeout_s: float = 10.0
    ) -> tuple[grpc.StatusCode, str, str]:
        """Raw bytes to any method: the status's code, our kind (or ""), details."""
        return send(self.channel, method, messages, timeout_s)

    @contextmanager
    def unharmed(self, *, written: bool = False, grown_bytes: int = 64 * MIB) -> Iterator[None]:
        """The body may make the service write nothing, grow much or end.

        Args:
            written: What it writes is right.
            grown_bytes: How much more memory it may have afterwards.
        """
        before, memory = contents(self.replica.store), pss_bytes(self.pid)
        yield
        assert self.replica.alive
        assert self.replica.process.pid == self.pid
        assert self.replica.healthy()
        assert pss_bytes(self.pid) - memory < grown_bytes
        if not written:
            assert contents(self.replica.store) == before


def send(
    channel: grpc.Channel,
    method: str,
    messages: tuple[bytes, ...],
    timeout_s: float = 10.0,
    **options: object,
) -> tuple[grpc.StatusCode, str, str]:
    """See `Target.send`."""
    call = channel.stream_stream(method)(iter(messages), timeout=timeout_s, **options)
    try:
        for _ in call:
            pass
    except grpc.RpcError:
        pass
    metadata = dict(call.trailing_metadata() or ())
    return call.code(), str(metadata.get(KIND_METADATA, "")), call.details() or ""
