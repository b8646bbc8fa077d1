"""A contest: contestants take turns, and only right answers count."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from extraction_peers import inputs, tables
from extraction_peers.contestants import CONTESTANTS
from extraction_peers.processes import OURS, Bench, ContestantFailed, Run
from extraction_peers.reference import TOLERANCE, Reference, unique_tokens

Result = dict[str, Any]

TIMES: Final = ("warm_s", "cold_s", "running_s", "warm_cpu_s", "start_workers_s", "plan_s")
"""What is noted of every round, in seconds; `warm_cpu_s` is CPU time of all processes."""

VARIANTS: Final = (
    ("", "running_s", "warm_s"),
    ("_with_start", "warm_s", "warm_s"),
    ("_cold", "cold_s", "cold_s"),
)
"""Suffix of a headline, our time and a peer's."""


@dataclass(frozen=True, slots=True)
class Bout:
    """What the cases are run with."""

    bench: Bench
    folder: Path
    questions: Path
    peers: tuple[str, ...]
    rounds: int
    limit: int | None
    long_questions: int
    workers: int

    def scaled(self, count: int) -> int:
        """A number of prompts, cut down for a quick look."""
        return count if self.limit is None else min(count, 5 * self.limit)


def contest(bout: Bout, case: inputs.Case, names: Sequence[str]) -> Result:
    """Run all contestants in turns, and check every run's rows."""
    bench = bout.bench
    total, nodes, _ = unique_tokens(case, bench.model)
    say(f"{case.name}: {len(case.texts)} prompts, {total} tokens, {nodes} without repetition")
    reference = Reference.of(case, bench.model, bench.dtype, bench.device)
    found: dict[str, Result] = {name: _blank() for name in (*names, OURS)}
    for number in range(bout.rounds):
        # Whoever comes first may find the machine in another state than the last.
        turns = [*names, OURS]
        turns = turns[number % len(turns) :] + turns[: number % len(turns)]
        for name in turns:
            if "failed" in found[name]:
                continue
            try:
                _one_run(bout, case, name, reference, found[name])
            except ContestantFailed as error:
                found[name] = {"failed": str(error)}
            say(f"  round {number + 1}: {tables.brief(name, found[name])}")
    for result in found.values():
        for key in TIMES:
            if result.get(f"{key}_rounds"):
                result[key] = statistics.median(result[f"{key}_rounds"])
    return {
        "prompts": len(case.texts),
        "tokens": total,
        "tokens_unique": nodes,
        "contestants": found,
    }


def _blank() -> Result:
    return {f"{key}_rounds": [] for key in TIMES}


def _one_run(
    bout: Bout, case: inputs.Case, name: str, reference: Reference, result: Result
) -> None:
    """Run one contestant once (ours twice: as a program and as a command) and note it.

    Raises:
        ContestantFailed: It did not end well, or its rows are not those of the reference.
    """
    bench = bout.bench
    if name == OURS:
        run = bench.run_ours(case, bout.workers)
        rows = reference.of_cache(run.rows, run.told["capture"])
        command = bench.run_command(case, bout.workers)
        result["cold_s_rounds"].append(command.cold_s)
        result["running_s_rounds"].append(running(run))
        result["start_workers_s_rounds"].append(run.told["start_workers_s"])
        result["plan_s_rounds"].append(run.told["plan_s"])
        result |= {key: run.told[key] for key in ("tokens_computed", "shards")}
    else:
        run = bench.run_peer(name, case)
        rows = reference.of_peer(run.rows) if CONTESTANTS[name].gives else {}
        result["cold_s_rounds"].append(run.cold_s)
        result["versions"] = run.told["versions"]
    result["warm_s_rounds"].append(run.warm_s)
    result["warm_cpu_s_rounds"].append(run.told["warm_cpu_s"])
    result["streams"] = sorted(rows)
    if rows:
        result["relative_error"] = error = reference.error(rows)
        if error > TOLERANCE[reference.dtype]:
            raise ContestantFailed(
                f"{name}: its rows are not those of plain transformers: relative error {error:.2g},"
                f" expected less than {TOLERANCE[reference.dtype]:g}"
            )


def ours_two_ways(
    bout: Bout, case: inputs.Case, headline: str, ways: Mapping[str, Callable[[], Run]]
) -> Result:
    """Ratio of the first way's time to the second's."""
    say(f"{headline}: {len(case.texts)} prompts")
    found = {way: _blank() for way in ways}
    for _ in range(bout.rounds):
        for way, run_it in ways.items():
            run = run_it()
            found[way]["warm_s_rounds"].append(run.warm_s)
            found[way]["running_s_rounds"].append(running(run))
            found[way]["start_workers_s_rounds"].append(run.told["start_workers_s"])
            found[way]["warm_cpu_s_rounds"].append(run.told["warm_cpu_s"])
            say(f"  {way}: {run.warm_s:.1f} s, running {running(run):.1f} s")
    for result in found.values():
        for key in ("warm_s", "running_s", "start_workers_s", "warm_cpu_s"):
            result[key] = statistics.median(result[f"{key}_rounds"])
    first, second = (found[way] for way in ways)
    headlines = {
        headline: ratio(first["running_s"], second["running_s"]),
        f"{headline}_with_start": ratio(first["warm_s"], second["warm_s"]),
    }
    return {"prompts": len(case.texts), "contestants": found, "headlines": headlines}


def vs_peers(headline: str, outcome: Result, peers: Sequence[str]) -> dict[str, float | None]:
    """By variant, the fastest of these peers' time over ours; None if there is none of either."""
    headlines = {}
    for variant, ours, theirs in VARIANTS:
        times = [median(outcome, peer, theirs) for peer in peers]
        best = min((time for time in times if time is not None), default=None)
        headlines[f"{headline}{variant}"] = ratio(best, median(outcome, OURS, ours))
    return headlines


def median(outcome: Result, name: str, key: str) -> float | None:
    """A contestant's median; None if it has none."""
    time: float | None = outcome["contestants"].get(name, {}).get(key)
    return time


def ratio(above: float | None, below: float | None) -> float | None:
    """None if one of them is."""
    return None if above is None or below is None else round(above / below, 4)


def running(run: Run) -> float:
    """Seconds of a run of ours without those until a worker computes."""
    assert run.warm_s is not None
    return float(run.warm_s - run.told["start_workers_s"])


def say(text: str) -> None:
    """Show what is going on, on stderr."""
    print(text, file=sys.stderr, flush=True)
