"""Sections of a reduction's page: a picture each, how to read it, and the table behind it.

Where there is nothing to draw, a section says why.

Shapes: L layers, H heads, M methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.reduction.comparing import (
    ANTIDOTE_FRACTION,
    cosines,
    sparsity,
)
from pipeline.reduction.results import Reduction
from pipeline.report import comparing_figures, separability_figures
from pipeline.report.charts import Chart
from pipeline.report.reduction_lead import METHOD_NAMES
from pipeline.report.score_table import HEADINGS, number, score_table
from pipeline.report.separability_figures import Classes, LayerLine
from pipeline.report.site_scores import SiteScores
from store.activations import ActivationCache


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """What a page is about.

    Attributes:
        name: Of the run.
        reduction: Shown.
        others: Of the same cache by other methods, to compare with.
        caches: Complete, to read held-out rows from; none where activations are not stored.
        corpus_files: Names of the prompt files.
        environment: Device and versions.
    """

    name: str
    reduction: Reduction
    others: Sequence[Reduction]
    caches: Sequence[ActivationCache]
    corpus_files: Sequence[str]
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Section:
    """A picture, the table behind it, and what is said about them.

    Attributes:
        title: Of the section; empty where it belongs to the one before.
        chart: None where there is nothing to draw.
        reading: How to read it, or why there is nothing.
        table: Headings and rows.
        summary: What unfolds the table.
    """

    title: str
    reading: str
    chart: Chart | None = None
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None
    summary: str = ""


def layers_section(scores: SiteScores) -> Section:
    """Separability of every layer, with intervals and controls."""
    title = "Layer by layer"
    if not scores.streams():
        return Section(
            title,
            "No stream with whole layers was captured, only heads. Add a stream such as resid_post "
            "under [capture] to see layers.",
        )
    if scores.reported is None:
        return Section(title, "No layer has a score, as no rows of both classes were held out.")
    best = scores.best(heads=False)
    lines = []
    for stream in scores.streams():
        chosen = scores.of_stream(stream)
        lines.append(
            LayerLine(
                stream,
                [scores.sites[n].layer for n in chosen],
                scores.held_out("auroc")[chosen],
                scores.column("auroc_low_test")[chosen],
                scores.column("auroc_high_test")[chosen],
                scores.control("random")[chosen],
                scores.control("shuffled")[chosen],
                list(chosen).index(best) if best in chosen else None,
            )
        )
    has_arms = any(np.isfinite(line.low_L).any() for line in lines)
    has_controls = any(np.isfinite(line.random_L).any() for line in lines)
    reading = f"AUROC on the {scores.reported} rows; 0.5 is chance."
    reading += " Arms are 95\u00a0% intervals." if has_arms else " Intervals were not computed."
    reading += (
        " Grey marks are controls: what a random direction, and one fitted on shuffled labels, "
        "reach at the same layer. A layer is worth something where it lies clear of them."
        if has_controls
        else " Controls were not computed."
    )
    numbers = scores.numbers(heads=False)
    return Section(
        title,
        reading,
        separability_figures.separability(lines, f"AUROC, {scores.reported} rows"),
        (HEADINGS, score_table(scores, numbers.tolist())),
        "Every layer as a table",
    )


def heads_section(scores: SiteScores) -> Section:
    """Separability of every head, and which do not stand out from chance."""
    title = "Head by head"
    chosen = scores.numbers(heads=True)
    if not len(chosen):
        return Section(
            title, "No heads were captured. Add the stream z under [capture] to see them."
        )
    if scores.reported is None:
        return Section(title, "No head has a score, as no rows of both classes were held out.")
    layers, value_LH = scores.head_grid(scores.held_out("auroc"))
    is_tested = bool(scores.tested[chosen].any())
    _, survives_LH = scores.head_grid(scores.survives if is_tested else np.ones(len(scores.sites)))
    survives_LH = survives_LH.astype(bool)
    best = scores.best(heads=True)
    place = (
        None if best is None else divmod(int(np.flatnonzero(chosen == best)[0]), value_LH.shape[1])
    )
    reading = f"Each cell is one head: AUROC of its direction on the {scores.reported} rows."
    if is_tested:
        num = int((~survives_LH).sum())
        reading += (
            f" Faint and hatched: {num:,} of {len(chosen):,} that do not stand out from chance, "
            "once it counts how many are looked at (q ≥ 0.05)."
            if num
            else f" All {len(chosen):,} survive the permutation control, so none is hatched."
        )
    else:
        reading += " Which of them stand out from chance was not computed."
    reading += " The frame marks the best." if best is not None else ""
    rows = [
        [str(layer)]
        + [
            number(value, 2) + ("" if survives else "*")
            for value, survives in zip(values, survived, strict=True)
        ]
        for layer, values, survived in zip(layers, value_LH, survives_LH, strict=True)
    ]
    headings = ["layer", *(str(head) for head in range(value_LH.shape[1]))]
    return Section(
        title,
        reading,
        separability_figures.head_map(
            value_LH, survives_LH, layers, place, f"AUROC, {scores.reported} rows"
        ),
        (headings, rows),
        "Every head as a table" + (" (* does not stand out from chance)" if is_tested else ""),
    )


def histograms_section(scores: SiteScores) -> Section:
    """Projections of the classes at the best layer and the best head."""
    title = "The two classes, along the best directions"
    shown = [
        Classes(str(scores.sites[n]), scores.histograms[scores.sites[n]], scores.column("sigma")[n])
        for n in (scores.best(heads=False), scores.best(heads=True))
        if n is not None and scores.sites[n] in scores.histograms
    ]
    if not shown:
        return Section(
            title,
            "There are no projections to show: no rows were held out, or this reduction was stored "
            "before projections were kept.",
        )
    rows = [
        [classes.site, number(low, 3), number(high, 3), f"{negative:,}", f"{positive:,}"]
        for classes in shown
        for low, high, negative, positive in zip(
            classes.histogram.edges_B1[:-1],
            classes.histogram.edges_B1[1:],
            classes.histogram.negative_B,
            classes.histogram.positive_B,
            strict=True,
        )
        if negative or positive
    ]
    return Section(
        title,
        f"How far the {scores.reported} rows lie along the unit direction, from half way between "
        "the classes' means. Little overlap means that one threshold tells them apart.",
        separability_figures.class_histograms(shown, str(scores.reported)),
        (["site", "from", "to", "negative rows", "positive rows"], rows),
        "The bins as a table",
    )


def agreement_sections(subject: Subject, scores: SiteScores) -> tuple[Section, Section]:
    """Cosines between methods at the best layer, and between the layers of its stream."""
    reduction = subject.reduction
    best = _shown_site(scores)
    site = scores.sites[best]
    compared = [reduction, *subject.others]
    names = [METHOD_NAMES[other.method] for other in compared]
    if len(compared) > 1:
        vectors = [other.at_site(other.directions_LW, site) for other in compared]
        cosine_MM = cosines(np.stack(vectors))
        methods = Section(
            "Do methods and layers agree?",
            f"Cosine between the directions that methods find at {site}: 1 is the same direction, "
            "0 unrelated.",
            comparing_figures.method_cosines(cosine_MM, names, str(site)),
            (
                ["", *names],
                [[n, *(number(v, 2) for v in r)] for n, r in zip(names, cosine_MM, strict=True)],
            ),
            "Between methods, as a table",
        )
    else:
        methods = Section(
            "Do methods and layers agree?",
            f"Only one method, the {METHOD_NAMES[reduction.method]}, has been computed for this "
            "capture, so there is none to compare it with: name more under [reduce], and run "
            "`steerage reduce` again.",
        )
    if site.head is not None:
        return methods, Section(
            "",
            "Directions of heads of different layers live in spaces of their own, so there is no "
            "cosine between them; a stream such as resid_post would have one.",
        )
    layers = [scores.sites[n].layer for n in scores.of_stream(site.stream)]
    if len(layers) < 2:
        return methods, Section(
            "", "Only one layer was captured, so there is none to compare it with."
        )
    cosine_LL = cosines(reduction.directions_LW[site.stream])
    between = Section(
        "",
        f"Cosine between the directions of the layers of {site.stream}. A block of high values is "
        "one direction that the model carries on from layer to layer.",
        comparing_figures.layer_cosines(cosine_LL, layers, site.stream),
        (
            ["layer", *map(str, layers)],
            [[str(n), *(number(v, 2) for v in r)] for n, r in zip(layers, cosine_LL, strict=True)],
        ),
        "Between layers, as a table",
    )
    return methods, between


def sparsity_section(subject: Subject, scores: SiteScores) -> Section:
    """Norm and AUROC that fewer entries of the best direction keep."""
    title, reduction = "How few entries would do", subject.reduction
    site = scores.sites[_shown_site(scores)]
    if not reduction.at_site(reduction.directions_LW, site).any():
        return Section(title, f"The direction at {site} is zero, as nothing varies there.")
    split = scores.reported or "test"
    found = sparsity(reduction.direction(site), subject.caches, split)
    curve, at = found.largest, found.at(ANTIDOTE_FRACTION)
    has_auroc = bool(np.isfinite(curve.auroc_K).any())
    reading = (
        f"What is left at {site} where only the largest of its {found.width:,} entries are kept."
    )
    if at is not None:
        reading += (
            f" 5\u00a0% of them ({curve.num_kept_K[at]:,}) hold "
            f"{100 * curve.norm_share_K[at]:.0f}\u00a0% of the norm"
        )
        if has_auroc:
            reading += (
                f" and an AUROC of {number(curve.auroc_K[at])}, against "
                f"{number(curve.auroc_K[-1])} for all, on {found.num_samples:,} {split} rows. At "
                "equal strength, a mask lowers the dose as the norm falls"
            )
        reading += "."
    else:
        reading += " 5\u00a0% of them would be none."
    if not has_auroc:
        reading += (
            " The AUROC is not known, as no rows of both classes were held out."
            if subject.caches
            else " The AUROC is not known, as the activations are not in the store."
        )
    rows = zip(
        *(curve.num_kept_K, curve.norm_share_K, curve.auroc_K, found.random.auroc_K), strict=True
    )
    return Section(
        title,
        reading,
        comparing_figures.sparsity_curves(found, split),
        (
            ["entries kept", "share", "norm kept", "AUROC", "AUROC, entries at random"],
            [
                [
                    f"{num:,}",
                    f"{100 * num / found.width:.3g}\u00a0%",
                    f"{100 * norm:.1f}\u00a0%",
                    *(number(auroc), number(random)),
                ]
                for num, norm, auroc, random in rows
            ],
        ),
        "The curve as a table",
    )


def _shown_site(scores: SiteScores) -> int:
    """The best layer, or head where there is none; the middle one where nothing has a score."""
    for heads in (False, True):
        if (best := scores.best(heads=heads)) is not None:
            return best
    chosen = scores.numbers(heads=not len(scores.numbers(heads=False)))
    return int(chosen[len(chosen) // 2])
