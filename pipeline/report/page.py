"""The report: one self-contained HTML page for somebody who did not run it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from pipeline.evaluation.suites import Point
from pipeline.reduction.results import Reduction
from pipeline.report.figures import Drawing, Line, heat_map, layer_bars, strength_curve
from steering_service.core.artifact import Artifact
from steering_service.core.site import Site


@dataclass(frozen=True, slots=True)
class Answers:
    """One prompt, answered three times.

    Attributes:
        suite: Which suite it is of.
        plain, up, down: The answers without steering, with it, and with it subtracted.
    """

    suite: str
    prompt: str
    plain: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class Behaviour:
    """One section of the report: a direction and what it does.

    Attributes:
        title: Such as ``Refusal``.
        lead: What the section shows, in a sentence or two with the figures.
        artifact: What was published.
        points: The direction's strength sweep.
        control: By seed, the same suites with a random direction of the same norm.
        up, down: Strengths that were chosen on the validation split.
        answers: A few prompts side by side.
    """

    title: str
    lead: str
    artifact: Artifact
    reduction: Reduction
    points: Sequence[Point]
    control: Mapping[int, Sequence[Point]]
    up: float
    down: float
    answers: Sequence[Answers]


def write_report(
    path: Path, *, title: str, behaviours: Sequence[Behaviour], provenance: Mapping[str, Any]
) -> None:
    """Write the page. It holds everything it shows: no file beside it, nothing from the network.

    Args:
        path: The HTML file, which is replaced.
        provenance: What it was made from and with, shown as a table.
    """
    page = render_page(
        "report.html.j2",
        title=title,
        behaviours=[_section(behaviour) for behaviour in behaviours],
        provenance=provenance,
    )
    path.write_text(page, encoding="utf-8")


def render_page(template: str, **values: Any) -> str:
    """A page of `pipeline.report.templates`, which all extend ``base.html.j2``."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["data_uri"] = _data_uri
    return environment.get_template(template).render(**values)


def _section(behaviour: Behaviour) -> dict[str, Any]:
    reduction = behaviour.reduction
    rows = reduction.scores.to_pylist()
    layers = [row for row in rows if Site.parse(row["site"]).stream == "resid_post"]
    heads = [row for row in rows if Site.parse(row["site"]).head is not None]
    numbers = list(reduction.capture["layers"])
    figures: list[Drawing] = []
    if heads:
        auroc_LH = np.array([row["auroc_test"] for row in heads]).reshape(len(numbers), -1)
        figures.append(heat_map(auroc_LH, numbers, "How well each head tells the classes apart"))
    if layers:
        auroc_L = np.array([row["auroc_test"] for row in layers])
        figures.append(layer_bars(auroc_L, numbers, "How well each layer tells the classes apart"))
    return {
        "title": behaviour.title,
        "lead": behaviour.lead,
        "curve": strength_curve(
            [
                *_lines(behaviour.points),
                *_control_lines(behaviour),
            ],
            [behaviour.down, behaviour.up],
            "What the strength does",
        ),
        "figures": figures,
        "answers": behaviour.answers,
        "up": behaviour.up,
        "down": behaviour.down,
        "best": [
            ("layers", reduction.ranked(heads=False)[:5] if layers else []),
            ("heads", reduction.ranked(heads=True)[:5] if heads else []),
        ],
        "curve_table": _curve_table(behaviour),
        "artifact": behaviour.artifact,
        "interventions": [
            {
                "site": str(item.site),
                "operation": item.operation,
                "positions": item.positions,
                "norm": item.direction.norm,
                "share_of_activation": item.direction.norm / item.direction.activation_norm,
                "sigma": item.direction.sigma,
            }
            for item in behaviour.artifact.interventions
        ],
    }


def _lines(points: Sequence[Point]) -> list[Line]:
    lines = []
    for suite in dict.fromkeys(point.suite for point in points):
        chosen = sorted((p for p in points if p.suite == suite), key=lambda p: p.strength)
        lines.append(
            Line(
                suite,
                [p.strength for p in chosen],
                [p.share for p in chosen],
                [p.interval[0] for p in chosen],
                [p.interval[1] for p in chosen],
            )
        )
    return lines


def _control_lines(behaviour: Behaviour) -> list[Line]:
    """One line a seed and suite, through the plain model at 0; the legend names them once."""
    plain = [point for point in behaviour.points if point.strength == 0]
    lines = [
        replace(line, label=None, is_control=True)
        for points in behaviour.control.values()
        for line in _lines([*points, *plain])
    ]
    return [replace(lines[0], label="random directions of the same norm"), *lines[1:]]


def _curve_table(behaviour: Behaviour) -> dict[str, Any]:
    """The table behind the strength curve: a row a suite, a column a strength."""
    strengths = sorted({point.strength for point in behaviour.points})
    rows = []
    sets = [("", behaviour.points)]
    sets += [(f"random direction {seed}: ", points) for seed, points in behaviour.control.items()]
    for prefix, points in sets:
        for suite in dict.fromkeys(point.suite for point in points):
            by_strength = {p.strength: p for p in points if p.suite == suite}
            rows.append((f"{prefix}{suite}", [by_strength.get(s) for s in strengths]))
    return {"strengths": strengths, "rows": rows}


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
