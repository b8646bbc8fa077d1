"""kill -9 and Ctrl-C in the middle of an extraction: the finished cache is that of a quiet run."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

# Another seed kills at other moments; a failure names its seed and moment.
SEED = 20261121
NUM_KILLS = 5
# More of them find rarer moments; one keeps CI within its time.
TRIALS = range(int(os.environ.get("STEERAGE_TRIALS", "1")))

StartDriver = Callable[[Path], Any]
Records = Mapping[str, tuple[int, int]]


@pytest.mark.parametrize("trial", TRIALS)
def test_killed_workers_are_replaced(
    start_driver: StartDriver, tmp_path: Path, undisturbed: dict[str, str], trial: int
) -> None:
    moments = random.Random(f"{SEED} worker {trial}")
    driver = start_driver(tmp_path)
    for _ in range(NUM_KILLS):
        before = _wait_for_moment(driver, moments)
        while not (workers := driver.shard_workers()):
            time.sleep(0.02)
        moments.choice(workers).kill()
    code, out, err = driver.finish()
    assert code == 0, err
    result = json.loads(out)
    assert result["shards_computed"] == result["shards"]
    _assert_finished(driver.cache, before, undisturbed)
    assert driver.wait_for_family_to_end() == []


@pytest.mark.parametrize("trial", TRIALS)
def test_killed_drivers_are_run_again(
    start_driver: StartDriver, tmp_path: Path, undisturbed: dict[str, str], trial: int
) -> None:
    """The same command again and again, killed each time but the last."""
    moments = random.Random(f"{SEED} driver {trial}")
    before: Records = {}
    for _ in range(NUM_KILLS):
        driver = start_driver(tmp_path)
        _wait_for_moment(driver, moments)
        driver.kill()
        assert driver.wait_for_family_to_end() == [], "processes outlive their driver"
        now = driver.cache.records()
        assert {name: now[name] for name in before} == before, "a committed shard was redone"
        before = now
    _finish_the_rest(start_driver, tmp_path, undisturbed)


def test_interrupted_run_says_so_and_can_go_on(
    start_driver: StartDriver, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    driver = start_driver(tmp_path)
    _wait_for_moment(driver, random.Random(f"{SEED} interrupt"))
    driver.interrupt()
    code, out, err = driver.finish()
    assert code == 130
    assert out == ""
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1] == (
        "steerage: interrupted; what is finished is kept, run it again to go on"
    )
    assert driver.wait_for_family_to_end() == [], "processes outlive their driver"
    _finish_the_rest(start_driver, tmp_path, undisturbed)


def _wait_for_moment(driver: Any, moments: random.Random) -> Records:
    """Sleep to a random moment of the extraction; the commit records that exist then."""
    num_shards = driver.cache.num_committed() + moments.randrange(1, 6)
    delay_s = moments.uniform(0, 0.3)
    print(f"waiting for {num_shards} shards and {delay_s:.3f} s more")
    deadline = time.monotonic() + 300
    while driver.cache.num_committed() < num_shards:
        assert driver.process.poll() is None, driver.finish()
        assert time.monotonic() < deadline, "the extraction does not get on"
        time.sleep(0.02)
    time.sleep(delay_s)
    records: Records = driver.cache.records()
    print(f"struck with {driver.cache.num_committed()} shards committed")
    return records


def _finish_the_rest(start_driver: StartDriver, store: Path, undisturbed: dict[str, str]) -> None:
    """The same command again computes what is missing, and nothing else."""
    again = start_driver(store)
    before = again.cache.records()
    num_before = again.cache.num_committed()
    code, out, err = again.finish()
    assert code == 0, err
    result = json.loads(out)
    assert result["shards_computed"] == result["shards"] - num_before
    _assert_finished(again.cache, before, undisturbed)
    assert again.wait_for_family_to_end() == []


def _assert_finished(cache: Any, before: Records, undisturbed: dict[str, str]) -> None:
    assert cache.contents() == undisturbed
    after = cache.records()
    assert {name: after[name] for name in before} == before, "a committed shard was redone"
