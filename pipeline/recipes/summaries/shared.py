"""Tables and lines that several summaries have."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.evaluation.suites import Point
from pipeline.recipes.findings import Table
from pipeline.report.figures import Line


def curve_table(curves: dict[str, list[Point]]) -> Table:
    """Every suite of every curve, by strength."""
    strengths = sorted({p.strength for points in curves.values() for p in points})
    rows = []
    for name, points in curves.items():
        for suite in dict.fromkeys(p.suite for p in points):
            shares = {p.strength: f"{p.share:.0f}" for p in points if p.suite == suite}
            rows.append([name, suite, *(shares.get(s, "") for s in strengths)])
    headings = ["curve", "share, %", *(f"{s:g}" for s in strengths)]
    return Table("Every strength, test split", headings, rows)


def line(label: str, points: Sequence[Point], suite: str) -> Line:
    """One suite of a curve, with intervals."""
    chosen = sorted((p for p in points if p.suite == suite), key=lambda p: p.strength)
    ends = [p.interval for p in chosen]
    return Line(
        label,
        [p.strength for p in chosen],
        [p.share for p in chosen],
        [low for low, _ in ends],
        [high for _, high in ends],
    )


def with_interval(point: Point) -> str:
    """A point's value with its 95 % interval, for a table."""
    low, high = point.interval
    return f"{point.value:.1f} [{low:.0f}, {high:.0f}]"
