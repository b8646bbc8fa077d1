"""The page of a reduction: where the classes can be told apart, how well, and what to doubt."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from pipeline.evaluation.completions import write_whole
from pipeline.reduction.results import Reduction
from pipeline.report.page import render_page
from pipeline.report.reduction_lead import METHOD_NAMES, doubts, lead, rows_of
from pipeline.report.reduction_sections import (
    Subject,
    agreement_sections,
    heads_section,
    histograms_section,
    layers_section,
    sparsity_section,
)
from pipeline.report.score_table import HEADINGS, score_table
from pipeline.report.site_scores import SiteScores

REPORT_FILE: Final = "report.html"
FIGURES: Final = ("layers", "heads", "histograms", "cosines_methods", "cosines_layers", "sparsity")
_BEST_SHOWN: Final = 8
_SPLITS: Final = ("train", "validation", "test")


def write_reduction_report(folder: Path, subject: Subject) -> dict[str, Any]:
    """Write `REPORT_FILE` and a PNG a figure, each whole or not at all.

    The page needs no file beside it. It is written last; figures that an earlier report left and
    this one lacks are removed.

    Args:
        folder: Made when missing.

    Returns:
        The figures of the lead, and the paths written; JSON values.

    Raises:
        pipeline.errors.InvalidInput: The folder cannot be written.
        store.errors.Corrupt: The cache is damaged.
    """
    reduction = subject.reduction
    scores = SiteScores.of(reduction)
    comparing = agreement_sections(subject, scores)
    sections = {
        "layers": layers_section(scores),
        "heads": heads_section(scores),
        "histograms": histograms_section(scores),
        "methods": comparing[0],
        "between": comparing[1],
        "sparsity": sparsity_section(subject, scores),
    }
    sentences, warnings = lead(reduction, scores), doubts(reduction, scores)
    page = render_page(
        "reduction.html.j2",
        title=f"{subject.name}: where the model tells the classes apart",
        subtitle=[
            f"Method: {METHOD_NAMES[reduction.method]}",
            f"model “{_model(reduction, 'name')}”",
            f"reduction {reduction.digest[:12]}",
        ],
        lead=sentences,
        doubts=warnings,
        sections=sections,
        best=[
            (name, _best(scores, heads=heads))
            for name, heads in (("layers", False), ("heads", True))
            if len(scores.numbers(heads=heads))
        ],
        chosen=scores.chosen,
        reported=scores.reported,
        headings=HEADINGS,
        rows=[(split, *(f"{num:,}" for num in rows_of(reduction, split))) for split in _SPLITS],
        left_out=reduction.left_out,
        provenance=_provenance(subject),
    )
    charts = [s.chart for s in sections.values() if s.chart is not None]
    for chart in charts:
        write_whole(folder / f"{chart.name}.png", chart.png)
    write_whole(folder / REPORT_FILE, page.encode())
    for name in set(FIGURES) - {chart.name for chart in charts}:
        (folder / f"{name}.png").unlink(missing_ok=True)
    return {
        "report": str(folder / REPORT_FILE),
        "figures": [str(folder / f"{chart.name}.png") for chart in charts],
        "reduction": reduction.digest,
        "capture": reduction.capture_digest,
        "method": reduction.method,
        "compared_with": [other.method for other in subject.others],
        "best_layer": _figures_of(scores, scores.best(heads=False)),
        "best_head": _figures_of(scores, scores.best(heads=True)),
        "reported_on": scores.reported,
        "heads": len(scores.numbers(heads=True)),
        "heads_surviving": _num_surviving(scores, heads=True),
        "layers": len(scores.numbers(heads=False)),
        "layers_surviving": _num_surviving(scores, heads=False),
        "lead": sentences,
        "doubts": warnings,
    }


def _best(scores: SiteScores, *, heads: bool) -> list[list[str]]:
    return score_table(scores, scores.ranked(heads=heads)[:_BEST_SHOWN])


def _figures_of(scores: SiteScores, site: int | None) -> dict[str, Any] | None:
    """What the lead says of a site, for machines."""
    if site is None:
        return None
    return {
        "site": str(scores.sites[site]),
        "auroc": float(scores.held_out("auroc")[site]),
        "low": float(scores.column("auroc_low_test")[site]),
        "high": float(scores.column("auroc_high_test")[site]),
        "q": float(scores.column("q_test")[site]),
        "random": float(scores.control("random")[site]),
        "shuffled": float(scores.control("shuffled")[site]),
        "split_half_cosine": float(scores.column("split_half_cosine")[site]),
    }


def _num_surviving(scores: SiteScores, *, heads: bool) -> int | None:
    chosen = scores.numbers(heads=heads)
    tested = chosen[scores.tested[chosen]]
    return int(scores.survives[tested].sum()) if len(tested) else None


def _model(reduction: Reduction, field: str) -> str:
    return str(reduction.capture.get("model", {}).get(field, "unknown"))


def _provenance(subject: Subject) -> dict[str, str]:
    reduction, capture = subject.reduction, subject.reduction.capture
    layers = list(capture["layers"])
    parameters = ", ".join(f"{name} = {value}" for name, value in reduction.parameters.items())
    others = ", ".join(f"{other.method} {other.digest[:12]}" for other in subject.others)
    return {
        "model": f"{_model(reduction, 'name')}, {_model(reduction, 'dtype')}",
        "weights": f"sha256 {_model(reduction, 'fingerprint')}",
        "prompt files": ", ".join(subject.corpus_files),
        "corpus": str(capture.get("corpus", "unknown")),
        "capture": reduction.capture_digest,
        **({"and of captures": ", ".join(reduction.extends)} if reduction.extends else {}),
        "streams": ", ".join(capture.get("streams", reduction.directions_LW)),
        "layers": f"{layers[0]} to {layers[-1]}, {len(layers)} of them",
        "tokens": str(capture.get("tokens", "unknown")),
        "reduction": reduction.digest,
        "method": reduction.method + (f" ({parameters})" if parameters else ""),
        **({"compared with": others} if others else {}),
        "scores of every site": f"reductions/{reduction.digest}/scores.parquet in the store",
        **subject.environment,
    }
