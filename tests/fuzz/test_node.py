"""A service that lies to a real Subscription: it refuses, keeps its last good artifact, goes on."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import queue
import threading
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import grpc
import pytest
from delivery import make_artifact
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from publishers import FINGERPRINT, Publisher
from serving import serving
from waiting import eventually
from wire import ODD_NAMES, ODD_NUMBERS, mangled

from steering_service.client.subscription import Subscription
from steering_service.v1 import (
    artifact_pb2,
    artifact_pb2_grpc,
    watch_pb2,
    watch_pb2_grpc,
)

LIMIT = 1000.0
# Answers that a node gives before it subscribes again: the service's copy may be put right.
MAY_HEAL = {"rpc_not_found", "manifest_digest", "payload_digest"}
# No shrinking: an example takes seconds where it fails.
FUZZ = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.reuse, Phase.generate],
}
_ids = itertools.count()


@dataclass
class Talk:
    """What a node is told, and what it answers; over all of its streams.

    Attributes:
        script: What to send next, one after the report on the other.
        reports: What came back.
        streams: How many were opened.
    """

    script: queue.Queue[watch_pb2.WatchResponse] = field(default_factory=queue.Queue)
    reports: queue.Queue[watch_pb2.Report] = field(default_factory=queue.Queue)
    streams: int = 0

    def tell(self, *responses: watch_pb2.WatchResponse) -> None:
        for response in responses:
            self.script.put(response)

    def report(self) -> watch_pb2.Report:
        return self.reports.get(timeout=20)


class Liar(artifact_pb2_grpc.ArtifactServiceServicer, watch_pb2_grpc.WatchServiceServicer):
    """Sends whatever it is told to.

    Attributes:
        files: Manifest, signature and payload by the digest that is asked for.
        talks: By node.
    """

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, bytes, bytes]] = {}
        self.talks: defaultdict[str, Talk] = defaultdict(Talk)

    def GetManifest(self, request, context):
        manifest, signature, payload = self._file(request.digest, context)
        return artifact_pb2.GetManifestResponse(
            manifest=manifest, signature=signature, payload_size=len(payload)
        )

    def Download(self, request, context):
        payload = self._file(request.digest, context)[2]
        yield artifact_pb2.DownloadResponse(offset=request.offset, chunk=payload[request.offset :])

    def _file(self, digest, context):
        if digest not in self.files:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such artifact")
        return self.files[digest]

    def Watch(self, request_iterator, context):
        talk = self.talks[next(request_iterator).subscribe.node_id]
        talk.streams += 1
        stream = talk.streams
        reports = queue.SimpleQueue()

        def listen():
            with contextlib.suppress(grpc.RpcError):
                for request in request_iterator:
                    if request.WhichOneof("message") == "report":
                        reports.put(request.report)
            reports.put(None)

        threading.Thread(target=listen, daemon=True).start()
        yield watch_pb2.WatchResponse(heartbeat=watch_pb2.Heartbeat(interval_ms=60_000))
        # Only the latest stream of a node speaks: gRPC may tell late that one is gone.
        while reports.empty() and talk.streams == stream:
            try:
                response = talk.script.get(timeout=0.05)
            except queue.Empty:
                continue
            yield response
            if response.WhichOneof("message") == "assignment":
                report = reports.get()
                if report is None:
                    return
                talk.reports.put(report)


@pytest.fixture(scope="module")
def lying():
    """A lying service, and its address."""
    liar = Liar()
    with serving(
        partial(artifact_pb2_grpc.add_ArtifactServiceServicer_to_server, liar),
        partial(watch_pb2_grpc.add_WatchServiceServicer_to_server, liar),
    ) as address:
        yield liar, address


@pytest.fixture(scope="module")
def artifacts(publisher, lying, tmp_path_factory):
    """By what is wrong with them; "good" and "better" are right."""
    liar, _ = lying
    stranger = Publisher(tmp_path_factory.mktemp("stranger") / "keys")
    good, better = make_artifact(1), make_artifact(2)
    foreign, other_model = make_artifact(3), make_artifact(4, fingerprint="b" * 64)
    swapped, cut, unsigned = make_artifact(5), make_artifact(6), make_artifact(7)
    made = {
        "good": (good, publisher.sign(good), good.payload_bytes),
        "better": (better, publisher.sign(better), better.payload_bytes),
        "foreign": (foreign, stranger.sign(foreign), foreign.payload_bytes),
        "other model": (other_model, publisher.sign(other_model), other_model.payload_bytes),
        "another's signature": (swapped, publisher.sign(good), swapped.payload_bytes),
        "another's payload": (cut, publisher.sign(cut), good.payload_bytes),
        "unsigned": (unsigned, b"", unsigned.payload_bytes),
    }
    for artifact, signature, payload in made.values():
        liar.files[artifact.digest] = (artifact.manifest_bytes, signature, payload)
    # Under a digest that is not its own.
    liar.files["f" * 64] = liar.files[good.digest]
    found = {name: artifact.digest for name, (artifact, _, _) in made.items()}
    return found | {"digest that does not match": "f" * 64, "missing": "0" * 64}


GOOD = ("good", "better")


@pytest.fixture(scope="module")
def follow(lying, publisher, tmp_path_factory):
    """A Subscription of its own to the lying service, and what they say to each other."""

    @contextmanager
    def make():
        liar, address = lying
        folder = tmp_path_factory.mktemp("node")
        node_id = f"node-{next(_ids)}"
        with Subscription(address, "prod", node_id, folder, publisher.roots, FINGERPRINT) as node:
            talk = liar.talks[node_id]
            eventually(lambda: talk.streams, 20, "a stream")
            yield node, talk

    return make


def assignment(nonce, artifacts, **fields):
    state = {"channel": "prod", "revision": nonce, "strength": 1.0, "enabled": True, "share": 1.0}
    state |= fields
    state["artifact"] = artifacts.get(state.get("artifact", "good"), state.get("artifact", ""))
    return watch_pb2.WatchResponse(assignment=watch_pb2.Assignment(nonce=nonce, **state))


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "revision": st.integers(0, 12) | st.sampled_from([2**63, 2**64 - 1]),
        "artifact": st.sampled_from(
            [
                *("good", "better", "good", "better", "foreign", "other model", "unsigned"),
                *("another's signature", "another's payload", "digest that does not match"),
                *("missing", "", *ODD_NAMES[:12]),
            ]
        ),
        "strength": st.sampled_from([1.0, 2.0, LIMIT, LIMIT + 1, -LIMIT - 1, *ODD_NUMBERS]),
        "share": st.sampled_from([1.0, 1.0, 0.0, 1.5, -0.5, *ODD_NUMBERS]),
        "enabled": st.booleans(),
        "channel": st.sampled_from(["prod", "prod", "prod", "other", *ODD_NAMES[:8]]),
    },
)


@settings(max_examples=60, **FUZZ)
@given(changes=st.lists(CHANGES, min_size=1, max_size=6))
def test_whatever_is_assigned_only_good_things_run(follow, artifacts, changes):
    """Replayed, reordered, forked and made-up Assignments, in any order."""
    with follow() as (node, talk):
        last, told = 0, {}
        for nonce, change in enumerate(changes, start=1):
            message = assignment(nonce, artifacts, **change)
            sent = message.assignment
            streams = talk.streams
            talk.tell(message)
            report = talk.report()
            now = node.active.current
            assert (report.revision, report.nonce) == (sent.revision, sent.nonce)
            assert report.active_revision == now.revision
            assert now.revision >= last, "it went back"
            state = (sent.artifact, sent.strength, sent.share, sent.enabled)
            if report.status == watch_pb2.Report.STATUS_ACK:
                assert report.kind == ""
                assert now.revision == sent.revision
                assert sent.channel == "prod"
                # What is off needs no more to be right than its revision.
                assert not sent.enabled or repr(told.setdefault(now.revision, state)) == repr(state)
                if now.artifact is not None:
                    assert sent.enabled
                    assert now.artifact.digest == sent.artifact
                    assert now.strength == sent.strength
                    assert abs(now.strength) <= LIMIT
            else:
                assert report.status == watch_pb2.Report.STATUS_NACK
                assert report.kind, report.reason
                assert not report.kind[:1].isupper(), f"a bug: {report.kind} {report.reason}"
                assert now.revision == last, "it took what it refused"
            if now.artifact is not None:
                assert now.artifact.digest in {artifacts[name] for name in GOOD}
            last = now.revision
            if report.kind in MAY_HEAL:
                # The node subscribes again, after a while: what is said before that is lost.
                eventually(lambda streams=streams: talk.streams > streams, 20, "another stream")


ODD_ENVELOPES = [b"", b"{}", b"[" * 10_000, b"\xff" * 100, b'{"payload": "", "signatures": []}']


@settings(max_examples=30, **FUZZ)
@given(data=st.data())
def test_revocation_lists_that_are_none(follow, artifacts, publisher, data):
    good = publisher.signer.sign(json.dumps({"serial": 7}).encode())
    envelope = data.draw(st.sampled_from(ODD_ENVELOPES) | mangled(good) | st.just(good))
    serial = data.draw(st.sampled_from([0, 1, 7, 2**64 - 1]))
    bad = watch_pb2.WatchResponse(
        revocations=watch_pb2.Revocations(serial=serial, envelope=envelope)
    )
    with follow() as (node, talk):
        # What cannot be verified revokes nothing, and the assignment behind it is taken.
        talk.tell(bad, assignment(1, artifacts))
        assert talk.report().status == watch_pb2.Report.STATUS_ACK
        assert node.active.current.artifact.digest == artifacts["good"]


@settings(max_examples=30, **FUZZ)
@given(data=st.data())
def test_artifacts_that_are_mangled_on_the_way(lying, follow, artifacts, publisher, data):
    """Manifest, signature and payload, one of them or all: the digest must be what it was."""
    liar, _ = lying
    item = make_artifact(100)
    parts = [item.manifest_bytes, publisher.sign(item), item.payload_bytes]
    which = data.draw(st.sampled_from([0, 1, 2]))
    parts[which] = data.draw(mangled(parts[which]))
    intact = parts == [item.manifest_bytes, publisher.sign(item), item.payload_bytes]
    liar.files[item.digest] = tuple(parts)
    with follow() as (node, talk):
        talk.tell(assignment(1, {"good": item.digest}))
        report = talk.report()
        if report.status == watch_pb2.Report.STATUS_ACK:
            # A signature may be mangled where nobody reads it, as in its key id.
            assert intact or which == 1
            assert node.active.current.artifact.digest == item.digest
        else:
            assert not report.kind[:1].isupper(), f"a bug: {report.kind} {report.reason}"
            assert node.active.current.revision == 0


def test_a_manifest_of_a_gigabyte_of_payload_is_not_downloaded(lying, follow, publisher):
    liar, _ = lying
    item = make_artifact(101)
    value = json.loads(item.manifest_bytes)
    value["payload"]["size"] = 1 << 40
    manifest = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(manifest).hexdigest()
    liar.files[digest] = (manifest, publisher.signer.sign(manifest), b"\0" * 1000)
    with follow() as (node, talk):
        talk.tell(assignment(1, {"good": digest}))
        report = talk.report()
        assert (report.status, report.kind) == (watch_pb2.Report.STATUS_NACK, "payload_size")
        assert node.active.current.revision == 0


def test_a_message_above_the_limit_and_a_flood_of_heartbeats(follow, artifacts):
    with follow() as (node, talk):
        beat = watch_pb2.WatchResponse(heartbeat=watch_pb2.Heartbeat(interval_ms=60_000))
        huge = assignment(1, {"good": "x" * (13 << 20)})
        talk.tell(*[beat] * 20_000, huge)
        # The node cannot even receive that: the stream ends, and the next one is a good one.
        eventually(lambda: talk.streams == 2, 30, "another stream")
        talk.tell(assignment(2, artifacts))
        assert talk.report().status == watch_pb2.Report.STATUS_ACK
        assert node.active.current.revision == 2


def test_intervals_of_nothing_and_of_weeks_neither_spin_nor_sleep(follow, artifacts):
    """0 ms must not make it reconnect in a loop, 2^32-1 ms must not make it deaf."""
    with follow() as (node, talk):
        eventually(lambda: node.status.connected, 20)
        for interval_ms in (0, 1, 2**32 - 1):
            beat = watch_pb2.Heartbeat(interval_ms=interval_ms, head_revision=2**64 - 1)
            talk.tell(watch_pb2.WatchResponse(heartbeat=beat))
        talk.tell(assignment(3, artifacts, enabled=False))
        eventually(lambda: node.active.current.revision == 3, 20)
        assert talk.streams < 10
