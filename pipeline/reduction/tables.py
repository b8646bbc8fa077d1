"""Tables: a Reduction as a notebook or a terminal shows it, its best layers and heads."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Any, Final

from steering_service.core.site import Site

if TYPE_CHECKING:
    from pipeline.reduction.results import Reduction

_COLUMNS: Final = (
    ("AUROC val.", "auroc_validation", ".3f"),
    ("AUROC test", "auroc_test", ".3f"),
    ("from", "auroc_low_test", ".3f"),
    ("to", "auroc_high_test", ".3f"),
    ("q", "q_test", ".1g"),
    ("accuracy", "accuracy_test", ".3f"),
    ("Cohen's d", "cohens_d_test", ".2f"),
    ("norm", "norm", ".3g"),
    ("sigma", "sigma", ".3g"),
)
_LEAST_Q: Final = 1e-9
"""A q below this is as good as 0."""


def as_text(reduction: Reduction, top: int = 5) -> str:
    """Lines for a terminal."""
    lines = [_title(reduction)]
    for heading, rows in _parts(reduction, top):
        width = max(len(row[0]) for row in rows)
        lines += ["", f"{heading:<{width}}  " + "  ".join(name for name, _, _ in _COLUMNS)]
        for site, *values in rows:
            cells = (
                f"{value:>{len(name)}}"
                for (name, _, _), value in zip(_COLUMNS, values, strict=True)
            )
            lines.append(f"{site:<{width}}  " + "  ".join(cells))
    return "\n".join([*lines, *_notes(reduction)])


def as_html(reduction: Reduction, top: int = 5) -> str:
    """A notebook's cell: plain tables, which take on the notebook's own style."""
    parts = [f"<p><b>{html.escape(_title(reduction))}</b></p>"]
    for heading, rows in _parts(reduction, top):
        names = [heading, *(name for name, _, _ in _COLUMNS)]
        parts.append("<table><thead><tr>")
        parts += [f"<th>{html.escape(name)}</th>" for name in names]
        parts.append("</tr></thead><tbody>")
        for row in rows:
            parts.append(
                "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            )
        parts.append("</tbody></table>")
    parts += [f"<p>{html.escape(note)}</p>" for note in _notes(reduction) if note]
    return "".join(parts)


def _title(reduction: Reduction) -> str:
    rows = reduction.counts
    return (
        f"{reduction.method} of capture {reduction.capture_digest[:12]} "
        f"(reduction {reduction.digest[:12]}), fitted on {rows['train_positive']} positive and "
        f"{rows['train_negative']} negative samples"
    )


def _parts(reduction: Reduction, top: int) -> list[tuple[str, list[list[str]]]]:
    """Headings and their rows, a site's name first; layers or heads may not have been captured."""
    with_heads = {
        Site.parse(name).head is not None for name in reduction.scores["site"].to_pylist()
    }
    return [
        (
            "best heads" if heads else "best layers",
            [
                [row["site"], *(_cell(row, name, form) for _, name, form in _COLUMNS)]
                for row in reduction.ranked(heads=heads)[:top]
            ],
        )
        for heads in sorted(with_heads)
    ]


def _cell(row: dict[str, Any], name: str, form: str) -> str:
    value = row[name]
    if math.isnan(value):
        return "–"
    return f"{max(value, _LEAST_Q) if name == 'q_test' else value:{form}}"


def _notes(reduction: Reduction) -> list[str]:
    notes = ["", "Chosen on validation, reported on test; from, to: 95 % bootstrap of pairs."]
    if reduction.signs_in_doubt:
        notes.append(
            "Signs in doubt, as most pairs and the class means disagree: "
            f"{', '.join(reduction.signs_in_doubt)}."
        )
    if reduction.left_out:
        notes.append(f"Left out as quarantined, with their pairs: {reduction.left_out} samples.")
    return notes
