"""Telemetry: what a node counts of its requests. Numbers only: never prompts, never text."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from steering_service.client.active import Deployment
from steering_service.core.errors import InvalidInput
from steering_service.v1 import watch_pb2

# As watch.proto allows in one message.
MAX_DEPLOYMENTS: Final = 16


@dataclass(slots=True)
class Counters:
    """Counts of one deployment.

    Attributes:
        requests: That began.
        steered_requests: Those of them that were steered at all.
        generated_tokens: Of all requests.
        gate_open, gate_shut: Decisions of a controller: to steer, and not to.
        errors: Requests that failed because of the steering.
    """

    requests: int = 0
    steered_requests: int = 0
    generated_tokens: int = 0
    gate_open: int = 0
    gate_shut: int = 0
    errors: int = 0

    @classmethod
    def from_proto(cls, message: watch_pb2.DeploymentCounters) -> Counters:
        """Read the wire form."""
        return cls(
            message.requests,
            message.steered_requests,
            message.generated_tokens,
            message.gate_open,
            message.gate_shut,
            message.errors,
        )


class Telemetry:
    """Counters of a node, by deployment. Safe to use from several threads.

    Whoever runs the model counts; the `Subscription` takes a batch now and then and sends it.
    """

    __slots__ = ("_counters", "_lock", "_since")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[tuple[int, str], Counters] = {}
        self._since = datetime.now(UTC)

    def count(
        self,
        deployment: Deployment,
        *,
        requests: int = 0,
        steered_requests: int = 0,
        generated_tokens: int = 0,
        gate_open: int = 0,
        gate_shut: int = 0,
        errors: int = 0,
    ) -> None:
        """Add to the counters of a deployment; see `Counters`.

        Args:
            deployment: The one that the request began with.

        Raises:
            InvalidInput: A count is negative.
        """
        added = (requests, steered_requests, generated_tokens, gate_open, gate_shut, errors)
        if min(added) < 0:
            raise InvalidInput(
                f"telemetry counts only grow, got {added}", kind="telemetry_negative"
            )
        with self._lock:
            counters = self._counters.setdefault(
                (deployment.revision, deployment.identity), Counters()
            )
            counters.requests += requests
            counters.steered_requests += steered_requests
            counters.generated_tokens += generated_tokens
            counters.gate_open += gate_open
            counters.gate_shut += gate_shut
            counters.errors += errors

    def take(self) -> watch_pb2.Telemetry | None:
        """What was counted since the last `take`; None if nothing was.

        With more deployments than a message holds, the latest go first and the others wait.
        """
        with self._lock:
            if not self._counters:
                return None
            keys = sorted(self._counters, reverse=True)[:MAX_DEPLOYMENTS]
            taken = [(key, self._counters.pop(key)) for key in keys]
            since, self._since = self._since, datetime.now(UTC)
            until = self._since
        message = watch_pb2.Telemetry(since=_timestamp(since), until=_timestamp(until))
        for (revision, identity), counters in taken:
            message.deployments.add(
                revision=revision,
                identity=identity,
                requests=counters.requests,
                steered_requests=counters.steered_requests,
                generated_tokens=counters.generated_tokens,
                gate_open=counters.gate_open,
                gate_shut=counters.gate_shut,
                errors=counters.errors,
            )
        return message


def _timestamp(time: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp
