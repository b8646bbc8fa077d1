"""A store that fills up: at every step a clear error, no garbage, nothing lost, and a way on."""

from __future__ import annotations

import os
import shutil
import subprocess
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from store.activations import ActivationCache
from store.errors import StoreError, Unavailable
from store.layout import StreamLayout
from store.location import Location

NUM_ROWS = 150
LAYOUTS = [
    StreamLayout("resid_post", NUM_ROWS, (2, 5), 64, "bfloat16", 64),
    StreamLayout("z", NUM_ROWS, (0,), 32, "float32", 64),
]
QUARANTINED = {1: {70: "activations are not finite at resid_post.2"}}
INDEX = pa.table({"prompt": np.arange(NUM_ROWS)})
PAGE = 4096


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own, which goes with everything on it."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def part(shard):
    rows = LAYOUTS[0].shard_rows(shard)
    rng = np.random.default_rng(shard)
    values = {
        "resid_post": rng.integers(0, 65536, (len(rows), 2, 64), dtype=np.uint16),
        "z": rng.standard_normal((len(rows), 1, 32)).astype(np.float32),
    }
    for row in QUARANTINED.get(shard, {}):
        values["resid_post"][row - rows.start] = 0x7FC0
        values["z"][row - rows.start] = np.nan
    return values


def run(folder):
    """What an extraction does with the store, from the beginning or from where one ended."""
    root = Location.open(folder)
    cache = ActivationCache.create(root, {"m": 1}, LAYOUTS, INDEX, {"plan": b"plan" * 2000})
    for shard in cache.missing():
        cache.write_shard(shard, part(shard), quarantined=QUARANTINED.get(shard))
    cache.seal()
    return cache


def objects(folder):
    location = Location.open(folder)
    return {info.key: location.get(info.key) for info in location.list() if info.key != "ballast"}


def leftovers(folder):
    return [name for _, _, names in os.walk(folder) for name in names if name.startswith(".")]


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calm")
    run(folder)
    return objects(folder)


def check_stopped(folder, error, calm):
    """Nothing but whole objects of the undisturbed run, and what has a record is sound."""
    assert error.kind == "no_space"
    assert leftovers(folder) == []
    found = objects(folder)
    assert found.items() <= calm.items()
    for digest in ActivationCache.list_digests(Location.open(folder)):
        cache = ActivationCache.open(Location.open(folder), digest)
        assert {problem.kind for problem in cache.verify()} <= {"not_committed"}
        assert cache.damaged() == set()
    return found


def test_a_disk_that_is_full_at_any_step(tmp_path, calm):
    """Free pages from none to enough: each step of creating, writing and sealing meets the end."""
    with tmpfs(tmp_path / "disk", "size=1m") as disk:
        run(disk)
        enough = sum(-(-len(data) // PAGE) for data in calm.values())
        reached = set()
        for num_free in range(enough + 1):
            shutil.rmtree(disk / "caches")
            ballast = disk / "ballast"
            ballast.write_bytes(b"")
            free = os.statvfs(disk).f_bavail * PAGE
            ballast.write_bytes(b"x" * (free - num_free * PAGE))
            error = None
            try:
                run(disk)
            except Unavailable as raised:
                error = raised
            if error is not None:
                done = check_stopped(disk, error, calm)
                (missing,) = [key for key in calm if key in str(error)] or [None]
                assert missing is not None, error
                assert missing not in done
                assert f"{len(calm[missing]):,} bytes are needed" in str(error)
                assert "free space" in str(error)
                reached.add(missing.partition("/")[2].partition("/")[2].partition("/")[0])
            ballast.unlink()
            run(disk)
            assert objects(disk) == calm
        assert error is None
        assert reached >= {"index.parquet", "resid_post", "_commits", "_quarantine"}, reached


def test_a_disk_without_inodes_at_any_step(tmp_path, calm):
    """Directories, temporary files and the links that make them visible: each needs an inode."""
    with tmpfs(tmp_path / "disk", "size=1m,nr_inodes=120") as disk:
        run(disk)
        assert objects(disk) == calm
        # Two more than what lies there at the end: an object under its temporary name as well.
        enough = sum(len(names) + len(folders) for _, folders, names in os.walk(disk)) + 2
        shutil.rmtree(disk / "caches")
        steps = set()
        for num_free in range(enough + 1):
            held = disk / "held"
            held.mkdir()
            for number in range(os.statvfs(disk).f_favail - num_free):
                (held / str(number)).touch()
            error = None
            try:
                run(disk)
            except Unavailable as raised:
                error = raised
            shutil.rmtree(held)
            if error is not None:
                check_stopped(disk, error, calm)
                steps |= {step.line for step in traceback.extract_tb(error.__cause__.__traceback__)}
            run(disk)
            assert objects(disk) == calm
            shutil.rmtree(disk / "caches")
        assert error is None
        for call in ("os.link(leftover, path)", "mkdir(", "open("):
            assert any(call in step for step in steps), (call, steps)


def test_the_message_says_what_where_how_much_and_what_to_do(tmp_path):
    with tmpfs(tmp_path / "disk", "size=64k") as disk:
        root = Location.open(disk)
        wide = StreamLayout("resid_post", 64, (0,), 1024, "float32", 64)
        cache = ActivationCache.create(root, {}, [wide], pa.table({"n": np.arange(64)}))
        with pytest.raises(Unavailable) as caught:
            cache.write_shard(0, {"resid_post": np.zeros((64, 1, 1024), np.float32)})
        text = str(caught.value)
        assert "creating" in text
        assert "resid_post/c/0/0/0: No space left on device" in text
        assert f"{wide.shard_nbytes(0):,} bytes are needed" in text
        assert "then run the same command again" in text
        assert isinstance(caught.value, StoreError)
        assert cache.missing() == [0]


def test_a_repair_on_a_full_disk_changes_nothing(tmp_path):
    with tmpfs(tmp_path / "disk", "size=256k") as disk:
        cache = run(disk)
        key = LAYOUTS[0].shard_key(1)
        whole = cache.location.get(key)
        damaged = bytes([whole[0] ^ 1]) + whole[1:]
        cache.location.replace(key, damaged)
        free = os.statvfs(disk).f_bavail * PAGE
        (disk / "ballast").write_bytes(b"x" * free)
        with pytest.raises(Unavailable, match="replacing"):
            cache.repair_shard(1, part(1), QUARANTINED[1])
        assert cache.location.get(key) == damaged
        assert leftovers(disk) == []
        (disk / "ballast").unlink()
        assert cache.repair_shard(1, part(1), QUARANTINED[1]) == [key]
        assert cache.location.get(key) == whole
