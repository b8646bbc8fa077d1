"""Who may do what: every method and every role, tokens, policies that change."""

from __future__ import annotations

import grpc
import pytest
import secure
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import eventually

from steering_service.core.errors import InvalidInput, Refused
from steering_service.core.wire import KIND_METADATA
from steering_service.server.access import (
    ROLES,
    Denied,
    Identity,
    Unauthenticated,
    actor,
    caller,
)
from steering_service.server.identities import Identities
from steering_service.server.policy import Patterns, Role
from steering_service.v1 import (
    artifact_pb2,
    channel_pb2,
    channel_pb2_grpc,
    node_pb2,
    watch_pb2,
)

READ = {"reader", "publisher", "operator"}
LOOK = READ | {"auditor"}
# Written down once more, by hand; docs/delivery.md says it in words.
DOCUMENTED = {
    "ArtifactService/Publish": {"publisher"},
    "ArtifactService/GetUpload": {"publisher"},
    "ArtifactService/GetManifest": LOOK,
    "ArtifactService/Download": READ,
    "ArtifactService/List": LOOK,
    "ArtifactService/Revoke": {"operator"},
    "ArtifactService/GetRevocations": LOOK,
    "ChannelService/Promote": {"operator"},
    "ChannelService/Rollback": {"operator"},
    "ChannelService/Approve": {"operator"},
    "ChannelService/ListProposals": {"operator", "auditor"},
    "ChannelService/GetChannel": LOOK,
    "ChannelService/History": {"operator", "auditor"},
    "ChannelService/ListChannels": LOOK,
    "WatchService/Watch": {"reader", "operator", "auditor"},
    "NodeService/ListNodes": {"operator", "auditor"},
}
FILES = (artifact_pb2, channel_pb2, watch_pb2, node_pb2)
METHODS = {
    f"{service.name}/{method.name}": method
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
POLICY = "".join(secure.entry(role, role) for role in Role)


def bearer(token):
    return (("authorization", f"Bearer {token}"),)


def ask(channel, name, data=b"", metadata=(), timeout=10):
    """Call any method with raw bytes; gives the code and the kind."""
    method = METHODS[name]
    kind = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }[method.client_streaming, method.server_streaming]
    call = kind(f"/steering_service.v1.{name}")
    request = iter([data]) if method.client_streaming else data
    try:
        answer = call(request, metadata=metadata, timeout=timeout)
        if method.server_streaming:
            next(iter(answer), None)
    except grpc.RpcError as error:
        kinds = dict(error.trailing_metadata() or ())
        return error.code(), kinds.get(KIND_METADATA)
    return grpc.StatusCode.OK, None


@pytest.fixture(scope="module")
def service(guarded_once):
    return guarded_once(POLICY)


def test_every_method_has_the_documented_roles():
    ours = {name: roles for name, roles in ROLES.items() if "/steering_service.v1." in name}
    assert ours.keys() == {f"/steering_service.v1.{name}" for name in METHODS}
    assert {name.partition("v1.")[2]: set(roles) for name, roles in ours.items()} == DOCUMENTED


@pytest.mark.parametrize("role", Role)
def test_every_method_is_denied_to_every_other_role(service, role):
    with service.channel() as channel:
        for name, roles in DOCUMENTED.items():
            # Not a message: whoever is denied is so before it is parsed.
            code, kind = ask(channel, name, b"\xff\xff", bearer(role))
            if role in roles:
                assert (code, kind) == (grpc.StatusCode.INVALID_ARGUMENT, "message_syntax"), name
            else:
                assert (code, kind) == (grpc.StatusCode.PERMISSION_DENIED, "access_role"), name


@pytest.mark.parametrize(
    ("metadata", "kind"),
    [
        ((), "no_credentials"),
        (bearer("nobody"), "token_unknown"),
        (bearer(""), "token_unknown"),
        ((("authorization", "Basic b3BlcmF0b3I6"),), "token_format"),
        ((*bearer("operator"), *bearer("operator")), "token_format"),
        # The sha256 in the policy is no token.
        (bearer(secure.sha256("operator")), "token_unknown"),
    ],
)
def test_nobody_is_answered_without_a_credential(service, metadata, kind):
    with service.channel() as channel:
        # All of them once; a host that fails too often is not asked who it is any more.
        for name in (
            DOCUMENTED if not metadata else ("ChannelService/Promote", "WatchService/Watch")
        ):
            assert ask(channel, name, metadata=metadata) == (
                grpc.StatusCode.UNAUTHENTICATED,
                kind,
            )
    assert not (service.store / "channels").exists()
    assert "b3BlcmF0b3I6" not in service.log.read_text()


