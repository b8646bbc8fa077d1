"""Revocation lists: numbered, created once, followed cheaply."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from store.errors import Conflict, InvalidInput, NotFound
from store.revocations import RevocationLog

ROOT = Path(__file__).parents[2]


def test_append_and_follow(root):
    log, reader = RevocationLog(root), RevocationLog(root)
    assert log.head() is None
    assert reader.head() is None
    for serial in (1, 2, 3):
        log.append(serial, b"list %d" % serial)
        assert reader.head() == log.head() == (serial, b"list %d" % serial)
    assert RevocationLog(root).head() == (3, b"list 3")
    assert log.serials() == [1, 2, 3]
    assert log.get(2) == b"list 2"
    assert [info.key for info in root.list()] == [f"revocations/0000000{n}.json" for n in (1, 2, 3)]


def test_the_next_serial_or_none(root):
    log = RevocationLog(root)
    with pytest.raises(Conflict):
        log.append(2, b"early")
    log.append(1, b"one")
    log.append(1, b"one")  # after a lost reply
    log.append(2, b"two")
    log.append(1, b"one")
    for serial, envelope in ((1, b"other"), (2, b"other"), (4, b"early")):
        with pytest.raises(Conflict, match="the next one is 3") as caught:
            log.append(serial, envelope)
        assert caught.value.kind == "serial_taken"
    assert log.head() == (2, b"two")


@pytest.mark.parametrize("serial", [0, -1, 10**8])
def test_bad_serials(root, serial):
    with pytest.raises(InvalidInput) as caught:
        RevocationLog(root).append(serial, b"x")
    assert caught.value.kind == "out_of_range"
    assert list(root.list()) == []


def test_absent_and_stray(root):
    log = RevocationLog(root)
    with pytest.raises(NotFound) as caught:
        log.get(1)
    assert caught.value.kind == "no_revocations"
    for name in ("notes.txt", "9.json", "00000009.json.bak", "old/00000009.json"):
        root.put_new(f"revocations/{name}", b"stray")
    assert RevocationLog(root).head() is None
    log.append(1, b"one")
    assert RevocationLog(root).head() == (1, b"one")


RACE = """
import sys
from store.errors import Conflict
from store.location import Location
from store.revocations import RevocationLog
log = RevocationLog(Location.open(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
won = []
while (head := log.head() or (0, b""))[0] < 40:
    try:
        log.append(head[0] + 1, head[1] + sys.argv[2].encode())
    except Conflict:
        continue
    won.append(head[0] + 1)
print(*won)
"""


def test_racing_processes_lose_no_list(shared_root):
    """Each list holds the one before it, so that a lost one would show."""
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, shared_root.url, name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "abcd"
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = {}
    for name, racer in zip("abcd", racers, strict=True):
        output, _ = racer.communicate()
        assert racer.returncode == 0
        won |= {int(serial): name for serial in output.split()}
    assert sorted(won) == list(range(1, 41))
    log = RevocationLog(shared_root)
    for serial in range(1, 41):
        assert log.get(serial).decode() == "".join(won[n] for n in range(1, serial + 1))
