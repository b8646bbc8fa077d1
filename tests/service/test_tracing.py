"""Spans, made by the real SDK in the service's process."""

from __future__ import annotations

import json

import grpc
import pytest
import secure
from waiting import eventually

from steering_service.server.tracing import Tracing
from steering_service.v1 import (
    artifact_pb2,
    artifact_pb2_grpc,
    channel_pb2,
    channel_pb2_grpc,
    watch_pb2,
    watch_pb2_grpc,
)

# As `opentelemetry-instrument` would: the provider is there before the service is.
SDK = (
    """
import sys
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(
    out=sys.stderr, formatter=lambda span: span.to_json(indent=None) + chr(10))))
trace.set_tracer_provider(provider)
"""
    + secure.SERVE
)
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def spans(service):
    lines = [json.loads(x) for x in service.log.read_text().splitlines() if x.startswith("{")]
    return [line for line in lines if "context" in line]


def test_spans_follow_the_callers_trace(guarded):
    service = guarded(secure.entry("ada", "operator", "a-token"), program=SDK)
    metadata = (
        ("authorization", "Bearer a-token"),
        ("traceparent", f"00-{TRACE}-{PARENT}-01"),
        ("anything-bin", b"\xff"),
    )
    with service.channel() as channel:
        stub = channel_pb2_grpc.ChannelServiceStub(channel)
        stub.ListChannels(channel_pb2.ListChannelsRequest(), timeout=5, metadata=metadata)
        with pytest.raises(grpc.RpcError):
            stub.GetChannel(
                channel_pb2.GetChannelRequest(channel="no"), timeout=5, metadata=metadata
            )
        stub.ListChannels(channel_pb2.ListChannelsRequest(), timeout=5, metadata=metadata[:1])
        download = artifact_pb2_grpc.ArtifactServiceStub(channel).Download(
            artifact_pb2.DownloadRequest(digest="0" * 64), timeout=5, metadata=metadata
        )
        with pytest.raises(grpc.RpcError):
            next(download)
        subscribe = watch_pb2.Subscribe(node_id="n", channel="prod")
        watch = watch_pb2_grpc.WatchServiceStub(channel).Watch(
            iter([watch_pb2.WatchRequest(subscribe=subscribe)]), timeout=5, metadata=metadata
        )
        next(watch)
        watch.cancel()
    listed, missing, alone, downloaded = eventually(
        lambda: spans(service) if len(spans(service)) >= 4 else None
    )
    assert listed["name"] == "steering_service.v1.ChannelService/ListChannels"
    assert listed["context"]["trace_id"] == f"0x{TRACE}"
    assert listed["parent_id"] == f"0x{PARENT}"
    assert listed["kind"] == "SpanKind.SERVER"
    assert listed["attributes"] == {
        "rpc.system": "grpc",
        "rpc.service": "steering_service.v1.ChannelService",
        "rpc.method": "ListChannels",
        "rpc.grpc.status_code": 0,
        "steerage.caller": "ada",
    }
    assert missing["attributes"]["steerage.error_kind"] == "no_channel"
    assert missing["status"]["status_code"] == "ERROR"
    assert alone["parent_id"] is None
    assert downloaded["attributes"]["steerage.error_kind"] == "no_artifact"
    assert "a-token" not in service.log.read_text()


def test_without_a_provider_there_are_no_spans(guarded):
    assert not Tracing().enabled
    service = guarded()
    with service.channel() as channel:
        stub = channel_pb2_grpc.ChannelServiceStub(channel)
        stub.ListChannels(channel_pb2.ListChannelsRequest(), timeout=5)
    assert spans(service) == []
