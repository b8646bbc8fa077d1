"""`steerage verify` in processes of its own: it names what is damaged and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from store.activations import ActivationCache
from store.layout import StreamLayout
from store.location import Location

STEERAGE = str(Path(sys.executable).with_name("steerage"))
LAYOUTS = [
    StreamLayout("resid_post", 150, (2, 5), 8, "bfloat16", 64),
    StreamLayout("z", 150, (0,), 4, "float32", 64),
]


def steerage(*arguments, code=0, **environment):
    done = subprocess.run(
        [STEERAGE, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def verify(store, *arguments, code=0):
    """The JSON object of the command, its only output."""
    out = steerage("verify", *arguments, "--store", store, "--json", code=code).stdout
    (line,) = out.splitlines()
    result = json.loads(line)
    assert result["sound"] == (code == 0)
    return result


def part(shard):
    rows = LAYOUTS[0].shard_rows(shard)
    random = np.random.default_rng(shard)
    return {
        "resid_post": random.integers(0, 65536, (len(rows), 2, 8), dtype=np.uint16),
        "z": random.standard_normal((len(rows), 1, 4)).astype(np.float32),
    }


def fill(store, name, shards=range(3)):
    index = pa.table({"label": np.arange(150) % 2 == 0})
    cache = ActivationCache.create(Location.open(store), {"name": name}, LAYOUTS, index)
    for shard in shards:
        cache.write_shard(shard, part(shard))
    if not cache.missing():
        cache.seal()
    return cache


def flip(cache, key, at=40):
    data = cache.location.get(key)
    cache.location.replace(key, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def test_a_sound_store(store):
    caches = [fill(store, "one"), fill(store, "two"), fill(store, "unfinished", range(2))]
    result = verify(store)
    assert {report["capture"] for report in result["caches"]} == {cache.digest for cache in caches}
    assert all(report["problems"] == [] for report in result["caches"])
    by_name = {report["capture"]: report for report in result["caches"]}
    assert (by_name[caches[0].digest]["complete"], by_name[caches[0].digest]["shards"]) == (True, 3)
    unfinished = by_name[caches[2].digest]
    assert (unfinished["complete"], unfinished["shards_missing"]) == (False, 1)
    shown = steerage("verify", "--store", store).stdout
    assert shown.count("  sound, 3 shards") == 3
    assert "1 not written yet" in shown
    assert not any("_damaged" in str(path) for path in store.rglob("*"))
    assert verify(store.parent / "empty")["caches"] == []


def test_each_damaged_shard_is_named_and_marked(store):
    cache, other = fill(store, "one"), fill(store, "two")
    flip(cache, LAYOUTS[0].shard_key(1))
    cache.location.delete(LAYOUTS[1].shard_key(2))
    result = verify(store, code=1)
    found = {report["capture"]: report["problems"] for report in result["caches"]}
    assert found[other.digest] == []
    assert [(p["stream"], p["shard"], p["rows"], p["kind"]) for p in found[cache.digest]] == [
        ("resid_post", 1, [64, 128], "shard_checksum"),
        ("z", 2, [128, 150], "shard_missing"),
    ]
    assert {info.key for info in cache.location.list("_damaged")} == {
        "_damaged/resid_post/00000001.json",
        "_damaged/z/00000002.json",
    }
    shown = steerage("verify", "--store", store, code=1)
    for said in (
        cache.digest,
        "resid_post shard 1, rows 64 to 127: ",
        "crc32c of chunk 0 of layer 2",
        "z shard 2, rows 128 to 149: ",
        "recorded but gone",
        "2 damaged",
    ):
        assert said in shown.stdout
    assert shown.stdout.count("`steerage extract RUN.toml`") == 1
    # What extract does with it.
    cache = ActivationCache.open(Location.open(store), cache.digest)
    assert cache.damaged() == {1, 2}
    for shard in (1, 2):
        cache.repair_shard(shard, part(shard))
    verify(store)
    assert cache.damaged() == set()


def test_caches_are_chosen_by_the_first_digits_of_their_digest(store):
    cache, other = fill(store, "one"), fill(store, "two")
    flip(cache, LAYOUTS[0].shard_key(1))
    assert [r["capture"] for r in verify(store, other.digest)["caches"]] == [other.digest]
    both = verify(store, cache.digest[:12], other.digest, cache.digest, code=1)
    assert [r["capture"] for r in both["caches"]] == [cache.digest, other.digest]
    absent = steerage("verify", "0123456789", "--store", store, code=1)
    assert "no cache 0123456789" in absent.stderr
    assert absent.stdout == ""
    absent = steerage("verify", "absent.toml", "--store", store, code=1)
    assert "absent.toml" in absent.stderr


def test_a_cache_is_chosen_by_its_run_file(store, tmp_path, make_model):
    fill(store, "another")
    rows = [{"prompt": f"{n}: to the north", "label": n % 2} for n in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_file = tmp_path / "run.toml"
    run_file.write_text(
        f'name = "heading"\n[model]\npath = "{make_model()}"\n'
        '[prompts]\nfiles = ["prompts.jsonl"]\n'
    )
    planned = json.loads(steerage("plan", run_file, "--store", store, "--json").stdout)
    (report,) = verify(store, run_file)["caches"]
    assert report["capture"] == planned["capture"]
    assert report["shards_missing"] == report["shards"] == planned["shards"]


def test_damage_outside_the_shards(store):
    cache, edited = fill(store, "one"), fill(store, "two")
    cache.location.replace("index.parquet", b"PAR1")
    cache.location.replace("_COMPLETE", b"{}")
    edited.location.replace("zarr.json", b"{}")
    result = verify(store, code=1)
    kinds = {r["capture"]: [p["kind"] for p in r["problems"]] for r in result["caches"]}
    assert kinds == {
        cache.digest: ["index", "complete_marker"],
        edited.digest: ["array_metadata"],
    }
    shown = steerage("verify", "--store", store, code=1).stdout
    assert shown.count("the cache as a whole") == 3
    assert "steerage extract RUN.toml` on the cache's run file" not in shown


def test_a_store_that_takes_no_marks_is_still_checked(store):
    """The mark's folder cannot be made where a file has its name, as on a disk that is full."""
    cache = fill(store, "one")
    flip(cache, LAYOUTS[0].shard_key(1))
    (cache.location.local_path() / "_damaged").mkdir()
    (cache.location.local_path() / "_damaged/resid_post").write_text("in the way")
    (report,) = verify(store, code=1)["caches"]
    assert [(p["stream"], p["shard"]) for p in report["problems"]] == [("resid_post", 1)]
    assert "_damaged" in report["unmarked"]
    assert "not marked for repair" in steerage("verify", "--store", store, code=1).stdout
