"""The harness of benchmarks/reduction.py: contestants take turns, each in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from extraction_peers.process_tree import PeakMemory

from reduction_peers import inputs
from store.activations import ActivationCache

ROOT: Final = Path(__file__).resolve().parents[2]
PEER: Final = ROOT / ".venv-bench-reduce" / "bin" / "python"
THREADS: Final = 2
_TOLERANCE: Final = 1e-9
"""Of a difference of means, over its largest entry; ours and the peers' add up in float64."""

Result = dict[str, Any]
Contestants = dict[str, Callable[[], Result]]


class ContestantFailed(Exception):
    """A process ended with an error, or with another result than ours."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What all cases have in common.

    Attributes:
        folder: For caches and results; each case clears up its own.
        gib: Of the cache that is scanned.
        peer_gib: Of the cache that the peers' files are made of.
        rounds: Of which the medians are taken.
    """

    folder: Path
    gib: float
    peer_gib: float
    rounds: int

    def cache(self, gib: float) -> ActivationCache:
        """A cache of about this size in a store of its own."""
        say(f"writing a cache of {gib:g} GiB")
        rows = max(int(gib * 2**30 / inputs.BYTES_PER_ROW) // 2 * 2, 2)
        return inputs.write_cache(Path(tempfile.mkdtemp(dir=self.folder)), rows)

    def ours(
        self,
        cache: ActivationCache,
        what: str,
        *,
        workers: int = THREADS,
        bound: bool = False,
        watch: bool = False,
    ) -> Result:
        """Count in Ray tasks; see reduction_peers/ours.py."""
        path = cache.location.local_path()
        assert path is not None
        job = {
            "store": str(path.parents[1]),
            "digest": cache.digest,
            "workers": workers,
            "what": what,
            "bound": bound,
            "out": str(self.folder / "ours.npy"),
        }
        return self._run("reduction_peers.ours", sys.executable, job, watch=watch)

    def peer(self, contestant: str, path: object) -> Result:
        """A contestant of reduction_peers/means.py, whose means must be ours."""
        out = None if contestant.startswith("raw") else str(self.folder / f"{contestant}.npy")
        job = {"contestant": contestant, "path": path, "out": out}
        told = self._run("reduction_peers.means", str(PEER), job)
        if out:
            theirs_LW, ours_LW = np.load(out), np.load(self.folder / "ours.npy")
            gap = float(np.abs(theirs_LW - ours_LW).max() / np.abs(ours_LW).max())
            if not gap < _TOLERANCE:
                raise ContestantFailed(f"{contestant}: means differ from ours by {gap:.2g}")
            told["relative_gap"] = gap
        return told

    def turns(self, contestants: Contestants, cold: Sequence[Path]) -> Result:
        """Run all of them in each round, after `cold` was taken out of the page cache."""
        runs: dict[str, list[Result]] = {name: [] for name in contestants}
        for number in range(self.rounds):
            for name, run in contestants.items():
                inputs.forget(cold)
                runs[name].append(run())
                seconds = runs[name][-1]["seconds"]
                say(f"round {number + 1} of {self.rounds}: {name}: {seconds:.2f} s")
        return {
            name: {
                "seconds": statistics.median(one["seconds"] for one in several),
                "seconds_rounds": [round(one["seconds"], 3) for one in several],
                **({"start_s": several[0]["start_s"]} if "start_s" in several[0] else {}),
                **(
                    {"relative_gap": several[0]["relative_gap"]}
                    if "relative_gap" in several[0]
                    else {}
                ),
            }
            for name, several in runs.items()
        }

    def _run(self, module: str, python: str, job: Result, *, watch: bool = False) -> Result:
        path = self.folder / "job.json"
        path.write_text(json.dumps(job))
        # What is set here for other ends must not decide how fast a contestant is.
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "RAY_"))}
        environment |= {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")]),
            "RAY_USAGE_STATS_ENABLED": "0",
            "DASK_NUM_WORKERS": str(THREADS),
        }
        process = subprocess.Popen(
            [python, "-m", module, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        memory = PeakMemory(process.pid)
        if watch:
            with memory:
                out, err = process.communicate()
        else:
            out, err = process.communicate()
        if process.returncode != 0:
            raise ContestantFailed(f"{module}: exit code {process.returncode}:\n{err[-2000:]}")
        told: Result = json.loads(out.splitlines()[-1])
        return told | ({"peak_bytes": memory.peak_bytes} if watch else {})


def say(text: str) -> None:
    """A line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)
