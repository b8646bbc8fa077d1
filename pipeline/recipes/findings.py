"""Findings: what a recipe gives back, for machines, for a terminal and for a page."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import rich.table
from rich.console import Console
from rich.markup import escape

from pipeline.evaluation.completions import write_whole
from pipeline.report.environment import environment
from pipeline.report.figures import Drawing
from pipeline.report.page import render_page


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headings; every cell is text."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Findings:
    """The outcome of one recipe.

    Attributes:
        title: Such as ``Head-specific intervention``.
        lead: What was found, in a few sentences with the figures.
        summary: Figures by name, for machines; JSON values. Shares are in points, 0 to 100.
        tables: For people.
        figures: For the page.
        artifacts: Digests that were delivered, by name.
        completions: Every answer with what it was judged, a mapping of columns each.
    """

    title: str
    lead: str
    summary: Mapping[str, Any]
    tables: Sequence[Table] = ()
    figures: Sequence[Drawing] = ()
    artifacts: Mapping[str, str] = field(default_factory=dict)
    completions: Sequence[Mapping[str, Any]] = ()


def write_findings(found: Findings, name: str, out: Path) -> Path:
    """Write OUT/NAME.json, OUT/NAME.html and OUT/NAME.parquet, if there are completions.

    Returns:
        The page's path.
    """
    out.mkdir(parents=True, exist_ok=True)
    made_with = environment()
    record = {
        "title": found.title,
        "summary": dict(found.summary),
        "artifacts": dict(found.artifacts),
        "environment": made_with,
    }
    write_whole(out / f"{name}.json", json.dumps(record, indent=1, sort_keys=True).encode())
    if found.completions:
        sink = io.BytesIO()
        table = pa.Table.from_pylist([dict(row) for row in found.completions])
        pq.write_table(table, sink, compression="zstd")
        write_whole(out / f"{name}.parquet", sink.getvalue())
    page = render_page(
        "findings.html.j2",
        title=found.title,
        lead=found.lead,
        figures=found.figures,
        tables=found.tables,
        provenance={f"artifact {key}": value for key, value in found.artifacts.items()} | made_with,
    )
    path = out / f"{name}.html"
    write_whole(path, page.encode())
    return path


def print_findings(found: Findings, console: Console) -> None:
    """The lead and the first table, for a terminal; the page has the rest."""
    console.print(found.lead, highlight=False)
    for table in found.tables[:1]:
        shown = rich.table.Table(title=table.title, title_justify="left")
        for number, heading in enumerate(table.headings):
            shown.add_column(heading, justify="left" if number == 0 else "right")
        for row in table.rows:
            shown.add_row(*(escape(cell) for cell in row))
        console.print(shown)
