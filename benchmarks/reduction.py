"""Reduction beside its peers: the same rows, machine and threads, in one run.

    make bench-reduce    # installs the peers, then all cases
    python benchmarks/reduction.py --rounds 1 --gib 1 --peer-gib 0.25 --cases scan peers    # a look

Caches are of a model of 8B: residual streams in bfloat16, 32 layers, width 4,096, made here.
Every contestant is a process of its own with two threads in all (ours: two Ray workers of one
thread). Contestants take turns within a round; seconds are medians over rounds. Before a timing the
files that are read are taken out of the page cache (posix_fadvise, DONTNEED), for ours as for the
others, if not said otherwise. Every mean is compared with ours before its time counts.

Our seconds are from the open cache to the result in the driver's memory, Ray's workers running;
each ratio NAME has a NAME_with_start beside it, with the time that Ray takes to start and its
workers to import torch in ours. Peers' seconds are without imports too.

Headlines (a ratio of times: how many times faster we are, if not said otherwise):

    scan_vs_raw          bytes/s of the difference of means over those of reading the same files
                         from end to end and doing nothing, with one thread or with two, whichever
                         is faster. The cache is larger than memory (--gib)
    scan_moments_vs_raw  the same with all that `steerage reduce` counts: means and variances of
                         eight groups, and of pair differences
    scan_vs_numpy        numpy over a mapped .npy of the same rows, block by block, of bits that it
                         widens or of float32 (--peer-gib of bits), whichever is faster
    scan_vs_dask         dask.array.from_zarr over a zarr array of the same rows: bits of bfloat16
                         that a map_blocks widens, or float32, whichever is faster
    rss_growth_10x       peak memory (PSS of the driver and all that it starts) at ten times the
                         rows over once, of all that is counted
    ray_two_workers      speed of two workers over one; the page cache is warm, and each worker is
                         bound to a core: one that reads ahead would take two
    probes_vs_sklearn    see reduction_peers/probes_sklearn.py

A table goes to stderr; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from reduction_peers import inputs
from reduction_peers.bench import (
    PEER,
    ROOT,
    THREADS,
    Bench,
    ContestantFailed,
    Contestants,
    Result,
    say,
)
from rich.console import Console
from rich.table import Table

from pipeline.report.environment import environment
from store.activations import ActivationCache

_STDERR: Final = Console(stderr=True, width=120)


def scan(bench: Bench) -> Result:
    """A cache larger than memory, beside reading its files."""
    cache = bench.cache(bench.gib)
    shards = _shards(cache)
    raw = [str(path) for path in shards]
    found = bench.turns(
        {
            "raw_1": partial(bench.peer, "raw_1", raw),
            "means": partial(bench.ours, cache, "means"),
            "raw_2": partial(bench.peer, "raw_2", raw),
            "moments": partial(bench.ours, cache, "moments"),
        },
        shards,
    )
    num_bytes = sum(path.stat().st_size for path in shards)
    _remove(cache)
    fastest = _fastest(found, "raw_1", "raw_2")
    headlines: Result = {}
    for name, contestant in (("scan_vs_raw", "means"), ("scan_moments_vs_raw", "moments")):
        headlines |= _ratios(name, found[fastest], found[contestant])
    return {
        "bytes": num_bytes,
        "page_cache": "all shards dropped with posix_fadvise before each timing",
        "against": fastest,
        "gb_per_s": {name: num_bytes / one["seconds"] / 1e9 for name, one in found.items()},
        "contestants": found,
        "headlines": headlines,
    }


def peers(bench: Bench) -> Result:
    """numpy and dask, each in the two ways that a user may have the rows."""
    cache = bench.cache(bench.peer_gib)
    paths: dict[str, Path] = {}
    for dtype in ("uint16", "float32"):
        say(f"writing the rows as {dtype} in .npy and zarr")
        paths[f"numpy_{dtype}"] = bench.folder / f"{dtype}.npy"
        inputs.write_npy(cache, paths[f"numpy_{dtype}"], dtype)
        paths[f"dask_{dtype}"] = bench.folder / f"{dtype}.zarr"
        inputs.write_zarr(cache, paths[f"dask_{dtype}"], dtype)
    contestants: Contestants = {"means": partial(bench.ours, cache, "means")}
    for name, path in paths.items():
        contestants[name] = partial(bench.peer, name.partition("_")[0], str(path))
    found = bench.turns(
        contestants, [*_shards(cache), *(f for path in paths.values() for f in inputs.files(path))]
    )
    _remove(cache)
    for path in paths.values():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    headlines: Result = {}
    against = {}
    for peer in ("numpy", "dask"):
        against[peer] = _fastest(found, f"{peer}_uint16", f"{peer}_float32")
        headlines |= _ratios(f"scan_vs_{peer}", found[against[peer]], found["means"])
    return {
        "page_cache": "all files dropped with posix_fadvise before each timing",
        "dtype": "uint16: bits of bfloat16, widened by the peer; float32: twice the bytes to read",
        "against": against,
        "contestants": found,
        "headlines": headlines,
    }


def rss(bench: Bench) -> Result:
    """Memory at once and at ten times the rows."""
    peaks = {}
    for times in (1, 10):
        cache = bench.cache(times * bench.peer_gib / 4)
        runs = [bench.ours(cache, "moments", watch=True) for _ in range(bench.rounds)]
        peaks[f"{times}x"] = statistics.median(run["peak_bytes"] for run in runs)
        _remove(cache)
    return {
        "peak_bytes": peaks,
        "headlines": {"rss_growth_10x": round(peaks["10x"] / peaks["1x"], 4)},
    }


def ray_workers(bench: Bench) -> Result:
    """One worker and two."""
    cache = bench.cache(bench.peer_gib)
    found = bench.turns(
        {
            "one_worker": partial(bench.ours, cache, "means", workers=1, bound=True),
            "two_workers": partial(bench.ours, cache, "means", workers=2, bound=True),
        },
        [],
    )
    _remove(cache)
    headlines = _ratios("ray_two_workers", found["one_worker"], found["two_workers"])
    # Both start Ray, so the ratio with it says nothing of the workers.
    del headlines["ray_two_workers_with_start"]
    return {
        "page_cache": "warm",
        "cores": "one a worker",
        "contestants": found,
        "headlines": headlines,
    }


def probes(bench: Bench) -> Result:
    """Logistic probes of heads beside scikit-learn's."""
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks/reduction_peers/probes_sklearn.py")),
            *("--peer", str(PEER), "--rounds", str(bench.rounds)),
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    told: Result = json.loads(done.stdout.splitlines()[-1])
    return told | {"headlines": {"probes_vs_sklearn": told.pop("probes_vs_sklearn")}}


