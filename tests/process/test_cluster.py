"""A Ray cluster of several raylets that loses workers, nodes and drivers: twenty runs in all."""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

# Another seed kills at other moments; a failure names its seed, kind and run.
SEED = 20261122
NUM_NODES = 3
NUM_WORKERS = 2
KINDS = ("worker", "raylet", "driver", "any")
# Of each kind; CI asks for fewer, to keep within its time.
RUNS = range(int(os.environ.get("STEERAGE_CLUSTER_RUNS", "5")))

StartDriver = Callable[..., Any]


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[[int], Any]) -> Any:
    return start_cluster(NUM_NODES)


@pytest.fixture(autouse=True)
def _whole_again(cluster: Any) -> Iterator[None]:
    yield
    while len(cluster.nodes) < NUM_NODES:
        cluster.add_node()


@pytest.mark.parametrize("kind", KINDS)
def test_a_cluster_that_loses_some_of_itself(
    cluster: Any,
    start_driver: StartDriver,
    tmp_path: Path,
    undisturbed: Mapping[str, str],
    kind: str,
) -> None:
    for run in RUNS:
        moments = random.Random(f"{SEED} {kind} {run}")
        struck = _Struck(cluster, tmp_path / str(run))
        begun_before = cluster.shards_begun()
        driver = start_driver(struck.store, "--ray", cluster.address)
        for _ in range(moments.randrange(1, 3)):
            if not _wait_for_moment(driver, moments):
                break
            what = moments.choice(KINDS[:3]) if kind == "any" else kind
            print(f"{kind} run {run}: {what} with {driver.cache.num_committed()} shards committed")
            driver = struck.strike(what, driver, moments, start_driver)
        code, out, err = driver.finish()
        assert code == 0, err
        result = json.loads(out)
        assert result["shards_computed"] == result["shards"] - struck.committed_at_start
        assert driver.cache.contents() == undisturbed
        after = driver.cache.records()
        assert {name: after[name] for name in struck.records} == struck.records
        begun = cluster.shards_begun()
        begun.subtract(begun_before)
        again = sum(begun.values()) - result["shards"]
        print(f"{again} shards computed again for {struck.num_workers_lost} workers lost")
        assert 0 <= again <= struck.num_workers_lost
        while len(cluster.nodes) < NUM_NODES:
            cluster.add_node()


def test_what_is_left_of_a_cluster_finishes(
    cluster: Any, start_driver: StartDriver, tmp_path: Path, undisturbed: Mapping[str, str]
) -> None:
    """A lost worker that fits nowhere else gets its place once the others have no more to do."""
    cluster.lose_node(cluster.nodes[-1])
    driver = start_driver(tmp_path, "--ray", cluster.address)
    assert _wait_for_moment(driver, random.Random(f"{SEED} left"))
    with_workers = [node for node in cluster.nodes if node.shard_workers()]
    cluster.lose_node(with_workers[0])
    code, _, err = driver.finish()
    assert code == 0, err
    assert driver.cache.contents() == undisturbed


class _Struck:
    """What a run has lost."""

    def __init__(self, cluster: Any, store: Path) -> None:
        self.cluster, self.store = cluster, store
        self.records: Mapping[str, Any] = {}
        self.num_workers_lost = 0
        self.committed_at_start = 0

    def strike(
        self, what: str, driver: Any, moments: random.Random, start_driver: StartDriver
    ) -> Any:
        """Kill -9; returns the driver that goes on."""
        self.records = driver.cache.records()
        workers = self.cluster.shard_workers()
        if what == "worker" and workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                moments.choice(workers).kill()
            self.num_workers_lost += 1
        elif what == "raylet":
            node = moments.choice([n for n in self.cluster.nodes if n.shard_workers()] or [None])
            if node is not None:
                self.num_workers_lost += len(node.shard_workers())
                self.cluster.lose_node(node)
        elif what == "driver":
            driver.kill()
            self.num_workers_lost += NUM_WORKERS
            _, alive = psutil.wait_procs(workers, timeout=60)
            assert alive == [], "workers outlive their driver"
            self.records = driver.cache.records()
            self.committed_at_start = driver.cache.num_committed()
            return start_driver(self.store, "--ray", self.cluster.address)
        return driver


def _wait_for_moment(driver: Any, moments: random.Random) -> bool:
    """Sleep to a random moment of the extraction; False if it is over before."""
    num_shards = driver.cache.num_committed() + moments.randrange(1, 5)
    delay_s = moments.uniform(0, 0.3)
    deadline = time.monotonic() + 300
    while driver.cache.num_committed() < num_shards:
        if driver.process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "the extraction does not get on"
        time.sleep(0.02)
    time.sleep(delay_s)
    return driver.process.poll() is None
