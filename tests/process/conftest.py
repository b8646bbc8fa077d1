"""A run that is slow enough to be killed in the middle, and its undisturbed result."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

NUM_PAIRS = 1792
TIMEOUT_S = 400
_MARK = "STEERAGE_TEST_RUN"
_GONE = (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess)


@dataclass
class Driver:
    """One `steerage extract` process and everything that it starts."""

    run_file: Path
    store: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    process: subprocess.Popen[str] | None = None

    def start(self) -> Driver:
        self.process = subprocess.Popen(
            [
                *(str(Path(sys.executable).with_name("steerage")), "extract", str(self.run_file)),
                *("--store", str(self.store), "--workers", "2", "--json"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, _MARK: self.mark},
            # A group of its own, as a shell gives every job: Ctrl-C reaches all of it.
            start_new_session=True,
        )
        return self

    def finish(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, out, err

    @property
    def cache(self) -> Cache:
        return Cache(self.store)

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()

    def family(self) -> list[psutil.Process]:
        """Living processes that inherited this driver's environment, itself included."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(*_GONE):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and process.environ().get(_MARK) == self.mark:
                    found.append(process)
        return found

    def shard_workers(self) -> list[psutil.Process]:
        """The Ray actors that hold a model."""
        workers = []
        for process in self.family():
            with contextlib.suppress(*_GONE):
                if "MapWorker" in process.cmdline()[0]:
                    workers.append(process)
        return workers

    def wait_for_family_to_end(self, timeout_s: float) -> list[str]:
        """Command lines of what is still alive when the time is over; it is killed."""
        deadline = time.monotonic() + timeout_s
        while (left := self.family()) and time.monotonic() < deadline:
            time.sleep(0.2)
        names = []
        for process in left:
            with contextlib.suppress(*_GONE):
                names.append(" ".join(process.cmdline())[:120])
                process.kill()
        return names


@dataclass(frozen=True)
class Cache:
    """The one cache in a store, as files."""

    store: Path

    @property
    def folder(self) -> Path | None:
        folders = sorted((self.store / "caches").glob("*"))
        return folders[0] if folders else None

    def records(self) -> dict[str, tuple[int, int]]:
        """Commit records and shards by path: inode and time of change."""
        if self.folder is None:
            return {}
        found = {}
        for path in (self.folder / "_commits").rglob("*.json"):
            info = path.stat()
            found[str(path.relative_to(self.folder))] = (info.st_ino, info.st_mtime_ns)
            shard = self.folder / path.parent.name / "c" / str(int(path.stem)) / "0" / "0"
            info = shard.stat()
            found[str(shard.relative_to(self.folder))] = (info.st_ino, info.st_mtime_ns)
        return found

    def num_committed(self) -> int:
        """Shards with the record of every stream; `z` is written last."""
        return 0 if self.folder is None else len(list(self.folder.glob("_commits/z/*.json")))

    def contents(self) -> dict[str, str]:
        """sha256 of every file by path, but for the commit records, which hold timings, and what
        killed writers leave, whose names begin with a dot."""
        return {
            str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and "_commits" not in path.parts and path.name[0] != "."
        }


StartDriver = Callable[[Path], Driver]


@pytest.fixture
def start_driver(run_file: Path) -> Iterator[StartDriver]:
    """Start `steerage extract` on a store; whatever it leaves behind is killed at the end."""
    drivers: list[Driver] = []

    def start(store: Path) -> Driver:
        drivers.append(Driver(run_file, store).start())
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.wait_for_family_to_end(0)


@pytest.fixture(scope="module")
def run_file(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    model = make_model(
        "llama", hidden_size=192, intermediate_size=512, num_hidden_layers=6, initializer_range=0.05
    )
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(NUM_PAIRS):
            row = {
                "prompt": f"question {number}: which way does the ship steer tonight?",
                "positive": "to the north, captain",
                "negative": "to the south, captain",
            }
            file.write(json.dumps(row) + "\n")
    path = folder / "run.toml"
    path.write_text(
        f"""
        name = "kill"
        [model]
        path = "{model}"
        [prompts]
        files = ["pairs.jsonl"]
        [capture]
        tokens = "last"
        tokens_per_pack = 2048
        shard_mib = 0.5
        """
    )
    return path


@pytest.fixture(scope="module")
def undisturbed(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a run writes that nobody disturbs."""
    store = tmp_path_factory.mktemp("undisturbed")
    driver = Driver(run_file, store).start()
    code, _, err = driver.finish()
    assert code == 0, err
    assert driver.wait_for_family_to_end(30) == []
    assert Cache(store).num_committed() >= 16
    return Cache(store).contents()
