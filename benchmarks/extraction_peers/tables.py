"""What is shown on stderr."""

from __future__ import annotations

from typing import Any, Final

from rich.console import Console
from rich.table import Table

from extraction_peers.processes import OURS

_STDERR: Final = Console(stderr=True, width=132)
_NOT_HEADLINES: Final = frozenset(
    {"benchmark", "environment", "device", "model", "rounds", "limit", "cases"}
)


def brief(name: str, result: dict[str, Any]) -> str:
    """One contestant's newest run in a line."""
    if "failed" in result:
        return f"{name}: failed: {result['failed'].strip().splitlines()[-1]}"
    return (
        f"{name}: warm {result['warm_s_rounds'][-1]:.1f} s, cold {result['cold_s_rounds'][-1]:.1f}"
        f" s, relative error {result.get('relative_error', 0.0):.1g}"
    )


def show(case: str, outcome: dict[str, Any]) -> None:
    """A case's contestants."""
    found = outcome.get("contestants")
    if found is None:
        _STDERR.print(f"[bold]{case}[/]", {k: v for k, v in outcome.items() if k != "cases"})
        return
    title = f"{case}: {outcome['prompts']} prompts"
    if "tokens" in outcome:
        title += f", {outcome['tokens']:,} tokens, {outcome['tokens_unique']:,} without repetition"
    table = Table(title=title, title_justify="left")
    table.add_column("contestant", no_wrap=True)
    for column in (
        "warm s",
        "rounds",
        "CPU s",
        "prompts/s",
        "ours is",
        "cold s",
        "ours is",
        "error",
    ):
        table.add_column(column, justify="right")
    table.add_column("streams")
    ours = found.get(OURS, {})
    for name, result in sorted(found.items(), key=lambda item: item[1].get("warm_s", float("inf"))):
        if "failed" in result:
            table.add_row(name, "failed", *[""] * 7, result["failed"].strip().splitlines()[-1])
            continue
        warm, cold = result["warm_s"], result.get("cold_s")
        table.add_row(
            name,
            f"{warm:.2f}",
            " ".join(f"{s:.1f}" for s in result["warm_s_rounds"]),
            f"{result['warm_cpu_s']:.1f}",
            f"{outcome['prompts'] / warm:.1f}",
            _times(warm, ours.get("warm_s")),
            "" if cold is None else f"{cold:.2f}",
            _times(cold, ours.get("cold_s")),
            f"{result['relative_error']:.1g}" if "relative_error" in result else "",
            " ".join(result.get("streams", [])),
        )
    _STDERR.print(table)
    if "start_workers_s" in ours:
        _STDERR.print(
            f"of ours, planning {ours['plan_s']:.2f} s, starting workers "
            f"{ours['start_workers_s']:.2f} s, the rest "
            f"{ours['warm_s'] - ours['plan_s'] - ours['start_workers_s']:.2f} s"
        )


def show_headlines(result: dict[str, Any]) -> None:
    """The headline keys."""
    table = Table(title="Headlines", title_justify="left")
    table.add_column("key", no_wrap=True)
    table.add_column("value", justify="right")
    for key in sorted(result.keys() - _NOT_HEADLINES):
        table.add_row(key, "not measured" if result[key] is None else f"{result[key]:.3f}")
    _STDERR.print(table)


def _times(theirs: float | None, ours: float | None) -> str:
    return "" if theirs is None or ours is None else f"{theirs / ours:.2f} ×"
