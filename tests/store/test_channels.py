"""Channels against a dictionary, under races, and with altered logs."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import obstore
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from store.channels import ChannelEntry, ChannelLog
from store.digest import sha256_hex
from store.errors import Conflict, Corrupt, InvalidInput, NotFound
from store.location import Location

ROOT = Path(__file__).parents[2]


def append(log, channel="prod", expected_revision=0, **more):
    fields = {
        "artifact": "a" * 64,
        "strength": 1.0,
        "enabled": True,
        "share": 1.0,
        "actor": "alice",
        "reason": "test",
    }
    return log.append(channel, expected_revision=expected_revision, **{**fields, **more})


def leave(location, key):
    """Put an object past the store, as people and desktops do."""
    if (path := location.local_path()) is not None:
        (path / key).parent.mkdir(parents=True, exist_ok=True)
        (path / key).write_bytes(b"stray")
    else:
        bucket, _ = location.obstore_and_prefix()
        obstore.put(bucket, key, b"stray")


@pytest.fixture(params=["local", "memory"])
def log(request, tmp_path):
    return ChannelLog(Location.open(tmp_path if request.param == "local" else "memory://"))


def test_append_and_read(log):
    first = append(log)
    second = append(
        log, expected_revision=1, artifact=None, strength=-0.5, share=0.25, enabled=False
    )
    assert (first.revision, second.revision) == (1, 2)
    assert first.previous == ""
    assert second.previous == sha256_hex(first.to_bytes())
    assert log.head("prod") == second
    assert log.entry("prod", 1) == first
    assert log.history("prod") == [first, second]
    assert log.history("prod", after=1) == [second]
    assert log.history("prod", after=2) == []
    assert log.history("prod", after=7) == []
    assert log.history("prod", limit=1) == [first]
    assert log.history("prod", after=1, limit=5) == [second]
    for bad in (0, -1):
        with pytest.raises(InvalidInput):
            log.history("prod", limit=bad)
    assert log.names() == ["prod"]
    log.verify("prod")
    when = datetime.fromisoformat(first.time)
    assert when.utcoffset() == timedelta(0)


OLD = (
    b'{"actor":"alice","artifact":null,"channel":"prod","enabled":true,"previous":"","reason":"x",'
    b'"revision":1,"schema_version":1,"share":1,"strength":2.5,"time":"2026-11-21T18:40:00Z"}'
)


def test_logs_from_before_there_were_approvers_keep_their_bytes(log):
    log.location.put_new("channels/prod/00000001.json", OLD)
    assert log.head("prod").to_bytes() == OLD
    assert (log.head("prod").approver, log.head("prod").restores) == (None, None)
    fields = {"artifact": None, "strength": 2.5, "reason": "x", "time": "2026-11-21T18:40:00Z"}
    assert append(log, **fields).to_bytes() == OLD  # sent again
    second = append(log, expected_revision=1, approver="bob", restores=1)
    assert second.previous == sha256_hex(OLD)
    assert json.loads(second.to_bytes())["approver"] == "bob"
    assert log.history("prod") == [log.entry("prod", 1), second]
    assert ChannelLog(log.location).head("prod") == second
    log.verify("prod")


def test_nothing_is_written_twice(log):
    """None is not spelled out: an entry has one byte form."""
    spelled = OLD.replace(b'"artifact"', b'"approver":null,"artifact"')
    log.location.put_new("channels/prod/00000001.json", spelled)
    with pytest.raises(Corrupt) as caught:
        log.head("prod")
    assert caught.value.kind == "channel_chain"


def test_a_draft_is_what_append_appends(log):
    draft = {"artifact": "a" * 64, "strength": 1.0, "enabled": True, "share": 1.0}
    draft |= {"actor": "alice", "reason": "test", "time": "2026-11-21T18:40:00Z"}
    first = log.draft("prod", expected_revision=0, **draft)
    assert log.names() == []
    assert log.append("prod", expected_revision=0, **draft) == first
    for expected_revision in (0, 7):
        with pytest.raises(Conflict) as caught:
            log.draft("prod", expected_revision=expected_revision, **draft)
        assert caught.value.kind == "revision_taken"
    with pytest.raises(InvalidInput):
        log.draft("prod", expected_revision=1, **{**draft, "strength": float("nan")})
    assert log.head("prod") == first


def test_newer(log):
    assert log.newer("prod", 0) is None
    entries = [append(log, expected_revision=revision) for revision in range(4)]
    for reader in (log, ChannelLog(log.location)):
        for revision in range(4):
            assert reader.newer("prod", revision) == entries[-1]
        assert reader.newer("prod", 4) is None
        assert reader.newer("prod", 9) is None
        with pytest.raises(InvalidInput):
            reader.newer("../x", 1)


def test_head_sees_other_writers(log):
    append(log)
    reader = ChannelLog(log.location)
    assert reader.head("prod").revision == 1
    for revision in range(1, 5):
        append(log, expected_revision=revision)
    assert reader.head("prod").revision == 5


def test_stale_writers_lose(log):
    append(log)
    append(log, expected_revision=1, actor="bob", reason="mine")
    with pytest.raises(Conflict, match="'bob' made revision 2") as caught:
        append(log, expected_revision=1)
    assert caught.value.kind == "revision_taken"
    for revision in (0, 7):
        with pytest.raises(Conflict):
            append(log, expected_revision=revision)
    assert log.head("prod").actor == "bob"


def test_the_same_change_may_be_sent_again(log):
    """A bucket may have stored an entry although its reply was lost."""
    append(log, time="2026-11-21T18:40:00Z")
    again = append(log, time="2026-11-21T18:40:00Z")
    assert again.revision == log.head("prod").revision == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("artifact", "a" * 63),
        ("artifact", "A" * 64),
        ("artifact", "a" * 64 + "\n"),
        ("strength", float("nan")),
        ("strength", float("inf")),
        ("strength", "1"),
        ("share", -0.01),
        ("share", 1.01),
        ("share", float("nan")),
        ("enabled", 1),
        ("actor", ""),
        ("reason", None),
        ("time", "yesterday"),
        ("time", "2026-11-21"),
        ("time", "2026-11-21T18:40:00+01:00"),
        ("time", "2026-13-21T18:40:00Z"),
        ("approver", ""),
        ("approver", "alice"),
        ("restores", 0),
        ("restores", 1),
        ("restores", True),
        ("expected_revision", -1),
        ("expected_revision", -2),
    ],
)
def test_bad_entries_are_refused(log, field, value):
    with pytest.raises(InvalidInput) as caught:
        append(log, **{field: value})
    assert caught.value.kind == "channel_entry"
    assert log.names() == []


@pytest.mark.parametrize(
    "name", ["", "A", "-a", ".a", "a/b", "..", "a" * 64, "a\n", "é", "a.", None]
)
def test_bad_names_are_refused(log, name):
    for call in (
        lambda: append(log, name),
        lambda: log.head(name),
        lambda: log.history(name),
        lambda: log.verify(name),
        lambda: log.entry(name, 1),
    ):
        with pytest.raises(InvalidInput) as caught:
            call()
        assert caught.value.kind == "channel_name"


def test_absent(log):
    append(log)
    for call, kind in (
        (lambda: log.head("dev"), "no_channel"),
        (lambda: log.verify("dev"), "no_channel"),
        (lambda: log.entry("prod", 2), "no_revision"),
        (lambda: log.history("dev"), "no_channel"),
        (lambda: log.history("dev", after=3, limit=1), "no_channel"),
    ):
        with pytest.raises(NotFound) as caught:
            call()
        assert caught.value.kind == kind


def test_stray_files_are_no_entries(log):
    first = append(log)
    for name in (".DS_Store", "notes.txt", "00000000.json", "00000002.json.bak", "9.json"):
        leave(log.location, f"channels/prod/{name}")
    leave(log.location, "channels/prod/old/00000009.json")
    leave(log.location, "channels/.trash/00000001.json")
    leave(log.location, "channels/Not a channel/00000001.json")
    leave(log.location, "channels/README.md")
    reader = ChannelLog(log.location)
    assert reader.head("prod") == first
    assert reader.history("prod") == [first]
    assert reader.names() == ["prod"]
    second = append(reader, expected_revision=1)
    assert reader.history("prod") == [first, second]
    reader.verify("prod")
    leave(log.location, "channels/strays-only/notes.txt")
    with pytest.raises(NotFound):
        reader.head("strays-only")


def test_history_reads_only_what_is_asked_for_and_the_entry_before(log):
    entries = [append(log, expected_revision=revision) for revision in range(6)]
    for revision in (1, 6):  # what is not read cannot be found to be damaged
        log.location.replace(f"channels/prod/{revision:08d}.json", b"damaged")
    assert log.history("prod", after=2, limit=3) == entries[2:5]
    with pytest.raises(Corrupt):
        log.history("prod", after=2)
    with pytest.raises(Corrupt):
        log.history("prod", limit=1)


def test_history_finds_altered_entries(log):
    for revision in range(4):
        append(log, expected_revision=revision)
    key = "channels/prod/00000002.json"
    whole = log.location.get(key)
    changed = json.loads(whole) | {"strength": 9}
    log.location.replace(key, ChannelEntry.model_validate(changed).to_bytes())
    for after in (0, 1, 2):  # at 2, the altered one lies before the first that is wanted
        with pytest.raises(Corrupt, match="revision 3 names") as caught:
            log.history("prod", after=after)
        assert caught.value.kind == "channel_chain"
    assert [entry.revision for entry in log.history("prod", after=3)] == [4]
    log.location.delete(key)
    for after in (0, 1, 2):
        with pytest.raises(Corrupt, match="revision 2 is gone, revision 3 is there") as caught:
            log.history("prod", after=after)
        assert caught.value.kind == "channel_gap"


def test_altered_logs_are_found(log):
    for revision in range(4):
        append(log, expected_revision=revision)
    key = "channels/prod/00000002.json"
    whole = log.location.get(key)

    changed = json.loads(whole) | {"strength": 9}
    log.location.replace(key, ChannelEntry.model_validate(changed).to_bytes())
    with pytest.raises(Corrupt, match="revision 3") as caught:
        log.verify("prod")
    assert caught.value.kind == "channel_chain"

    log.location.replace(key, whole.replace(b":2,", b":3,"))
    with pytest.raises(Corrupt):
        log.verify("prod")
    with pytest.raises(Corrupt):
        log.entry("prod", 2)

    log.location.replace(key, whole + b" ")
    with pytest.raises(Corrupt):
        log.history("prod")

    log.location.replace(key, whole[:-5])
    with pytest.raises(Corrupt, match="00000002"):
        log.verify("prod")

    log.location.delete(key)
    with pytest.raises(Corrupt, match="revision 2 is gone, revision 3 is there") as caught:
        log.verify("prod")
    assert caught.value.kind == "channel_gap"

    log.location.replace(key, whole)
    log.verify("prod")


class ChannelMachine(RuleBasedStateMachine):
    """Two logs over one location must behave as one dictionary of lists."""

    names = st.sampled_from(["prod", "dev"])

    @initialize()
    def open(self):
        root = Location.open("memory://")
        self.logs = [ChannelLog(root), ChannelLog(root)]
        self.model: dict[str, list[ChannelEntry]] = {}

    @rule(
        which=st.integers(0, 1),
        channel=names,
        lag=st.sampled_from([0, 0, 0, 1, 2, -1]),
        strength=st.floats(-1e300, 1e300),
        share=st.floats(0, 1),
        artifact=st.none() | st.just("b" * 64),
        enabled=st.booleans(),
        reason=st.text(st.characters(exclude_categories=["Cs"])),
    )
    def append(self, which, channel, lag, **fields):
        entries = self.model.setdefault(channel, [])
        expected = len(entries) - lag
        if expected < 0:
            return
        log = self.logs[which]
        if lag:
            with pytest.raises(Conflict):
                log.append(channel, expected_revision=expected, actor="a", **fields)
            return
        entry = log.append(channel, expected_revision=expected, actor="a", **fields)
        assert {name: getattr(entry, name) for name in fields} == fields
        entries.append(entry)

    @rule(which=st.integers(0, 1), channel=names, after=st.integers(0, 5))
    def read(self, which, channel, after):
        entries = self.model.get(channel, [])
        log = self.logs[which]
        if entries:
            assert log.history(channel, after=after) == entries[after:]
            assert log.history(channel, after=after, limit=2) == entries[after : after + 2]
            assert log.head(channel) == entries[-1]
            log.verify(channel)
        else:
            with pytest.raises(NotFound):
                log.head(channel)
            with pytest.raises(NotFound):
                log.history(channel, after=after)

    @invariant()
    def same_names(self):
        wanted = sorted(name for name, entries in self.model.items() if entries)
        assert self.logs[0].names() == wanted


TestChannelMachine = ChannelMachine.TestCase
TestChannelMachine.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


RACE = """
import sys
from store.channels import ChannelLog
from store.errors import Conflict, NotFound
from store.location import Location
log = ChannelLog(Location.open(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for number in range(10):
    while True:
        try:
            revision = log.head("prod").revision
        except NotFound:
            revision = 0
        try:
            log.append("prod", expected_revision=revision, artifact=None, strength=number,
                       enabled=True, share=1, actor=sys.argv[2], reason="race")
            break
        except Conflict:
            pass
"""


def test_racing_processes_lose_no_update(shared_root):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, shared_root.url, name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "abcdefgh"
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        racer.communicate()
        assert racer.returncode == 0
    log = ChannelLog(shared_root)
    log.verify("prod")
    history = log.history("prod")
    assert [entry.revision for entry in history] == list(range(1, 81))
    for name in "abcdefgh":
        assert [e.strength for e in history if e.actor == name] == list(range(10))
