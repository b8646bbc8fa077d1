"""A store that fills up, and one whose shards are damaged: said clearly, and put right."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

StartDriver = Callable[..., Any]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB in memory; the whole cache takes more."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "steerage-test", str(folder)],
        capture_output=True,
        text=True,
    )
    if mount.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_store_is_said_and_the_run_goes_on_after_space_is_made(
    small_disk: Path, start_driver: StartDriver, undisturbed: Mapping[str, str]
) -> None:
    driver = start_driver(small_disk)
    code, out, err = driver.finish()
    assert code == 1, err
    assert out == ""
    assert "Traceback" not in err
    assert "No space left on device" in err
    assert "free space" in err
    assert driver.wait_for_family_to_end() == []
    before, num_before = driver.cache.records(), driver.cache.num_committed()
    assert num_before > 0, "it was full before anything was committed, so this shows little"
    # What counts is whole.
    held = driver.cache.contents()
    recorded = {name for name in before if not name.startswith("_commits")}
    assert {name: held[name] for name in recorded} == {n: undisturbed[n] for n in recorded}
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    again = start_driver(small_disk)
    code, out, err = again.finish()
    assert code == 0, err
    assert json.loads(out)["shards_computed"] == json.loads(out)["shards"] - num_before
    after = again.cache.records()
    assert {name: after[name] for name in before} == before, "a committed shard was redone"
    assert again.cache.contents() == undisturbed


@pytest.fixture
def damaged(start_driver: StartDriver, tmp_path: Path, undisturbed: Mapping[str, str]) -> Any:
    """A finished cache with a shard that is cut off and one with a flipped bit."""
    driver = start_driver(tmp_path)
    code, _, err = driver.finish()
    assert code == 0, err
    assert driver.cache.contents() == undisturbed
    for stream, shard, damage in (("z", 2, _cut), ("resid_post", 5, _flip)):
        path = driver.cache.folder / stream / "c" / str(shard) / "0" / "0"
        # A copy: it keeps its inode's number apart from the others'.
        damaged = path.with_name("damaged")
        shutil.copyfile(path, damaged)
        damage(damaged)
        damaged.replace(path)
    return driver


def test_a_shard_cut_off_is_found_by_extract_alone(
    damaged: Any, start_driver: StartDriver, undisturbed: Mapping[str, str]
) -> None:
    flipped = damaged.cache.folder / "resid_post/c/5/0/0"
    held = hashlib.sha256(flipped.read_bytes()).hexdigest()
    _repairs(damaged, start_driver, {"z/c/2/0/0"})
    # Nobody has read it, so nobody knows.
    assert damaged.cache.contents() == {**undisturbed, "resid_post/c/5/0/0": held}


def test_what_verify_names_is_repaired_and_nothing_else(
    damaged: Any, start_driver: StartDriver, undisturbed: Mapping[str, str]
) -> None:
    found = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("steerage")), "verify"),
            *("--store", str(damaged.store), damaged.cache.folder.name),
        ],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1, found.stderr
    for name in ("z/c/2/0/0", "resid_post/c/5/0/0"):
        assert name in found.stdout + found.stderr
    _repairs(damaged, start_driver, {"z/c/2/0/0", "resid_post/c/5/0/0"})
    assert damaged.cache.contents() == undisturbed


def _repairs(damaged: Any, start_driver: StartDriver, expected: set[str]) -> None:
    before = damaged.cache.records()
    again = start_driver(damaged.store)
    code, out, err = again.finish()
    assert code == 0, err
    result = json.loads(out)
    assert result["shards_repaired"] == result["shards_computed"] == len(expected)
    after = again.cache.records()
    assert {name for name in before if after[name] != before[name]} == expected


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def _flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
