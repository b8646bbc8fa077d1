"""The service's calls, through the real client, over a real process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import store.errors as stored
from steering_service.client.connection import Connection
from steering_service.client.operator import Operator
from steering_service.core.errors import (
    Conflict,
    Corrupt,
    InvalidInput,
    NotFound,
    Refused,
    SteeringError,
    Unavailable,
)
from steering_service.server.status import STATUS
from steering_service.v1 import artifact_pb2, channel_pb2, watch_pb2

WHO = {"actor": "ada", "reason": "a test"}
ROOT = Path(__file__).resolve().parents[2]


def test_artifacts_round_trip(operator, publisher, artifact):
    made = [artifact(seed) for seed in range(3)]
    for item in made:
        signature = publisher.signer.sign(item.manifest_bytes)
        assert operator.publish(item, signature) == item.digest
        assert operator.publish(item, signature) == item.digest
        found = operator.manifest(item.digest)
        assert (found.manifest_bytes, found.signature) == (item.manifest_bytes, signature)
        assert found.payload_size == len(item.payload_bytes)
        assert found.manifest == item.manifest
    assert [entry.digest for entry in operator.list()] == sorted(item.digest for item in made)


def test_list_pages(service, operator, publisher, artifact):
    digests = sorted(publisher.publish(operator, artifact(seed)) for seed in range(5))
    with Connection(service.address) as connection:
        pages, token = [], ""
        while not pages or token:
            page = connection.artifacts.List(
                artifact_pb2.ListRequest(page_size=2, page_token=token), timeout=5
            )
            pages.append([entry.digest for entry in page.artifacts])
            token = page.next_page_token
    assert pages == [digests[:2], digests[2:4], digests[4:]]


@pytest.mark.parametrize("offset", [0, 1, 1 << 20, (1 << 20) + 1, None])
def test_download_from_an_offset(shared_service, shared_operator, publisher, artifact, offset):
    large = artifact(width=600_000)
    publisher.publish(shared_operator, large)
    if offset is None:
        offset = len(large.payload_bytes)
    with Connection(shared_service.address) as connection:
        request = artifact_pb2.DownloadRequest(digest=large.digest, offset=offset)
        chunks = list(connection.artifacts.Download(request, timeout=10))
    assert b"".join(c.chunk for c in chunks) == large.payload_bytes[offset:]
    assert all(len(c.chunk) <= 1 << 20 for c in chunks)
    ends = [c.offset + len(c.chunk) for c in chunks]
    assert [c.offset for c in chunks] == [offset, *ends][: len(chunks)]


def test_publish_is_all_or_nothing(service, operator, publisher, artifact):
    item = artifact()
    header = artifact_pb2.PublishHeader(
        manifest=item.manifest_bytes, signature=publisher.signer.sign(item.manifest_bytes)
    )
    first = artifact_pb2.PublishRequest(header=header)
    whole = artifact_pb2.PublishRequest(chunk=item.payload_bytes)
    half = artifact_pb2.PublishRequest(chunk=item.payload_bytes[:100])
    flipped = artifact_pb2.PublishRequest(chunk=bytes(len(item.payload_bytes)))
    cases = {
        grpc.StatusCode.INVALID_ARGUMENT: [[], [whole], [first, first], [first, whole, whole]],
        grpc.StatusCode.DATA_LOSS: [[first], [first, half], [first, flipped]],
    }
    with Connection(service.address) as connection:
        for code, streams in cases.items():
            for requests in streams:
                with pytest.raises(grpc.RpcError) as caught:
                    connection.artifacts.Publish(iter(requests), timeout=5)
                assert caught.value.code() is code
    assert [entry.digest for entry in operator.list()] == []


def test_publish_checks_signatures_when_it_has_trust_roots(start, publisher, stranger, artifact):
    service = start(str(publisher.public_key))
    with service.operator() as operator:
        with pytest.raises(Refused) as caught:
            stranger.publish(operator, artifact(1))
        assert caught.value.kind == "signature_untrusted"
        with pytest.raises(Refused) as caught:
            operator.publish(artifact(1), b"")
        assert caught.value.kind == "unsigned"
        publisher.publish(operator, artifact(2))
        assert [entry.digest for entry in operator.list()] == [artifact(2).digest]


def test_promote_keeps_what_is_left_out_and_logs_everything(
    shared_operator, publisher, artifact, channel
):
    one, two = (publisher.publish(shared_operator, artifact(seed)) for seed in (1, 2))
    shared_operator.promote(channel, artifact=one, strength=1.0, share=0.5, **WHO)
    shared_operator.promote(channel, artifact=two, **WHO)
    shared_operator.promote(channel, enabled=False, **WHO)
    shared_operator.promote(channel, artifact="", **WHO)
    states = [
        (e.artifact, e.strength, e.enabled, e.share) for e in shared_operator.history(channel)
    ]
    assert states == [
        (one, 1.0, True, 0.5),
        (two, 1.0, True, 0.5),
        (two, 1.0, False, 0.5),
        (None, 1.0, False, 0.5),
    ]
    head = shared_operator.channel(channel)
    assert (head.revision, head.actor, head.reason) == (4, "ada", "a test")
    assert [e.revision for e in shared_operator.history(channel, after=2)] == [3, 4]
    assert channel in list(shared_operator.channels())


def test_the_log_of_no_channel_is_not_found(shared_operator, channel):
    for call in (
        lambda: shared_operator.channel(channel),
        lambda: list(shared_operator.history(channel)),
    ):
        with pytest.raises(NotFound) as caught:
            call()
        assert caught.value.kind == "no_channel"


def test_an_altered_log_is_not_served(service, operator):
    for _ in range(3):
        operator.promote("prod", **WHO)
    file = service.store / "channels/prod/00000002.json"
    file.write_bytes(file.read_bytes().replace(b'"share":1', b'"share":0'))
    with pytest.raises(Corrupt, match="revision 3 names") as caught:
        list(operator.history("prod"))
    assert caught.value.kind == "channel_chain"
    assert operator.channel("prod").revision == 3


def test_a_page_of_history_reads_no_more_than_itself(service, operator):
    for _ in range(6):
        operator.promote("prod", **WHO)
    # What is not read cannot be found to be damaged.
    for revision in (1, 6):
        (service.store / f"channels/prod/{revision:08d}.json").write_bytes(b"damaged")
    request = channel_pb2.HistoryRequest(channel="prod", after=2, page_size=2)
    with Connection(service.address) as connection:
        page = connection.channels.History(request, timeout=5)
    assert [entry.revision for entry in page.entries] == [3, 4]
    assert page.more


def test_stray_files_in_the_store_are_no_errors(service, operator, publisher, artifact):
    digest = publisher.publish(operator, artifact())
    operator.promote("prod", artifact=digest, strength=1.0, **WHO)
    for name in ("channels/prod/notes.txt", "channels/Not a channel/x", "artifacts/notes.txt"):
        file = service.store / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"stray")
    assert [entry.revision for entry in operator.history("prod")] == [1]
    assert list(operator.channels()) == ["prod"]
    assert [entry.digest for entry in operator.list()] == [digest]


def test_promote_of_a_stale_revision_is_a_conflict(shared_operator, publisher, artifact, channel):
    digest = publisher.publish(shared_operator, artifact())
    shared_operator.promote(channel, artifact=digest, strength=1.0, **WHO)
    for stale in (0, 7):
        with pytest.raises(Conflict):
            shared_operator.promote(channel, strength=0.5, expected_revision=stale, **WHO)
    assert shared_operator.channel(channel).revision == 1


@pytest.mark.parametrize(
    ("change", "error", "kind"),
    [
        ({"strength": 2.5}, Refused, "policy_strength"),
        ({"strength": float("nan")}, InvalidInput, "promote_strength"),
        ({"strength": float("-inf")}, InvalidInput, "promote_strength"),
        ({"share": 1.1}, InvalidInput, "promote_share"),
        ({"share": float("nan")}, InvalidInput, "promote_share"),
        ({"artifact": "0" * 64}, NotFound, "no_artifact"),
        ({"artifact": "../../etc/passwd"}, InvalidInput, "digest"),
        ({"actor": " "}, InvalidInput, "promote_actor"),
        ({"reason": ""}, InvalidInput, "promote_reason"),
    ],
)
def test_promote_refuses_what_nodes_would_refuse(
    shared_operator, publisher, artifact, channel, change, error, kind
):
    digest = publisher.publish(shared_operator, artifact())
    shared_operator.promote(channel, artifact=digest, strength=1.0, **WHO)
    with pytest.raises(error) as caught:
        shared_operator.promote(channel, **(WHO | change))
    assert (type(caught.value), caught.value.kind) == (error, kind)
    assert shared_operator.channel(channel).revision == 1


def test_the_first_artifact_of_a_channel_needs_a_strength(
    shared_operator, publisher, artifact, channel
):
    digest = publisher.publish(shared_operator, artifact())
    with pytest.raises(InvalidInput, match="no strength yet"):
        shared_operator.promote(channel, artifact=digest, **WHO)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".", "Ünïcode", "x" * 300, "y" * (9 << 20)])
def test_odd_names_are_invalid_and_do_no_harm(shared_operator, name):
    before = list(shared_operator.channels())
    for call in (
        lambda: shared_operator.channel(name),
        lambda: list(shared_operator.history(name)),
        lambda: shared_operator.promote(name, **WHO),
        lambda: shared_operator.manifest(name),
        lambda: next(shared_operator.watch(name)),
    ):
        with pytest.raises(InvalidInput):
            call()
    assert list(shared_operator.channels()) == before


def test_a_message_above_the_limit_is_invalid(shared_operator):
    with pytest.raises(InvalidInput):
        shared_operator.manifest("0" * (13 << 20))
    list(shared_operator.list())


def test_watch_gives_the_present_state_then_every_change(
    shared_operator, publisher, artifact, channel
):
    digest = publisher.publish(shared_operator, artifact())
    shared_operator.promote(channel, artifact=digest, strength=1.0, **WHO)
    watch = shared_operator.watch(channel)
    assert next(watch).revision == 1
    shared_operator.promote(channel, strength=0.25, **WHO)
    second = next(watch)
    assert (second.revision, second.strength, second.artifact) == (2, 0.25, digest)
    watch.close()


def test_a_slow_watcher_skips_revisions_and_gets_the_last(service, operator):
    reports: list[watch_pb2.WatchRequest] = [
        watch_pb2.WatchRequest(subscribe=watch_pb2.Subscribe(node_id="slow", channel="prod"))
    ]

    def requests():
        while True:
            if reports:
                yield reports.pop()
            elif stopped:
                return
            else:
                pause.wait(0.01)

    stopped: list[bool] = []
    pause = threading.Event()
    last = 40
    with Connection(service.address) as connection:
        call = connection.watches.Watch(requests(), timeout=20)
        assert next(call).heartbeat.head_revision == 0
        for _ in range(last):
            operator.promote("prod", **WHO)
        seen = []
        for response in call:
            if response.WhichOneof("message") == "assignment":
                seen.append(response.assignment)
            elif response.heartbeat.head_revision == last and len(seen) >= 8:
                break
        assert len(seen) == 8
        reports.append(
            watch_pb2.WatchRequest(
                report=watch_pb2.Report(nonce=seen[-1].nonce, status=watch_pb2.Report.STATUS_ACK)
            )
        )
        after = next(r.assignment for r in call if r.WhichOneof("message") == "assignment")
        assert (after.revision, after.nonce) == (last, 9)
        assert next(call).WhichOneof("message") == "heartbeat"
        stopped.append(True)


def test_a_change_through_one_replica_reaches_watchers_of_another(start):
    with start().operator() as here, start().operator() as there:
        watch = there.watch("prod")
        here.promote("prod", **WHO)
        assert next(watch).revision == 1
        here.promote("prod", **WHO)
        assert next(watch).revision == 2
        watch.close()


def test_health_and_reflection_answer(shared_service):
    names = {
        f"steering_service.v1.{name}"
        for name in ("ArtifactService", "ChannelService", "WatchService")
    }
    with grpc.insecure_channel(shared_service.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", *names):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection.ServerReflectionInfo(iter([asked]), timeout=5)
        assert names < {s.name for s in answer.list_services_response.service}


def test_sigterm_drains_and_ends_watches(service, operator):
    operator.promote("prod", **WHO)
    watch = operator.watch("prod")
    next(watch)
    assert service.terminate() == 0
    with pytest.raises(Unavailable):
        next(watch)
    with pytest.raises(Unavailable, match="check that it runs"):
        operator.channel("prod")


def steerage_serve(store, address):
    """The command itself; for addresses that it must refuse."""
    return subprocess.run(
        [
            *(sys.executable, "-c", "from pipeline.main import run; run()"),
            *("serve", "--store", str(store), "--address", address),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("address", ["0.0.0.0:0", "192.168.1.1:80", "example.org:80", "[::]:0"])
def test_only_loopback_is_served_or_dialled(tmp_path, address):
    done = steerage_serve(tmp_path, address)
    assert done.returncode == 3
    assert done.stdout == ""
    assert "without TLS nothing else is served" in done.stderr
    with pytest.raises(Refused):
        Operator(address)


def test_a_taken_port_is_an_error_not_a_shared_port(shared_service, tmp_path):
    done = steerage_serve(tmp_path, shared_service.address)
    assert done.returncode == 1
    assert "cannot listen" in done.stderr


def test_every_error_class_has_a_status():
    classes = {*SteeringError.__subclasses__(), *stored.StoreError.__subclasses__()}
    assert classes <= set(STATUS)


def test_stubs_are_fresh():
    done = subprocess.run(
        [sys.executable, str(ROOT / "protos" / "generate.py"), "--check"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert (done.returncode, done.stderr) == (0, "")
