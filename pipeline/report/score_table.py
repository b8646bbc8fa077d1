"""Figures of a reduction as text, and all scores of a site as a row of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from pipeline.report.site_scores import SiteScores

HEADINGS: Final = (
    "site",
    "AUROC",
    "95\u00a0% interval",
    "q",
    "AUROC, choosing",
    "accuracy",
    "pairs in order",
    "Cohen's d",
    "split-half cosine",
    "random control",
    "shuffled control",
    "norm",
    "sigma",
    "activation norm",
)


def score_table(scores: SiteScores, numbers: Sequence[int]) -> list[list[str]]:
    """All scores of some sites, as text, under `HEADINGS`."""
    rows = []
    for n in numbers:
        low, high = scores.column("auroc_low_test")[n], scores.column("auroc_high_test")[n]
        rows.append(
            [
                str(scores.sites[n]),
                number(scores.held_out("auroc")[n]),
                interval(low, high),
                _q(scores.column("q_test")[n]),
                number(scores.column(f"auroc_{scores.chosen}")[n]),
                number(scores.held_out("accuracy")[n]),
                number(scores.held_out("pair_accuracy")[n]),
                number(scores.held_out("cohens_d")[n], 2),
                number(scores.column("split_half_cosine")[n], 2),
                number(scores.control("random")[n], 2),
                number(scores.control("shuffled")[n], 2),
                *(_short(scores.column(name)[n]) for name in ("norm", "sigma", "activation_norm")),
            ]
        )
    return rows


def number(value: float | None, decimals: int = 3) -> str:
    """A figure as the page writes it; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    # A minus, not a hyphen, beside which a line may break.
    return f"{value:.{decimals}f}".replace("-", "\u2212")


def interval(low: float, high: float) -> str:
    """Both ends, or a dash."""
    return "–" if math.isnan(low) or math.isnan(high) else f"{number(low)}\u2013{number(high)}"


def _q(value: float) -> str:
    return "< 0.001" if value < 0.001 else number(value)


def _short(value: float) -> str:
    """Three digits that count, never as a power of ten up to a million."""
    if math.isnan(value) or not 1e-3 <= abs(value) < 1e6:
        return "–" if math.isnan(value) else f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
