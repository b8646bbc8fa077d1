"""What weighted steering tells."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.recipes import weighted
from pipeline.recipes.findings import Findings, Table
from pipeline.recipes.summaries.shared import curve_table, line
from pipeline.report.figures import strength_curve


def weighted_findings(outcome: weighted.Outcome, settings: weighted.Settings) -> Findings:
    """Weighted activation steering."""
    suites = list(dict.fromkeys(p.suite for p in outcome.points["controller"]))
    attacks, harmful, benign, lookalikes, skill = suites[:5]
    strength, fixed = outcome.strength, outcome.fixed_strength

    def at(curve: str, suite: str | Sequence[str]) -> float:
        return outcome.share(curve, suite, strength if curve == "controller" else fixed)

    def plain(suite: str | Sequence[str]) -> float:
        return outcome.share("controller", suite, 0.0)

    def balanced(suites: Sequence[str]) -> float:
        return outcome.share("constant", suites, outcome.balanced_strength)

    all_harmful, all_benign = (attacks, harmful, *suites[5:]), (benign, lookalikes)

    summary: dict[str, object] = {
        # All harmful requests of the test split: plain, in seen and in unseen wrappers.
        "was_harmful_refusal": at("controller", all_harmful),
        "was_harmful_refusal_fixed": at("constant", all_harmful),
        "was_harmful_refusal_balanced": balanced(all_harmful),
        "was_harmful_refusal_plain": plain(all_harmful),
        # All benign ones, look-alikes among them.
        "was_benign_refusal": at("controller", all_benign),
        "was_benign_refusal_fixed": at("constant", all_benign),
        "was_benign_refusal_balanced": balanced(all_benign),
        "was_benign_refusal_plain": plain(all_benign),
        "was_skill": at("controller", skill),
        "was_skill_plain": plain(skill),
        "was_gate_auroc": round(outcome.gate_auroc, 4),
        "was_gate_auroc_by": {k: round(v, 4) for k, v in outcome.gate_auroc_by.items()},
        "was_layer_weights": {k: round(v, 4) for k, v in outcome.weights.items()},
        "was_strength": strength,
        "was_fixed_strength": fixed,
        "was_balanced_strength": outcome.balanced_strength,
        # Random directions in place of the trained ones, under the same controller.
        "was_random_shift": max(
            (
                point.share - plain(point.suite)
                for name, points in outcome.points.items()
                if name.startswith("random")
                for point in points
            ),
            key=abs,
        ),
        "was_threshold": round(outcome.scores["threshold"], 4),
        "was_shares": {
            suite: {
                "plain": plain(suite),
                "controller": at("controller", suite),
                "fixed": at("constant", suite),
            }
            for suite in suites
        },
    }
    rows = [
        [name, f"{plain(group):.1f}", f"{at('controller', group):.1f}"]
        + [f"{at('constant', group):.1f}"]
        + [""] * ("reference" in outcome.points)
        for name, group in (
            ("all harmful requests refused", all_harmful),
            ("all benign requests refused", all_benign),
        )
    ]
    reference: dict[str, float] = {}
    for suite in suites:
        row = [suite, f"{plain(suite):.1f}", f"{at('controller', suite):.1f}"]
        row.append(f"{at('constant', suite):.1f}")
        if "reference" in outcome.points:
            found = [
                p.share
                for p in outcome.points["reference"]
                if p.suite == suite and p.strength == max(weighted.REFERENCE_STRENGTHS)
            ]
            row.append(f"{found[0]:.1f}" if found else "")
            if found:
                reference[suite] = found[0]
        rows.append(row)
    if reference:
        summary["was_reference_shares"] = reference
    headings = ["share", "plain", f"controller, {strength:g}", f"constant, {fixed:g}"]
    if "reference" in outcome.points:
        headings.append("reference_compat")
    return Findings(
        title="Weighted activation steering",
        lead=(
            f"With the controller at strength {strength:g}, {at('controller', all_harmful):.1f} % "
            f"of the harmful requests are refused ({plain(all_harmful):.1f} % unsteered) and "
            f"{at('controller', all_benign):.1f} % of the benign ones, look-alikes among them "
            f"({plain(all_benign):.1f} % unsteered). The constant strength that refuses most, "
            f"{fixed:g}, gives {at('constant', all_harmful):.1f} % and "
            f"{at('constant', all_benign):.1f} %; the one with the best balance, "
            f"{outcome.balanced_strength:g}, gives {balanced(all_harmful):.1f} % and "
            f"{balanced(all_benign):.1f} %. "
            f"The gate's AUROC over held-out requests is "
            f"{outcome.gate_auroc:.3f}."
        ),
        summary=summary,
        tables=[
            Table("Test split, %", headings, rows),
            Table(
                "Gate's AUROC, as the node decided",
                ["harmful / benign", "AUROC"],
                [[name, f"{value:.3f}"] for name, value in outcome.gate_auroc_by.items()],
            ),
            Table(
                "Mean weight over harmful training requests; one half is where training began",
                ["site", "weight"],
                [[site, f"{value:.4f}"] for site, value in outcome.weights.items()],
            ),
            curve_table(outcome.points),
        ],
        figures=[
            strength_curve(
                [
                    line(f"{suite}, {name}", outcome.points[name], suite)
                    for name in ("controller", "constant")
                    for suite in (attacks, lookalikes)
                ],
                [strength, fixed],
                "Controller and constant strength",
            )
        ],
        artifacts=outcome.digests,
    )
