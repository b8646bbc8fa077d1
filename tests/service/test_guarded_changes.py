"""What two-person approval, floors and bounds of identities forbid together."""

from __future__ import annotations

import hashlib
import uuid

import pytest
from waiting import eventually

from steering_service.client.channel import ChannelEntry, Proposal
from steering_service.client.credentials import Credentials
from steering_service.client.operator import Operator
from steering_service.core.errors import Refused
from steering_service.core.revocation import Revocations

WHY = {"reason": "a test"}
# As secure.SERVE, with trust roots.
SERVE = """
import json, sys
from steering_service.core.signing import TrustRoots
from steering_service.server.app import serve
options = json.loads(sys.argv[3])
roots = TrustRoots.from_paths([options.pop("trust")])
serve(sys.argv[1], sys.argv[2], trust_roots=roots, poll_s=0.1, heartbeat_s=0.3, drain_s=1.0,
      **options)
"""


def identity(name, role="operator", **bounds):
    token = hashlib.sha256(name.encode()).hexdigest()
    lines = [f'name = "{name}"', f'token_sha256 = "{token}"', f'roles = ["{role}"]']
    lines += [f"{key} = {value}" for key, value in bounds.items()]
    return "[[identity]]\n" + "\n".join(lines).replace("'", '"') + "\n"


ADA = identity("ada")
OTHERS = (
    identity("pat", "publisher")
    + identity("bob")
    + identity("eve", channels=["dev-*"])
    + identity("mia", models=["other*"])
)
RULE = '[[channel]]\nname = "back-*"\ntwo_person = true\nalone = ["rollback"]\n'
POLICY = ADA + OTHERS + RULE


class People:
    """Clients of everybody in the policy."""

    def __init__(self, service, folder):
        self.service, self.opened = service, {}
        self.folder = folder

    def __getattr__(self, name):
        if name not in self.opened:
            file = self.folder / name
            file.write_text(name)
            self.opened[name] = Operator(self.service.address, credentials=Credentials(token=file))
        return self.opened[name]

    def close(self):
        for operator in self.opened.values():
            operator.close()


@pytest.fixture
def people(guarded, publisher, tmp_path):
    opened = []

    def make(policy):
        options = {"trust": str(publisher.public_key)}
        opened.append(People(guarded(policy, program=SERVE, options=options), tmp_path))
        return opened[-1]

    yield make
    for item in opened:
        item.close()


def refusal(call):
    with pytest.raises(Refused) as caught:
        call()
    return caught.value.kind


def name(prefix):
    return f"{prefix}-{uuid.uuid4().hex[:8]}"


def signed(publisher, serial, **changes):
    fields = {"actor": "ada", "time": "2026-11-22T10:00:00Z", "reason": "a test"} | changes
    return publisher.signer.sign_revocations(Revocations(serial=serial, **fields).to_bytes())


def set_policy(people, policy, taken):
    """Change the policy, and wait until it counts."""
    people.service.policy_file.write_text(policy)
    eventually(taken)


def test_a_floor_holds_for_what_a_rollback_restores(people, publisher, artifact):
    everybody = people(POLICY)
    ada, bob, back, free = everybody.ada, everybody.bob, name("back"), name("free")
    digest = publisher.publish(everybody.pat, artifact(1))

    def change(**state):
        return bob.approve(back, ada.promote(back, **state, **WHY).id)

    change(artifact=digest, strength=1.5)
    change(strength=0.5)
    for revision in (1, 2):
        assert ada.rollback(back, to_revision=revision, **WHY).restores == revision
    for strength in (1.5, 0.5):
        ada.promote(free, artifact=digest, strength=strength, **WHY)
    bob.revoke(signed(publisher, 1, floors={back: 2, free: 2}))
    for call in (
        lambda: ada.rollback(back, to_revision=1, **WHY),
        # Its own number is above the floor, and its state is that of revision 1.
        lambda: ada.rollback(back, to_revision=3, **WHY),
        lambda: ada.rollback(free, to_revision=1, **WHY),
    ):
        with pytest.raises(Refused) as caught:
            call()
        assert caught.value.kind == "revision_revoked"
        assert "revision 1 is below 2" in str(caught.value)
    assert ada.rollback(back, to_revision=2, **WHY).restores == 2


