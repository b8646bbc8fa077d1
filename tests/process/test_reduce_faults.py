"""kill -9 of Ray workers in the middle of a count: the Moments are those of a quiet run."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest

from store.activations import ActivationCache
from store.layout import StreamLayout
from store.location import Location

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

# Another seed kills at other moments.
SEED = 20261122
NUM_KILLS = 6
NUM_SHARDS = 96
ROWS_PER_SHARD, WIDTH = 4096, 64
TIMEOUT_S = 300
_MARK = "STEERAGE_TEST_RUN"
_GONE = (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess)

DRIVER = """
import sys
from pipeline.ray_runtime import ray_session
from pipeline.reduction.moment_store import training_moments
from pipeline.reduction.pairs import find_pairs
from pipeline.reduction.samples import read_samples
from store.activations import ActivationCache
from store.location import Location

# A Ray session sends what is printed elsewhere.
out = sys.stdout
root = Location.open(sys.argv[1])
cache = ActivationCache.open(root, sys.argv[2])
samples = read_samples(cache)
pairs = find_pairs(samples.index, samples.split_N == "train")
with ray_session(None, int(sys.argv[3])):
    training_moments(cache, root, samples, pairs, on_done=lambda n: print(n, file=out, flush=True))
"""


@dataclass
class Count:
    """A process that counts a cache, and the workers that it starts."""

    store: Path
    digest: str
    num_workers: int

    def start(self) -> Count:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, self.store, self.digest, str(self.num_workers)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "RAY_AUTH_MODE": "disabled", _MARK: self.mark},
            start_new_session=True,
        )
        return self

    def wait_for(self, num_done: int) -> None:
        """Read its progress until so many tasks are done."""
        for line in self.process.stdout:
            if int(line) >= num_done:
                return
        raise AssertionError(self.process.communicate(timeout=TIMEOUT_S))

    def finish(self) -> bytes:
        """Wait for its end; the bytes of the stored Moments, which are then taken away."""
        _, err = self.process.communicate(timeout=TIMEOUT_S)
        assert self.process.returncode == 0, err
        (stored,) = self.store.glob("moments/*/*.safetensors")
        data = stored.read_bytes()
        assert stored.stem == hashlib.sha256(data).hexdigest()
        shutil.rmtree(self.store / "moments")
        return data

    def processes(self) -> Iterator[tuple[psutil.Process, str]]:
        """Living processes of this count, with the names that Ray gives them."""
        for process in psutil.process_iter():
            with contextlib.suppress(*_GONE):
                if process.environ().get(_MARK) == self.mark:
                    yield process, process.cmdline()[0]

    def kill_a_worker(self, moments: random.Random) -> str:
        """kill -9 of a process that has a task; what task."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            found = [p for p in self.processes() if p[1] in ("ray::_count_part", "ray::_merge")]
            if found:
                process, name = moments.choice(found)
                process.kill()
                return name
            assert self.process.poll() is None, "the count was over before it could be disturbed"
        raise AssertionError("no worker has a task")

    def end(self) -> None:
        for process, _ in list(self.processes()):
            with contextlib.suppress(*_GONE):
                process.kill()
        self.process.wait(timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    """One task a shard; the sides of most pairs lie in different shards."""
    root = Location.open(tmp_path_factory.mktemp("store"))
    num_rows = NUM_SHARDS * ROWS_PER_SHARD
    rng = np.random.default_rng(0)
    pair_A = rng.permutation(num_rows) // 2
    first = np.unique(pair_A, return_index=True)[1]
    columns = {
        "pair": pa.array(pair_A.astype(str)),
        "label": np.isin(np.arange(num_rows), first),
        "split": pa.array(np.where(pair_A % 50 == 0, "train", "test")),
    }
    layout = StreamLayout("z", num_rows, (3,), WIDTH, "bfloat16", ROWS_PER_SHARD)
    cache = ActivationCache.create(root, {"of": "faults"}, [layout], pa.table(columns))
    for shard in cache.missing():
        shape = (ROWS_PER_SHARD, 1, WIDTH)
        cache.write_shard(shard, {"z": rng.integers(0x3F00, 0x4200, shape, np.uint16)})
    cache.seal()
    return cache


@pytest.fixture
def start(cache: ActivationCache) -> Iterator[object]:
    store = cache.location.local_path().parents[1]
    counts: list[Count] = []

    def start(num_workers: int) -> Count:
        counts.append(Count(store, cache.digest, num_workers).start())
        return counts[-1]

    yield start
    for one in counts:
        one.end()


@pytest.fixture(scope="module")
def undisturbed(cache: ActivationCache) -> bytes:
    """What one worker stores."""
    one = Count(cache.location.local_path().parents[1], cache.digest, 1).start()
    try:
        return one.finish()
    finally:
        one.end()


def test_the_number_of_workers_does_not_change_a_bit(start, undisturbed: bytes) -> None:
    assert start(2).finish() == undisturbed


def test_killed_workers_do_not_change_a_bit(start, undisturbed: bytes) -> None:
    moments = random.Random(SEED)
    count = start(2)
    killed = []
    for number in range(NUM_KILLS):
        count.wait_for((number + 1) * NUM_SHARDS // (NUM_KILLS + 2))
        time.sleep(moments.uniform(0, 0.05))
        killed.append(count.kill_a_worker(moments))
    print(f"killed {killed}")
    assert count.finish() == undisturbed