CASES: Final[dict[str, Callable[[Bench], Result]]] = {
    "scan": scan,
    "peers": peers,
    "rss": rss,
    "ray_workers": ray_workers,
    "probes": probes,
}


def main() -> None:
    """Run the chosen cases."""
    arguments = _arguments()
    result: Result = {
        "benchmark": "reduction",
        "environment": environment(),
        "rounds": arguments.rounds,
        "gib": arguments.gib,
        "peer_gib": arguments.peer_gib,
        "threads": THREADS,
        "cases": {},
    }
    failed = False
    with tempfile.TemporaryDirectory(prefix="steerage-bench-", dir=arguments.folder) as name:
        bench = Bench(Path(name), arguments.gib, arguments.peer_gib, arguments.rounds)
        for case in arguments.cases:
            try:
                outcome = CASES[case](bench)
            except (ContestantFailed, subprocess.CalledProcessError) as error:
                # The other cases are worth having all the same; the exit code tells.
                outcome, failed = {"failed": str(error), "headlines": {}}, True
            result |= outcome.pop("headlines")
            result["cases"][case] = outcome
            _show(case, outcome)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, sort_keys=True, indent=1) + "\n")
    print(json.dumps(result, sort_keys=True, allow_nan=False))
    sys.exit(failed)


def _shards(cache: ActivationCache) -> list[Path]:
    layout = cache.streams[inputs.STREAM]
    paths = [cache.location.local_path(layout.shard_key(n)) for n in range(cache.num_shards)]
    return [path for path in paths if path is not None]


def _remove(cache: ActivationCache) -> None:
    path = cache.location.local_path()
    assert path is not None
    shutil.rmtree(path.parents[1])


def _fastest(found: Result, *names: str) -> str:
    return min(names, key=lambda name: found[name]["seconds"])


def _ratios(name: str, theirs: Result, ours: Result) -> Result:
    return {
        name: round(theirs["seconds"] / ours["seconds"], 4),
        f"{name}_with_start": round(theirs["seconds"] / (ours["seconds"] + ours["start_s"]), 4),
    }


def _show(case: str, outcome: Result) -> None:
    if "contestants" not in outcome:
        _STDERR.print(f"[bold]{case}[/]", outcome)
        return
    table = Table(title=case, title_justify="left")
    for column in ("contestant", "seconds", "GB/s", "rounds"):
        table.add_column(column, justify="left" if column == "contestant" else "right")
    for name, one in sorted(outcome["contestants"].items(), key=lambda item: item[1]["seconds"]):
        rate = outcome.get("gb_per_s", {}).get(name)
        table.add_row(
            name,
            f"{one['seconds']:.2f}",
            "" if rate is None else f"{rate:.2f}",
            " ".join(f"{seconds:.1f}" for seconds in one["seconds_rounds"]),
        )
    _STDERR.print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", choices=sorted(CASES), default=list(CASES), help="default: all"
    )
    parser.add_argument("--rounds", type=int, default=3, help="default 3; medians are over these")
    parser.add_argument(
        "--gib", type=float, default=26, help="of the cache that is scanned, default 26"
    )
    parser.add_argument(
        "--peer-gib",
        type=float,
        default=2,
        help="of the cache for the other cases, default 2: the peers' files take six times as much "
        "beside it, and the memory case two and a half times",
    )
    parser.add_argument(
        "--folder", type=Path, help="where caches are written, on the disk to be measured"
    )
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    arguments = parser.parse_args()
    if not PEER.exists():
        parser.error(f"{PEER} is not there; `make bench-reduce` installs it")
    return arguments


if __name__ == "__main__":
    main()
