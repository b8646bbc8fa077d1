"""The steering service beside a bare grpc.aio server that sends the same bytes, in one run.

    make bench-service
    python benchmarks/service.py --rounds 1 --cases manifest swap    # a look

"Ours" is `steerage serve` as an operator starts it: its log, metrics and store (a folder on disk)
included, and, with TLS, certificates on both sides and an access policy. "Bare" is
service_peers/bare.py: grpc.aio and nothing else, handing out bytes made beforehand, with the same
channel options and the same TLS. All servers and clients are processes of their own on the same
cores. Contestants take turns within a round; figures are medians over the rounds.

Cases and headlines:

    manifest   get_manifest_vs_bare, calls/s over the bare server's with 16 calls in flight, without
               TLS; get_manifest_one_vs_bare with one; and the same with TLS and policy, _tls. The
               client (service_peers/http2.py) writes bare HTTP/2 frames, so that the server is what
               limits
    download   download_vs_bare, bytes/s of a payload of 64 MiB over the bare server's, TLS in both
    swap       swap_vs_bare, the time in which a node fetches, verifies and swaps in an artifact of
               5 MB, over that of a download of the same bytes from the bare server by the same
               process (how many times slower; TLS in both)
    watch      watch_p99_s, from sending Promote until the last of 1,000 watchers has sent its ACK,
               and watch_converged_p99_s, until ListNodes says so too; watch_vs_bare, the median of
               the first over the bare server's (how many times slower); watch_missed, watchers that
               did not end on the last revision; watcher_bytes, memory (PSS) of the service with
               1,000 watchers less that without, a watcher
    reconnect  reconnect_s, from when a service that was killed listens again until all of its 1,000
               watchers are served; they come back at once (reconnect_jitter_s: after the delays of
               the product's client). reconnect_health_max_s, the slowest of the health checks that
               are made meanwhile, ten a second and each on a new connection, and
               reconnect_health_failures, how many got no answer within five seconds

Every watcher has a connection of its own, as nodes have, unless --connections says otherwise.

A table goes to stderr; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import grpc
from rich.console import Console
from rich.table import Table
from service_peers.bench import Bench, ContestantFailed, Result
from service_peers.calls import download, manifest, swap
from service_peers.tls import make_security
from service_peers.watching import reconnect, watch

from pipeline.report.environment import environment

_STDERR: Final = Console(stderr=True, width=120)

CASES: Final[dict[str, Callable[[Bench], Result]]] = {
    "manifest": manifest,
    "download": download,
    "swap": swap,
    "watch": watch,
    "reconnect": reconnect,
}


def main() -> None:
    """Run the chosen cases."""
    options = _arguments()
    result: Result = {
        "benchmark": "service",
        "environment": environment(),
        "rounds": options.rounds,
        "cases": {},
    }
    failed = False
    with tempfile.TemporaryDirectory(prefix="steerage-bench-", dir=options.folder) as name:
        folder = Path(name)
        bench = Bench(
            folder,
            make_security(folder),
            rounds=options.rounds,
            tls=not options.no_tls,
            watchers=options.watchers,
            connections=options.connections or options.watchers,
        )
        for case in options.cases:
            begun = time.monotonic()
            try:
                outcome = CASES[case](bench)
            except (ContestantFailed, grpc.RpcError) as error:
                # The other cases are worth having all the same; the exit code tells.
                outcome, failed = {"failed": str(error), "headlines": {}}, True
            outcome["took_s"] = round(time.monotonic() - begun, 1)
            _show(case, outcome)
            result |= outcome.pop("headlines")
            result["cases"][case] = outcome
    if options.out is not None:
        options.out.write_text(json.dumps(result, sort_keys=True, indent=1) + "\n")
    print(json.dumps(result, sort_keys=True, allow_nan=False))
    sys.exit(failed)


def _show(case: str, outcome: Result) -> None:
    contestants = outcome.get("contestants", {})
    table = Table(title=case, title_justify="left")
    table.add_column("contestant")
    columns = [
        name
        for name, value in next(iter(contestants.values()), {}).items()
        if not isinstance(value, list)
    ]
    for column in columns:
        table.add_column(column, justify="right")
    for name, one in contestants.items():
        table.add_row(
            name,
            *(
                f"{one[column]:,.4g}" if isinstance(one[column], float) else f"{one[column]:,}"
                for column in columns
            ),
        )
    _STDERR.print(table)
    for name, value in outcome["headlines"].items():
        _STDERR.print(f"  {name} {value}")
    if "failed" in outcome:
        _STDERR.print(outcome["failed"], markup=False)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", choices=sorted(CASES), default=list(CASES), help="default: all"
    )
    parser.add_argument("--rounds", type=int, default=3, help="default 3; medians are over these")
    parser.add_argument("--watchers", type=int, default=1000, help="default 1,000")
    parser.add_argument(
        "--connections", type=int, help="that the watchers share; default: each has its own"
    )
    parser.add_argument("--no-tls", action="store_true", help="nothing is encrypted, for a look")
    parser.add_argument("--folder", type=Path, help="where stores are kept")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
