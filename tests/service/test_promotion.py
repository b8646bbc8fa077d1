"""Changes of channels: rollback, two-person approval, and what each identity may do."""

from __future__ import annotations

import hashlib
import uuid

import pytest

from steering_service.client.channel import Proposal
from steering_service.client.credentials import Credentials
from steering_service.client.operator import Operator
from steering_service.core.errors import Conflict, InvalidInput, NotFound, Refused

WHO = {"actor": "ada", "reason": "a test"}
WHY = {"reason": "a test"}


def identity(name, *roles, **bounds):
    token = hashlib.sha256(name.encode()).hexdigest()
    lines = [f'name = "{name}"', f'token_sha256 = "{token}"', f"roles = {list(roles)}"]
    lines += [f"{key} = {value}" for key, value in bounds.items()]
    return "[[identity]]\n" + "\n".join(lines).replace("'", '"') + "\n"


POLICY = "".join(
    (
        identity("pat", "publisher"),
        identity("ada", "operator"),
        identity("bob", "operator"),
        identity("eve", "operator", channels=["dev-*"]),
        identity("mia", "operator", "publisher", models=["other*"]),
        identity("rea", "reader", channels=["prod-*"]),
        '[[channel]]\nname = "prod-*"\ntwo_person = true\nalone = ["off"]\n',
        '[[channel]]\nname = "back-*"\ntwo_person = true\nalone = ["rollback"]\n',
    )
)


@pytest.fixture(scope="module")
def service(guarded_once):
    return guarded_once(POLICY, options={"board_s": 0.1})


@pytest.fixture
def person(service, tmp_path):
    """A client of somebody."""
    opened = []

    def make(name):
        file = tmp_path / name
        file.write_text(name)
        opened.append(Operator(service.address, credentials=Credentials(token=file)))
        return opened[-1]

    yield make
    for operator in opened:
        operator.close()


@pytest.fixture
def name():
    return f"prod-{uuid.uuid4().hex[:8]}"


def refusal(call):
    with pytest.raises(Refused) as caught:
        call()
    return caught.value.kind


def states(operator, channel):
    return [(e.revision, e.strength, e.enabled, e.restores) for e in operator.history(channel)]


def test_rollback_walks_back(shared_operator, publisher, artifact, channel):
    digest = publisher.publish(shared_operator, artifact())
    for strength in (0.1, 0.2, 0.3):
        shared_operator.promote(channel, artifact=digest, strength=strength, **WHO)
    assert shared_operator.rollback(channel, **WHO).restores == 2
    assert shared_operator.rollback(channel, **WHO).restores == 1
    with pytest.raises(InvalidInput) as caught:
        shared_operator.rollback(channel, **WHO)
    assert caught.value.kind == "rollback_revision"
    assert shared_operator.rollback(channel, to_revision=3, **WHO).restores == 3
    assert [row[1:] for row in states(shared_operator, channel)] == [
        (0.1, True, None),
        (0.2, True, None),
        (0.3, True, None),
        (0.2, True, 2),
        (0.1, True, 1),
        (0.3, True, 3),
    ]
    # After a change of its own, one step back is the revision before it.
    shared_operator.promote(channel, enabled=False, **WHO)
    assert shared_operator.rollback(channel, **WHO).restores == 6


def test_a_rollback_is_a_compare_and_set_and_checks_its_words(shared_operator, channel):
    with pytest.raises(NotFound):
        shared_operator.rollback(channel, expected_revision=0, **WHO)
    for _ in range(2):
        shared_operator.promote(channel, **WHO)
    for stale in (0, 1, 7):
        with pytest.raises(Conflict) as caught:
            shared_operator.rollback(channel, expected_revision=stale, **WHO)
        assert caught.value.kind == "revision_taken"
    for revision in (2, 3, 2**40):
        with pytest.raises(InvalidInput) as invalid:
            shared_operator.rollback(channel, to_revision=revision, **WHO)
        assert invalid.value.kind == "rollback_revision"
    with pytest.raises(InvalidInput):
        shared_operator.rollback(channel, actor="ada", reason=" ")
    assert shared_operator.channel(channel).revision == 2


def test_a_rollback_restores_all_of_a_state(shared_operator, publisher, artifact, channel):
    one, two = (publisher.publish(shared_operator, artifact(seed)) for seed in (1, 2))
    first = shared_operator.promote(channel, artifact=one, strength=1.5, share=0.25, **WHO)
    shared_operator.promote(channel, artifact=two, strength=0.5, share=1.0, enabled=False, **WHO)
    back = shared_operator.rollback(channel, **WHO)
    for field in ("artifact", "strength", "enabled", "share"):
        assert getattr(back, field) == getattr(first, field)
    assert (back.revision, back.restores, back.actor) == (3, 1, "ada")


def test_two_people_change_a_guarded_channel(person, publisher, artifact, name):
    ada, bob = person("ada"), person("bob")
    digest = publisher.publish(person("pat"), artifact())
    proposal = ada.promote(name, artifact=digest, strength=1.0, **WHY)
    assert isinstance(proposal, Proposal)
    assert (proposal.entry.actor, proposal.entry.approver) == ("ada", None)
    with pytest.raises(NotFound):
        ada.channel(name)
    assert [p.id for p in bob.proposals(name)] == [proposal.id]
    assert refusal(lambda: ada.approve(name, proposal.id)) == "approver_is_proposer"
    with pytest.raises(NotFound) as caught:
        bob.approve(name, "0" * 16)
    assert caught.value.kind == "no_proposal"
    entry = bob.approve(name, proposal.id)
    assert (entry.revision, entry.actor, entry.approver, entry.strength) == (1, "ada", "bob", 1.0)
    assert bob.proposals(name) == []
    with pytest.raises(Conflict):
        bob.approve(name, proposal.id)
    assert [e.approver for e in bob.history(name)] == ["bob"]


