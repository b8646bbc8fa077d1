"""Proposals: kept under their revision, found by their id, refused when altered."""

from __future__ import annotations

import json

import pytest

from store.channels import ChannelLog
from store.digest import sha256_hex
from store.errors import Corrupt, InvalidInput, NotFound
from store.proposals import Proposals

CHANGE = {
    "artifact": "a" * 64,
    "strength": 1.5,
    "enabled": True,
    "share": 0.5,
    "actor": "alice",
    "reason": "weekly",
}


def draft(root, channel="prod", expected_revision=0, **more):
    log = ChannelLog(root)
    return log.draft(channel, expected_revision=expected_revision, **{**CHANGE, **more})


def keys(root):
    return [info.key for info in root.list()]


def test_a_proposal_is_kept_and_approved(root):
    entry = draft(root, time="2026-11-21T18:40:00Z")
    proposal_id, kept = Proposals(root).add(entry)
    assert kept == entry
    assert Proposals(root).add(entry) == (proposal_id, entry)
    (key,) = keys(root)
    assert key == f"proposals/prod/00000001-{proposal_id}.json"
    assert sha256_hex(root.get(key))[:16] == proposal_id
    assert json.loads(root.get(key)) == {"schema_version": 1, "entry": json.loads(entry.to_bytes())}
    found = Proposals(root).get("prod", proposal_id)
    assert found == entry
    log = ChannelLog(root)
    approved = log.append(
        "prod",
        expected_revision=found.revision - 1,
        approver="bob",
        **{name: getattr(found, name) for name in (*CHANGE, "time", "restores")},
    )
    assert approved == entry.model_copy(update={"approver": "bob"})
    log.verify("prod")


def test_open_ones_are_those_of_the_next_revision_oldest_first(root):
    proposals = Proposals(root)
    times = [f"2026-11-21T18:40:0{second}Z" for second in (3, 1, 2)]
    ids = {time: proposals.add(draft(root, time=time))[0] for time in times}
    assert [i for i, _ in proposals.open("prod", 1)] == [ids[time] for time in sorted(times)]
    assert proposals.open("prod", 0) == proposals.open("prod", 2) == []
    assert proposals.open("dev", 1) == []
    ChannelLog(root).append("prod", expected_revision=0, **CHANGE)
    later, entry = proposals.add(draft(root, expected_revision=1, restores=1))
    assert proposals.open("prod", 2) == [(later, entry)]
    assert len(proposals.open("prod", 1)) == 3
    assert proposals.get("prod", later).restores == 1
    other, _ = proposals.add(draft(root, "dev"))
    assert proposals.channels() == ["dev", "prod"]
    with pytest.raises(NotFound):
        proposals.get("prod", other)


@pytest.mark.parametrize("bad", ["", "0" * 16, "../../x", "0" * 17, "é", None])
def test_absent(root, bad):
    Proposals(root).add(draft(root))
    with pytest.raises(NotFound) as caught:
        Proposals(root).get("prod", bad)
    assert caught.value.kind == "no_proposal"
    for call in (Proposals(root).get, Proposals(root).open):
        with pytest.raises(InvalidInput) as caught:
            call("a/b", 1)
        assert caught.value.kind == "channel_name"


def test_a_proposal_has_no_approver(root):
    with pytest.raises(InvalidInput) as caught:
        Proposals(root).add(draft(root, approver="bob"))
    assert caught.value.kind == "channel_entry"
    assert keys(root) == []


def test_altered_proposals_are_refused(root):
    proposals = Proposals(root)
    proposal_id, _ = proposals.add(draft(root))
    (key,) = keys(root)
    whole = root.get(key)
    approved = whole.replace(b'"artifact"', b'"approver":"bob","artifact"')
    for data in (whole.replace(b"1.5", b"9.5"), whole[:-3], whole + b"\n", b"", approved):
        root.replace(key, data)
        for call in (
            lambda: proposals.get("prod", proposal_id),
            lambda: proposals.open("prod", 1),
        ):
            with pytest.raises(Corrupt) as caught:
                call()
            assert caught.value.kind == "proposal"
    root.put_new(f"proposals/dev/00000001-{proposal_id}.json", whole)  # of another channel
    with pytest.raises(Corrupt):
        proposals.get("dev", proposal_id)
