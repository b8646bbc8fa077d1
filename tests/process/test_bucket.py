"""Extraction into a bucket: workers write straight to S3 (Ceph's radosgw), through a kill."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from store.location import Location

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


def steerage(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("steerage")), *arguments]
    return subprocess.run(command, text=True, capture_output=True, timeout=400)


def contents(url: str) -> dict[str, str]:
    """sha256 of every object, but for the commit records, which hold timings."""
    caches = Location.open(url)
    return {
        info.key: hashlib.sha256(caches.get(info.key)).hexdigest()
        for info in caches.list("caches")
        if "_commits" not in info.key
    }


def test_a_run_into_a_bucket_survives_its_driver_and_mends_damage(
    bucket: str,
    run_file: Path,
    start_driver: Callable[..., Any],
    undisturbed: Mapping[str, str],
) -> None:
    url = f"{bucket}/run"
    driver = start_driver(url)
    root = Location.open(url)
    deadline = time.monotonic() + 300
    while len([i for i in root.list("caches") if "_commits/z/" in i.key]) < 3:
        assert driver.process.poll() is None, driver.finish()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    driver.kill()
    assert driver.wait_for_family_to_end() == []
    done = steerage("extract", str(run_file), "--store", url, "--workers", "2", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 0 < result["shards_computed"] < result["shards"]
    digest = result["capture"]
    wanted = {f"caches/{digest}/{name}": value for name, value in undisturbed.items()}
    assert contents(url) == wanted

    cut, flipped = (f"caches/{digest}/{name}" for name in ("z/c/2/0/0", "resid_post/c/5/0/0"))
    root.replace(cut, root.get(cut)[:-100])
    data = bytearray(root.get(flipped))
    data[1000] ^= 1
    root.replace(flipped, bytes(data))
    found = steerage("verify", str(run_file), "--store", url)
    assert found.returncode == 1
    assert "z/c/2/0/0" in found.stdout + found.stderr
    assert "resid_post/c/5/0/0" in found.stdout + found.stderr
    done = steerage("extract", str(run_file), "--store", url, "--workers", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["shards_repaired"] == 2
    assert contents(url) == wanted
    assert steerage("verify", str(run_file), "--store", url).returncode == 0
    done = steerage("reduce", str(run_file), "--store", url, "--workers", "2", "--json")
    assert done.returncode == 0, done.stderr


def test_the_store_keeps_its_promises_on_s3(bucket: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/store/test_location.py"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "STEERAGE_TEST_BUCKET": bucket},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
