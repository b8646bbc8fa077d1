"""The first lines of a reduction's page: what was found, and what to doubt about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from pipeline.reduction.held_out import MOST_SCORED
from pipeline.reduction.results import Reduction
from pipeline.report.score_table import interval, number
from pipeline.report.site_scores import SIGNIFICANT, SiteScores

METHOD_NAMES: Final = {
    "difference_of_means": "difference of means",
    "paired_difference": "paired difference",
    "pca": "PCA of pairs",
    "probe": "logistic probe",
    "lda": "whitened difference",
}
_FEW_ROWS: Final = 50
_WIDE: Final = 0.1
_UNSTABLE: Final = 0.8
_CLOSE: Final = 0.05
_FAR: Final = 0.75
_SITES_NAMED: Final = 5


def rows_of(reduction: Reduction, split: str) -> tuple[int, int]:
    """Positive and negative samples of a split."""
    counts = reduction.counts
    return counts[f"{split}_positive"], counts[f"{split}_negative"]


def lead(reduction: Reduction, scores: SiteScores) -> list[str]:
    """Two or three sentences with the figures that matter."""
    if scores.reported is None:
        return [
            "Nothing was held out that has rows of both classes, so no layer or head has a score: "
            "the directions are there, but how well they tell the classes apart is not known. "
            "Raise prompts.validation_share and prompts.test_share and reduce again."
        ]
    best = [("layer", scores.best(heads=False)), ("head", scores.best(heads=True))]
    found = [(kind, site) for kind, site in best if site is not None]
    parts = [f"the best {kind} is {_with_auroc(scores, site)}" for kind, site in found]
    site = found[0][1]
    sentences = [
        f"Along the {METHOD_NAMES[reduction.method]}, {'; '.join(parts)}. That is on "
        f"{_num_scored(reduction, scores.reported)} rows that nothing was fitted on; 0.5 is "
        "chance, 1 is perfect.",
        _survivors(scores) + _controls(scores, site),
        _stability(scores, site) + _rows(reduction, scores),
    ]
    return [sentence.strip() for sentence in sentences if sentence]


def doubts(reduction: Reduction, scores: SiteScores) -> list[str]:
    """What a reader should hold against the figures, in plain words."""
    found = [_few_rows(reduction, "train")]
    if scores.reported is not None:
        found += [
            _few_rows(reduction, scores.reported),
            _same_rows(scores),
            *(
                doubt
                for site in (scores.best(heads=False), scores.best(heads=True))
                if site is not None
                for doubt in _of_site(scores, site)
            ),
        ]
    if reduction.signs_in_doubt:
        found.append(
            f"The sign is in doubt at {_named(reduction.signs_in_doubt)}: most training pairs and "
            "the class means disagree about which side is the positive class."
        )
    if reduction.left_out:
        found.append(
            f"{reduction.left_out:,} rows were left out, as they or others of their pairs are in "
            "quarantine."
        )
    return [doubt for doubt in found if doubt]


def _with_auroc(scores: SiteScores, site: int) -> str:
    low, high = scores.column("auroc_low_test")[site], scores.column("auroc_high_test")[site]
    text = f"{scores.sites[site]} with AUROC {number(scores.held_out('auroc')[site])}"
    if np.isfinite(high - low):
        text += f" (95\u00a0% interval {interval(low, high)})"
    return text


def _num_scored(reduction: Reduction, split: str) -> str:
    """Of more rows, scores are of a draw."""
    rows = sum(rows_of(reduction, split))
    return f"{MOST_SCORED:,} of {rows:,} {split}" if rows > MOST_SCORED else f"{rows:,} {split}"


def _stability(scores: SiteScores, site: int) -> str:
    cosine = scores.column("split_half_cosine")[site]
    if np.isnan(cosine):
        return ""
    return (
        f"Fitted on either half of the training rows alone, the two directions at "
        f"{scores.sites[site]} have a cosine of {number(cosine, 2)}. "
    )


def _rows(reduction: Reduction, scores: SiteScores) -> str:
    text = f"{sum(rows_of(reduction, 'train')):,} rows were fitted on"
    if scores.chosen != scores.reported:
        text += f"; the best sites were chosen on {sum(rows_of(reduction, 'validation')):,} others"
    return f"{text}."


def _survivors(scores: SiteScores) -> str:
    parts = []
    for heads, name in ((True, "heads"), (False, "layers")):
        chosen = scores.numbers(heads=heads)
        tested = chosen[scores.tested[chosen]]
        if len(tested):
            num = int(scores.survives[tested].sum())
            parts.append(f"{num:,} of {len(tested):,} {name}")
    if not parts:
        return ""
    verb = "survives" if len(parts) == 1 and parts[0].startswith("1 ") else "survive"
    return f"{' and '.join(parts)} {verb} the permutation control (q < {SIGNIFICANT}). "


def _controls(scores: SiteScores, site: int) -> str:
    random, shuffled = scores.control("random")[site], scores.control("shuffled")[site]
    parts = []
    if np.isfinite(random):
        parts.append(f"a random direction reaches {number(random, 2)}")
    if np.isfinite(shuffled):
        parts.append(
            f"one fitted on shuffled labels {'' if parts else 'reaches '}{number(shuffled, 2)}"
        )
    return f"At {scores.sites[site]}, {' and '.join(parts)}." if parts else ""


def _few_rows(reduction: Reduction, split: str) -> str:
    positive, negative = rows_of(reduction, split)
    if min(positive, negative) >= _FEW_ROWS:
        return ""
    what = "What was fitted" if split == "train" else "Every figure here"
    return (
        f"Few {split} rows: {positive:,} positive and {negative:,} negative. {what} may well look "
        "otherwise on other prompts."
    )


def _same_rows(scores: SiteScores) -> str:
    if scores.chosen != scores.reported:
        return ""
    lacks = "validation" if scores.reported == "test" else "test"
    return (
        f"The {lacks} split lacks rows of a class, so the best sites were chosen and are reported "
        f"on the same {scores.reported} rows: the best are partly the luckiest."
    )


def _of_site(scores: SiteScores, site: int) -> list[str]:
    name, value = scores.sites[site], scores.held_out("auroc")[site]
    low, high = scores.column("auroc_low_test")[site], scores.column("auroc_high_test")[site]
    found = []
    if high - low > _WIDE:
        found.append(
            f"Wide interval at {name}: the AUROC may be anything in {interval(low, high)}."
        )
    if low == high == 1:
        found.append(
            f"At {name} every test row lies on its class's side, so its interval has no width. "
            "That says these rows are easy, not that the next ones will be."
        )
    q = scores.column("q_test")[site]
    if q >= SIGNIFICANT:
        found.append(f"{name} does not survive the permutation control (q = {number(q, 2)}).")
    bar = low if np.isfinite(low) else value
    reach = (scores.control("random")[site], scores.control("shuffled")[site])
    words = ("a random direction", "one fitted on shuffled labels")
    near = [
        f"{what} ({number(control, 2)})"
        for what, control in zip(words, reach, strict=True)
        if control >= bar - _CLOSE
    ]
    if near:
        why = (
            "the classes differ along almost any direction there, so the AUROC does not single "
            "this one out"
            if np.nanmax(reach) > _FAR
            else "its AUROC is hardly above chance"
        )
        verb = "come" if len(near) > 1 else "comes"
        found.append(
            f"At {name}, {' and '.join(near)} {verb} about as far as the fitted direction: {why}."
        )
    half = scores.column("split_half_cosine")[site]
    if half < _UNSTABLE:
        found.append(
            f"The direction at {name} hangs on which rows it is fitted on: that of one half has a "
            f"cosine of only {number(half, 2)} with that of the other."
        )
    return found


def _named(sites: Sequence[str]) -> str:
    more = len(sites) - _SITES_NAMED
    return ", ".join(sites[:_SITES_NAMED]) + (f" and {more:,} more" if more > 0 else "")
