"""kill -9 at random moments: what resumes must end equal to what was never disturbed."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from store.activations import ActivationCache
from store.location import Location

ROOT = Path(__file__).parents[2]

WRITER = """
import sys
import numpy as np, pyarrow as pa
from store.activations import ActivationCache
from store.layout import StreamLayout
from store.location import Location

NUM_ROWS = 60 * 64 - 11
layouts = [
    StreamLayout("resid_post", NUM_ROWS, (3, 4), 512, "bfloat16", 64),
    StreamLayout("z", NUM_ROWS, (4,), 64, "float32", 64),
]
if sys.argv[2] == "early":
    print("ready", flush=True)
index = pa.table({"row": np.arange(NUM_ROWS)})
cache = ActivationCache.create(Location.open(sys.argv[1]), {"m": 1}, layouts, index, {"p": b"plan"})
if sys.argv[2] == "late":
    print("ready", flush=True)
for shard in cache.missing():
    rows = layouts[0].shard_rows(shard)
    rng = np.random.default_rng(shard)
    cache.write_shard(shard, {
        "resid_post": rng.integers(0, 65536, (len(rows), 2, 512), dtype=np.uint16),
        "z": rng.standard_normal((len(rows), 1, 64)).astype(np.float32),
    })
    print(shard, flush=True)
cache.seal()
"""


def start(folder, moment="late"):
    """A writer that is about to make the cache ("early") or to write its missing shards."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, folder, moment], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert writer.stdout.readline() == b"ready\n"
    return writer


def objects(folder):
    location = Location.open(folder)
    return {info.key: location.get(info.key) for info in location.list()}


def test_resume_after_kills_equals_an_undisturbed_run(tmp_path):
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    assert start(calm).wait(60) == 0
    chance = random.Random(20261121)
    num_committed = [0]
    for moment in ["early"] * 3 + ["late"] * 7:
        writer = start(killed, moment)
        for _ in range(chance.randrange(5) if moment == "late" else 0):
            writer.stdout.readline()  # a shard is done: the next run has something to resume
        time.sleep(chance.uniform(0, 0.03))
        writer.kill()
        if writer.wait() == 0:
            pytest.fail("the writer finished before ten kills; give it more shards")
        num_committed.append(_check_unfinished(killed))
    assert num_committed == sorted(num_committed)
    assert num_committed[-1] > 0
    assert start(killed).wait(60) == 0
    assert objects(killed) == objects(calm)
    (digest,) = ActivationCache.list_digests(Location.open(killed))
    cache = ActivationCache.open(Location.open(killed), digest)
    assert cache.is_complete
    assert list(cache.verify()) == []


def _check_unfinished(folder):
    """Whatever has a record is whole, at any moment; how many shards have."""
    root = Location.open(folder)
    num_committed = 0
    for digest in ActivationCache.list_digests(root):
        cache = ActivationCache.open(root, digest)
        assert not cache.is_complete
        assert {problem.kind for problem in cache.verify()} <= {"not_committed"}
        num_committed += len(cache.committed())
    return num_committed


def test_racing_writers_end_equal_to_one(tmp_path):
    calm, raced = tmp_path / "calm", tmp_path / "raced"
    assert start(calm).wait(60) == 0
    writers = [start(raced) for _ in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert objects(raced) == objects(calm)
