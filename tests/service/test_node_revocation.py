"""What is revoked stops on every node at once, stays stopped, and never comes back."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from functools import partial

import pytest
from publishers import FINGERPRINT
from securesystemslib.dsse import Envelope
from serving import serving
from waiting import eventually

from steering_service.client.active import UNSTEERED
from steering_service.client.channel import Assignment
from steering_service.client.connection import Connection
from steering_service.client.fetch import ArtifactCache, fetch_artifact
from steering_service.client.node import Node
from steering_service.client.revoked import RevocationFile
from steering_service.client.subscription import Subscription
from steering_service.core.errors import Refused, Unavailable
from steering_service.core.revocation import Revocations
from steering_service.core.signing import TrustRoots
from steering_service.v1 import watch_pb2, watch_pb2_grpc
from store.channels import ChannelLog
from store.location import Location

WHO = {"actor": "ada", "reason": "a test"}


def a_list(serial, *artifacts, keys=(), floors=None):
    return Revocations(
        serial=serial,
        artifacts=tuple(sorted(artifacts)),
        keys=tuple(sorted(keys)),
        floors=floors or {},
        time="2026-11-22T10:00:00Z",
        **WHO,
    )


def signed(publisher, *arguments, **options):
    return publisher.signer.sign_revocations(a_list(*arguments, **options).to_bytes())


@pytest.fixture
def other(tmp_path, publisher):
    """A second publisher, whom the nodes of this test trust too."""
    return type(publisher)(tmp_path / "other")


@pytest.fixture
def roots(publisher, other):
    return TrustRoots.from_paths([publisher.public_key, other.public_key])


@pytest.fixture
def trusting(start, publisher, other):
    """A service that trusts both."""
    return start(str(publisher.public_key), str(other.public_key))


@pytest.fixture
def trusting_operator(trusting):
    with trusting.operator() as operator:
        yield operator


@pytest.fixture
def subscribe(tmp_path, roots):
    def make(address, *, node_id="node-1", channel="prod", cache="cache"):
        return Subscription(address, channel, node_id, tmp_path / cache, roots, FINGERPRINT)

    return make


def status_of(operator, node_id="node-1", channel="prod"):
    return next((n for n in operator.nodes(channel)[0] if n.node_id == node_id), None)


@pytest.mark.parametrize("kind", ["artifact_revoked", "key_revoked", "revision_revoked"])
def test_what_runs_and_is_revoked_makes_way_for_the_plain_model(
    trusting, trusting_operator, publisher, other, artifact, subscribe, kind
):
    operator, item = trusting_operator, artifact(1)
    other.publish(operator, item)
    operator.promote("prod", artifact=item.digest, strength=1.0, **WHO)
    revoked = {
        "artifact_revoked": {"artifacts": [item.digest]},
        "key_revoked": {"keys": (other.signer.key_id,)},
        "revision_revoked": {"floors": {"prod": 2}},
    }[kind]
    envelope = signed(publisher, 1, *revoked.pop("artifacts", ()), **revoked)
    with subscribe(trusting.address) as node:
        assert node.active.wait_for(1, 5).artifact.digest == item.digest
        assert operator.revoke(envelope) == 1
        eventually(lambda: node.active.current.artifact is None)
        current = node.active.current
        assert (current.revision, current.enabled, current.identity) == (1, True, UNSTEERED)
        eventually(lambda: node.status.revocations_serial == 1)
        # The service is told, also as a refusal of the present revision.
        eventually(lambda: (seen := status_of(operator)) is not None and seen.refuses_head)
        seen = status_of(operator)
        assert (seen.nack.kind, seen.nack.revision) == (kind, 1)
        assert (seen.active_revision, seen.revocations_serial) == (0, 1)
        assert node.status.refused_revision == 1
        assert node.status.last_error.startswith(kind)
        convergence = operator.nodes("prod")[1]
        assert (convergence.converged, convergence.refusing) == (0, 1)
        # A good one ends it.
        good = artifact(2)
        publisher.publish(operator, good)
        operator.promote("prod", artifact=good.digest, **WHO)
        assert node.active.wait_for(2, 5).artifact.digest == good.digest
        eventually(lambda: node.status.refused_revision is None)


def test_what_is_not_revoked_runs_on(trusting, trusting_operator, publisher, artifact, subscribe):
    item = artifact(1)
    publisher.publish(trusting_operator, item)
    trusting_operator.promote("prod", artifact=item.digest, strength=1.0, **WHO)
    with subscribe(trusting.address) as node:
        before = node.active.wait_for(1, 5)
        trusting_operator.revoke(
            signed(publisher, 1, artifact(2).digest, floors={"prod": 1, "dev": 9})
        )
        eventually(lambda: node.status.revocations_serial == 1)
        assert node.active.current is before
        assert node.status.refused_revision is None


def test_a_revoked_artifact_is_refused_and_the_last_good_one_stays(
    trusting, trusting_operator, publisher, artifact, subscribe
):
    good, bad = artifact(1), artifact(2)
    for item in (good, bad):
        publisher.publish(trusting_operator, item)
    trusting_operator.promote("prod", artifact=good.digest, strength=1.0, **WHO)
    with subscribe(trusting.address) as node:
        node.active.wait_for(1, 5)
        trusting_operator.revoke(signed(publisher, 1, bad.digest))
        eventually(lambda: node.status.revocations_serial == 1)
        # Past the service's own check, as an attacker with the bucket's keys would.
        ChannelLog(Location.open(str(trusting.store))).append(
            "prod",
            expected_revision=1,
            artifact=bad.digest,
            strength=1.0,
            enabled=True,
            share=1.0,
            actor="eve",
            reason="mischief",
        )
        eventually(lambda: node.status.refused_revision == 2)
        assert node.status.last_error.startswith("artifact_revoked")
        assert node.active.current.artifact.digest == good.digest


def test_off_works_below_the_floor(trusting, trusting_operator, publisher, subscribe):
    trusting_operator.revoke(signed(publisher, 1, floors={"prod": 5}))
    trusting_operator.promote("prod", enabled=False, **WHO)
    with subscribe(trusting.address) as node:
        assert node.active.wait_for(1, 5).enabled is False
        assert node.status.refused_revision is None


def test_revocations_hold_after_a_restart_without_the_service(
    trusting, trusting_operator, publisher, artifact, subscribe, tmp_path
):
    item = artifact(1)
    publisher.publish(trusting_operator, item)
    trusting_operator.promote("prod", artifact=item.digest, strength=1.0, **WHO)
    with subscribe(trusting.address) as node:
        node.active.wait_for(1, 5)
        eventually((tmp_path / "cache/state/node-1/prod.json").exists)
        trusting_operator.revoke(signed(publisher, 1, item.digest))
        eventually((tmp_path / "cache/revocations.json").exists)
    trusting.kill()
    # Also for another node of the machine, and for what applies artifacts without a channel.
    with subscribe(trusting.address) as node, subscribe(trusting.address, node_id="n2") as second:
        for each in (node, second):
            assert each.status.revocations_serial == 1
            assert each.active.current.artifact is None
    cache = ArtifactCache(tmp_path / "cache", trust_roots=publisher.roots)
    with pytest.raises(Refused) as caught:
        cache.load(item.digest)
    assert caught.value.kind == "artifact_revoked"


def test_a_node_that_was_away_learns_of_a_revocation_before_anything_else(
    trusting, trusting_operator, publisher, artifact, subscribe, tmp_path
):
    item = artifact(1)
    publisher.publish(trusting_operator, item)
    trusting_operator.promote("prod", artifact=item.digest, strength=1.0, **WHO)
    with subscribe(trusting.address) as node:
        node.active.wait_for(1, 5)
        eventually((tmp_path / "cache/state/node-1/prod.json").exists)
    trusting_operator.revoke(signed(publisher, 1, item.digest))
    with subscribe(trusting.address) as node:
        assert node.active.current.artifact is not None  # as it was left
        eventually(lambda: node.active.current.artifact is None)
        eventually(lambda: node.status.refused_revision == 1)
    with subscribe(trusting.address, cache="fresh") as node:
        eventually(lambda: node.status.refused_revision == 1)
        assert node.status.last_error.startswith("artifact_revoked")
        assert not list((tmp_path / "fresh").glob(f"*{item.digest}*"))


def test_what_is_fetched_without_a_channel_is_checked_too(
    trusting, trusting_operator, publisher, artifact, tmp_path
):
    one, two = artifact(1), artifact(2)
    for item in (one, two):
        publisher.publish(trusting_operator, item)
    options = {
        "cache_dir": tmp_path / "tools",
        "trust_roots": publisher.roots,
        "model_fingerprint": FINGERPRINT,
    }
    assert fetch_artifact(one.digest, trusting.address, **options).digest == one.digest
    trusting_operator.revoke(signed(publisher, 1, one.digest, two.digest))
    with pytest.raises(Refused) as caught:
        fetch_artifact(two.digest, trusting.address, **options)
    assert caught.value.kind == "artifact_revoked"
    # The list is on the disk now, and counts for what is there.
    with pytest.raises(Refused) as caught:
        fetch_artifact(one.digest, trusting.address, **options)
    assert caught.value.kind == "artifact_revoked"


class Liar(watch_pb2_grpc.WatchServiceServicer):
    """A real gRPC service in the wrong hands: sends the lists it is given, one after the other."""

    def __init__(self, envelopes):
        self.envelopes = envelopes
        self.subscribed = []
        self.stop = threading.Event()

    def Watch(self, request_iterator, context):
        self.subscribed.append(next(request_iterator).subscribe)
        yield watch_pb2.WatchResponse(heartbeat=watch_pb2.Heartbeat(interval_ms=10_000))
        for serial, envelope in self.envelopes:
            yield watch_pb2.WatchResponse(
                revocations=watch_pb2.Revocations(serial=serial, envelope=envelope)
            )
            time.sleep(0.05)  # each for itself, not only the last one
        yield watch_pb2.WatchResponse(
            assignment=watch_pb2.Assignment(channel="prod", revision=7, nonce=1)
        )
        self.stop.wait(20)


@contextmanager
def lying_service(envelopes):
    liar = Liar(envelopes)
    with serving(partial(watch_pb2_grpc.add_WatchServiceServicer_to_server, liar)) as address:
        try:
            yield liar, address
        finally:
            liar.stop.set()


def test_a_list_never_goes_back(publisher, other, stranger, subscribe, tmp_path):
    one, two = "1" * 64, "2" * 64
    present = signed(publisher, 5, one, keys=(other.signer.key_id,), floors={"prod": 3})
    refused = [
        (9, signed(stranger, 9, one, keys=(other.signer.key_id,), floors={"prod": 3})),
        (9, signed(other, 9, one, keys=(other.signer.key_id,), floors={"prod": 3})),
        (9, b""),
        (9, b"{"),
        (9, publisher.signer.sign(a_list(9).to_bytes())),
        (4, signed(publisher, 4, one)),
        (5, signed(publisher, 5, one, two, keys=(other.signer.key_id,), floors={"prod": 3})),
        (6, signed(publisher, 6, two, keys=(other.signer.key_id,), floors={"prod": 3})),
        (6, signed(publisher, 6, one, floors={"prod": 3})),
        (6, signed(publisher, 6, one, keys=(other.signer.key_id,), floors={"prod": 2})),
    ]
    with lying_service([(5, present), *refused]) as (_, address), subscribe(address) as node:
        node.active.wait_for(7, 10)
        assert node.status.revocations_serial == 5
        assert (tmp_path / "cache/revocations.json").read_bytes() == present
    later = signed(publisher, 8, one, two, keys=(other.signer.key_id,), floors={"prod": 4})
    with lying_service([(8, later)]) as (liar, address), subscribe(address) as node:
        eventually(lambda: node.status.revocations_serial == 8)
        assert liar.subscribed[0].revocations_serial == 5
        eventually(lambda: (tmp_path / "cache/revocations.json").read_bytes() == later)


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff" * 100, None])
def test_a_damaged_list_on_the_disk_keeps_the_node_plain_until_the_service_answers(
    trusting, trusting_operator, publisher, stranger, artifact, subscribe, tmp_path, damage
):
    item = artifact(1)
    publisher.publish(trusting_operator, item)
    trusting_operator.promote("prod", artifact=item.digest, strength=1.0, **WHO)
    file = tmp_path / "cache/revocations.json"
    with subscribe(trusting.address) as node:
        node.active.wait_for(1, 5)
        trusting_operator.revoke(signed(publisher, 1, artifact(2).digest))
        eventually(file.exists)
    file.write_bytes(signed(stranger, 2) if damage is None else damage)
    trusting.kill()
    with subscribe(trusting.address) as node:
        assert node.active.current.artifact is None
    trusting.start()
    with subscribe(trusting.address) as node:
        eventually(lambda: node.status.revocations_serial == 1)
        assert node.active.wait_for(1, 5).artifact.digest == item.digest
        eventually(lambda: publisher.roots.verify_revocations(file.read_bytes()).serial == 1)


@pytest.mark.faults
def test_a_revocation_overtakes_a_download(
    trusting, trusting_operator, publisher, artifact, subscribe, proxy
):
    small, large = artifact(1), artifact(2, width=4_000_000)
    for item in (small, large):
        publisher.publish(trusting_operator, item)
    trusting_operator.promote("prod", artifact=small.digest, strength=1.0, **WHO)
    slow = proxy(trusting.address)
    with subscribe(slow.address) as node:
        node.active.wait_for(1, 5)
        slow.delay_s = 0.1  # a piece: half a minute for the large one
        trusting_operator.promote("prod", artifact=large.digest, **WHO)
        eventually(lambda: slow.bytes_to_client > 100_000)
        began = time.monotonic()
        trusting_operator.revoke(signed(publisher, 1, small.digest))
        eventually(lambda: node.active.current.artifact is None, 15)
        assert node.active.current.revision == 1, "the download had ended before"
        slow.delay_s = 0.0
        assert node.active.wait_for(2, 30).artifact.digest == large.digest
    assert time.monotonic() - began < 60


def test_lists_of_several_processes_end_with_the_highest(publisher, tmp_path):
    path = tmp_path / "cache/revocations.json"
    fast, slow = (RevocationFile(path, publisher.roots) for _ in range(2))
    for file in (fast, slow):
        file.restore()
    slow.offer(signed(publisher, 1, "1" * 64))
    fast.offer(signed(publisher, 2, "1" * 64, "2" * 64))
    assert fast.keep()
    assert slow.keep()
    assert not slow.keep()
    late = RevocationFile(path, publisher.roots)
    late.restore()
    assert late.serial == 2


def test_the_same_list_in_another_envelope_is_no_news(publisher, other, roots, tmp_path):
    file = RevocationFile(tmp_path / "revocations.json", roots)
    assert file.offer(signed(publisher, 1, "1" * 64))
    assert not file.offer(signed(publisher, 1, "1" * 64))
    assert not file.offer(signed(other, 1, "1" * 64))


def test_a_disk_that_refuses_leaves_the_list_in_force(publisher, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    file = RevocationFile(tmp_path / "file" / "revocations.json", publisher.roots)
    file.restore()  # under a file there is no list
    assert file.offer(signed(publisher, 1, "1" * 64))
    with pytest.raises(Unavailable) as caught:
        file.keep()
    assert caught.value.kind == "cache_disk"
    with pytest.raises(Refused):
        file.check_artifact("1" * 64, ["k"])


def unreadable(path):
    """What no process can read as a file, whoever it is; returns what makes it good again."""
    kept = path.read_bytes()
    path.unlink()
    path.mkdir()

    def heal():
        path.rmdir()
        path.write_bytes(kept)

    return heal


def test_a_list_that_cannot_be_read_is_asked_for_again_and_nothing_passes(publisher, tmp_path):
    path = tmp_path / "revocations.json"
    before = RevocationFile(path, publisher.roots)
    before.offer(signed(publisher, 5, "1" * 64))
    before.keep()
    heal = unreadable(path)
    file = RevocationFile(path, publisher.roots)
    for attempt in (
        file.restore,
        lambda: file.offer(signed(publisher, 3)),
        lambda: file.offer(signed(publisher, 6, "1" * 64)),
        lambda: file.check_artifact("2" * 64, ["k"]),
        lambda: file.check_revision("prod", 1),
    ):
        with pytest.raises(Unavailable) as caught:
            attempt()
        assert caught.value.kind == "cache_disk"
    heal()
    with pytest.raises(Refused) as caught:
        file.offer(signed(publisher, 3))
    assert caught.value.kind == "revocations_order"
    assert file.serial == 5
    with pytest.raises(Refused):
        file.check_artifact("1" * 64, ["k"])


def test_keep_takes_the_later_list_of_another_process(publisher, tmp_path):
    path = tmp_path / "revocations.json"
    fast, slow = (RevocationFile(path, publisher.roots) for _ in range(2))
    slow.offer(signed(publisher, 1))
    fast.offer(signed(publisher, 2, "2" * 64))
    fast.keep()
    assert slow.keep()
    assert slow.serial == 2
    with pytest.raises(Refused):
        slow.check_artifact("2" * 64, ["k"])


def test_what_the_later_list_of_another_process_forbids_stops(
    publisher, artifact, tmp_path, trusting, trusting_operator
):
    """A list that came late here: the sibling's, which counts from then on, forbids what runs."""
    item = artifact(1)
    publisher.publish(trusting_operator, item)
    cache = ArtifactCache(tmp_path / "cache", trust_roots=publisher.roots)
    node = Node("prod", "node-1", cache, None)
    node.restore()
    with Connection(trusting.address) as connection:
        assignment = Assignment("prod", 1, item.digest, 1.0, enabled=True, share=1.0)
        node.apply(assignment, lambda digest: cache.get(digest, connection))
    assert node.keep()
    cache.revocations.offer(signed(publisher, 1))
    assert node.obey() is None
    sibling = RevocationFile(cache.revocations.path, publisher.roots)
    sibling.offer(signed(publisher, 2, item.digest))
    sibling.keep()
    with pytest.raises(Refused) as caught:
        node.keep()
    assert caught.value.kind == "artifact_revoked"
    assert node.active.current.artifact is None
    assert node.reported_revision == 0


