"""Starting contestants: each in a process of its own, timed from outside and from inside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from extraction_peers.contestants import CONTESTANTS
from extraction_peers.inputs import Case
from extraction_peers.process_tree import PeakMemory

ROOT: Final = Path(__file__).resolve().parents[2]
OURS: Final = "steerage"
_TIMEOUT_S: Final = 3600
_ERROR_LINES: Final = 12


class ContestantFailed(Exception):
    """A process ended with an error; the message ends with its last words."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one contestant.

    Attributes:
        cold_s: From the start of the process to the finished result. For a peer that is the
            arrays in its memory, for us the end of the command.
        warm_s: From the texts to the finished result; None where only the command was run.
        peak_bytes: Memory of the whole process tree; 0 where it was not watched.
        rows: Where the activations are: a peer's .npz, or our store.
        told: What the process said of itself.
    """

    cold_s: float
    warm_s: float | None
    peak_bytes: int
    rows: Path
    told: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bench:
    """What all runs have in common.

    Attributes:
        work: Folder for jobs and results.
        model: The model's folder.
        dtype: Of the model.
        device: ``cpu`` or ``cuda``.
        threads: Of a contestant, all of its processes together.
    """

    work: Path
    model: Path
    dtype: str
    device: str
    threads: int

    def run_peer(self, name: str, case: Case) -> Run:
        """Run a peer, or the bare forward, in its environment.

        Raises:
            ContestantFailed: Its process did.
        """
        texts, rows = self.work / f"{case.name}.json", self.work / f"{name}.npz"
        texts.write_text(json.dumps(case.texts))
        rows.unlink(missing_ok=True)
        job = {
            "contestant": name,
            "model": str(self.model),
            "texts": str(texts),
            "rows": str(rows) if CONTESTANTS[name].gives else None,
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
        }
        command = [str(python_of(name)), "-m", "extraction_peers.child", self._job(job)]
        start = time.monotonic()
        told, _, _ = self._run(name, command, [ROOT / "benchmarks"], self.threads)
        return Run(told["done"] - start, told["warm_s"], 0, rows, told)

    def run_ours(self, case: Case, workers: int, engine: str | None = None) -> Run:
        """Run plan and extract in a program that has started Ray.

        Raises:
            ContestantFailed: Its process did.
        """
        store = self._empty_store()
        job = {
            "run_file": str(case.run_file),
            "store": str(store),
            "workers": workers,
            "device": self.device,
            "engine": engine,
        }
        command = [sys.executable, "-m", "extraction_peers.ours", self._job(job)]
        start = time.monotonic()
        told, _, _ = self._run(OURS, command, [ROOT, ROOT / "benchmarks"], None)
        return Run(told["done"] - start, told["warm_s"], 0, store, told)

    def run_command(self, case: Case, workers: int, *, watch_memory: bool = False) -> Run:
        """Run `steerage extract`, as a user does.

        Args:
            watch_memory: Sample the memory, which costs some per cent of the time.

        Raises:
            ContestantFailed: Its process did.
        """
        store = self._empty_store()
        command = [sys.executable, "-c", "from pipeline.main import run; run()", "extract"]
        command += [str(case.run_file), "--store", str(store), "--json"]
        command += ["--workers", str(workers), "--device", self.device]
        told, seconds, peak = self._run(OURS, command, [ROOT], None, watch_memory)
        return Run(seconds, None, peak, store, told)

    def _empty_store(self) -> Path:
        store = self.work / "store"
        shutil.rmtree(store, ignore_errors=True)
        return store

    def _job(self, job: dict[str, Any]) -> str:
        path = self.work / "job.json"
        path.write_text(json.dumps(job))
        return str(path)

    def _run(
        self,
        name: str,
        command: Sequence[str],
        paths: Sequence[Path],
        threads: int | None,
        watch_memory: bool = False,
    ) -> tuple[dict[str, Any], float, int]:
        environment = {
            key: value
            for key, value in os.environ.items()
            # What is set here for other ends must not decide how fast a contestant is.
            if not key.startswith(("OMP_", "MKL_", "RAY_"))
        }
        # All inputs are local; a peer that asks a hub nevertheless shall not wait for one.
        environment |= {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "HF_HUB_OFFLINE": "1",
        }
        if threads is not None:
            environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        start = time.monotonic()
        with (self.work / "stderr").open("w+") as stderr:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
            )
            memory = PeakMemory(process.pid)
            with memory if watch_memory else nullcontext():
                try:
                    output, _ = process.communicate(timeout=_TIMEOUT_S)
                except subprocess.TimeoutExpired as error:
                    raise ContestantFailed(f"{name}: not done in {_TIMEOUT_S} s") from error
                finally:
                    # Nothing to do if it has ended.
                    process.kill()
                    process.wait()
            seconds = time.monotonic() - start
            if process.returncode != 0:
                stderr.seek(0)
                last = "".join(stderr.readlines()[-_ERROR_LINES:])
                raise ContestantFailed(f"{name}: exit code {process.returncode}:\n{last}")
        told: dict[str, Any] = json.loads(output.splitlines()[-1])
        return told, seconds, memory.peak_bytes


def python_of(name: str) -> Path:
    """The interpreter of a contestant's environment: ours for plain transformers."""
    distribution = CONTESTANTS[name].distribution
    if distribution == "transformers":
        return Path(sys.executable)
    return ROOT / f".venv-bench-{distribution}" / "bin" / "python"
