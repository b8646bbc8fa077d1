"""What nodes count: checked, since it comes from outside, and added up for the metrics."""

from __future__ import annotations

from typing import Final

from steering_service.core.errors import InvalidInput
from steering_service.server import metrics
from steering_service.v1 import watch_pb2

MAX_DEPLOYMENTS: Final = 16
# A node that generated a million tokens a second for a week would not reach it.
_MAX_COUNT: Final = 10**12
_MAX_IDENTITY_CHARS: Final = 200
# 16 deployments of everything that one can have are less.
_MAX_BYTES: Final = 16 << 10
_MAX_SECONDS: Final = 253_402_300_799  # the end of the year 9999, where Timestamp ends

_COUNTERS: Final = (
    ("requests", metrics.TELEMETRY_REQUESTS),
    ("steered_requests", metrics.TELEMETRY_STEERED_REQUESTS),
    ("generated_tokens", metrics.TELEMETRY_GENERATED_TOKENS),
    ("gate_open", metrics.TELEMETRY_GATE_OPEN),
    ("gate_shut", metrics.TELEMETRY_GATE_SHUT),
    ("errors", metrics.TELEMETRY_ERRORS),
)


def check(telemetry: watch_pb2.Telemetry) -> None:
    """Refuse what no node can have counted; drop fields that this version does not know.

    Raises:
        InvalidInput: kind "telemetry", too many deployments, counts or times that cannot be.
    """
    # Nobody has looked at what is in them, and they would be kept with the rest.
    telemetry.DiscardUnknownFields()
    if (size := telemetry.ByteSize()) > _MAX_BYTES:
        raise _refused(f"{size} bytes, at most {_MAX_BYTES}")
    if len(telemetry.deployments) > MAX_DEPLOYMENTS:
        raise _refused(f"{len(telemetry.deployments)} deployments, at most {MAX_DEPLOYMENTS}")
    for time in (telemetry.since, telemetry.until):
        if not (0 <= time.seconds <= _MAX_SECONDS and 0 <= time.nanos < 1_000_000_000):
            raise _refused(f"a time of {time.seconds} s and {time.nanos} ns since 1970")
    for counters in telemetry.deployments:
        if len(counters.identity) > _MAX_IDENTITY_CHARS:
            raise _refused(f"an identity of {len(counters.identity)} characters")
        for name, _ in _COUNTERS:
            count = getattr(counters, name)
            if count > _MAX_COUNT:
                raise _refused(f"{name} of {count}, at most {_MAX_COUNT}")


def add(telemetry: watch_pb2.Telemetry, channel: str) -> None:
    """Add checked counters to the metrics. The channel must exist."""
    label = metrics.CHANNEL(channel)
    for name, counter in _COUNTERS:
        count = sum(getattr(counters, name) for counters in telemetry.deployments)
        if count:
            counter.labels(label).inc(count)


def _refused(what: str) -> InvalidInput:
    return InvalidInput(f"telemetry has {what}; it is left out", kind="telemetry")