def test_health_is_for_all_and_reflection_for_whoever_is_known(service):
    with service.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        call = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        with pytest.raises(grpc.RpcError) as caught:
            next(call(iter([asked]), timeout=5))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        for role in Role:
            answer = next(call(iter([asked]), timeout=5, metadata=bearer(role)))
            services = {s.name for s in answer.list_services_response.service}
            assert "steering_service.v1.ArtifactService" in services


def test_every_registered_method_has_a_role(service):
    """What the server registers, as it says itself, is in the table: nothing else is served."""
    with service.channel() as channel:
        call = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = next(call(iter([asked]), timeout=5, metadata=bearer("reader")))
        names = {s.name for s in answer.list_services_response.service}
    pool = descriptor_pool.Default()
    served = {
        f"/{name}/{method.name}"
        for name in names
        for method in pool.FindServiceByName(name).methods
    }
    assert {m for m in served if not m.startswith("/grpc.health.v1.Health/")} <= ROLES.keys()


def test_a_request_of_10_mb_is_refused_before_it_is_parsed(service):
    # Field 1, a string, of 10 MiB as a varint.
    data = b"\x0a\x80\x80\x80\x05" + b"x" * (10 << 20)
    with service.channel(options=(("grpc.max_send_message_length", -1),)) as channel:
        for method, roles in DOCUMENTED.items():
            if METHODS[method].client_streaming or method == "ArtifactService/Revoke":
                continue
            message = METHODS[method].input_type
            if not message.fields or message.fields[0].type != message.fields[0].TYPE_STRING:
                continue
            assert message_factory.GetMessageClass(message).FromString(data)
            code, kind = ask(channel, method, data, bearer(min(roles)))
            assert (code, kind) == (grpc.StatusCode.INVALID_ARGUMENT, "message_size"), method


def test_every_method_of_a_channel_asks_whose_it_is(guarded):
    everything = f"roles = {sorted(map(str, Role))}\n"
    service = guarded(
        secure.entry("all", "reader").replace('roles = ["reader"]\n', everything)
        + secure.entry("some", "reader").replace('roles = ["reader"]\n', everything)
        + 'channels = ["mine-*"]\nnodes = ["mine-*"]\n'
    )
    with service.channel() as channel:
        stub = channel_pb2_grpc.ChannelServiceStub(channel)
        for name in ("theirs", "mine-1"):
            request = channel_pb2.PromoteRequest(channel=name, reason="a test")
            entry = stub.Promote(request, timeout=10, metadata=bearer("all")).entry
            assert entry.actor == "all"
        found = set()
        for name, method in METHODS.items():
            message = message_factory.GetMessageClass(method.input_type)
            if "channel" in method.input_type.fields_by_name:
                request = message(channel="theirs")
            elif name == "WatchService/Watch":
                subscribe = watch_pb2.Subscribe(node_id="mine-1", channel="theirs")
                request = watch_pb2.WatchRequest(subscribe=subscribe)
            else:
                continue
            if "reason" in method.input_type.fields_by_name:
                request.reason = "a test"
            code, kind = ask(channel, name, request.SerializeToString(), bearer("some"))
            assert (code, kind) == (grpc.StatusCode.PERMISSION_DENIED, "access_channel"), name
            found.add(name)
        assert len(found) == 8
        subscribe = watch_pb2.Subscribe(node_id="theirs", channel="mine-1")
        request = watch_pb2.WatchRequest(subscribe=subscribe).SerializeToString()
        assert ask(channel, "WatchService/Watch", request, bearer("some")) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "access_node",
        )
        names = stub.ListChannels(
            channel_pb2.ListChannelsRequest(), timeout=10, metadata=bearer("some")
        )
        assert list(names.channels) == ["mine-1"]
        seen = stub.History(
            channel_pb2.HistoryRequest(channel="theirs"), timeout=10, metadata=bearer("all")
        )
        assert [entry.revision for entry in seen.entries] == [1]