def test_a_floor_holds_for_an_approved_rollback(people, publisher, artifact):
    everybody = people(POLICY.replace('alone = ["rollback"]', "alone = []"))
    ada, bob, back = everybody.ada, everybody.bob, name("back")
    digest = publisher.publish(everybody.pat, artifact(1))
    for strength in (1.5, 0.5):
        proposal = ada.promote(back, artifact=digest, strength=strength, **WHY)
        bob.approve(back, proposal.id)
    proposal = ada.rollback(back, **WHY)
    bob.revoke(signed(publisher, 1, floors={back: 2}))
    assert refusal(lambda: bob.approve(back, proposal.id)) == "revision_revoked"


def test_one_person_restores_only_what_two_have_seen(people, publisher, artifact):
    everybody = people(ADA + OTHERS)
    ada, bob, back = everybody.ada, everybody.bob, name("back")
    digest = publisher.publish(everybody.pat, artifact(1))
    ada.promote(back, artifact=digest, strength=1.5, **WHY)
    ada.promote(back, enabled=False, **WHY)
    set_policy(everybody, POLICY, lambda: isinstance(ada.promote(name("back"), **WHY), Proposal))
    proposal = ada.rollback(back, to_revision=1, **WHY)
    assert isinstance(proposal, Proposal)
    assert bob.approve(back, proposal.id).restores == 1
    assert isinstance(ada.rollback(back, to_revision=2, **WHY), ChannelEntry), "off needs nobody"
    assert isinstance(ada.rollback(back, to_revision=3, **WHY), ChannelEntry), "approved"
    ada.rollback(back, to_revision=2, **WHY)
    # Revision 5 has no approver, and what it restores has.
    assert ada.rollback(back, to_revision=5, **WHY).restores == 5


def test_a_proposal_lasts_as_long_as_its_proposer(people):
    names = ("ada", "gus", "dan", "joe")
    everybody = people("".join(map(identity, names)) + OTHERS + RULE)
    bob, back = everybody.bob, name("back")
    proposals = {
        who: getattr(everybody, who).promote(back, share=number / 4, **WHY).id
        for number, who in enumerate(names)
    }
    after = (
        identity("gus", "auditor"),
        identity("dan", channels=["dev-*"]),
        identity("joe", models=["*"]),
    )
    set_policy(everybody, "".join(after) + OTHERS + RULE, lambda: not _knows(everybody.ada, back))
    for who in ("ada", "gus", "dan"):
        assert refusal(lambda who=who: bob.approve(back, proposals[who])) == "proposer_gone"
    assert bob.approve(back, proposals["joe"]).actor == "joe"


def _knows(operator, channel):
    """Whether the service lets somebody in."""
    try:
        operator.proposals(channel)
    except Refused:
        return False
    return True


def test_whoever_revokes_may_change_what_is_revoked(people, publisher, artifact):
    everybody = people(POLICY)
    ada, eve, mia = everybody.ada, everybody.eve, everybody.mia
    digest = publisher.publish(everybody.pat, artifact(1))

    def revoke(who, serial, **changes):
        return who.revoke(signed(publisher, serial, **changes))

    assert refusal(lambda: revoke(eve, 1, floors={"prod": 2})) == "access_channel"
    assert refusal(lambda: revoke(eve, 1, keys=("a" * 64,))) == "access_revoke"
    assert refusal(lambda: revoke(eve, 1, artifacts=("b" * 64,))) == "access_revoke"
    assert refusal(lambda: revoke(mia, 1, artifacts=(digest,))) == "access_model"
    assert refusal(lambda: revoke(mia, 1, keys=("a" * 64,))) == "access_revoke"
    assert ada.revocations() == (0, b"")
    assert revoke(eve, 1, floors={"dev-1": 3}) == 1
    known = {"keys": ("a" * 64,), "artifacts": ("b" * 64,)}
    assert revoke(ada, 2, floors={"dev-1": 3, "prod": 2}, **known) == 2
    # Only what is new has to be the caller's.
    assert revoke(eve, 3, floors={"dev-1": 4, "prod": 2}, **known) == 3
    assert refusal(lambda: revoke(eve, 4, floors={"dev-1": 4, "prod": 3}, **known)) == (
        "access_channel"
    )
    known["artifacts"] = tuple(sorted((digest, "b" * 64)))
    assert revoke(eve, 4, floors={"dev-1": 4, "prod": 2}, **known) == 4
