"""What the search for heads and layers tells."""

from __future__ import annotations

import numpy as np

from pipeline.recipes import choice
from pipeline.recipes.findings import Findings, Table
from pipeline.recipes.summaries.shared import with_interval
from pipeline.report.figures import Drawing, heat_map
from pipeline.report.recipe_figures import Bar, bars

_NAMES = {"hsi": "HSI", "iti": "ITI", "caa": "CAA"}


def choice_findings(outcome: choice.Outcome, settings: choice.Settings) -> Findings:
    """HSI, ITI and CAA."""
    summary: dict[str, object] = {"plain_share": outcome.plain, "num_heads": outcome.num_heads}
    rows, shown, artifacts = [], [], {}
    for method, found in outcome.chosen.items():
        sites = [str(site) for site in found.candidate.sites]
        summary |= {
            f"{method}_shift": found.shift,
            f"{method}_strength": found.candidate.strength,
            f"{method}_sites": sites,
            f"{method}_perplexity_ratio": round(found.ratio, 4),
            f"{method}_undefined": 100.0 * len(found.steered.undefined) / found.steered.num,
        }
        artifacts[method] = found.digest
        rows.append(
            [
                _NAMES[method],
                " ".join(sites),
                f"{found.candidate.strength:g}",
                with_interval(found.plain),
                with_interval(found.steered),
                f"{found.shift:+.1f}",
                f"{found.ratio:.2f}",
            ]
        )
        shown.append(Bar(_NAMES[method], found.shift))
    every = [shift for shifts in outcome.random_directions.values() for shift in shifts]
    for name, label, shifts in (
        ("random_heads", "random heads", outcome.random_heads),
        *(
            (f"{method}_random_direction", f"{_NAMES[method]} at random directions", found_shifts)
            for method, found_shifts in outcome.random_directions.items()
        ),
    ):
        if shifts:
            summary[f"{name}_shift"] = float(np.mean(shifts))
            summary[f"{name}_shift_largest"] = max(shifts, key=abs)
            rows.append(
                [f"{label}, mean of {len(shifts)}", "", "", "", "", f"{np.mean(shifts):+.1f}", ""]
            )
            shown.append(Bar(label, float(np.mean(shifts)), is_control=True))
    # Over all methods together.
    summary["random_direction_shift"] = float(np.mean(every))
    if outcome.prompt is not None:
        shift = outcome.prompt - outcome.plain
        summary["prompt_shift"] = shift
        rows.append(["asked by a prompt", "", "", "", f"{outcome.prompt:.1f}", f"{shift:+.1f}", ""])
        shown.append(Bar("asked by a prompt", shift, is_control=True))
    figures: list[Drawing] = [
        bars(shown, "Change of the share of the target choice, points", "held-out questions")
    ]
    if outcome.single_LH is not None:
        figures.append(
            heat_map(
                outcome.single_LH,
                range(len(outcome.single_LH)),
                "Each head alone, its best strength",
                ends=(0.0, 100.0),
                label="target choice, %",
                decimals=0,
            )
        )
    names = " and ".join(_NAMES[m] for m in outcome.chosen)
    text = "; ".join(
        f"{_NAMES[m]} moves it by {f.shift:+.0f} points ({len(f.candidate.sites)} "
        f"{'layer' if m == 'caa' else 'heads' if len(f.candidate.sites) > 1 else 'head'})"
        for m, f in outcome.chosen.items()
    )
    how = (
        "Heads, layers and strengths are the published ones."
        if settings.published is not None
        else "Each was chosen on the validation split, within "
        f"{settings.perplexity_cap:g} times the plain model's perplexity on its own answers to "
        "neutral prompts."
    )
    return Findings(
        title=f"{names} on two-choice questions",
        lead=(
            f"The plain model gives the target choice on {outcome.plain:.0f} % of the held-out "
            f"questions. {text}. {how}"
        ),
        summary=summary,
        tables=[
            Table(
                "Held-out questions answered with the target choice, %",
                [
                    "method",
                    "sites",
                    "strength",
                    "plain",
                    "steered",
                    "change",
                    "perplexity, as chosen by",
                ],
                rows,
            ),
            _candidates_table(outcome),
        ],
        figures=figures,
        artifacts=artifacts,
    )


def _candidates_table(outcome: choice.Outcome) -> Table:
    rows = []
    for method, candidates in outcome.candidates.items():
        best = sorted(candidates, key=lambda c: (-c.share, c.ratio))[:10]
        rows += [
            [
                _NAMES[method],
                " ".join(map(str, c.sites)),
                f"{c.strength:g}",
                f"{c.share:.0f}",
                f"{c.undefined:.0f}",
                f"{c.ratio:.2f}",
            ]
            for c in best
        ]
    return Table(
        "The ten furthest candidates of each method, validation split",
        ["method", "sites", "strength", "target, %", "undefined, %", "perplexity"],
        rows,
    )
