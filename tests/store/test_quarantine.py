"""Rows that do not count: written before the records, the same whoever writes them, never lost."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.activations import ActivationCache
from store.digest import canonical_json, sha256_hex
from store.errors import Conflict, Corrupt, InvalidInput, StoreError
from store.layout import StreamLayout
from store.location import Location

ROOT = Path(__file__).parents[2]
NUM_ROWS = 40 * 32 - 5
A = StreamLayout("resid_post", NUM_ROWS, (2, 5), 8, "bfloat16", 32)
B = StreamLayout("z", NUM_ROWS, (0,), 4, "float32", 32)
INDEX = pa.table({"prompt": np.arange(NUM_ROWS)})
REASON = "activations are not finite at resid_post.5"


def quarantine_of(shard):
    """None, one or several rows, by the number of the shard."""
    return {shard * 32 + row: f"{REASON} ({row})" for row in (7, 3, 20)[: shard % 4]}


def part(shard):
    rows = A.shard_rows(shard)
    rng = np.random.default_rng(shard)
    values = {
        "resid_post": rng.integers(0, 0x7F00, (len(rows), 2, 8), dtype=np.uint16),
        "z": rng.standard_normal((len(rows), 1, 4)).astype(np.float32),
    }
    for row in quarantine_of(shard):
        values["resid_post"][row - rows.start] = 0x7FC0
        values["z"][row - rows.start] = np.nan
    return values


def create(root):
    return ActivationCache.create(root, {"m": 1}, [A, B], INDEX)


def write(cache, shards, seal=True):
    for shard in shards:
        cache.write_shard(shard, part(shard), quarantined=quarantine_of(shard))
    if seal:
        cache.seal()
    return cache


def contents(cache):
    return {info.key: cache.location.get(info.key) for info in cache.location.list()}


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    return Location.open(tmp_path if request.param == "local" else "memory://")


def test_rows_and_reasons_come_back_and_only_they_are_kept(root):
    cache = write(create(root), range(40))
    wanted = {row: reason for shard in range(40) for row, reason in quarantine_of(shard).items()}
    assert len(wanted) == 60
    again = ActivationCache.open(root, cache.digest)
    assert again.quarantined() == wanted
    assert list(again.quarantined()) == sorted(wanted)
    keys = {key for key in contents(cache) if key.startswith("_quarantine/")}
    assert keys == {f"_quarantine/{shard:08d}.json" for shard in range(40) if shard % 4}
    data = cache.location.get("_quarantine/00000002.json")
    assert data == canonical_json(json.loads(data))
    assert json.loads(data) == {
        "schema_version": 1,
        "capture": cache.digest,
        "shard": 2,
        "rows": [
            {"row": 67, "reason": f"{REASON} (3)"},
            {"row": 71, "reason": f"{REASON} (7)"},
        ],
    }
    for stream in ("resid_post", "z"):
        assert cache.read_record(stream, 2).quarantine == sha256_hex(data)
        assert cache.read_record(stream, 4).quarantine is None


def test_a_cache_without_quarantine_has_the_bytes_it_always_had(root):
    """Records and marker of before there was a quarantine, byte for byte."""
    cache = create(root)
    values = {shard: part(shard) for shard in range(40)}
    for shard in range(40):
        cache.write_shard(shard, values[shard])
    marker = cache.seal()
    keys = [
        "capture",
        "num_bytes",
        "rows",
        "schema_version",
        "seconds",
        "sha256",
        "shard",
        "stream",
    ]
    rows = []
    for stream in ("resid_post", "z"):
        for shard in range(40):
            record = json.loads(cache.location.get(f"_commits/{stream}/{shard:08d}.json"))
            assert sorted(record) == keys
            rows.append([stream, shard, record["num_bytes"], record["sha256"]])
    assert marker.records_sha256 == sha256_hex(canonical_json(rows))
    assert set(json.loads(marker.to_bytes())) == {
        *("schema_version", "capture", "num_rows", "num_shards", "num_bytes", "records_sha256"),
    }
    assert cache.quarantined() == {}


@settings(max_examples=20)
@given(st.permutations(range(8)), st.sets(st.integers(0, 7)))
def test_the_order_of_shards_and_repeats_leave_no_trace(order, repeated):
    layouts = [StreamLayout("z", 8 * 32, (0,), 4, "float32", 32)]
    index = pa.table({"prompt": np.arange(8 * 32)})

    def run(shards):
        cache = ActivationCache.create(Location.open("memory://"), {"m": 1}, layouts, index)
        for shard in shards:
            values = {"z": part(shard)["z"]}
            cache.write_shard(shard, values, quarantined=quarantine_of(shard))
        cache.seal()
        return contents(cache)

    assert run([*order, *repeated]) == run(range(8))


def test_the_marker_covers_the_quarantine(root):
    cache = write(create(root), range(40))
    plain = ActivationCache.create(Location.open("memory://"), {"m": 1}, [A, B], INDEX)
    for shard in range(40):
        plain.write_shard(shard, part(shard))
    assert plain.summary().records_sha256 != cache.summary().records_sha256
    assert plain.summary().num_bytes == cache.summary().num_bytes


@pytest.mark.parametrize(
    "quarantined", [{31: REASON}, {64: REASON}, {-1: REASON}, {40: ""}, {40: REASON, 70: REASON}]
)
def test_rows_of_another_shard_and_missing_reasons_are_refused(root, quarantined):
    cache = create(root)
    with pytest.raises(InvalidInput, match="rows 32 to 63, each with a reason") as caught:
        cache.write_shard(1, part(1), quarantined=quarantined)
    assert caught.value.kind == "rows"
    assert cache.quarantined() == {}
    assert cache.committed() == set()


def test_another_quarantine_of_a_recorded_shard_is_refused(root):
    cache = write(create(root), range(8), seal=False)
    before = contents(cache)
    for shard, quarantined in ((1, {}), (1, {33: REASON}), (4, {130: REASON})):
        with pytest.raises(Conflict, match="not deterministic") as caught:
            cache.write_shard(shard, part(shard), quarantined=quarantined)
        assert caught.value.kind == "not_deterministic"
    assert contents(cache) == before


def test_what_a_killed_writer_left_counts_only_with_the_shard(root):
    cache = create(root)
    write(cache, [1, 2], seal=False)
    before = contents(cache)
    # Killed right after the quarantine, and the next run finds other rows to quarantine, or none.
    for shard in (1, 2):
        for stream, layout in (("resid_post", A), ("z", B)):
            cache.location.delete(f"_commits/{stream}/{shard:08d}.json")
            cache.location.delete(layout.shard_key(shard))
    cache = create(root)
    cache.write_shard(1, part(1))
    cache.write_shard(2, part(2), quarantined={70: REASON})
    assert cache.quarantined() == {70: REASON}
    # Killed after the first shard object: that one would be adopted, so both must agree.
    cache.location.replace("_quarantine/00000002.json", before["_quarantine/00000002.json"])
    for stream in ("resid_post", "z"):
        cache.location.delete(f"_commits/{stream}/00000002.json")
    with pytest.raises(Conflict, match="remove these objects") as caught:
        create(root).write_shard(2, part(2), quarantined={70: REASON})
    assert caught.value.kind == "not_deterministic"
    write(create(root), [2], seal=False)
    assert create(root).quarantined() == quarantine_of(2)


def test_a_damaged_quarantine_is_refused_with_the_way_on(root):
    cache = write(create(root), range(4), seal=False)
    key = "_quarantine/00000001.json"
    whole = cache.location.get(key)
    for data in (b"{", whole.replace(b'"shard":1', b'"shard":2'), b""):
        cache.location.replace(key, data)
        with pytest.raises(Corrupt, match="steerage verify") as caught:
            cache.quarantined()
        assert caught.value.kind == "quarantine"
    cache.location.replace(key, whole)
    cache.location.put_new("_quarantine/notes.txt", b"stray")
    assert len(cache.quarantined()) == 6


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_quarantine import Location, create, write
cache = create(Location.open(sys.argv[1]))
print("ready", flush=True)
write(cache, cache.missing())
"""


