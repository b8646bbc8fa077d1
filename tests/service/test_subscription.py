"""Nodes: what they accept, what they refuse, and what they survive."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
from publishers import FINGERPRINT
from serving import serving
from waiting import eventually

from steering_service.client.active import UNSTEERED, Active, Deployment, identity_of
from steering_service.client.channel import Assignment, rollout_point
from steering_service.client.connection import Connection
from steering_service.client.fetch import ArtifactCache
from steering_service.client.subscription import Subscription
from steering_service.core.errors import Corrupt, InvalidInput, NotFound, Refused, Unavailable
from steering_service.v1 import watch_pb2, watch_pb2_grpc
from store.channels import ChannelLog
from store.location import Location

WHO = {"actor": "ada", "reason": "a test"}


@pytest.fixture
def subscribe(tmp_path, publisher):
    def make(address, *, node_id="node-1", channel="prod", fingerprint=FINGERPRINT, check=None):
        return Subscription(
            address, channel, node_id, tmp_path / "cache", publisher.roots, fingerprint, check=check
        )

    return make


def test_a_node_follows_its_channel(service, operator, publisher, artifact, subscribe):
    one, two = artifact(1), artifact(2)
    for item in (one, two):
        publisher.publish(operator, item)
    with subscribe(service.address) as node:
        assert node.active.current.identity == UNSTEERED
        operator.promote("prod", artifact=one.digest, strength=1.0, **WHO)
        first = node.active.wait_for(1, 5)
        assert first.artifact.digest == one.digest
        assert first.identity == identity_of(one, 1.0)
        operator.promote("prod", strength=-0.5, **WHO)
        assert node.active.wait_for(2, 5).strength == -0.5
        operator.promote("prod", artifact=two.digest, **WHO)
        assert node.active.wait_for(3, 5).artifact.digest == two.digest
        operator.promote("prod", enabled=False, **WHO)
        off = node.active.wait_for(4, 5)
        assert (off.artifact, off.strength, off.enabled) == (None, 0.0, False)
        assert off.identity == UNSTEERED
        operator.promote("prod", enabled=True, **WHO)
        assert node.active.wait_for(5, 5).artifact.digest == two.digest
        assert node.status.connected
        assert node.status.last_error is None
    assert node.active.current.revision == 5


def test_share_takes_in_a_part_of_the_nodes_and_only_adds(
    service, operator, publisher, artifact, subscribe
):
    publisher.publish(operator, artifact())
    points = {f"node-{i}": rollout_point("prod", f"node-{i}") for i in range(6)}
    nodes = {name: subscribe(service.address, node_id=name) for name in points}
    for node in nodes.values():
        node.__enter__()
    try:
        for revision, share in enumerate((0.0, 0.4, 0.7, 1.0), start=1):
            operator.promote("prod", artifact=artifact().digest, strength=1.0, share=share, **WHO)
            for name, node in nodes.items():
                deployment = node.active.wait_for(revision, 5)
                assert (deployment.artifact is not None) == (points[name] < share)
                assert deployment.enabled
    finally:
        for node in nodes.values():
            node.close()


def test_rollout_points_are_spread_and_stable():
    points = [rollout_point("prod", f"node-{i}") for i in range(4000)]
    assert 0.45 < sum(points) / len(points) < 0.55
    assert all(0.0 <= p < 1.0 for p in points)
    # Written down, since other languages must agree.
    assert rollout_point("prod", "node-1") == 0.7237329162718719


def test_a_node_refuses_and_keeps_the_last_good_one(
    service, operator, publisher, stranger, artifact, subscribe, tmp_path
):
    good = artifact(1)
    publisher.publish(operator, good)
    operator.promote("prod", artifact=good.digest, strength=1.0, **WHO)
    foreign, other_model = artifact(2), artifact(3, fingerprint="b" * 64)
    stranger.publish(operator, foreign)
    publisher.publish(operator, other_model)
    unsigned = artifact(4)
    operator.publish(unsigned, b"")
    log = ChannelLog(Location.open(str(service.store)))
    cases = [
        (foreign.digest, 1.0, "signature_untrusted"),
        (unsigned.digest, 1.0, "unsigned"),
        (other_model.digest, 1.0, "model_fingerprint"),
        # Past the service's own check, as an attacker with the bucket's keys would.
        (good.digest, 2.5, "policy_strength"),
    ]
    with subscribe(service.address) as node:
        node.active.wait_for(1, 5)
        for revision, (digest, strength, kind) in enumerate(cases, start=2):
            log.append(
                "prod",
                expected_revision=revision - 1,
                artifact=digest,
                strength=strength,
                enabled=True,
                share=1.0,
                actor="eve",
                reason="mischief",
            )
            eventually(lambda r=revision: node.status.refused_revision == r)
            assert node.status.last_error.startswith(kind)
            current = node.active.current
            assert (current.revision, current.artifact.digest) == (1, good.digest)
        operator.promote("prod", artifact=good.digest, strength=0.5, **WHO)
        assert node.active.wait_for(len(cases) + 2, 5).strength == 0.5
        eventually(lambda: node.status.refused_revision is None)


def test_a_node_refuses_what_its_own_check_refuses(
    service, operator, publisher, artifact, subscribe
):
    good, misfit = artifact(1), artifact(2)
    for item in (good, misfit):
        publisher.publish(operator, item)
    looked_at = []

    def check(item):
        looked_at.append((item.digest, node.active.current.revision))
        if item.digest == misfit.digest:
            raise InvalidInput("this model has no such site", kind="no_such_site")

    with subscribe(service.address, check=check) as node:
        operator.promote("prod", artifact=good.digest, strength=1.0, **WHO)
        assert node.active.wait_for(1, 5).artifact.digest == good.digest
        operator.promote("prod", artifact=misfit.digest, **WHO)
        eventually(lambda: node.status.refused_revision == 2)
        assert node.status.last_error.startswith("no_such_site")
        current = node.active.current
        assert (current.revision, current.artifact.digest) == (1, good.digest)
        operator.promote("prod", enabled=False, **WHO)
        assert node.active.wait_for(3, 5).artifact is None
    # Before the swap each time, and never for "off".
    assert looked_at == [(good.digest, 0), (misfit.digest, 1)]


def test_a_check_that_fails_without_a_steering_error_changes_nothing(
    service, operator, publisher, artifact, subscribe, tmp_path
):
    publisher.publish(operator, artifact())
    operator.promote("prod", artifact=artifact().digest, strength=1.0, **WHO)

    def check(item):
        raise ZeroDivisionError("a bug")

    with subscribe(service.address, check=check) as node:
        eventually(lambda: node.status.refused_revision == 1)
        assert node.active.current.revision == 0
    with subscribe(service.address) as node:
        node.active.wait_for(1, 5)
        eventually((tmp_path / "cache/state/node-1/prod.json").exists)
    service.kill()
    with subscribe(service.address, check=check) as node:
        assert node.active.current.revision == 0


def test_the_check_also_looks_at_what_is_restored(
    service, operator, publisher, artifact, subscribe, tmp_path
):
    publisher.publish(operator, artifact())
    operator.promote("prod", artifact=artifact().digest, strength=1.0, **WHO)
    with subscribe(service.address) as node:
        node.active.wait_for(1, 5)
        eventually((tmp_path / "cache/state/node-1/prod.json").exists)
    service.kill()

    def refuse(item):
        raise Refused("another model", kind="no_such_site")

    with subscribe(service.address, check=refuse) as node:
        assert (node.active.current.revision, node.active.current.artifact) == (0, None)
    with subscribe(service.address, check=lambda item: None) as node:
        assert node.active.current.artifact.digest == artifact().digest


def test_a_killed_service_changes_nothing_and_a_new_one_converges(
    service, publisher, artifact, subscribe
):
    with subscribe(service.address) as node:
        with service.operator() as operator:
            publisher.publish(operator, artifact(1))
            publisher.publish(operator, artifact(2))
            operator.promote("prod", artifact=artifact(1).digest, strength=1.0, **WHO)
        before = node.active.wait_for(1, 5)
        service.kill()
        eventually(lambda: not node.status.connected)
        assert node.active.current is before
        service.start()
        with service.operator() as operator:
            operator.promote("prod", artifact=artifact(2).digest, **WHO)
        assert node.active.wait_for(2, 15).artifact.digest == artifact(2).digest


def test_a_node_starts_from_its_disk_without_the_service(
    service, operator, publisher, artifact, subscribe, tmp_path
):
    publisher.publish(operator, artifact())
    operator.promote("prod", artifact=artifact().digest, strength=1.5, **WHO)
    with subscribe(service.address) as node:
        before = node.active.wait_for(1, 5)
        eventually((tmp_path / "cache/state/node-1/prod.json").exists)
    service.kill()
    with subscribe(service.address) as node:
        again = node.active.current
        assert (again.revision, again.strength) == (1, 1.5)
        assert again.identity == before.identity
    # A node that meanwhile runs another model starts with nothing.
    with subscribe(service.address, fingerprint="c" * 64) as node:
        assert node.active.current.artifact is None
        assert node.active.current.revision == 0


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[" * 30_000, b'{"schema_version": 2}', b"\xff\xfe", b'{"share": NaN}']
)
def test_a_damaged_state_file_does_not_stop_a_node(
    shared_service, shared_operator, publisher, artifact, subscribe, tmp_path, channel, damage
):
    state = tmp_path / "cache/state/node-1" / f"{channel}.json"
    state.parent.mkdir(parents=True)
    state.write_bytes(damage)
    publisher.publish(shared_operator, artifact())
    shared_operator.promote(channel, artifact=artifact().digest, strength=1.0, **WHO)
    with subscribe(shared_service.address, channel=channel) as node:
        assert node.active.wait_for(1, 5).artifact is not None
    assert json.loads(state.read_bytes())["revision"] == 1


def test_damaged_artifacts_on_the_disk_are_fetched_again(
    shared_service, shared_operator, publisher, artifact, tmp_path
):
    item = artifact()
    publisher.publish(shared_operator, item)
    cache = ArtifactCache(tmp_path / "cache", trust_roots=publisher.roots)
    with Connection(shared_service.address) as connection:
        assert cache.fetch(item.digest, connection).payload_bytes == item.payload_bytes
        for name in ("manifest.json", "payload.safetensors", "signature.json"):
            file = tmp_path / "cache" / item.digest / name
            whole = file.read_bytes()
            file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            with pytest.raises((Corrupt, Refused, InvalidInput)):
                cache.load(item.digest)
            assert cache.fetch(item.digest, connection).digest == item.digest
            assert file.read_bytes() == whole
            file.unlink()
            with pytest.raises(NotFound):
                cache.load(item.digest)
            assert cache.fetch(item.digest, connection).digest == item.digest
        assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [item.digest]
        assert sorted(p.name for p in (tmp_path / "cache" / item.digest).iterdir()) == [
            "manifest.json",
            "payload.safetensors",
            "signature.json",
        ]


def test_a_cut_download_is_resumed(
    shared_service, shared_operator, publisher, artifact, proxy, tmp_path
):
    item = artifact(width=2_000_000)
    publisher.publish(shared_operator, item)
    cache = ArtifactCache(tmp_path / "cache", trust_roots=publisher.roots)
    cut = proxy(shared_service.address, cut_after=5_000_000)
    with Connection(cut.address) as connection, pytest.raises(Unavailable):
        cache.fetch(item.digest, connection)
    partial = tmp_path / "cache" / f".{item.digest}.partial"
    kept = partial.stat().st_size
    # Chunks have 1 MiB, and what was under way when the connection broke may be lost.
    assert 1 << 20 <= kept < len(item.payload_bytes)
    counted = proxy(shared_service.address)
    with Connection(counted.address) as connection:
        assert cache.fetch(item.digest, connection).payload_bytes == item.payload_bytes
    assert counted.bytes_to_client < len(item.payload_bytes) - kept + 200_000
    assert not partial.exists()


def test_a_wrong_partial_file_is_not_resumed(
    shared_service, shared_operator, publisher, artifact, tmp_path
):
    item = artifact(width=100_000)
    publisher.publish(shared_operator, item)
    cache = ArtifactCache(tmp_path / "cache", trust_roots=publisher.roots)
    partial = tmp_path / "cache" / f".{item.digest}.partial"
    with Connection(shared_service.address) as connection:
        for wrong in (b"x" * 1000, b"x" * len(item.payload_bytes), b"x" * 10_000_000):
            partial.parent.mkdir(exist_ok=True)
            partial.write_bytes(wrong)
            assert cache.fetch(item.digest, connection).payload_bytes == item.payload_bytes
            assert not partial.exists()
            for file in (tmp_path / "cache" / item.digest).iterdir():
                file.unlink()
            (tmp_path / "cache" / item.digest).rmdir()


class AfterOneChunk:
    """Interrupts a download when the first part of it has come, without cancelling the call."""

    pending = True

    def cancelling(self, cancel):
        return nullcontext()


def test_an_interrupted_fetch_goes_on_later(
    shared_service, shared_operator, publisher, artifact, tmp_path
):
    item = artifact(width=1_000_000)
    publisher.publish(shared_operator, item)
    cache = ArtifactCache(tmp_path / "cache", trust_roots=publisher.roots)
    with Connection(shared_service.address) as connection:
        with pytest.raises(Unavailable) as caught:
            cache.get(item.digest, connection, AfterOneChunk())
        assert caught.value.kind == "fetch_interrupted"
        assert (tmp_path / "cache" / f".{item.digest}.partial").stat().st_size == 1 << 20
        assert cache.fetch(item.digest, connection).digest == item.digest


class Liar(watch_pb2_grpc.WatchServiceServicer):
    """A real gRPC service that sends what an honest one never would."""

    def __init__(self, assignments):
        self.assignments = assignments
        self.reports = []

    def Watch(self, request_iterator, context):
        next(request_iterator)
        yield watch_pb2.WatchResponse(heartbeat=watch_pb2.Heartbeat(interval_ms=10_000))
        for nonce, fields in enumerate(self.assignments, start=1):
            assignment = watch_pb2.Assignment(nonce=nonce, **fields)
            yield watch_pb2.WatchResponse(assignment=assignment)
            self.reports.append(next(request_iterator).report)
        for _ in request_iterator:
            pass


@contextmanager
def lying_service(assignments):
    liar = Liar(assignments)
    with serving(partial(watch_pb2_grpc.add_WatchServiceServicer_to_server, liar)) as address:
        yield liar, address


def test_nothing_in_an_assignment_is_trusted(subscribe):
    base = {"channel": "prod", "artifact": "../../etc", "strength": 1.0, "enabled": True}
    nan, inf = float("nan"), float("inf")
    cases = [
        (base | {"revision": 5, "share": 1.0}, "digest"),
        (base | {"revision": 5, "share": 1.0, "strength": nan}, "assignment_strength"),
        (base | {"revision": 5, "share": 1.0, "strength": inf}, "assignment_strength"),
        (base | {"revision": 5, "share": nan}, "assignment_share"),
        (base | {"revision": 5, "share": -1.0}, "assignment_share"),
        (base | {"revision": 5, "channel": "other"}, "revision_order"),
        (base | {"revision": 6, "enabled": False, "share": nan, "strength": nan}, None),
        (base | {"revision": 5, "enabled": False}, "revision_order"),
        (base | {"revision": 6, "enabled": True, "share": 0.0}, "revision_order"),
    ]
    sent, kinds = zip(*cases, strict=True)
    with lying_service(sent) as (liar, address), subscribe(address) as node:
        eventually(lambda: len(liar.reports) == len(cases))
        assert [report.kind or None for report in liar.reports] == list(kinds)
        assert [report.active_revision for report in liar.reports] == [0] * 6 + [6] * 3
        assert node.active.current.revision == 6
        assert node.active.current.artifact is None


def test_wait_for_times_out_and_wakes():
    active = Active(Deployment.plain("prod", 0, enabled=False))
    with pytest.raises(Unavailable, match="still at revision 0"):
        active.wait_for(1, 0.01)
    timer = threading.Timer(0.05, active.swap, [Deployment.plain("prod", 3, enabled=False)])
    timer.start()
    assert active.wait_for(2, 5).revision == 3


@pytest.mark.parametrize("node_id", ["", "../x", ".hidden", "a/b", "n" * 129, "ü"])
def test_node_ids_must_be_safe_names(subscribe, node_id):
    with pytest.raises(InvalidInput):
        subscribe("127.0.0.1:1", node_id=node_id)


def test_identity_depends_on_all_that_decides_outputs(artifact):
    made = {identity_of(artifact(seed), s) for seed in (1, 2) for s in (0.5, 1.0)}
    assert len(made) == 4
    assert identity_of(None, 1.0) == UNSTEERED


def test_includes_is_what_the_proto_says():
    state = Assignment("prod", 1, None, 1.0, True, share=0.5)
    names = [f"node-{i}" for i in range(50)]
    assert [state.includes(n) for n in names] == [rollout_point("prod", n) < 0.5 for n in names]


def test_a_node_needs_little():
    program = (
        "import sys, steering_service.client.subscription, steering_service.client.operator\n"
        "heavy = {'torch', 'ray', 'zarr', 'transformers', 'pipeline', 'store', 'pyarrow'}\n"
        "found = heavy & set(sys.modules) or [m for m in sys.modules if 'service.server' in m]\n"
        "sys.exit(f'imported: {found}' if found else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
