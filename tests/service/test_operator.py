"""The operator's client over real services: resumed, filtered, rolled back, approved."""

from __future__ import annotations

import itertools
import threading

import pytest

from steering_service.client.channel import ChannelEntry, Proposal
from steering_service.client.credentials import Credentials
from steering_service.client.operator import Operator
from steering_service.core.errors import Conflict, NotFound, Refused, SteeringError, Unavailable
from steering_service.core.revocation import Revocations

WHO = {"actor": "ada", "reason": "a test"}
MIB = 1 << 20


def test_a_publish_that_breaks_goes_on_where_it_was(service, publisher, artifact, upload_proxy):
    large = artifact(width=10 << 20)  # 40 MiB, five pieces
    breaking = upload_proxy(service.address, cut_after=18 * MIB)
    sent = []
    with Operator(breaking.address, deadline_s=20) as operator:
        signature = publisher.signer.sign(large.manifest_bytes)
        assert operator.publish(large, signature, on_sent=sent.append) == large.digest
    assert breaking.connections > 1
    # Less than two of them from the start.
    assert breaking.bytes_to_service < 2 * len(large.payload_bytes)
    assert sent[-1] == len(large.payload_bytes)
    assert sum(later < earlier for earlier, later in itertools.pairwise(sent)) >= 1
    with service.operator() as operator:
        assert operator.manifest(large.digest).payload_size == len(large.payload_bytes)


def test_a_publish_that_gets_nowhere_is_an_error(service, publisher, artifact, upload_proxy):
    large = artifact(width=4 << 20)
    breaking = upload_proxy(service.address, cut_after=2 * MIB)
    with Operator(breaking.address, deadline_s=10) as operator, pytest.raises(Unavailable):
        publisher.publish(operator, large)
    with service.operator() as operator:
        assert list(operator.list()) == []


@pytest.fixture
def upload_proxy(proxy):
    """Proxies that count and cut what goes to the service."""

    def make(target, *, cut_after):
        made = proxy(target)
        pump, made.bytes_to_service, lock = made._pump, 0, threading.Lock()

        def pumping(source, sink, limit):
            to_service = sink.getpeername() == made._target
            if not to_service:
                pump(source, sink, None)
                return
            passed = 0
            try:
                while chunk := source.recv(1 << 16):
                    sink.sendall(chunk)
                    passed += len(chunk)
                    with lock:
                        made.bytes_to_service += len(chunk)
                    if passed >= cut_after:
                        break
            except OSError:
                pass
            source.close()
            sink.close()

        made._pump = pumping
        return made

    return make


def test_the_list_is_filtered(service, operator, publisher, artifact):
    one, two = artifact(1), artifact(2, fingerprint="b" * 64)
    for item in (one, two):
        publisher.publish(operator, item)
    entries = {entry.digest: entry for entry in operator.list()}
    assert sorted(entries) == list(entries) == sorted([one.digest, two.digest])
    entry = entries[one.digest]
    assert (entry.name, entry.kind, entry.model_name) == ("artifact 1", "intervention", "pocket")
    assert entry.payload_size == len(one.payload_bytes)

    def listed(**filters):
        return {entry.digest for entry in operator.list(**filters)}

    assert listed(name_prefix="artifact") == {one.digest, two.digest}
    assert listed(name_prefix="artifact 2") == {two.digest}
    assert listed(model="b" * 64) == {two.digest}
    assert listed(model="pocket", name_prefix="artifact 1") == {one.digest}
    assert listed(kind="controller") == listed(parent="c" * 64) == set()


def test_rollbacks_walk_back(operator, publisher, artifact):
    publisher.publish(operator, artifact())
    for strength in (0.1, 0.2, 0.3):
        operator.promote("prod", artifact=artifact().digest, strength=strength, **WHO)
    back = operator.rollback("prod", **WHO)
    assert isinstance(back, ChannelEntry)
    assert (back.revision, back.strength, back.restores) == (4, 0.2, 2)
    assert operator.rollback("prod", **WHO).restores == 1
    assert operator.rollback("prod", to_revision=3, **WHO).strength == 0.3
    with pytest.raises(Conflict):
        operator.rollback("prod", expected_revision=3, **WHO)
    with pytest.raises(NotFound):
        operator.rollback("other", **WHO)
    with pytest.raises(SteeringError):
        operator.rollback("prod", to_revision=99, **WHO)
    assert operator.channel("prod").revision == 6


TWO = """
[[identity]]
name = "alice"
certificate = "spiffe://test/alice"
roles = ["publisher", "operator"]

[[identity]]
name = "bob"
certificate = "spiffe://test/bob"
roles = ["operator"]

[[channel]]
name = "prod*"
two_person = true
alone = ["off"]
"""


def test_two_people_change_a_channel_that_asks_for_it(guarded, pki, publisher, artifact):
    service = guarded(TWO, tls=True)

    def connect(pair):
        return Operator(
            service.address,
            credentials=Credentials(
                ca=pki.authority.certificate, certificate=pair.certificate, key=pair.key
            ),
        )

    with connect(pki.alice) as alice, connect(pki.client("bob")) as bob:
        publisher.publish(alice, artifact())
        proposal = alice.promote("prod", artifact=artifact().digest, strength=1.0, reason="a test")
        assert isinstance(proposal, Proposal)
        assert (proposal.entry.revision, proposal.entry.actor) == (1, "alice")
        with pytest.raises(NotFound):
            alice.channel("prod")
        assert [item.id for item in bob.proposals("prod")] == [proposal.id]
        with pytest.raises(Refused):
            alice.approve("prod", proposal.id)
        entry = bob.approve("prod", proposal.id)
        assert isinstance(entry, ChannelEntry)
        assert (entry.actor, entry.approver, entry.strength) == ("alice", "bob", 1.0)
        assert bob.proposals("prod") == []
        with pytest.raises(NotFound):
            bob.approve("prod", "0" * 16)
        # Off needs nobody else.
        off = bob.promote("prod", enabled=False, reason="an emergency")
        assert (off.revision, off.actor, off.approver) == (2, "bob", None)


def test_revocation_lists_follow_each_other(start, publisher, artifact):
    service = start(str(publisher.public_key))

    def signed(serial, *artifacts):
        revocations = Revocations(
            serial=serial, artifacts=tuple(sorted(artifacts)), time="2026-11-22T10:00:00Z", **WHO
        )
        return publisher.signer.sign_revocations(revocations.to_bytes())

    with service.operator() as operator:
        assert operator.revocations() == (0, b"")
        assert operator.revoke(signed(1, "1" * 64)) == 1
        assert operator.revocations() == (1, signed(1, "1" * 64))
        with pytest.raises(Conflict):
            operator.revoke(signed(3, "1" * 64))
        with pytest.raises(SteeringError):
            operator.revoke(signed(2, "2" * 64))  # allows what is revoked
        assert operator.revoke(signed(2, "1" * 64, "2" * 64)) == 2