def test_a_changed_policy_counts_without_a_restart(guarded):
    service = guarded(POLICY)
    with service.channel() as channel:
        late = bearer("latecomer")
        assert ask(channel, "ChannelService/ListChannels", metadata=late)[1] == "token_unknown"
        service.policy_file.write_text(
            POLICY.replace(secure.sha256("reader"), secure.sha256("latecomer"))
        )

        def codes():
            return [
                ask(channel, "ChannelService/ListChannels", metadata=metadata)[0]
                for metadata in (late, bearer("reader"))
            ]

        changed = [grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED]
        eventually(lambda: codes() == changed)
        assert len(service.events("access policy reread")) == 1


@pytest.mark.parametrize("broken", ["", "[[identity]\n", POLICY + "[limits]\nburst = -1\n", None])
def test_a_broken_policy_keeps_the_old_one(guarded, broken):
    service = guarded(POLICY)
    with service.channel() as channel:

        def asked():
            code, _ = ask(channel, "ChannelService/ListChannels", metadata=bearer("reader"))
            assert code is grpc.StatusCode.OK
            return service.events("access policy not taken over")

        assert asked() == []
        if broken is None:
            service.policy_file.unlink()
        else:
            service.policy_file.write_text(broken)
        (event,) = eventually(asked)
        assert (event["level"], event["kind"]) == ("ERROR", "access_policy")
        service.policy_file.write_text(POLICY + "[limits]\nburst = 5000\n")
        eventually(lambda: asked() and service.events("access policy reread"))
        assert len(asked()) == 1


def test_tokens_never_reach_the_log(service):
    with service.channel() as channel:
        ask(channel, "ChannelService/Promote", metadata=bearer("a-secret-token"))
        ask(channel, "ChannelService/Promote", metadata=bearer("reader"))

    def refused():
        return [
            event
            for event in service.events("rpc refused")
            if (event["caller"], event["kind"]) == ("reader", "access_role")
        ]

    event = eventually(refused)[-1]
    assert {"method", "code", "duration_s"} <= event.keys()
    assert "a-secret-token" not in service.log.read_text()


def identity(**settings):
    return Identity("ada", frozenset(Role), Identities(), **settings)


def test_what_an_identity_may_touch():
    who = identity(
        channels=Patterns(["prod-*", "canary"]),
        models=Patterns(["llama-*"]),
        nodes=Patterns(["n?"]),
    )
    who.check_channel("prod-eu")
    who.check_model("llama-3", "f" * 64)
    who.check_node("n1")
    who.check_node("anything", observer=True)
    for kind, refused in {
        "access_channel": lambda: who.check_channel("prod"),
        "access_model": lambda: who.check_model("gpt", "f" * 64),
        "access_node": lambda: who.check_node("n12"),
    }.items():
        with pytest.raises(Denied) as caught:
            refused()
        assert caught.value.kind == kind
    by_fingerprint = identity(models=Patterns(["f" * 64]))
    by_fingerprint.check_model("any name", "f" * 64)
    assert not by_fingerprint.allows_model("any name", "e" * 64)


def test_an_auditor_only_observes():
    auditor = Identity("eve", frozenset({Role.AUDITOR}), Identities())
    auditor.check_node("n1", observer=True)
    with pytest.raises(Denied) as caught:
        auditor.check_node("n1")
    assert caught.value.kind == "access_observer"


@settings(max_examples=50)
@given(st.text(max_size=30).map(lambda text: text * 30))
def test_patterns_take_any_text(text):
    assert Patterns(["*"]).match(text)
    exact = Patterns([text]) if text and not set(text) & set("*?[") else None
    if exact is not None:
        assert exact.match(text) == (len(text) <= 512)
        assert not exact.match(text + "x")


def test_who_is_kept_as_the_actor():
    known, unknown = identity(), Identities().anybody()
    assert actor(known, "") == actor(known, "ada") == "ada"
    with pytest.raises(Denied) as caught:
        actor(known, "bob")
    assert caught.value.kind == "actor_mismatch"
    assert actor(unknown, "bob") == "bob"
    for given_actor in ("", "  ", "x" * 201):
        with pytest.raises(InvalidInput) as caught:
            actor(unknown, given_actor)
        assert caught.value.kind == "promote_actor"


def test_there_is_no_caller_outside_a_call():
    with pytest.raises(LookupError):
        caller()


def test_denied_and_unknown_are_refusals_to_clients():
    assert issubclass(Denied, Refused)
    assert issubclass(Unauthenticated, Refused)
