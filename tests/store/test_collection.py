"""Collection: what is garbage goes, what is named or young stays, whatever happens meanwhile."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from store.channels import ChannelLog
from store.collection import collect, find_garbage
from store.digest import canonical_json, sha256_hex
from store.errors import Conflict, Corrupt, InvalidInput, NotFound
from store.location import Location
from store.proposals import Proposals
from store.registry import Registry
from store.replicas import ReplicaBoard
from store.revocations import RevocationLog
from store.uploads import Uploads

WEEK_S = 7 * 86400


def later(days=30.0):
    return datetime.now(UTC) + timedelta(days=days)


def manifest_of(payload, *, parents=(), **more):
    named = {"sha256": sha256_hex(payload), "size": len(payload)}
    return canonical_json({"payload": named, "parents": list(parents), **more})


def publish(root, payload, **more):
    return Registry(root).publish(manifest_of(payload, **more), payload, b"signed")


def promote(root, artifact, channel="prod", expected_revision=0):
    change = {"strength": 1.0, "enabled": True, "share": 1.0, "actor": "alice", "reason": "test"}
    log = ChannelLog(root)
    return log.append(channel, expected_revision=expected_revision, artifact=artifact, **change)


def keys(root):
    return {info.key for info in root.list()}


def gc(root, *, days=30.0, **options):
    """Reasons by key of what a collection finds after some days, which it then removes."""
    found = list(find_garbage(root, now=later(days), **options))
    before = keys(root)
    assert collect(root, found) == len(found)
    gone = {item.key: item.reason for item in found}
    assert keys(root) == before - gone.keys()
    return gone


def test_nothing_of_a_sound_store_goes(root):
    first = publish(root, b"one")
    promote(root, publish(root, b"two", parents=[first]))
    RevocationLog(root).append(1, b"list")
    root.put_new("caches/x/capture.json", b"of another part of the store")
    root.put_new("blobs/sha256/notes.txt", b"whoever put that there")
    assert gc(root, unreferenced=True) == {}


def test_each_kind_of_garbage_goes_when_it_is_old(root):
    kept = publish(root, b"kept")
    promote(root, kept)
    orphan, unsigned = f"blobs/sha256/{sha256_hex(b'o')}", f"artifacts/{'5' * 64}/signature.json"
    root.put_new(orphan, b"o")
    root.put_new(unsigned, b"signed")
    Uploads(root).add("d" * 64, 0, b"x")
    Uploads(root).add("d" * 64, 1, b"x")
    log = ChannelLog(root)
    change = {"artifact": kept, "strength": 1.0, "enabled": True, "share": 1.0, "reason": "r"}
    drafts = {
        channel: log.draft(channel, expected_revision=revision, actor="bob", **change)
        for channel, revision in (("prod", 1), ("dev", 0))
    }
    ids = {channel: Proposals(root).add(entry)[0] for channel, entry in drafts.items()}
    ReplicaBoard(root).write("pod-1", b"{}")
    garbage = {
        orphan: "orphan_blob",
        unsigned: "orphan_signature",
        f"uploads/{'d' * 64}/000000000000-1.part": "upload",
        f"uploads/{'d' * 64}/000000000001-1.part": "upload",
        "replicas/pod-1.json": "replica_gone",
    }
    for days in (-1, 0, 0.9):
        assert gc(root, days=days) == {}
    assert gc(root, days=6.9) == {"replicas/pod-1.json": "replica_gone"}
    ReplicaBoard(root).write("pod-1", b"{}")
    assert gc(root) == garbage
    assert gc(root) == {}
    assert ids.keys() == set(Proposals(root).channels())  # they can be approved still
    promote(root, kept, expected_revision=1)
    key = f"proposals/prod/00000002-{ids['prod']}.json"
    assert gc(root, days=6.9) == {}
    assert gc(root) == {key: "past_proposal"}
    assert Registry(root).payload(kept) == b"kept"


def test_an_upload_that_goes_on_keeps_all_its_pieces(tmp_path):
    root = Location.open(tmp_path)
    Uploads(root).add("d" * 64, 0, b"x")
    between = datetime.now(UTC)
    Uploads(root).add("d" * 64, 1, b"x")
    week_on = between + timedelta(seconds=WEEK_S)
    assert list(find_garbage(root, now=week_on)) == []


def test_artifacts_that_nobody_ever_used_go_on_request(root):
    parent, used, unused = (publish(root, payload) for payload in (b"parent", b"used", b"unused"))
    child = publish(root, b"child", parents=[parent])
    promote(root, used)
    promote(root, child, expected_revision=1)
    promote(root, None, expected_revision=2)  # once named is enough
    assert gc(root) == {}
    gone = gc(root, unreferenced=True)
    assert gone == {
        f"artifacts/{unused}/{part}.json": "unreferenced" for part in ("manifest", "signature")
    }
    with pytest.raises(NotFound):
        Registry(root).open(unused)
    assert gc(root) == {f"blobs/sha256/{sha256_hex(b'unused')}": "orphan_blob"}
    assert publish(root, b"unused") == unused
    assert {Registry(root).payload(d) for d in (parent, used, unused, child)} == {
        b"parent",
        b"used",
        b"unused",
        b"child",
    }


def test_what_waits_for_approval_stays(root):
    digest = publish(root, b"p")
    promote(root, None)
    change = {"strength": 1.0, "enabled": True, "share": 1.0, "actor": "alice", "reason": "test"}
    log = ChannelLog(root)
    Proposals(root).add(log.draft("prod", expected_revision=1, artifact=digest, **change))
    assert gc(root, unreferenced=True) == {}
    promote(root, None, expected_revision=1)
    assert set(gc(root, unreferenced=True).values()) == {"past_proposal", "unreferenced"}


def test_hundreds_of_unused_artifacts():
    root = Location.open("memory://")
    digests = [publish(root, b"p", number=number) for number in range(140)]
    promote(root, digests[70])
    found = find_garbage(root, now=later(), unreferenced=True)
    assert collect(root, found) == 278
    assert Registry(root).list() == [digests[70]]


def test_what_is_used_after_it_was_found_stays(root):
    one, two, three = (publish(root, payload) for payload in (b"1", b"2", b"3"))
    found = list(find_garbage(root, now=later(), unreferenced=True))
    assert len(found) == 6
    promote(root, one)
    publish(root, b"4", parents=[two])
    assert collect(root, found) == 2
    assert Registry(root).payload(one) == b"1"
    assert Registry(root).payload(two) == b"2"
    with pytest.raises(NotFound):
        Registry(root).manifest(three)


@pytest.mark.parametrize("num_written", [1, 2, 3])
def test_what_is_published_again_after_it_was_found_stays(tmp_path, num_written):
    for root in (Location.open(tmp_path), Location.open("memory://")):
        payload, manifest = b"p", manifest_of(b"p")
        digest = sha256_hex(manifest)
        root.put_new(f"blobs/sha256/{sha256_hex(payload)}", payload)
        if num_written > 1:
            root.put_new(f"artifacts/{digest}/signature.json", b"signed")
        if num_written > 2:
            root.put_new(f"artifacts/{digest}/manifest.json", manifest)
        found = list(find_garbage(root, now=later(), unreferenced=True))
        assert found
        assert Registry(root).publish(manifest, payload, b"signed") == digest
        assert collect(root, found) == 0
        assert Registry(root).payload(digest) == payload


def test_leftovers_of_killed_writers_go(tmp_path):
    root = Location.open(tmp_path)
    promote(root, publish(root, b"p"))
    leftover = tmp_path / "artifacts" / ".tmp-1-dead"
    leftover.write_bytes(b"half")
    (tmp_path / "caches").mkdir()
    (tmp_path / "caches" / ".tmp-1-dead").write_bytes(b"of an extraction")
    (found,) = find_garbage(root, now=later())
    assert (found.key, found.size, found.reason) == ("artifacts/.tmp-1-dead", 4, "leftover")
    assert list(find_garbage(root)) == []
    assert collect(root, [found, found]) == 1
    assert not leftover.exists()
    with pytest.raises(InvalidInput):
        root.remove_leftover("channels/prod/00000001.json")


@pytest.mark.parametrize("age_s", [-1, float("nan")])
def test_bad_ages(root, age_s):
    with pytest.raises(InvalidInput) as caught:
        list(find_garbage(root, older_than_s=age_s))
    assert caught.value.kind == "out_of_range"


@pytest.mark.parametrize(
    "damage", ["manifest", "no manifest", "entry", "no entry", "chain is no matter"]
)
def test_nothing_goes_while_damage_hides_what_was_named(root, damage):
    digest = publish(root, b"p")
    for revision in range(3):
        promote(root, digest, expected_revision=revision)
    root.put_new(f"blobs/sha256/{sha256_hex(b'o')}", b"o")
    Uploads(root).add("d" * 64, 0, b"x")
    match damage:
        case "manifest":
            root.replace(f"artifacts/{digest}/manifest.json", manifest_of(b"another"))
        case "no manifest":
            root.delete(f"artifacts/{digest}/manifest.json")
        case "entry":
            root.replace("channels/prod/00000002.json", b"damaged")
        case "no entry":
            root.delete("channels/prod/00000002.json")
        case _:
            key = "channels/prod/00000002.json"
            root.replace(key, root.get(key).replace(b"test", b"TEST"))
            assert len(gc(root)) == 2
            return
    before = keys(root)
    with pytest.raises(Corrupt):
        collect(root, find_garbage(root, now=later(), unreferenced=True))
    assert keys(root) == before


class Interrupted:
    """A backend that stops before its n-th call, to do something else or for good."""

    def __init__(self, inner, at, action):
        self._inner = inner
        self._at = at
        self._action = action
        self._calls = itertools.count()

    def __getattr__(self, name):
        if next(self._calls) in self._at:
            self._action()
        return getattr(self._inner, name)


class Killed(Exception):
    pass


def killed():
    raise Killed


def interrupted(root, at, action):
    return Location(Interrupted(root._backend, at, action), root._root, root._prefix)


@settings(max_examples=150)
@given(
    left=st.sampled_from(["nothing", "blob", "signature", "other signature", "artifact"]),
    find_at=st.integers(0, 12),
    collect_after=st.integers(0, 12),
)
def test_a_publish_survives_a_collection_at_any_moment(left, find_at, collect_after):
    """The garbage is found before one request of a publish, and removed before another one. All
    that lay there is old, all that the publish writes is young.
    """
    root = Location.open("memory://")
    payload, manifest = b"p", manifest_of(b"p")
    digest = sha256_hex(manifest)
    promote(root, publish(root, b"in use"))
    if left != "nothing":
        root.put_new(f"blobs/sha256/{sha256_hex(payload)}", payload)
    if "signature" in left or left == "artifact":
        signature = b"rotated" if left == "other signature" else b"signed"
        root.put_new(f"artifacts/{digest}/signature.json", signature)
    if left == "artifact":
        root.put_new(f"artifacts/{digest}/manifest.json", manifest)
    week_on = datetime.now(UTC) + timedelta(seconds=WEEK_S)
    found = []

    def find():
        found.extend(find_garbage(root, now=week_on, unreferenced=True))

    busy = interrupted(root, [find_at], find)
    busy = interrupted(busy, [find_at + collect_after], lambda: collect(root, found))
    assert Registry(busy).publish(manifest, payload, b"signed") == digest
    assert Registry(root).open(digest).signature == b"signed"
    assert Registry(root).payload(digest) == payload
    assert list(find_garbage(root, now=week_on, unreferenced=True)) == []


class StoreMachine(RuleBasedStateMachine):
    """Publishes, also killed ones, promotions, proposals and collections in any order."""

    payloads = st.sampled_from([b"a", b"b", b"c"])
    numbers = st.integers(0, 2)

    @initialize()
    def open(self):
        self.root = Location.open("memory://")
        self.payloads: dict[str, bytes] = {}
        self.parents: dict[str, list[str]] = {}
        self.named: set[str] = set()
        self.found: list = []

    @rule(payload=payloads, number=numbers, data=st.data())
    def publish(self, payload, number, data):
        parent = data.draw(st.sampled_from([None, *sorted(self.payloads)]))
        parents = [parent] if parent else []
        digest = publish(self.root, payload, number=number, parents=parents)
        self.payloads[digest] = payload
        self.parents[digest] = parents

    @rule(payload=payloads, number=numbers, at=st.integers(0, 4))
    def publish_and_die(self, payload, number, at):
        manifest = manifest_of(payload, number=number)
        try:
            registry = Registry(interrupted(self.root, [at], killed))
            registry.publish(manifest, payload, b"signed")
        except Killed:
            pass
        if self.root.exists(f"artifacts/{sha256_hex(manifest)}/manifest.json"):
            self.payloads[sha256_hex(manifest)] = payload

    @rule(data=st.data(), channel=st.sampled_from(["prod", "dev"]))
    def promote(self, data, channel):
        digest = data.draw(st.sampled_from([None, *sorted(self.payloads)]))
        head = ChannelLog(self.root).newer(channel, 0)
        promote(self.root, digest, channel, head.revision if head else 0)
        self.named.update([digest] if digest else [])

    @rule(older_than_s=st.sampled_from([0.0, WEEK_S]), unreferenced=st.booleans())
    def find(self, older_than_s, unreferenced):
        options = {"older_than_s": older_than_s, "unreferenced": unreferenced}
        self.found = list(find_garbage(self.root, now=later(), **options))

    @rule()
    def find_young(self):
        assert list(find_garbage(self.root, unreferenced=True)) == []

    @rule()
    def collect(self):
        unused = {i.key.split("/")[1] for i in self.found if i.reason == "unreferenced"}
        collect(self.root, self.found)
        for digest in unused - self.named:
            if not self.root.exists(f"artifacts/{digest}/manifest.json"):
                self.payloads.pop(digest, None)
                self.parents.pop(digest, None)

    @rule()
    def collect_all(self):
        for item in find_garbage(self.root, now=later()):
            assert item.reason in ("orphan_blob", "orphan_signature")
            assert collect(self.root, [item]) == 1
        wanted = {sha256_hex(payload) for payload in self.payloads.values()}
        blobs = {info.key.rpartition("/")[2] for info in self.root.list("blobs")}
        assert blobs == wanted

    @invariant()
    def everything_is_there(self):
        registry = Registry(self.root)
        assert set(registry.digests()) == self.payloads.keys()
        assert self.named.union(*self.parents.values()) <= self.payloads.keys()
        for digest, payload in self.payloads.items():
            assert registry.open(digest).signature == b"signed"
            assert registry.payload(digest) == payload


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def test_a_promotion_between_the_looks_puts_an_artifact_back(root):
    """The artifact is looked up as unused, goes, and comes back as a channel names it after all."""
    digest = publish(root, b"p")
    found = list(find_garbage(root, now=later(), unreferenced=True))
    deletes = itertools.count()

    class Promoting:
        def __getattr__(self, name):
            if name == "delete" and next(deletes) == 0:
                promote(root, digest)
            return getattr(root._backend, name)

    assert collect(Location(Promoting(), root._root, root._prefix), found) == 0
    assert Registry(root).payload(digest) == b"p"
    with pytest.raises(Conflict):
        Registry(root).publish(manifest_of(b"p"), b"p", b"another")
