"""Cases of many watchers: a change to all of them, and all of them coming back."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final, Self

from extraction_peers.process_tree import tree_bytes, tree_cpu_s

from service_peers.bench import (
    ACTOR,
    CONTESTANTS,
    SMALL_BYTES,
    Bench,
    ContestantFailed,
    Process,
    Published,
    Result,
    Server,
    median,
    say,
)
from service_peers.wire import CHANNEL, PROMOTE, sync_channel
from steering_service.v1 import channel_pb2, node_pb2, node_pb2_grpc

CLIENT_PROCESSES: Final = 2
CHANGES: Final = 100
BURST: Final = 20
SETTLE_S: Final = 0.5
DOWN_S: Final = 2.0
PATIENCE_S: Final = 60.0


def watch(bench: Bench) -> Result:
    """A change to many."""
    changes = math.ceil(CHANGES / bench.rounds)
    runs: dict[str, list[Result]] = {name: [] for name in CONTESTANTS}
    for number in range(bench.rounds):
        published = bench.publish(SMALL_BYTES)
        for contestant, several in runs.items():
            several.append(_changes(bench, contestant, published, changes))
            acked = several[-1]["acked_s"]
            say(
                f"round {number + 1}: {contestant}: median {statistics.median(acked):.3f} s, most "
                f"{max(acked):.3f} s, {several[-1]['bytes_per_watcher']:,.0f} bytes a watcher"
            )
    acked = {name: _joined(several, "acked_s") for name, several in runs.items()}
    converged = _joined(runs["ours"], "converged_s")
    return {
        "watchers": bench.watchers,
        "connections": bench.connections,
        "client_processes": CLIENT_PROCESSES,
        "changes": len(acked["ours"]),
        "tls": bench.tls,
        "contestants": {
            name: {
                "seconds": statistics.median(acked[name]),
                "p99_s": _p99(acked[name]),
                "max_s": max(acked[name]),
                "server_cpu_s_per_change": round(median(several, "cpu_s"), 4),
                "bytes_per_watcher": round(median(several, "bytes_per_watcher")),
                "missed": sum(one["missed"] for one in several),
            }
            for name, several in runs.items()
        },
        "converged": {"seconds": statistics.median(converged), "p99_s": _p99(converged)},
        "headlines": {
            "watch_p99_s": round(_p99(acked["ours"]), 4),
            "watch_converged_p99_s": round(_p99(converged), 4),
            "watch_vs_bare": round(
                statistics.median(acked["ours"]) / statistics.median(acked["bare"]), 4
            ),
            "watch_missed": sum(one["missed"] for one in runs["ours"]),
            "watcher_bytes": round(median(runs["ours"], "bytes_per_watcher")),
        },
    }


def reconnect(bench: Bench) -> Result:
    """All come back at once."""
    found: dict[str, list[Result]] = {"at_once": [], "jittered": []}
    for number in range(bench.rounds):
        for name, several in found.items():
            several.append(_reconnect(bench, jitter=name == "jittered"))
            say(f"round {number + 1}: {name}: all served after {several[-1]['served_s']:.2f} s")
    everything = [one for several in found.values() for one in several]
    return {
        "watchers": bench.watchers,
        "connections": bench.connections,
        "tls": bench.tls,
        "contestants": {
            name: {
                "seconds": median(several, "served_s"),
                "max_s": max(one["served_s"] for one in several),
                "health_max_s": max(one["health_max_s"] for one in several),
                "health_checks": sum(one["health_checks"] for one in several),
                "health_failures": sum(one["health_failures"] for one in several),
                "health_wrong": [wrong for one in several for wrong in one["health_wrong"]],
            }
            for name, several in found.items()
        },
        "headlines": {
            "reconnect_s": round(max(one["served_s"] for one in found["at_once"]), 3),
            "reconnect_jitter_s": round(max(one["served_s"] for one in found["jittered"]), 3),
            "reconnect_health_max_s": round(max(one["health_max_s"] for one in everything), 3),
            "reconnect_health_failures": sum(one["health_failures"] for one in everything),
        },
    }


def _changes(bench: Bench, contestant: str, published: Published, changes: int) -> Result:
    """One server, its watchers, one change after the other; then a burst that nobody waits for."""
    acked: list[float] = []
    converged: list[float] = []
    with bench.server(contestant, published, tls=bench.tls) as server:
        # What a server needs once, such as for its first stream, is no watcher's.
        with _watching(bench, server, CLIENT_PROCESSES, jitter=False):
            pass
        time.sleep(SETTLE_S)
        idle = tree_bytes(server.process.pid)
        with (
            _watching(bench, server, bench.watchers, jitter=False) as watchers,
            _Operator(server, bench, published) as operator,
        ):
            begun = tree_cpu_s(server.process.pid)
            for revision in range(1, changes + 1):
                sent = operator.promote(revision)
                acked.append(_reached(watchers, revision) - sent)
                if contestant == "ours":
                    converged.append(operator.converged(revision, bench.watchers) - sent)
            spent = tree_cpu_s(server.process.pid) - begun
            grown = tree_bytes(server.process.pid) - idle
            for revision in range(changes + 1, changes + BURST + 1):
                operator.promote(revision)
            missed = _left_behind(watchers, changes + BURST)
    return {
        "acked_s": acked,
        "converged_s": converged,
        "cpu_s": spent / changes,
        "bytes_per_watcher": grown / bench.watchers,
        "missed": missed,
    }


def _reconnect(bench: Bench, *, jitter: bool) -> Result:
    """Kill a service, start it again, and wait for all of its watchers."""
    published = bench.publish(SMALL_BYTES)
    with ExitStack() as stack:
        server = stack.enter_context(bench.server("ours", published, tls=bench.tls))
        stack.enter_context(_Operator(server, bench, published)).promote(1)
        watchers = stack.enter_context(_watching(bench, server, bench.watchers, jitter=jitter))
        _reached(watchers, 1)
        health = stack.enter_context(
            bench.driver("health", address=server.address, security=bench.security_of(bench.tls))
        )
        health.read()
        server.process.kill()
        killed = time.monotonic()
        # Long enough for every client to have noticed, and to have knocked in vain.
        time.sleep(DOWN_S)
        again = stack.enter_context(bench.ours(published, tls=bench.tls, address=server.address))
        again.read()
        listening = time.monotonic()
        while True:
            states = _states(watchers)
            if all(state["first_back_at"] > killed for state in states):
                break
            if time.monotonic() > listening + PATIENCE_S:
                raise ContestantFailed(f"watchers are not back {PATIENCE_S} s after the restart")
            time.sleep(0.05)
        health.ask("end")
        answers = [one for one in health.read()["answers"] if one[0] > listening]
    return {
        "served_s": max(state["last_back_at"] for state in states) - listening,
        "health_max_s": max(seconds for _, seconds, _ in answers),
        "health_failures": sum(bool(wrong) for _, _, wrong in answers),
        "health_wrong": sorted({wrong for _, _, wrong in answers if wrong}),
        "health_checks": len(answers),
    }


class _Operator:
    """Promotes on one connection, and asks for convergence."""

    def __init__(self, server: Server, bench: Bench, published: Published) -> None:
        job = {"address": server.address, "security": bench.security_of(bench.tls)}
        self._artifact = published.digest
        self._channel = sync_channel(job)
        self._promote: Any = self._channel.unary_unary(PROMOTE)
        self._nodes = node_pb2_grpc.NodeServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def promote(self, revision: int) -> float:
        """Make a revision; when the call began."""
        request = channel_pb2.PromoteRequest(
            channel=CHANNEL,
            expected_revision=revision - 1,
            artifact=self._artifact,
            strength=1.0 + revision / 1000,
            actor=ACTOR,
            reason="bench",
        ).SerializeToString()
        sent = time.monotonic()
        self._promote(request)
        return sent

    def converged(self, revision: int, watchers: int) -> float:
        """Wait until the service says that all nodes run a revision; when it did."""
        request = node_pb2.ListNodesRequest(channel=CHANNEL, page_size=1)
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            told = self._nodes.ListNodes(request).convergence
            if told.head_revision == revision and told.converged == watchers:
                return time.monotonic()
            time.sleep(0.005)
        raise ContestantFailed(f"revision {revision} has not converged: {told}")


@contextmanager
def _watching(
    bench: Bench, server: Server, watchers: int, *, jitter: bool
) -> Iterator[list[Process]]:
    """Processes whose watchers are all served."""
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                bench.driver(
                    "watchers",
                    address=server.address,
                    security=bench.security_of(bench.tls),
                    name=f"node-{number}",
                    streams=watchers // CLIENT_PROCESSES,
                    connections=min(watchers, bench.connections) // CLIENT_PROCESSES,
                    jitter=jitter,
                )
            )
            for number in range(CLIENT_PROCESSES)
        ]
        for process in processes:
            process.read()
        yield processes


def _reached(watchers: list[Process], revision: int) -> float:
    """Wait until all watchers have acknowledged a revision; when the last one did."""
    for process in watchers:
        process.ask(f"reached {revision}")
    times: list[float] = [process.read()["acked_at"] for process in watchers]
    return max(times)


def _states(watchers: list[Process]) -> list[Result]:
    for process in watchers:
        process.ask("state")
    return [process.read() for process in watchers]


def _left_behind(watchers: list[Process], revision: int) -> int:
    """How many watchers do not run a revision, given time."""
    deadline = time.monotonic() + 10.0
    while True:
        behind: int = sum(
            one != revision for state in _states(watchers) for one in state["revisions"]
        )
        if not behind or time.monotonic() > deadline:
            return behind
        time.sleep(0.1)


def _joined(runs: list[Result], key: str) -> list[float]:
    return [value for one in runs for value in one[key]]


def _p99(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]
