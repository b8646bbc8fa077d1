"""`steerage extract --no-cache` as a process: what it says and writes, and kill -9 of it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Another seed kills at other moments; a failure names its seed and moment.
SEED = 20261122
NUM_KILLS = 3
FLAGS = ("--no-cache", "--keep-rows", "200")

StartDriver = Callable[..., Any]


def _steerage(*arguments: Any, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("steerage")), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def small_run(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    rows = [
        {"prompt": f"{i}: where to?", "positive": "to the north", "negative": "back home"}
        for i in range(60)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.toml").write_text(
        f'name = "small"\n[model]\npath = "{make_model()}"\n[prompts]\nfiles = ["pairs.jsonl"]\n'
        '[capture]\ntokens = "last"\n'
    )
    return folder / "run.toml"


@pytest.mark.faults
def test_what_it_says_and_writes(small_run: Path, tmp_path: Path) -> None:
    where = ("--store", tmp_path, "--workers", "1", "--json")
    out = _steerage("extract", small_run, *where, "--no-cache", "--keep-rows", "31").stdout
    summary = json.loads(out)
    assert summary["no_cache"]
    assert summary["shards_computed"] == summary["shards"]
    assert (summary["kept_rows"], summary["pairs_apart"], summary["rows"]) == (30, 0, 120)
    assert summary["parts"] == summary["parts_computed"]
    sizes = summary["bytes"]
    # The arrays, were they written; Moments as of 80 of their float32 rows: see `parts`.
    assert sizes["all_rows"] == 120 * 3 * (64 + 64) * 4
    assert 0 < sizes["moments"] - 10 * 2 * 8 * 3 * (64 + 64) < 4096
    kept = sum(path.stat().st_size for path in Path(summary["kept"]).rglob("c/*/0/0"))
    assert sizes["all_rows"] / 4 <= kept < sizes["all_rows"] / 3
    assert list(Path(summary["cache"]).rglob("c/*/0/0")) == []
    assert [p for p in Path(summary["moments"]).rglob("parts/**/*") if p.is_file()] == []
    # Again, there is nothing to do.
    again = json.loads(_steerage("extract", small_run, *where, "--no-cache").stdout)
    assert (again["parts"], again["shards_computed"], again["kept_rows"]) == (0, 0, 30)
    # What is not there is not damaged.
    checked = json.loads(_steerage("verify", "--store", tmp_path, "--json").stdout)
    assert checked["sound"]
    reports = {report["capture"]: report for report in checked["caches"]}
    assert reports[summary["capture"]]["no_cache"]
    [of] = [report["kept_rows_of"] for report in reports.values() if report["kept_rows_of"]]
    assert of == summary["capture"]
    _assert_damage_is_put_right(small_run, tmp_path, summary)


def _assert_damage_is_put_right(run_file: Path, store: Path, summary: dict[str, Any]) -> None:
    shard = next(Path(summary["kept"]).rglob("z/c/0/0/0"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    out = _steerage("verify", "--store", store, code=1).stdout
    assert "steerage extract RUN.toml --no-cache" in out
    again = _steerage(
        "extract", run_file, "--store", store, "--workers", "1", "--json", "--no-cache"
    )
    assert json.loads(again.stdout)["kept_rows"] == summary["kept_rows"]
    assert shard.read_bytes() == whole
    _steerage("verify", "--store", store)


def test_rows_to_keep_without_no_cache_are_a_mistake(small_run: Path, tmp_path: Path) -> None:
    done = _steerage("extract", small_run, "--store", tmp_path, "--keep-rows", "5", code=1)
    assert "--keep-rows 5 without --no-cache" in done.stderr


def _contents(store: Path) -> dict[str, str]:
    """sha256 of every file by path, but for commit records, which hold timings."""
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file() and "_commits" not in path.parts and path.name[0] != "."
    }


def _num_parts(store: Path) -> int:
    return len(list(store.glob("moments/*/parts/*/*.json")))


def _wait_for_moment(driver: Any, moments: random.Random) -> None:
    num_parts = _num_parts(driver.store) + moments.randrange(1, 4)
    delay_s = moments.uniform(0, 0.5)
    print(f"waiting for {num_parts} parts and {delay_s:.3f} s more")
    deadline = time.monotonic() + 300
    while _num_parts(driver.store) < num_parts:
        assert driver.process.poll() is None, driver.finish()
        assert time.monotonic() < deadline, "the extraction does not get on"
        time.sleep(0.02)
    time.sleep(delay_s)
    print(f"struck with {_num_parts(driver.store)} parts recorded")


@pytest.fixture(scope="module")
def undisturbed_moments(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a run writes that nobody disturbs."""
    store = tmp_path_factory.mktemp("undisturbed")
    where = ("--store", store, "--workers", "2", "--json")
    summary = json.loads(_steerage("extract", run_file, *where, *FLAGS).stdout)
    assert summary["parts_computed"] >= 16
    return _contents(store)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_killed_workers_are_replaced(
    start_driver: StartDriver, tmp_path: Path, undisturbed_moments: dict[str, str]
) -> None:
    moments = random.Random(f"{SEED} worker")
    driver = start_driver(tmp_path, *FLAGS)
    for _ in range(NUM_KILLS):
        _wait_for_moment(driver, moments)
        while not (workers := driver.shard_workers()):
            time.sleep(0.02)
        moments.choice(workers).kill()
    code, _, err = driver.finish()
    assert code == 0, err
    assert _contents(tmp_path) == undisturbed_moments
    assert driver.wait_for_family_to_end() == []


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_killed_drivers_are_run_again(
    start_driver: StartDriver, tmp_path: Path, undisturbed_moments: dict[str, str]
) -> None:
    moments = random.Random(f"{SEED} driver")
    for _ in range(NUM_KILLS):
        driver = start_driver(tmp_path, *FLAGS)
        _wait_for_moment(driver, moments)
        driver.kill()
        assert driver.wait_for_family_to_end() == [], "processes outlive their driver"
    before = _num_parts(tmp_path)
    assert before >= NUM_KILLS
    driver = start_driver(tmp_path, *FLAGS)
    code, out, err = driver.finish()
    assert code == 0, err
    summary = json.loads(out)
    assert summary["parts_computed"] == summary["parts"] - before
    assert _contents(tmp_path) == undisturbed_moments
