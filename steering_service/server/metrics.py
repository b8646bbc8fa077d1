"""What the service counts, for Prometheus.

Every label has few values: no node ids, no digests, no actors. Names that come from outside (a
channel, the kind of a refusal) pass through `Bounded` first, so that no caller can make the service
remember more series than that. Channels are labels only where they exist: of a channel that
somebody merely asked for, nothing is counted.

    metrics.ACKS.labels(metrics.CHANNEL(entry.channel)).inc()
    metrics.NACKS.labels(metrics.CHANNEL(channel), metrics.KIND(report.kind)).inc()
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

REGISTRY: Final = CollectorRegistry()
"""Of this process; what `serve(metrics_address=...)` answers with."""

OTHER: Final = "other"


class Bounded:
    """Passes on the first `limit` different values it sees; every later one becomes "other".

    Args:
        limit: How many different values pass.
    """

    __slots__ = ("_limit", "_seen")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: set[str] = set()

    def __call__(self, value: str) -> str:
        """The value, or "other"."""
        if value in self._seen:
            return value
        if len(self._seen) >= self._limit or len(value) > 128:
            return OTHER
        self._seen.add(value)
        return value


CHANNEL: Final = Bounded(1000)
"""Names of channels that exist."""

KIND: Final = Bounded(100)
"""Kinds of errors that nodes report: they may send any string."""

_RPC_BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0)
_DELAY_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 1.0, 2.0, 5.0, 15.0, 60.0, 300.0)


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(f"steerage_{name}", text, labels, registry=REGISTRY)


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(f"steerage_{name}", text, labels, registry=REGISTRY)


class MethodStats:
    """Calls of one method. Plain numbers of one event loop, since every call pays for them.

    Args:
        method: As in ``/steering_service.v1.ArtifactService/GetManifest``.
        timed: Whether durations mean something; streams that last for days have none.
    """

    __slots__ = ("_buckets", "_codes", "_method", "_timed", "_total_s")

    def __init__(self, method: str, *, timed: bool) -> None:
        self._method = method
        self._timed = timed
        self._codes = {"OK": 0}
        self._buckets = [0] * (len(_RPC_BUCKETS) + 1)
        self._total_s = 0.0

    def ended(self, code: str, duration_s: float) -> None:
        """Count a call that has ended with the status code of this name."""
        self._codes[code] = self._codes.get(code, 0) + 1
        self._buckets[bisect_left(_RPC_BUCKETS, duration_s)] += 1
        self._total_s += duration_s

    def codes(self) -> list[tuple[list[str], int]]:
        """Samples of the counter: labels and value."""
        return [([self._method, code], count) for code, count in list(self._codes.items())]

    def seconds(self) -> tuple[list[str], list[tuple[str, float]], float] | None:
        """Sample of the histogram: labels, cumulative buckets and sum; None for untimed ones."""
        if not self._timed:
            return None
        bounds = (*map(str, _RPC_BUCKETS), "+Inf")
        counts = map(float, accumulate(self._buckets))
        buckets = list(zip(bounds, counts, strict=True))
        return [self._method], buckets, self._total_s


_METHODS: Final[dict[str, MethodStats]] = {}


def method_stats(method: str, *, timed: bool) -> MethodStats:
    """The numbers of a method, which are the process's."""
    stats = _METHODS.get(method)
    if stats is None:
        stats = _METHODS[method] = MethodStats(method, timed=timed)
    return stats


class _MethodCollector(Collector):
    """Makes Prometheus' samples of them, when it asks."""

    def collect(self) -> Iterator[Metric]:
        """Two families."""
        counts = CounterMetricFamily(
            "steerage_rpcs", "Calls that ended, by status code.", labels=("method", "code")
        )
        seconds = HistogramMetricFamily(
            "steerage_rpc_seconds", "Duration of calls other than Watch.", labels=("method",)
        )
        for stats in list(_METHODS.values()):
            for labels, count in stats.codes():
                counts.add_metric(labels, count)
            if (sample := stats.seconds()) is not None:
                labels, buckets, total_s = sample
                seconds.add_metric(labels, buckets, total_s)
        yield counts
        yield seconds


REGISTRY.register(_MethodCollector())

REJECTED: Final = _counter(
    "rejected", "Calls refused before they began: who is not known, not allowed, too fast.", "kind"
)
RELOADS: Final = _counter(
    "reloads", "Rereads of a changed file: what is policy or tls, result ok or error.", "what",
    "result",
)  # fmt: skip
TLS_EXPIRES: Final = _gauge(
    "tls_certificate_expires_timestamp_seconds", "When the certificate in use expires, since 1970."
)

# Watch streams and what nodes report.
WATCHERS: Final = _gauge("watchers", "Watch streams that are open, observers included.")
ASSIGNMENTS: Final = _counter("assignments", "Assignments sent.", "channel")
ACKS: Final = _counter("acks", "Assignments that nodes accepted.", "channel")
NACKS: Final = _counter("nacks", "Assignments that nodes refused.", "channel", "kind")
ACK_SECONDS: Final = Histogram(
    "steerage_ack_seconds",
    "From an assignment's sending to its acknowledgement.",
    buckets=_DELAY_BUCKETS,
    registry=REGISTRY,
)
REVISION: Final = _gauge("channel_revision", "Head of each channel that is watched.", "channel")

# Channels and artifacts.
CHANGES: Final = _counter(
    "channel_changes",
    "Changes made through this replica: what is promote, rollback, propose or approve.",
    "channel",
    "what",
)
PUBLISHES: Final = _counter("publishes", "Artifacts published through this replica.")
PUBLISHED_BYTES: Final = _counter("published_bytes", "Payload bytes received by Publish.")
DOWNLOADED_BYTES: Final = _counter("downloaded_bytes", "Payload bytes sent by Download.")
CACHE_HITS: Final = _counter("cache_hits", "Reads of artifacts answered from memory.", "what")
CACHE_MISSES: Final = _counter("cache_misses", "Reads of artifacts that asked the store.", "what")

# The store.
STORE_ERRORS: Final = _counter("store_errors", "Errors of the store, by their kind.", "kind")
POLL_SECONDS: Final = Histogram(
    "steerage_poll_seconds",
    "Duration of a look at the store for changes by other replicas.",
    buckets=_RPC_BUCKETS,
    registry=REGISTRY,
)

# What nodes count, added up.
TELEMETRY_REQUESTS: Final = _counter("node_requests", "Requests that began on nodes.", "channel")
TELEMETRY_STEERED_REQUESTS: Final = _counter(
    "node_steered_requests", "Those of them that were steered.", "channel"
)
TELEMETRY_GENERATED_TOKENS: Final = _counter(
    "node_generated_tokens", "Tokens that nodes generated.", "channel"
)
TELEMETRY_GATE_OPEN: Final = _counter(
    "node_gate_open", "Decisions of controllers to steer.", "channel"
)
TELEMETRY_GATE_SHUT: Final = _counter(
    "node_gate_shut", "Decisions of controllers not to steer.", "channel"
)
TELEMETRY_ERRORS: Final = _counter(
    "node_errors", "Requests that failed because of the steering.", "channel"
)

POLL_AGE: Final = _gauge(
    "poll_age_seconds", "Since the last look at the store that succeeded; alert on this one."
)
_polled_at = time.monotonic()
POLL_AGE.set_function(lambda: time.monotonic() - _polled_at)
ProcessCollector(registry=REGISTRY)


def polled() -> None:
    """Say that a look at the store for changes has just succeeded."""
    global _polled_at
    _polled_at = time.monotonic()
