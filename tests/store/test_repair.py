"""Damage of every kind: found, named, marked and put right, and nothing else touched."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store import verification
from store.activations import ActivationCache
from store.errors import Conflict, Corrupt
from store.layout import StreamLayout
from store.location import Location
from store.repair import find_and_mark

ROOT = Path(__file__).parents[2]
NUM_ROWS = 5 * 64 - 9
A = StreamLayout("resid_post", NUM_ROWS, (2, 5), 8, "bfloat16", 64)
B = StreamLayout("z", NUM_ROWS, (0,), 4, "float32", 64)
REASONS = {65: "activations are not finite at z.0", 100: "the tokenizer failed"}
INDEX = pa.table({"prompt": np.arange(NUM_ROWS)})


def part(shard, seed=0):
    rows = A.shard_rows(shard)
    rng = np.random.default_rng([seed, shard])
    return {
        "resid_post": rng.integers(0, 65536, (len(rows), 2, 8), dtype=np.uint16),
        "z": rng.standard_normal((len(rows), 1, 4)).astype(np.float32),
    }


def quarantine_of(shard):
    return {row: reason for row, reason in REASONS.items() if row in A.shard_rows(shard)}


def fill(root, seal=True):
    cache = ActivationCache.create(root, {"m": 1}, [A, B], INDEX)
    for shard in range(cache.num_shards if seal else cache.num_shards - 2):
        cache.write_shard(shard, part(shard), quarantined=quarantine_of(shard))
    if seal:
        cache.seal()
    return cache


def contents(cache):
    return {info.key: cache.location.get(info.key) for info in cache.location.list()}


def reopened(cache):
    return ActivationCache.open(Location.open(cache._root.url), cache.digest)


def repair_all(cache):
    return {
        shard: cache.repair_shard(shard, part(shard), quarantine_of(shard))
        for shard in sorted(cache.damaged())
    }


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    return Location.open(tmp_path if request.param == "local" else "memory://")


OBJECT, RECORD, QUARANTINE = (
    B.shard_key(1),
    "_commits/z/00000001.json",
    "_quarantine/00000001.json",
)
GONE = None


def flip(at):
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


# What is changed, how, what verify calls it, and whether a listing shows it.
DAMAGES = {
    "flipped": (OBJECT, flip(40), {"shard_checksum"}, False),
    "flipped in the index": (OBJECT, flip(-9), {"shard_index"}, False),
    "cut off": (OBJECT, lambda data: data[:-100], {"shard_size"}, True),
    "longer": (OBJECT, lambda data: data + b"x", {"shard_size"}, True),
    "empty": (OBJECT, lambda data: b"", {"shard_size"}, True),
    "gone": (OBJECT, GONE, {"shard_missing"}, True),
    "record is no JSON": (RECORD, lambda data: b"{", {"record"}, False),
    "record is empty": (RECORD, lambda data: b"", {"record"}, False),
    "record of another": (
        RECORD,
        lambda data: data.replace(b'"shard":1', b'"shard":2'),
        {"record"},
        False,
    ),
    "record is gone": (RECORD, GONE, {"not_committed"}, True),
    "quarantine is gone": (QUARANTINE, GONE, {"quarantine"}, False),
    "quarantine was edited": (
        QUARANTINE,
        lambda data: data.replace(b'"row":65', b'"row":66'),
        {"quarantine"},
        False,
    ),
}


def inflict(cache, key, change):
    if change is GONE:
        cache.location.delete(key)
    else:
        cache.location.replace(key, change(cache.location.get(key)))


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_named_marked_and_repaired(root, name):
    key, change, kinds, shows = DAMAGES[name]
    cache = fill(root)
    before = contents(cache)
    inflict(cache, key, change)
    cache = reopened(cache)
    assert cache.damaged() == ({1} if shows else set())
    problems = [problem for problem in find_and_mark(cache) if problem.stream]
    assert {(problem.shard, problem.kind) for problem in problems} == {(1, kind) for kind in kinds}
    streams = {"resid_post", "z"} if key == QUARANTINE else {"z"}
    assert {problem.stream for problem in problems} == streams
    for stream in streams:
        mark = json.loads(cache.location.get(f"_damaged/{stream}/00000001.json"))
        assert (mark["stream"], mark["shard"]) == (stream, 1)
        assert mark["kind"] in kinds
    assert cache.damaged() == {1}
    assert repair_all(cache) == {1: [key]}
    assert contents(cache) == before
    again = reopened(cache)
    assert list(again.verify()) == []
    assert again.damaged() == set()
    assert again.quarantined() == REASONS


def test_an_object_and_its_record_both_damaged(root):
    cache = fill(root)
    before = contents(cache)
    inflict(cache, OBJECT, flip(40))
    inflict(cache, RECORD, lambda data: data[:30])
    list(find_and_mark(cache))
    assert repair_all(cache) == {1: [OBJECT, RECORD]}
    assert contents(cache) == before


def test_every_record_of_a_shard_and_its_quarantine_lost(root):
    cache = fill(root)
    before = contents(cache)
    for stream in ("resid_post", "z"):
        inflict(cache, f"_commits/{stream}/00000001.json", GONE)
    inflict(cache, QUARANTINE, GONE)
    assert cache.damaged() == {1}
    repair_all(cache)
    assert contents(cache) == before


def test_what_is_sound_is_not_replaced(tmp_path):
    cache = fill(Location.open(tmp_path))
    path = cache.location.local_path()

    inflict(cache, OBJECT, flip(40))
    list(find_and_mark(cache))
    # Inode numbers would not tell: a file system gives that of a deleted file to the next one.
    for file in filter(Path.is_file, path.rglob("*")):
        os.utime(file, (0, 0))
    repair_all(cache)
    written = {p for p in path.rglob("*") if p.is_file() and p.stat().st_mtime_ns}
    assert written == {path / OBJECT}


def test_values_of_another_machine_are_refused(root):
    cache = fill(root)
    inflict(cache, OBJECT, flip(40))
    list(find_and_mark(cache))
    damaged = contents(cache)
    with pytest.raises(Conflict, match="another kind of hardware") as caught:
        cache.repair_shard(1, part(1, seed=1), quarantine_of(1))
    assert caught.value.kind == "not_deterministic"
    for said in ("shard 1 of stream 'z'", "rows 64 to 127", "steerage extract RUN.toml", "backup"):
        assert said in str(caught.value)
    assert contents(cache) == damaged
    # Only what is damaged has to be the same: the other stream's values are not looked at.
    values = part(1) | {"resid_post": part(1, seed=1)["resid_post"]}
    assert cache.repair_shard(1, values, quarantine_of(1)) == [OBJECT]
    inflict(cache, QUARANTINE, GONE)
    with pytest.raises(Conflict, match="_quarantine/00000001.json was recorded"):
        cache.repair_shard(1, part(1), {70: "another"})
    assert not cache.location.exists(QUARANTINE)


def test_a_record_that_was_lost_is_made_of_the_shard_that_is_whole(root):
    """As when a writer was killed before the record: what lies there is what counts."""
    cache = fill(root)
    before = contents(cache)
    inflict(cache, RECORD, lambda data: b"{")
    list(find_and_mark(cache))
    assert cache.repair_shard(1, part(1, seed=1), quarantine_of(1)) == [RECORD]
    assert contents(cache) == before


def test_a_cache_that_is_not_complete(root):
    """What nobody has written is missing, not damaged; what was written is repaired."""
    cache = fill(root, seal=False)
    assert list(find_and_mark(cache)) == []
    assert cache.damaged() == set()
    inflict(cache, OBJECT, lambda data: data[:-1])
    assert {(p.stream, p.shard) for p in find_and_mark(cache)} == {("z", 1)}
    assert cache.damaged() == {1}
    assert cache.missing() == [3, 4]
    repair_all(cache)
    for shard in cache.missing():
        cache.write_shard(shard, part(shard))
    cache.seal()
    assert contents(cache) == contents(fill(Location.open("memory://")))


def test_a_shard_of_which_one_stream_is_damaged_and_one_not_written(root):
    cache = fill(root, seal=False)
    inflict(cache, A.shard_key(1), lambda data: data[:-1])
    inflict(cache, RECORD, GONE)
    cache = reopened(cache)
    assert (cache.damaged(), cache.missing()) == ({1}, [1, 3, 4])
    assert repair_all(cache) == {1: [A.shard_key(1), RECORD]}
    assert (cache.damaged(), cache.missing()) == (set(), [3, 4])


def test_marks_of_what_is_sound_again_are_removed(root):
    cache = fill(root)
    whole = cache.location.get(OBJECT)
    inflict(cache, OBJECT, flip(40))
    for _ in range(2):
        assert len(list(find_and_mark(cache))) == 1
    cache.location.replace(OBJECT, whole)
    assert cache.damaged() == {1}
    assert list(find_and_mark(cache)) == []
    assert cache.damaged() == set()
    inflict(cache, OBJECT, flip(40))
    list(find_and_mark(cache))
    cache.location.replace(OBJECT, whole)
    assert cache.repair_shard(1, part(1, seed=1), quarantine_of(1)) == []
    assert cache.damaged() == set()


def test_strays_are_no_damage(root):
    cache = fill(root)
    for key in ("_damaged/z/1.json", "_damaged/z/00000099.json", "z/c/77/0/0", "_commits/z/x.json"):
        cache.location.put_new(key, b"stray")
    assert cache.damaged() == set()


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(sorted(DAMAGES)), st.integers(0, 4)), max_size=8))
def test_any_damages_together(damages):
    """Whatever is broken at once, repairing what is found gives the bytes that were there."""
    cache = fill(Location.open("memory://"))
    before = contents(cache)
    hurt = set()
    for name, shard in damages:
        key, change, _, _ = DAMAGES[name]
        key = key.replace("c/1/", f"c/{shard}/").replace("00000001", f"{shard:08d}")
        if cache.location.exists(key) and (change is GONE or len(cache.location.get(key)) > 100):
            inflict(cache, key, change)
            if contents(cache)[key] != before[key] if change is not GONE else True:
                hurt.add(shard)
    cache = reopened(cache)
    found = {problem.shard for problem in find_and_mark(cache) if problem.stream}
    assert found <= hurt
    assert cache.damaged() == found
    repair_all(cache)
    assert contents(cache) == before


@pytest.mark.parametrize(
    ("key", "change"),
    [
        (OBJECT, flip(40)),
        (OBJECT, flip(-9)),
        (OBJECT, lambda data: data[:-1]),
        (OBJECT, lambda data: data[50:]),
        (OBJECT, GONE),
        (RECORD, lambda data: b"{"),
    ],
)
def test_a_reader_is_told_which_shard_and_what_to_do(root, key, change):
    cache = fill(root)
    inflict(cache, key, change)
    cache = reopened(cache)
    for read in (
        lambda: cache.read_layer("z", 0, 1),
        lambda: list(cache.scan("z")),
        lambda: cache.read_rows("z", 0, [64]),
    ):
        with pytest.raises(Corrupt) as caught:
            read()
        text = str(caught.value)
        assert "steerage verify" in text
        assert text.index("steerage verify") < text.index("steerage extract RUN.toml")
        assert ("z/c/1/0/0" in text) or ("_commits/z/00000001.json" in text)
        assert key == RECORD or "shard 1 of stream 'z' (rows 64 to 127)" in text


def test_memory_does_not_grow_with_the_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "_PIECE_BYTES", 1 << 16)
    layout = StreamLayout("z", 16 * 256, (0, 1, 2, 3), 512, "float32", 256)
    index = pa.table({"n": np.arange(layout.num_rows)})
    cache = ActivationCache.create(Location.open(tmp_path), {"big": 1}, [layout], index)
    for shard in range(cache.num_shards):
        cache.write_shard(shard, {"z": np.full((256, 4, 512), shard, np.float32)})
    assert layout.shard_nbytes(0) > 2 << 20
    tracemalloc.start()
    try:
        assert list(cache.verify()) == []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20, peak


REPAIRER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_repair import ActivationCache, Location, repair_all
root = Location.open(sys.argv[1])
(digest,) = ActivationCache.list_digests(root)
cache = ActivationCache.open(root, digest)
print("ready", flush=True)
repair_all(cache)
"""


def test_repairs_that_are_killed_are_gone_on_with(tmp_path):
    cache = fill(Location.open(tmp_path))
    before = contents(cache)
    moments = random.Random(20261122)
    for trial in range(8):
        for shard in range(cache.num_shards):
            inflict(cache, B.shard_key(shard), flip(40 + trial))
            inflict(cache, A.shard_key(shard), lambda data: data[: len(data) // 2])
            if shard % 2:
                inflict(cache, f"_commits/z/{shard:08d}.json", lambda data: b"{")
        inflict(cache, QUARANTINE, GONE)
        list(find_and_mark(cache))
        process = subprocess.Popen(
            [sys.executable, "-c", REPAIRER, tmp_path, Path(__file__).parent],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.wait()
        process.stdout.close()
        after = contents(cache)
        for shard in set(range(5)) - cache.damaged():
            for layout in (A, B):
                assert after[layout.shard_key(shard)] == before[layout.shard_key(shard)]
        repair_all(cache)
        assert contents(cache) == before
