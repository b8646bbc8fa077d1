"""Broken networks and bytes that no client of ours would send."""

from __future__ import annotations

import contextlib
import time

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steering_service.client.subscription import Subscription
from steering_service.v1 import artifact_pb2, channel_pb2, watch_pb2

WHO = {"actor": "ada", "reason": "a test"}
METHODS = [
    f"/{service.full_name}/{method.name}"
    for module in (artifact_pb2, channel_pb2, watch_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


def test_a_node_behind_a_breaking_network_ends_on_the_last_revision(
    service, operator, publisher, artifact, proxy, tmp_path
):
    made = [artifact(seed) for seed in range(3)]
    for item in made:
        publisher.publish(operator, item)
    breaking = proxy(service.address, cut_after=6000)
    with Subscription(
        breaking.address, "prod", "node-1", tmp_path / "cache", publisher.roots, "a" * 64
    ) as node:
        seen = set()
        for revision in range(1, 31):
            digest = made[revision % 3].digest
            operator.promote("prod", artifact=digest, strength=revision / 30, **WHO)
            time.sleep(0.02)
            deployment = node.active.current
            seen.add(deployment.revision)
            if deployment.artifact is not None:
                # One snapshot: artifact and strength always belong together.
                assert deployment.artifact.digest == made[deployment.revision % 3].digest
                assert deployment.strength == deployment.revision / 30
        assert node.active.wait_for(30, 30).artifact.digest == made[0].digest
    assert breaking.connections > 1


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
@given(messages=st.lists(st.binary(max_size=200), min_size=1, max_size=3))
def test_noise_gets_a_status_and_writes_nothing(shared_service, shared_operator, method, messages):
    before = list(shared_operator.list()), list(shared_operator.channels())
    with grpc.insecure_channel(shared_service.address) as channel:
        call = channel.stream_stream(method)(iter(messages), timeout=5)
        with contextlib.suppress(grpc.RpcError):
            list(call)
        assert call.code() in {
            grpc.StatusCode.OK,  # an empty request is a valid List
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.NOT_FOUND,
            grpc.StatusCode.FAILED_PRECONDITION,  # Revoke, of a service without trust roots
            grpc.StatusCode.UNIMPLEMENTED,  # gRPC's own, for several requests where one goes
        }, call.details()
    assert (list(shared_operator.list()), list(shared_operator.channels())) == before
