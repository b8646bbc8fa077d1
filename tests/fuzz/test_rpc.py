"""Every RPC, with what no client of ours sends: a documented status, and nothing written."""

from __future__ import annotations

import grpc
import pytest
from attack import DOCUMENTED, MIB
from delivery import contents
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire import METHODS, ODD_NAMES, ODD_NUMBERS, filled, mangled, messages, new, places

TEXTS = {FieldDescriptor.TYPE_STRING}
BLOBS = {FieldDescriptor.TYPE_BYTES}
NUMBERS = {FieldDescriptor.TYPE_DOUBLE}
FUZZ = {"max_examples": 40, "deadline": None, "suppress_health_check": list(HealthCheck)}
EVERY = pytest.mark.parametrize("method", METHODS)


def fields(kinds):
    """Every field of some types of every request, as parameters."""
    return [
        pytest.param(method, place, id=f"{method.rpartition('/')[2]}.{'.'.join(place)}")
        for method, descriptor in METHODS.items()
        for place in places(descriptor.input_type, kinds)
    ]


def check(target, method, *sent):
    code, kind, details = target.send(method, *sent, timeout_s=60)
    where = f"{method}: {code} {kind} {details}"
    assert code in DOCUMENTED or code is grpc.StatusCode.UNIMPLEMENTED, where
    if code is grpc.StatusCode.UNIMPLEMENTED:
        # gRPC's own: several messages where one goes.
        assert len(sent) > 1, where
    elif code is not grpc.StatusCode.OK:
        assert kind or code is grpc.StatusCode.RESOURCE_EXHAUSTED, f"no kind: {where}"
        assert len(details) <= 1100, "the header may become too long for peers"
    return code, kind


@EVERY
@settings(**FUZZ)
@given(data=st.data())
def test_any_message_of_the_right_type(target, method, data):
    names = st.sampled_from([*ODD_NAMES, "prod", "prod", target.artifact.digest, "ada"])
    blobs = st.binary(max_size=100) | st.sampled_from(
        [
            target.artifact.manifest_bytes,
            target.artifact.payload_bytes,
            target.publisher.sign(target.artifact),
        ]
    )
    kind = messages(METHODS[method].input_type, names | st.text(max_size=20), blobs)
    streaming = METHODS[method].client_streaming
    sent = data.draw(st.lists(kind, min_size=1, max_size=4 if streaming else 1))
    before = contents(target.replica.store)
    code, _ = check(target, method, *[m.SerializeToString() for m in sent])
    if code is not grpc.StatusCode.OK:
        assert contents(target.replica.store) == before, "a call that failed has written"


@EVERY
@settings(**FUZZ)
@given(data=st.data())
def test_mangled_bytes(target, method, data):
    names = st.sampled_from(["prod", target.artifact.digest, "ada"])
    blobs = st.sampled_from([target.artifact.manifest_bytes, target.artifact.payload_bytes])
    message = data.draw(messages(METHODS[method].input_type, names, blobs))
    sent = data.draw(mangled(message.SerializeToString()))
    before = contents(target.replica.store)
    code, _ = check(target, method, sent)
    if code is not grpc.StatusCode.OK:
        assert contents(target.replica.store) == before, "a call that failed has written"


@pytest.mark.parametrize(("method", "place"), fields(TEXTS))
def test_odd_names(target, method, place):
    with target.unharmed(written="Promote" in method):
        for name in ODD_NAMES:
            sent = filled(METHODS[method].input_type, place, name)
            check(target, method, sent.SerializeToString())


@pytest.mark.parametrize(("method", "place"), fields(TEXTS))
def test_names_of_ten_megabytes(target, method, place):
    with target.unharmed(grown_bytes=128 * MIB):
        for name in ("x" * (10 * MIB), "é" * (5 * MIB)):
            sent = filled(METHODS[method].input_type, place, name)
            code, _ = check(target, method, sent.SerializeToString())
            # None of them may count as a name that might exist; tokens and texts may be ignored.
            assert code is not grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(("method", "place"), fields(TEXTS))
def test_strings_that_are_not_utf_8(target, method, place):
    good = filled(METHODS[method].input_type, place, "MARK").SerializeToString()
    with target.unharmed():
        for bad in (b"\xff\xfe\xfd\xfc", b"\xed\xa0\x80a", b"\xc0\xafab", b"\xf8\x88\x80\x80"):
            code, kind = check(target, method, good.replace(b"MARK", bad))
            assert (code, kind) == (grpc.StatusCode.INVALID_ARGUMENT, "message_syntax")


@EVERY
def test_a_message_above_the_limit(target, method):
    with target.unharmed(grown_bytes=128 * MIB):
        code, _ = check(target, method, b"\xff" * (13 * MIB))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


@EVERY
def test_groups_nested_thousands_deep(target, method):
    with target.unharmed():
        # Unknown fields are kept, and groups (wire type 3) within groups are parsed recursively.
        for sent in (b"\xfb\x01" * 30_000, b"\xfb\x01" * 15_000 + b"\xfc\x01" * 15_000):
            code, kind = check(target, method, sent)
            assert (code, kind) == (grpc.StatusCode.INVALID_ARGUMENT, "message_syntax")


@EVERY
def test_no_message_at_all(target, method):
    with target.unharmed():
        code, kind, details = target.send(method, timeout_s=0.5)
        if METHODS[method].client_streaming:
            assert code is grpc.StatusCode.INVALID_ARGUMENT, details
        else:
            # gRPC waits for the message that has to come; the client's deadline ends that.
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED, (kind, details)


@pytest.mark.parametrize(("method", "place"), fields(NUMBERS))
@pytest.mark.parametrize("channel", ["prod", "new"])
def test_numbers_that_are_none(target, method, place, channel):
    for value in ODD_NUMBERS:
        request = filled(METHODS[method].input_type, place, value)
        for name, text in (("channel", channel), ("actor", "ada"), ("reason", "a test")):
            if hasattr(request, name):
                setattr(request, name, text)
        if hasattr(request, "expected_revision") and channel == "prod":
            with target.replica.operator() as operator:
                request.expected_revision = operator.channel("prod").revision
        before = contents(target.replica.store)
        code, kind = check(target, method, request.SerializeToString())
        if value != value or abs(value) == float("inf"):
            assert code is not grpc.StatusCode.OK, kind
        if code is not grpc.StatusCode.OK:
            assert contents(target.replica.store) == before


def test_a_method_and_a_service_that_do_not_exist(target):
    with target.unharmed():
        for method in ("/steering_service.v1.ChannelService/Drop", "/x/y", "/", "/../..", "//"):
            code, _, _ = target.send(method, b"")
            assert code is grpc.StatusCode.UNIMPLEMENTED


def test_every_blob_field_takes_ten_megabytes_and_nothing_happens(target):
    for parameter in fields(BLOBS):
        method, place = parameter.values
        with target.unharmed(grown_bytes=128 * MIB):
            sent = filled(METHODS[method].input_type, place, b"\0" * (10 * MIB))
            code, _ = check(target, method, sent.SerializeToString())
            assert code is not grpc.StatusCode.OK


def test_new_makes_every_request():
    """The descriptors are read as they are meant: all of the RPCs are attacked."""
    names = {method.rpartition("/")[2] for method in METHODS}
    assert {"Publish", "Promote", "Watch", "Download", "List", "Revoke", "ListNodes"} <= names
    assert all(new(method.input_type) is not None for method in METHODS.values())
