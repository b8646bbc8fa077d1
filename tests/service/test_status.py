"""Errors as callers get them: bounded, plain, with details."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

import steering_service.core.errors as core
import store.errors as stored
from steering_service.core.wire import KIND_METADATA
from steering_service.server.access import Denied, Unauthenticated
from steering_service.server.limits import Limited
from steering_service.server.status import FIELDS, STATUS, plain, status_of
from steering_service.v1 import channel_pb2, channel_pb2_grpc


def all_of(status):
    metadata = dict(status.trailing_metadata())
    return metadata[KIND_METADATA], status_pb2.Status.FromString(
        metadata["grpc-status-details-bin"]
    )


@given(
    st.text()
    | st.text().map(lambda text: text * 1000)
    | st.text("\ud800\x00\n\U0001f600", max_size=3000)
)
def test_any_message_travels_in_a_header(text):
    status = status_of(core.InvalidInput(text, kind="channel_name"))
    assert status.detail.isascii()
    assert status.detail.isprintable()
    assert len(status.detail) <= 1010
    size = sum(
        len(key) + len(value) * (4 / 3 if key.endswith("-bin") else 1)
        for key, value in status.trailing_metadata()
    )
    assert size + len(status.detail) < 6000


def test_the_end_of_a_long_message_stays():
    text = f"channel {'x' * 10_000_000!r}: expected something shorter"
    assert plain(text).startswith("channel 'xxx")
    assert plain(text).endswith("expected something shorter")


@pytest.mark.parametrize("cls", STATUS)
def test_every_error_has_its_details(cls):
    status = status_of(cls("why", kind="json"))
    kind, message = all_of(status)
    assert kind == "json"
    assert (message.code, message.message) == (STATUS[cls].value[0], "why")
    names = [item.type_url.rpartition(".")[2] for item in message.details]
    waiting = STATUS[cls] in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert names == (["ErrorInfo", "RetryInfo"] if waiting else ["ErrorInfo"])


def test_codes_say_what_to_do():
    expected = {
        Denied: grpc.StatusCode.PERMISSION_DENIED,
        Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
        Limited: grpc.StatusCode.RESOURCE_EXHAUSTED,
        core.Refused: grpc.StatusCode.FAILED_PRECONDITION,
        stored.Unavailable: grpc.StatusCode.UNAVAILABLE,
    }
    for cls, code in expected.items():
        assert status_of(cls("why", kind="io")).code is code

    class Later(core.Conflict):
        """Of a kind that the table does not name."""

    assert status_of(Later("why", kind="x")).code is grpc.StatusCode.ABORTED


def test_a_bug_tells_nothing():
    status = status_of(ValueError("a prompt"))
    assert status.code is grpc.StatusCode.INTERNAL
    assert "prompt" not in status.detail
    assert all_of(status)[0] == "internal"


def test_the_field_at_fault_is_named(shared_service):
    with grpc.insecure_channel(shared_service.address) as channel:
        stub = channel_pb2_grpc.ChannelServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Promote(
                channel_pb2.PromoteRequest(channel="x", share=2, actor="a", reason="b"), timeout=5
            )
    data = dict(caught.value.trailing_metadata())["grpc-status-details-bin"]
    message = status_pb2.Status.FromString(data)
    bad = error_details_pb2.BadRequest()
    assert message.details[1].Unpack(bad)
    (violation,) = bad.field_violations
    assert (violation.field, violation.reason) == ("share", "PROMOTE_SHARE")


def test_fields_are_named_as_requests_have_them():
    assert all(field == field.lower() for field in FIELDS.values())
