"""Telemetry: nothing is lost or counted twice between threads, and it reaches the service."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from publishers import FINGERPRINT

from steering_service.client.active import Deployment
from steering_service.client.subscription import Subscription
from steering_service.client.telemetry import MAX_DEPLOYMENTS, Counters, Telemetry
from steering_service.core.errors import InvalidInput

WHO = {"actor": "ada", "reason": "a test"}
NAMES = list(Counters.__dataclass_fields__)


def plain(revision):
    return Deployment.plain("prod", revision, enabled=True)


def drained(telemetry):
    """All counters, added up over as many batches as it takes."""
    sums: dict[int, dict[str, int]] = {}
    while (batch := telemetry.take()) is not None:
        assert 0 < len(batch.deployments) <= MAX_DEPLOYMENTS
        assert batch.since.ToNanoseconds() <= batch.until.ToNanoseconds()
        for item in batch.deployments:
            into = sums.setdefault(item.revision, dict.fromkeys(NAMES, 0))
            for name in NAMES:
                into[name] += getattr(item, name)
    return sums


counts = st.fixed_dictionaries({}, optional={name: st.integers(0, 1000) for name in NAMES})


@given(st.lists(st.tuples(st.integers(0, 40), counts)))
def test_sums_are_those_of_what_was_counted(items):
    telemetry = Telemetry()
    expected: dict[int, dict[str, int]] = {}
    for revision, fields in items:
        telemetry.count(plain(revision), **fields)
        into = expected.setdefault(revision, dict.fromkeys(NAMES, 0))
        for name, value in fields.items():
            into[name] += value
    assert drained(telemetry) == expected
    assert telemetry.take() is None


def test_threads_lose_nothing():
    telemetry, seen = Telemetry(), []
    done = threading.Event()

    def count():
        for _ in range(2000):
            telemetry.count(plain(1), requests=1, generated_tokens=3)

    def take():
        while not done.is_set():
            seen.append(drained(telemetry))

    taker = threading.Thread(target=take)
    counters = [threading.Thread(target=count) for _ in range(4)]
    for thread in (taker, *counters):
        thread.start()
    for thread in counters:
        thread.join()
    done.set()
    taker.join()
    seen.append(drained(telemetry))
    assert sum(batch.get(1, {}).get("requests", 0) for batch in seen) == 8000
    assert sum(batch.get(1, {}).get("generated_tokens", 0) for batch in seen) == 24000


def test_counts_only_grow():
    with pytest.raises(InvalidInput) as caught:
        Telemetry().count(plain(1), requests=-1)
    assert caught.value.kind == "telemetry_negative"


def test_it_reaches_the_service(service, operator, publisher, artifact, tmp_path):
    publisher.publish(operator, artifact())
    operator.promote("prod", artifact=artifact().digest, strength=1.0, **WHO)

    def counters():
        [node] = operator.nodes("prod")[0]
        return node.telemetry

    with Subscription(
        service.address,
        "prod",
        "node-1",
        tmp_path / "cache",
        publisher.roots,
        FINGERPRINT,
        telemetry_s=0.2,
    ) as node:
        deployment = node.active.wait_for(1, 5)
        node.telemetry.count(deployment, requests=2, steered_requests=1, generated_tokens=50)
        deadline = time.monotonic() + 10
        while not counters():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        key = (1, deployment.identity)
        assert counters() == {key: Counters(2, 1, 50)}
        node.telemetry.count(deployment, requests=7, errors=1)
    # What was counted last is sent on the way out.
    deadline = time.monotonic() + 10
    while counters() != {key: Counters(requests=7, errors=1)}:
        assert time.monotonic() < deadline, counters()
        time.sleep(0.05)