def test_without_its_trust_root_a_list_keeps_the_node_plain_until_one_that_counts_comes(
    trusting, trusting_operator, publisher, other, artifact, subscribe, tmp_path
):
    """The key that signed the list is no trust root any more: nobody knows what it revoked."""
    bad, good = artifact(1), artifact(2)
    for item in (bad, good):
        publisher.publish(trusting_operator, item)
    trusting_operator.promote("prod", artifact=good.digest, strength=1.0, **WHO)
    file = tmp_path / "cache/revocations.json"
    with subscribe(trusting.address) as node:
        node.active.wait_for(1, 5)
    file.write_bytes(signed(other, 1, bad.digest))
    # A service that has no list, and a node that does not trust `other` any more.
    rotated = Subscription(
        trusting.address, "prod", "node-1", tmp_path / "cache", publisher.roots, FINGERPRINT
    )
    with rotated as node:
        eventually(lambda: node.status.refused_revision == 1)
        assert node.status.last_error.startswith("revocations_untrusted")
        assert "trust root" in node.status.last_error
        assert node.active.current.artifact is None
        eventually(lambda: (seen := status_of(trusting_operator)) is not None and seen.refuses_head)
        assert status_of(trusting_operator).nack.kind == "revocations_untrusted"
        # Off works all the same.
        trusting_operator.promote("prod", enabled=False, **WHO)
        eventually(lambda: status_of(trusting_operator).active_revision == 2)
        trusting_operator.promote("prod", enabled=True, **WHO)
        eventually(lambda: node.status.refused_revision == 3)
        options = {"cache_dir": tmp_path / "cache", "model_fingerprint": FINGERPRINT}
        for digest in (bad.digest, good.digest):
            with pytest.raises(Refused) as caught:
                fetch_artifact(digest, trusting.address, trust_roots=publisher.roots, **options)
            assert caught.value.kind == "revocations_untrusted"
        # Signed again, it counts, and what was refused is assigned once more.
        trusting_operator.revoke(signed(publisher, 1, bad.digest))
        eventually(lambda: node.active.current.artifact is not None)
        assert node.active.current.artifact.digest == good.digest
        assert node.status.revocations_serial == 1


def test_an_artifact_with_one_good_signature_is_good(publisher, other, roots, artifact, tmp_path):
    """A publisher whose key is revoked signs again with another, beside the first signature."""
    item = artifact()
    both = Envelope.from_dict(json.loads(publisher.signer.sign(item.manifest_bytes)))
    both.signatures |= Envelope.from_dict(
        json.loads(other.signer.sign(item.manifest_bytes))
    ).signatures
    folder = tmp_path / "cache" / item.digest
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_bytes(item.manifest_bytes)
    (folder / "payload.safetensors").write_bytes(item.payload_bytes)
    (folder / "signature.json").write_text(json.dumps(both.to_dict()))
    cache = ArtifactCache(tmp_path / "cache", trust_roots=roots)
    cache.revocations.offer(signed(publisher, 1, keys=(other.signer.key_id,)))
    assert cache.load(item.digest).digest == item.digest
    cache.revocations.offer(
        signed(publisher, 2, keys=(other.signer.key_id, publisher.signer.key_id))
    )
    with pytest.raises(Refused) as caught:
        cache.load(item.digest)
    assert caught.value.kind == "key_revoked"