def test_resume_after_kills_equals_an_undisturbed_run(tmp_path):
    calm = write(create(Location.open(tmp_path / "calm")), range(40))
    chance = random.Random(20261122)
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path / "killed", Path(__file__).parent],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        process.wait()
        process.stdout.close()
        cache = create(Location.open(tmp_path / "killed"))
        assert {problem.kind for problem in cache.verify()} <= {"not_committed"}
        # Whoever sees the shard sees its quarantine.
        found = cache.quarantined()
        for shard in cache.committed():
            assert quarantine_of(shard).items() <= found.items()
    cache = create(Location.open(tmp_path / "killed"))
    write(cache, cache.missing())
    assert contents(cache) == contents(calm)


def test_an_index_may_name_rows_more_than_once(root):
    rows_N = np.concatenate([np.arange(NUM_ROWS), np.arange(0, NUM_ROWS, 7)])
    np.random.default_rng(0).shuffle(rows_N)
    index = pa.table({"row": rows_N, "prompt": np.arange(len(rows_N))})
    cache = ActivationCache.create(root, {"m": 2}, [A, B], index)
    assert cache.index().equals(index)
    assert ActivationCache.create(root, {"m": 2}, [A, B], index).digest == cache.digest
    with pytest.raises(Conflict):
        ActivationCache.create(root, {"m": 2}, [A, B], INDEX)


def test_an_index_without_rows_names_them_in_order(root):
    cache = create(root)
    assert cache.index().column_names == ["prompt", "row"]
    assert cache.index()["row"].type == pa.int64()
    assert cache.index()["row"].to_pylist() == list(range(NUM_ROWS))
    # It says the same as one that names them, so it is the same cache.
    named = INDEX.append_column("row", pa.array(np.arange(NUM_ROWS)))
    assert ActivationCache.create(root, {"m": 1}, [A, B], named).digest == cache.digest


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (pa.array(np.arange(NUM_ROWS - 1)), f"no entry of the index is of row {NUM_ROWS - 1}"),
        (pa.array(np.arange(NUM_ROWS + 1)), f"entry {NUM_ROWS} has {NUM_ROWS}"),
        (pa.array(np.arange(NUM_ROWS) - 1), "entry 0 has -1"),
        (pa.array(np.arange(NUM_ROWS, dtype=np.int32)), "must be int64 without nulls, got int32"),
        (pa.array([None, *range(NUM_ROWS)], pa.int64()), "with 1 nulls"),
        (pa.array(np.arange(NUM_ROWS) // 2), f"of row {NUM_ROWS // 2 + 1}, one of"),
    ],
)
def test_an_index_that_does_not_fit_the_rows_is_refused(root, rows, said):
    with pytest.raises(InvalidInput, match=said) as caught:
        ActivationCache.create(root, {"m": 3}, [A, B], pa.table({"row": rows}))
    assert caught.value.kind == "index"
    assert ActivationCache.list_digests(root) == []


def test_a_damaged_index_is_named(root):
    cache = write(create(root), range(40))
    cache.location.replace("index.parquet", cache.location.get("index.parquet")[:-30])
    with pytest.raises(StoreError, match=r"index\.parquet is damaged") as caught:
        cache.index()
    assert caught.value.kind == "index"
    assert [(p.stream, p.kind) for p in cache.verify()] == [("", "index")]
