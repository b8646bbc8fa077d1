"""Revocations at the service: who may revoke, what follows, and that every watcher is told."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import time
from typing import ClassVar

import pytest

from steering_service.client.connection import Connection
from steering_service.core.errors import Conflict, InvalidInput, Refused
from steering_service.core.revocation import Revocations
from steering_service.core.signing import TrustRoots
from steering_service.server.identities import Identities
from steering_service.server.publishing import Publishing
from steering_service.server.revocations import RevocationList
from steering_service.v1 import artifact_pb2, watch_pb2
from store.location import Location
from store.registry import Registry
from store.revocations import RevocationLog
from store.uploads import Uploads

WHO = {"actor": "ada", "reason": "a test"}


def revocations(serial, **changes):
    return Revocations(
        serial=serial, actor="ada", time="2026-11-22T10:00:00Z", reason="a test", **changes
    ).to_bytes()


def signed(publisher, serial, **changes):
    return publisher.signer.sign_revocations(revocations(serial, **changes))


def wait_until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)


class Watching:
    """A Watch stream by hand."""

    def __init__(self, address, channel, *, serial=0, node_id="node-1"):
        self.connection = Connection(address)
        self.outbox = queue.SimpleQueue()
        self.outbox.put(
            watch_pb2.WatchRequest(
                subscribe=watch_pb2.Subscribe(
                    node_id=node_id, channel=channel, revocations_serial=serial
                )
            )
        )
        self.call = self.connection.watches.Watch(iter(self.outbox.get, None), timeout=30)

    def next(self, *kinds):
        """The next message of these kinds."""
        return next(r for r in self.call if r.WhichOneof("message") in kinds)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.outbox.put(None)
        self.connection.close()


@pytest.fixture
def trusting(start, publisher):
    return start(str(publisher.public_key))


def test_without_trust_roots_nothing_can_be_revoked(shared_operator, publisher):
    with pytest.raises(Refused) as caught:
        shared_operator.revoke(signed(publisher, 1))
    assert caught.value.kind == "no_trust_roots"
    assert shared_operator.revocations() == (0, b"")


def test_lists_grow_one_by_one_and_are_signed(trusting, publisher, stranger):
    with trusting.operator() as operator:
        refused = {
            "signature_untrusted": signed(stranger, 1),
            "signature_type": publisher.signer.sign(revocations(1)),
            "unsigned": b"",
        }
        for kind, envelope in refused.items():
            with pytest.raises(Refused) as caught:
                operator.revoke(envelope)
            assert caught.value.kind == kind
        for envelope in (b"{}", b"\xff", json.dumps({"payload": "!"}).encode()):
            with pytest.raises(InvalidInput):
                operator.revoke(envelope)
        for serial in (2, 99):
            with pytest.raises(Conflict) as conflict:
                operator.revoke(signed(publisher, serial))
            assert conflict.value.kind == "serial_taken"
        first = signed(publisher, 1, artifacts=("a" * 64,))
        assert operator.revoke(first) == 1
        assert operator.revocations() == (1, first)
        with pytest.raises(Conflict):
            operator.revoke(first)
        with pytest.raises(Refused) as caught:
            operator.revoke(signed(publisher, 2, artifacts=("b" * 64,)))
        assert caught.value.kind == "revocations_shrink"
        second = signed(publisher, 2, artifacts=("a" * 64, "b" * 64))
        assert operator.revoke(second) == 2
        assert operator.revocations() == (2, second)
    assert len(list((trusting.store / "revocations").iterdir())) == 2


def test_what_is_revoked_is_neither_published_nor_promoted(trusting, publisher, artifact, channel):
    with trusting.operator() as operator:
        bad, good = (publisher.publish(operator, artifact(seed)) for seed in (1, 2))
        operator.promote(channel, artifact=bad, strength=1.0, **WHO)
        operator.promote(channel, artifact=good, strength=1.0, **WHO)
        operator.revoke(signed(publisher, 1, artifacts=(bad,), floors={channel: 2}))
        for call in (
            lambda: publisher.publish(operator, artifact(1)),
            lambda: operator.promote(channel, artifact=bad, **WHO),
            lambda: operator.rollback(channel, **WHO),
        ):
            with pytest.raises(Refused) as caught:
                call()
            assert caught.value.kind == "artifact_revoked"
        # What the floor forbids is past; the next revision is above it.
        assert operator.promote(channel, strength=0.5, **WHO).revision == 3
        operator.revoke(signed(publisher, 2, artifacts=(bad, good)[:1], floors={channel: 9}))
        with pytest.raises(Refused) as caught:
            operator.promote(channel, strength=0.25, **WHO)
        assert caught.value.kind == "revision_revoked"


def test_off_works_for_what_is_revoked(trusting, publisher, artifact, channel):
    with trusting.operator() as operator:
        bad = publisher.publish(operator, artifact(1))
        operator.promote(channel, artifact=bad, strength=1.0, **WHO)
        operator.revoke(signed(publisher, 1, artifacts=(bad,), keys=(publisher.signer.key_id,)))
        with pytest.raises(Refused):
            operator.promote(channel, strength=0.5, **WHO)
        assert not operator.promote(channel, enabled=False, **WHO).enabled
        # Whoever signed it has no say any more.
        with pytest.raises(Refused) as caught:
            operator.revoke(signed(publisher, 2, artifacts=(bad,), keys=(publisher.signer.key_id,)))
        assert caught.value.kind == "signature_untrusted"


def test_every_watcher_is_told_at_once_before_what_follows(start, publisher, channel):
    here, there = (start(str(publisher.public_key)) for _ in range(2))
    envelope = signed(publisher, 1)
    with (
        here.operator() as operator,
        Watching(here.address, channel) as near,
        Watching(there.address, channel) as far,
    ):
        for watching in (near, far):
            watching.next("heartbeat")
        operator.revoke(envelope)
        operator.promote(channel, **WHO)
        for watching in (near, far):
            told = watching.next("revocations", "assignment")
            assert told.revocations.serial == 1
            assert told.revocations.envelope == envelope
            assert watching.next("revocations", "assignment").assignment.revision == 1
        # Whoever has it already is not told again; whoever comes later is, first of all.
        with Watching(here.address, channel, serial=1, node_id="node-2") as knows:
            assert knows.next("revocations", "assignment").assignment.revision == 1
        with Watching(there.address, channel, node_id="node-3") as late:
            assert late.next("revocations", "assignment").revocations.serial == 1
            wait_until(
                lambda: (
                    {n.node_id: n.revocations_serial for n in operator.nodes(channel)[0]}
                    == {"node-1": 1, "node-2": 1, "node-3": 1}
                )
            )


def test_a_list_that_got_past_the_service_is_not_passed_on(
    trusting, stranger, publisher, artifact, channel
):
    with trusting.operator() as operator, Watching(trusting.address, channel) as watching:
        digest = publisher.publish(operator, artifact(1))
        watching.next("heartbeat")
        folder = trusting.store / "revocations"
        folder.mkdir(exist_ok=True)
        forged = signed(stranger, 1, artifacts=("a" * 64,))
        (folder / "00000001.json").write_bytes(forged)
        wait_until(lambda: operator.revocations() == (1, forged))
        with pytest.raises(Refused) as caught:
            operator.promote(channel, artifact=digest, strength=1.0, **WHO)
        assert caught.value.kind == "revocations_untrusted"
        # What steers nothing is assigned as ever, and nodes hear nothing of the list.
        for revision in (1, 2):
            operator.promote(channel, **WHO)
            assert watching.next("revocations", "assignment").assignment.revision == revision


def test_a_list_whose_key_is_trusted_no_more_is_not_forgotten(
    start, publisher, stranger, artifact, channel
):
    old, new = publisher, stranger
    both = start(str(old.public_key), str(new.public_key))
    with both.operator() as operator:
        bad, good = (new.publish(operator, artifact(seed)) for seed in (1, 2))
        for digest in (bad, good):
            operator.promote(channel, artifact=digest, strength=1.0, **WHO)
        first = signed(old, 1, artifacts=(bad,), keys=("f" * 64,), floors={"other": 2})
        operator.revoke(first)
    both.kill()
    kept = {"keys": ("f" * 64,), "floors": {"other": 2}}
    with start(str(new.public_key)).operator() as operator:
        for call in (
            lambda: operator.promote(channel, artifact=bad, **WHO),
            lambda: operator.promote(channel, strength=0.5, **WHO),
            lambda: operator.rollback(channel, **WHO),
            lambda: new.publish(operator, artifact(3)),
        ):
            with pytest.raises(Refused) as caught:
                call()
            assert caught.value.kind == "revocations_untrusted"
            assert "--trust" in str(caught.value)
        assert not operator.promote(channel, enabled=False, **WHO).enabled
        # Whoever signs it anew has to have seen it.
        assert operator.revocations() == (1, first)
        for envelope, error, kind in (
            (signed(new, 1, artifacts=(bad,), **kept), Conflict, "serial_taken"),
            (signed(new, 2, **kept), Refused, "revocations_shrink"),
            (signed(old, 2, artifacts=(bad,), **kept), Refused, "signature_untrusted"),
        ):
            with pytest.raises(error) as caught:
                operator.revoke(envelope)
            assert caught.value.kind == kind
        assert operator.revoke(signed(new, 2, artifacts=(bad,), **kept)) == 2
        assert operator.promote(channel, artifact=good, enabled=True, **WHO).enabled
        with pytest.raises(Refused) as caught:
            operator.promote(channel, artifact=bad, **WHO)
        assert caught.value.kind == "artifact_revoked"


def test_a_list_that_cannot_be_read_is_not_replaced(start, publisher, artifact):
    service = start(str(publisher.public_key))
    folder = service.store / "revocations"
    folder.mkdir(parents=True)
    (folder / "00000001.json").write_bytes(b"{}")
    with service.operator() as operator:
        for call in (
            lambda: publisher.publish(operator, artifact(1)),
            lambda: operator.revoke(signed(publisher, 2)),
        ):
            wait_until(lambda: operator.revocations()[0] == 1)
            with pytest.raises(Refused) as caught:
                call()
            assert caught.value.kind == "revocations_untrusted"


class Seen(TrustRoots):
    """Trust roots that note in which threads they verify lists."""

    threads: ClassVar[set[int]] = set()

    def verify_revocations(self, envelope_bytes, *, revoked=()):
        self.threads.add(threading.get_ident())
        return TrustRoots.verify_revocations(self, envelope_bytes, revoked=revoked)


async def anything(wanted, present):
    """Everybody may revoke it."""


def test_lists_are_verified_beside_the_event_loop(tmp_path, publisher):
    # One of 4 MiB takes a second, in which no heartbeat would go out.
    async def run():
        stored = RevocationLog(Location.open(str(tmp_path)))
        roots = Seen(publisher.roots.keys)
        assert await RevocationList(stored, roots).append(signed(publisher, 1), anything) == 1
        await RevocationList(stored, roots).ready()

    asyncio.run(run())
    assert Seen.threads
    assert threading.get_ident() not in Seen.threads


def test_the_first_publish_waits_for_the_list(tmp_path, publisher, artifact):
    built = artifact(1)
    header = artifact_pb2.PublishHeader(
        manifest=built.manifest_bytes, signature=publisher.signer.sign(built.manifest_bytes)
    )

    async def requests():
        yield artifact_pb2.PublishRequest(header=header)
        yield artifact_pb2.PublishRequest(chunk=built.payload_bytes)

    async def run():
        location = Location.open(str(tmp_path))
        RevocationLog(location).append(1, signed(publisher, 1, artifacts=(built.digest,)))
        publishing = Publishing(
            Registry(location),
            Uploads(location),
            RevocationList(RevocationLog(location), publisher.roots),
            trust_roots=publisher.roots,
            max_payload_bytes=1 << 20,
        )
        await publishing.publish(requests(), Identities().anybody(), "localhost")

    with pytest.raises(Refused) as caught:
        asyncio.run(run())
    assert caught.value.kind == "artifact_revoked"
