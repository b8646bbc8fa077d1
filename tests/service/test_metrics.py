"""What Prometheus gets, over HTTP, and that no caller can make it grow."""

from __future__ import annotations

import queue
import urllib.request
import uuid

import grpc
import pytest
import secure
from prometheus_client.parser import text_string_to_metric_families
from waiting import eventually

from steering_service.client.operator import Operator
from steering_service.core.errors import NotFound, SteeringError
from steering_service.server import metrics
from steering_service.v1 import channel_pb2, channel_pb2_grpc, watch_pb2, watch_pb2_grpc


def scrape(service):
    (event,) = service.events("metrics served")
    with urllib.request.urlopen(f"http://{event['address']}/metrics", timeout=5) as answer:
        return answer.read().decode()


def samples(text):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def service(guarded):
    return guarded(options={"metrics_address": "127.0.0.1:0"})


def test_calls_are_counted_by_method_and_code(service):
    with Operator(service.address) as operator:
        for _ in range(3):
            assert list(operator.channels()) == []
        for _ in range(2):
            with pytest.raises(NotFound):
                operator.channel("nowhere")

    def count(name, code):
        method = f"/steering_service.v1.ChannelService/{name}"
        return samples(scrape(service)).get(
            ("steerage_rpcs_total", ("code", code), ("method", method)), 0
        )

    eventually(lambda: count("GetChannel", "NOT_FOUND") == 2)
    assert count("ListChannels", "OK") == 3
    found = samples(scrape(service))
    name = "/steering_service.v1.ChannelService/ListChannels"
    assert found["steerage_rpc_seconds_count", ("method", name)] == 3
    assert 0 <= found[("steerage_poll_age_seconds",)] < 30
    assert found[("process_resident_memory_bytes",)] > 0


def test_callers_cannot_make_series(service):
    def series():
        return len(samples(scrape(service)))

    with service.channel() as channel:
        stub = channel_pb2_grpc.ChannelServiceStub(channel)

        def ask():
            name = f"c-{uuid.uuid4().hex}"
            for call in (
                lambda: stub.GetChannel(channel_pb2.GetChannelRequest(channel=name), timeout=5),
                lambda: channel.unary_unary(f"/steering_service.v1.{name}/x")(b"", timeout=5),
                lambda: channel.unary_unary(f"/{name}/x")(b"", timeout=5),
            ):
                with pytest.raises(grpc.RpcError):
                    call()

        ask()
        before = series()
        for _ in range(20):
            ask()
        assert series() == before
    assert "c-" not in scrape(service)


def test_what_nodes_report_is_counted(service):
    answers = queue.SimpleQueue()
    subscribe = watch_pb2.Subscribe(node_id="node-with-a-name", channel="prod")
    answers.put(watch_pb2.WatchRequest(subscribe=subscribe))
    with service.channel() as channel, Operator(service.address) as operator:
        operator.promote("prod", actor="ada", reason="a test")
        stream = watch_pb2_grpc.WatchServiceStub(channel).Watch(iter(answers.get, None), timeout=30)

        def answer(status, kind=""):
            assignment = next(m.assignment for m in stream if m.HasField("assignment"))
            report = watch_pb2.Report(
                channel="prod",
                revision=assignment.revision,
                nonce=assignment.nonce,
                status=status,
                active_revision=1,
                kind=kind,
            )
            answers.put(watch_pb2.WatchRequest(report=report))

        answer(watch_pb2.Report.STATUS_ACK)
        operator.promote("prod", actor="ada", reason="a test")
        answer(watch_pb2.Report.STATUS_NACK, "model_fingerprint")
        counters = watch_pb2.DeploymentCounters(revision=1, requests=5, steered_requests=3)
        answers.put(watch_pb2.WatchRequest(telemetry=watch_pb2.Telemetry(deployments=[counters])))
        prod = ("channel", "prod")
        expected = {
            ("steerage_watchers",): 1,
            ("steerage_assignments_total", prod): 2,
            ("steerage_acks_total", prod): 1,
            ("steerage_nacks_total", prod, ("kind", "model_fingerprint")): 1,
            ("steerage_ack_seconds_count",): 1,
            ("steerage_channel_revision", prod): 2,
            ("steerage_node_requests_total", prod): 5,
            ("steerage_node_steered_requests_total", prod): 3,
        }
        eventually(lambda: expected.items() <= samples(scrape(service)).items())
        answers.put(None)
        stream.cancel()
    eventually(lambda: samples(scrape(service))[("steerage_watchers",)] == 0)
    assert "node-with-a-name" not in scrape(service)


def test_refusals_are_counted(guarded):
    policy = (
        f'[[identity]]\nname = "a"\ntoken_sha256 = "{secure.sha256("a")}"\nroles = ["reader"]\n'
    )
    service = guarded(policy, options={"metrics_address": "127.0.0.1:0"})
    with Operator(service.address) as operator, pytest.raises(SteeringError):
        list(operator.channels())
    found = samples(scrape(service))
    assert found["steerage_rejected_total", ("kind", "no_credentials")] == 1


def test_a_bounded_label_lets_a_few_values_pass():
    bounded = metrics.Bounded(3)
    assert [bounded(str(i)) for i in range(5)] == ["0", "1", "2", "other", "other"]
    assert bounded("1") == "1"
    assert metrics.Bounded(3)("x" * 1000) == "other"


def test_every_metric_is_named_alike():
    for family in metrics.REGISTRY.collect():
        assert family.name.startswith(("steerage_", "process_")), family.name
        assert family.documentation.endswith((".", "one.")), family.name