def test_of_two_proposals_for_one_revision_one_is_approved(person, name):
    ada, bob = person("ada"), person("bob")
    one = ada.promote(name, share=0.5, **WHY)
    two = bob.promote(name, share=0.25, **WHY)
    assert [p.id for p in ada.proposals(name)] == [one.id, two.id]
    assert ada.approve(name, two.id).share == 0.25
    with pytest.raises(Conflict) as caught:
        bob.approve(name, one.id)
    assert caught.value.kind == "revision_taken"


def test_one_person_may_turn_a_channel_off_and_nothing_else(person, name):
    ada, bob = person("ada"), person("bob")
    bob.approve(name, ada.promote(name, **WHY).id)
    assert isinstance(ada.promote(name, enabled=False, share=0.5, **WHY), Proposal)
    off = ada.promote(name, enabled=False, **WHY)
    assert (off.revision, off.enabled, off.approver) == (2, False, None)
    assert isinstance(ada.promote(name, enabled=True, **WHY), Proposal)
    assert isinstance(ada.rollback(name, **WHY), Proposal)


def test_rollback_alone_where_the_policy_says_so(person):
    ada, bob = person("ada"), person("bob")
    name = f"back-{uuid.uuid4().hex[:8]}"
    for share in (0.1, 0.2):
        bob.approve(name, ada.promote(name, share=share, **WHY).id)
    back = ada.rollback(name, **WHY)
    assert (back.revision, back.share, back.restores) == (3, 0.1, 1)
    assert isinstance(ada.promote(name, enabled=False, **WHY), Proposal)
    proposal = bob.promote(name, share=0.3, **WHY)
    assert ada.approve(name, proposal.id).restores is None


def test_an_approved_rollback_says_what_it_restores(person, name):
    ada, bob = person("ada"), person("bob")
    for share in (0.1, 0.2):
        bob.approve(name, ada.promote(name, share=share, **WHY).id)
    proposal = ada.rollback(name, **WHY)
    assert proposal.entry.restores == 1
    entry = bob.approve(name, proposal.id)
    assert (entry.share, entry.restores, entry.actor, entry.approver) == (0.1, 1, "ada", "bob")


def test_nobody_keeps_others_from_proposing(person, name):
    ada, bob = person("ada"), person("bob")
    own = [ada.promote(name, share=number / 8, **WHY).id for number in range(8)]
    assert refusal(lambda: ada.promote(name, share=1.0, **WHY)) == "too_many_proposals"
    # The same change again is the same proposal, and none more.
    assert ada.promote(name, share=0.5, **WHY).id == own[4]
    assert refusal(lambda: ada.promote(name, share=0.5, reason="other")) == "too_many_proposals"
    assert bob.promote(name, share=1.0, **WHY).id not in own
    assert len(ada.proposals(name)) == 9


def test_off_is_proposed_whatever_waits_already(person):
    ada, bob = person("ada"), person("bob")
    name = f"back-{uuid.uuid4().hex[:8]}"
    bob.approve(name, ada.promote(name, **WHY).id)
    for number in range(8):
        ada.promote(name, share=number / 8, **WHY)
    off = ada.promote(name, enabled=False, reason="emergency")
    assert ada.promote(name, enabled=False, reason="emergency!").id == off.id
    assert len(ada.proposals(name)) == 9
    assert not bob.approve(name, off.id).enabled


def test_a_caller_is_who_the_service_says(person, name):
    ada = person("ada")
    assert refusal(lambda: ada.promote(name, actor="bob", **WHY)) == "actor_mismatch"
    assert ada.promote(name, actor="ada", **WHY).entry.actor == "ada"
    assert ada.promote(name, share=0.5, **WHY).entry.actor == "ada"


def test_channels_and_models_bound_what_a_caller_sees(person, publisher, artifact, name):
    ada, bob, eve, mia = map(person, ("ada", "bob", "eve", "mia"))
    digest = publisher.publish(person("pat"), artifact(5))
    bob.approve(name, ada.promote(name, artifact=digest, strength=1.0, **WHY).id)
    for call in (
        lambda: eve.channel(name),
        lambda: list(eve.history(name)),
        lambda: eve.promote(name, expected_revision=1, **WHY),
        lambda: eve.rollback(name, expected_revision=1, **WHY),
        lambda: eve.approve(name, "0" * 16),
        lambda: eve.proposals(name),
        lambda: eve.nodes(name),
    ):
        assert refusal(call) == "access_channel"
    assert name not in list(eve.channels())
    assert name in list(ada.channels())
    assert refusal(lambda: mia.manifest(digest)) == "access_model"
    assert refusal(lambda: publisher.publish(mia, artifact(6))) == "access_model"
    assert digest not in [entry.digest for entry in mia.list()]
    assert digest in [entry.digest for entry in ada.list()]
    assert (
        refusal(lambda: mia.promote(f"free-{name}", artifact=digest, strength=1.0, **WHY))
        == "access_model"
    )


def test_what_was_collected_is_not_promoted(service, person, publisher, artifact):
    pat, ada = person("pat"), person("ada")
    digest = publisher.publish(pat, artifact(77))
    pat.manifest(digest)
    for file in (service.store / "artifacts" / digest).iterdir():
        file.unlink()
    with pytest.raises(NotFound):
        ada.promote(f"free-{uuid.uuid4().hex[:8]}", artifact=digest, strength=1.0, **WHY)
