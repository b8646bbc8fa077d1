"""Cases of calls: manifests, downloads, and the swap that is made of both."""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from extraction_peers.process_tree import tree_cpu_s

from service_peers.bench import (
    ACTOR,
    CONTESTANTS,
    FINGERPRINT,
    SMALL_BYTES,
    Bench,
    Process,
    Published,
    Result,
    Server,
    median,
    say,
)
from service_peers.wire import MANIFEST
from steering_service.v1 import artifact_pb2

SWAP_BYTES: Final = 5_000_000
DOWNLOAD_BYTES: Final = 64 << 20
IN_FLIGHT: Final = (16, 1)
SWAPS: Final = 20
DOWNLOADS: Final = 8
SLICES: Final = 5
SLICE_S: Final = 0.5


def manifest(bench: Bench) -> Result:
    """Unary calls."""
    published = bench.publish(SMALL_BYTES)
    request = artifact_pb2.GetManifestRequest(digest=published.digest).SerializeToString()
    runs: dict[str, list[Result]] = {}
    for tls in (False, True)[: 1 + bench.tls]:
        with _driven(
            bench,
            published,
            "http2",
            tls=tls,
            method=MANIFEST,
            request=request.hex(),
            expected=str(published.manifest),
            warm_up_s=1.0,
        ) as driven:
            for _ in range(bench.rounds * SLICES):
                for in_flight in IN_FLIGHT:
                    for contestant, ask in driven.items():
                        name = f"{contestant}_{in_flight}{'_tls' if tls else ''}"
                        runs.setdefault(name, []).append(ask(f"{in_flight} {SLICE_S}"))
    headlines = {}
    for name in runs:
        contestant, _, behind = name.partition("_")
        if contestant == "ours":
            word = behind.replace("16", "").replace("1", "_one").replace("_tls", "")
            headline = f"get_manifest{word}_vs_bare{'_tls' if 'tls' in behind else ''}"
            headlines[headline] = _speed(runs, name, f"bare_{behind}", "calls")
    return {
        "answer_bytes": published.manifest.stat().st_size,
        "contestants": {
            name: {
                "calls_per_s": round(_rate(several, "calls")),
                "server_cpu_us_per_call": round(_cpu(several, "calls") * 1e6, 1),
                "calls_per_s_slices": [round(one["calls"] / one["seconds"]) for one in several],
            }
            for name, several in runs.items()
        },
        "headlines": headlines,
    }


def download(bench: Bench) -> Result:
    """A large payload."""
    published = bench.publish(DOWNLOAD_BYTES)
    request = artifact_pb2.DownloadRequest(digest=published.digest).SerializeToString()
    runs: dict[str, list[Result]] = {name: [] for name in CONTESTANTS}
    with _driven(bench, published, "transfer", tls=bench.tls, request=request.hex()) as driven:
        for _ in range(bench.rounds * DOWNLOADS):
            for contestant, ask in driven.items():
                runs[contestant].append(ask(""))
    return {
        "bytes": DOWNLOAD_BYTES,
        "tls": bench.tls,
        "contestants": {
            name: {
                "bytes_per_s": round(_rate(several, "bytes")),
                "server_cpu_s_per_gib": round(_cpu(several, "bytes") * 2**30, 3),
                "seconds": [round(one["seconds"], 4) for one in several],
            }
            for name, several in runs.items()
        },
        "headlines": {"download_vs_bare": _speed(runs, "ours", "bare", "bytes")},
    }


def swap(bench: Bench) -> Result:
    """Fetch, verify, swap."""
    store = Path(tempfile.mkdtemp(dir=bench.folder))
    artifacts = [bench.publish(SWAP_BYTES, store=store, seed=seed) for seed in range(2)]
    runs: list[Result] = []
    for number in range(bench.rounds):
        shutil.rmtree(store / "channels", ignore_errors=True)
        with (
            bench.server("bare", artifacts[0], tls=bench.tls) as bare,
            bench.server("ours", artifacts[0], tls=bench.tls) as ours,
            bench.driver(
                "node",
                address=ours.address,
                bare_address=bare.address,
                security=bench.security_of(bench.tls),
                folder=str(bench.folder),
                trust=str(bench.trust),
                fingerprint=FINGERPRINT,
                digests=[one.digest for one in artifacts],
                times=SWAPS,
                actor=ACTOR,
                pause_s=0.1,
            ) as node,
        ):
            told = [node.read() for _ in range(SWAPS)]
        runs += told
        say(
            f"round {number + 1}: swap {median(told, 'swap_s') * 1e3:.1f} ms, "
            f"download {median(told, 'download_s') * 1e3:.1f} ms"
        )
    names = ("swap", "promote_to_active", "download")
    runs_of = {name: [one[f"{name}_s"] for one in runs] for name in names}
    contestants = {
        name: {
            "seconds": round(statistics.median(runs_of[name]), 5),
            "seconds_quartiles": [
                round(one, 5) for one in statistics.quantiles(runs_of[name], n=4)
            ],
        }
        for name in names
    }
    return {
        "bytes": SWAP_BYTES,
        "tls": bench.tls,
        "swaps": len(runs),
        "contestants": contestants,
        "headlines": {
            "swap_vs_bare": round(median(runs, "swap_s") / median(runs, "download_s"), 4),
            "promote_to_active_vs_bare": round(
                median(runs, "promote_to_active_s") / median(runs, "download_s"), 4
            ),
        },
    }


@contextmanager
def _driven(
    bench: Bench, published: Published, module: str, *, tls: bool, **job: object
) -> Iterator[dict[str, Callable[[str], Result]]]:
    """Both servers with a driver each; asking one of these runs a load, while the other is idle."""
    with ExitStack() as stack:
        asking: dict[str, Callable[[str], Result]] = {}
        for contestant in CONTESTANTS:
            server = stack.enter_context(bench.server(contestant, published, tls=tls))
            where = {"address": server.address, "security": bench.security_of(tls)}
            driver = stack.enter_context(bench.driver(module, **where, **job))
            driver.read()
            asking[contestant] = partial(_load, server, driver)
        yield asking


def _load(server: Server, driver: Process, question: str) -> Result:
    begun = tree_cpu_s(server.process.pid)
    driver.ask(question)
    told = driver.read()
    return told | {"cpu_s": tree_cpu_s(server.process.pid) - begun}


def _rate(runs: list[Result], what: str) -> float:
    """Median of what was done a second."""
    return float(statistics.median(one[what] / one["seconds"] for one in runs))


def _cpu(runs: list[Result], what: str) -> float:
    """CPU seconds of the server for each."""
    return float(sum(one["cpu_s"] for one in runs) / sum(one[what] for one in runs))


def _speed(runs: dict[str, list[Result]], ours: str, theirs: str, what: str) -> float:
    """Median over neighbours of our speed over theirs: what else runs hits both alike."""
    pairs = zip(runs[ours], runs[theirs], strict=True)
    return round(statistics.median(_rate([a], what) / _rate([b], what) for a, b in pairs), 4)
