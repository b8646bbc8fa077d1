"""From what a recipe measured to what it tells: figures for machines, tables and drawings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.evaluation.statistics import Gap, Interval
from pipeline.evaluation.suites import Point
from pipeline.recipes import antidote, choice, faking, weighted
from pipeline.recipes.findings import Findings, Table
from pipeline.report.figures import Drawing, Line, strength_curve
from pipeline.report.recipe_figures import Bar, bars, share_map

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
                _with_interval(found.plain),
                _with_interval(found.steered),
                f"{found.shift:+.1f}",
                f"{found.ratio:.2f}",
            ]
        )
        shown.append(Bar(_NAMES[method], found.shift))
    for name, shifts in (
        ("random_heads", outcome.random_heads),
        ("random_direction", outcome.random_directions),
    ):
        if shifts:
            summary[f"{name}_shift"] = float(np.mean(shifts))
            summary[f"{name}_shift_largest"] = max(shifts, key=abs)
            label = name.replace("_", " ")
            rows.append(
                [f"{label}, mean of {len(shifts)}", "", "", "", "", f"{np.mean(shifts):+.1f}", ""]
            )
            shown.append(Bar(label, float(np.mean(shifts)), is_control=True))
    if outcome.prompt is not None:
        summary["prompt_shift"] = outcome.prompt - outcome.plain
        rows.append(["asked by a prompt", "", "", "", f"{outcome.prompt:.1f}", "", ""])
        shown.append(Bar("asked by a prompt", outcome.prompt - outcome.plain, is_control=True))
    figures: list[Drawing] = [
        bars(shown, "Change of the share of the target choice, points", "held-out questions")
    ]
    if outcome.single_LH is not None:
        figures.append(share_map(outcome.single_LH, "Each head alone, its best strength"))
    names = " and ".join(_NAMES[m] for m in outcome.chosen)
    text = "; ".join(
        f"{_NAMES[m]} moves it by {f.shift:+.0f} points ({len(f.candidate.sites)} "
        f"{'layer' if m == 'caa' else 'heads' if len(f.candidate.sites) > 1 else 'head'})"
        for m, f in outcome.chosen.items()
    )
    return Findings(
        title=f"{names} on two-choice questions",
        lead=(
            f"The plain model gives the target choice on {outcome.plain:.0f} % of the held-out "
            f"questions. {text}. Each was chosen on the validation split, within "
            f"{settings.perplexity_cap:g} times the plain model's perplexity on its own answers to "
            "neutral prompts."
        ),
        summary=summary,
        tables=[
            Table(
                "Held-out questions answered with the target choice, %",
                ["method", "sites", "strength", "plain", "steered", "change", "perplexity"],
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


def antidote_findings(outcome: antidote.Outcome, settings: antidote.Settings) -> Findings:
    """Jailbreak Antidote."""
    chosen, points = outcome.chosen, outcome.points["sparse"]
    by = {(p.suite, p.strength): p for p in points}
    suites = list(dict.fromkeys(p.suite for p in points))
    attacks, lookalikes, skill = suites[:3]

    def shift(suite: str) -> float:
        return by[suite, chosen.strength].share - by[suite, 0.0].share

    gain, cost, loss = shift(attacks), shift(lookalikes), -shift(skill)
    random = [p.share - by[p.suite, 0.0].share for found in outcome.random.values() for p in found]
    summary = {
        "antidote_refusal_gain": gain,
        "antidote_benign_cost": cost,
        "antidote_skill_cost": loss,
        "antidote_strength": chosen.strength,
        "antidote_layers": list(chosen.shape.layers),
        "antidote_method": chosen.shape.method,
        "antidote_positions": chosen.shape.positions,
        "antidote_kept_caps_on_validation": outcome.kept_caps,
        "antidote_random_shift": max(random, key=abs),
        "antidote_validation_gain": chosen.gain,
        "antidote_agreement": {str(k): round(v, 3) for k, v in outcome.agreement.items()},
        "antidote_curve": {
            name: {
                suite: {f"{p.strength:g}": p.share for p in found if p.suite == suite}
                for suite in dict.fromkeys(p.suite for p in found)
            }
            for name, found in outcome.points.items()
        },
    }
    rows = [
        [
            suite,
            _with_interval(by[suite, 0.0]),
            _with_interval(by[suite, chosen.strength]),
            f"{shift(suite):+.1f}",
        ]
        for suite in suites
    ]
    caps = (
        "It was the strongest on the validation split within the caps"
        if outcome.kept_caps
        else "No point on the validation split kept to the caps; it is the best trade-off there"
    )
    return Findings(
        title="Jailbreak Antidote",
        lead=(
            f"{settings.keep:.0%} of the entries of the direction ({chosen.shape}), added at "
            f"{chosen.strength:g} of the activations' norm, changes the refusal of jailbroken "
            f"requests by {gain:+.0f} points, of look-alike benign requests by {cost:+.0f}, and "
            f"right answers to the unrelated questions by {-loss:+.0f}. {caps} of "
            f"{settings.benign_cap:g} and {settings.skill_cap:g} points."
        ),
        summary=summary,
        tables=[
            Table("Test split, %", ["share", "plain", "steered", "change"], rows),
            _curve_table(outcome.points),
            Table(
                "PCA of shuffled pairs against the difference of means",
                ["layer", "cosine", "pairs told apart by PCA, validation"],
                [
                    [str(n), f"{outcome.agreement[n]:.3f}", f"{outcome.layer_accuracy[n]:.3f}"]
                    for n in outcome.agreement
                ],
            ),
        ],
        figures=[
            strength_curve(
                [
                    _line(f"{suite}, {name}", found, suite)
                    for name, found in outcome.points.items()
                    if name != "sparse, own norm"
                    for suite in (attacks, lookalikes)
                ],
                [chosen.strength],
                "Sparse and dense, at the same norm",
                unit="share of the activations' norm",
            )
        ],
        artifacts=outcome.digests,
    )


def weighted_findings(outcome: weighted.Outcome, settings: weighted.Settings) -> Findings:
    """Weighted activation steering."""
    suites = list(dict.fromkeys(p.suite for p in outcome.points["controller"]))
    attacks, harmful, benign, lookalikes, skill = suites[:5]
    strength, fixed = outcome.strength, outcome.fixed_strength

    def at(curve: str, suite: str) -> float:
        return outcome.share(curve, suite, strength if curve == "controller" else fixed)

    def plain(suite: str) -> float:
        return outcome.share("controller", suite, 0.0)

    summary: dict[str, object] = {
        "was_harmful_refusal": at("controller", attacks),
        "was_harmful_refusal_fixed": at("constant", attacks),
        "was_harmful_refusal_plain": plain(attacks),
        "was_plain_harmful_refusal": at("controller", harmful),
        "was_benign_refusal": at("controller", benign),
        "was_benign_refusal_fixed": at("constant", benign),
        "was_benign_refusal_plain": plain(benign),
        "was_lookalike_refusal": at("controller", lookalikes),
        "was_lookalike_refusal_fixed": at("constant", lookalikes),
        "was_lookalike_refusal_plain": plain(lookalikes),
        "was_skill": at("controller", skill),
        "was_skill_plain": plain(skill),
        "was_gate_auroc": round(outcome.gate_auroc, 4),
        "was_gate_auroc_by": {k: round(v, 4) for k, v in outcome.gate_auroc_by.items()},
        "was_layer_weights": {k: round(v, 4) for k, v in outcome.weights.items()},
        "was_strength": strength,
        "was_fixed_strength": fixed,
        "was_threshold": round(outcome.scores["threshold"], 4),
    }
    rows = []
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
                summary[f"was_reference {suite}"] = found[0]
        rows.append(row)
    headings = ["share", "plain", f"controller, {strength:g}", f"constant, {fixed:g}"]
    if "reference" in outcome.points:
        headings.append("reference_compat")
    return Findings(
        title="Weighted activation steering",
        lead=(
            f"With the controller at strength {strength:g}, jailbroken requests are refused "
            f"{at('controller', attacks):.0f} % of the time ({plain(attacks):.0f} % unsteered), "
            f"benign ones {at('controller', benign):.0f} % ({plain(benign):.0f} %), look-alikes "
            f"{at('controller', lookalikes):.0f} % ({plain(lookalikes):.0f} %). The best constant "
            f"strength, {fixed:g}, gives {at('constant', attacks):.0f}, "
            f"{at('constant', benign):.0f} and {at('constant', lookalikes):.0f} %. The gate's "
            f"AUROC over held-out requests is {outcome.gate_auroc:.3f}."
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
                "Mean weight over requests to steer; one half is where training began",
                ["site", "weight"],
                [[site, f"{value:.4f}"] for site, value in outcome.weights.items()],
            ),
            _curve_table(outcome.points),
        ],
        figures=[
            strength_curve(
                [
                    _line(f"{suite}, {name}", outcome.points[name], suite)
                    for name in ("controller", "constant")
                    for suite in (attacks, lookalikes)
                ],
                [strength, fixed],
                "Controller and constant strength",
            )
        ],
        artifacts=outcome.digests,
    )


def faking_findings(outcome: faking.Outcome) -> Findings:
    """Alignment faking."""
    results = outcome.results.results
    baseline = results[0]
    gap = baseline.tally.gap
    proxy = outcome.results.proxy(outcome.monitor.steered if outcome.monitor else None)
    summary: dict[str, object] = {
        "faking_gap": None if gap is None else gap.points,
        "faking_gap_interval": None if gap is None else _ends(gap.interval),
        "faking_gap_p": None if gap is None else gap.p,
        "faking_proxy": proxy.conclusion,
        "faking_conditions": {
            r.condition.name: None
            if r.tally.gap is None
            else {"gap": r.tally.gap.points, "interval": _ends(r.tally.gap.interval)}
            for r in results
        },
    }
    rows = [_condition_row(r.condition.name, r.tally.gap) for r in results]
    for row, result in zip(rows, results, strict=True):
        paired, related = result.tally.paired, result.interaction
        row += [
            "" if paired is None else f"{paired.p:.2g}",
            "" if related is None else f"{related.points:+.0f} {_range(related.points_interval)}",
            "" if related is None else f"{related.ratio:.2g} {_range(related.ratio_interval)}",
            str(sum(result.tally.undefined)),
        ]
    for result in results:
        if result.condition.control and result.tally.gap is not None:
            summary["faking_gap_neutral"] = result.tally.gap.points
            summary["faking_gap_neutral_interval"] = _ends(result.tally.gap.interval)
    tables = [
        Table(
            "Complied, by tier",
            [
                "condition",
                "first tier",
                "second tier",
                "gap, points",
                "odds ratio",
                "Fisher p",
                "McNemar p",
                "change of gap",
                "ratio of odds ratios",
                "undefined",
            ],
            rows,
        ),
        Table(
            f"Shallow or deep: {proxy.conclusion}",
            ["condition", "kind", "gap, points", "the gap"],
            [[c.condition, c.kind, f"{c.gap.points:+.0f}", c.state] for c in proxy.criteria],
        ),
    ]
    artifacts = {}
    lead = _faking_lead(gap, proxy.conclusion)
    if outcome.monitor is not None:
        monitor = outcome.monitor
        summary |= {
            "faking_monitor_site": str(monitor.direction.site),
            "faking_monitor_auroc": {k: round(v, 4) for k, v in monitor.auroc.items()},
            "faking_gap_steered": None if monitor.steered is None else monitor.steered.points,
            "faking_steering_strength": -monitor.strength,
        }
        artifacts["observed"] = monitor.digest
        tables.append(
            Table(
                f"Monitor at {monitor.direction.site}: tiers told apart, AUROC",
                ["condition", "AUROC"],
                [[name, f"{value:.3f}"] for name, value in monitor.auroc.items()],
            )
        )
        if monitor.steered is not None:
            lead += (
                f" With the direction between the tiers' prompts subtracted ({monitor.strength:g} "
                f"of it at {monitor.direction.site}), the gap is {monitor.steered.points:+.0f} "
                "points."
            )
    return Findings(
        title="Alignment faking",
        lead=f"{lead} {proxy.note}",
        summary=summary,
        tables=tables,
        figures=[
            bars(
                [
                    Bar(
                        r.condition.name.replace("_", " "),
                        r.tally.gap.points,
                        (r.tally.gap.interval.low, r.tally.gap.interval.high),
                        is_control=r.condition.control,
                    )
                    for r in results
                    if r.tally.gap is not None
                ],
                "More compliance in the first tier, points",
                "gap with 95 % interval",
            )
        ],
        artifacts=artifacts,
    )


def _faking_lead(gap: Gap | None, conclusion: str) -> str:
    if gap is None:
        return "No answer of the baseline could be judged."
    return (
        f"The model complies with {gap.share_a:.0f} % of the requests in the first tier and with "
        f"{gap.share_b:.0f} % in the second: a gap of {gap.points:.0f} points "
        f"{_range(gap.interval)}, Fisher p {gap.p:.2g}. The operational proxy says: {conclusion}."
    )


def _condition_row(name: str, gap: Gap | None) -> list[str]:
    if gap is None:
        return [name, "", "", "", "", ""]
    return [
        name,
        f"{gap.complied_a}/{gap.num_a}",
        f"{gap.complied_b}/{gap.num_b}",
        f"{gap.points:+.1f} {_range(gap.interval)}",
        f"{gap.odds_ratio:.3g}{'*' if gap.corrected else ''}",
        f"{gap.p:.2g}",
    ]


def _curve_table(curves: dict[str, list[Point]]) -> Table:
    strengths = sorted({p.strength for points in curves.values() for p in points})
    rows = []
    for name, points in curves.items():
        for suite in dict.fromkeys(p.suite for p in points):
            shares = {p.strength: f"{p.share:.0f}" for p in points if p.suite == suite}
            rows.append([name, suite, *(shares.get(s, "") for s in strengths)])
    headings = ["curve", "share, %", *(f"{s:g}" for s in strengths)]
    return Table("Every strength, test split", headings, rows)


def _line(label: str, points: Sequence[Point], suite: str) -> Line:
    chosen = sorted((p for p in points if p.suite == suite), key=lambda p: p.strength)
    ends = [p.interval for p in chosen]
    return Line(
        label,
        [p.strength for p in chosen],
        [p.share for p in chosen],
        [low for low, _ in ends],
        [high for _, high in ends],
    )


def _with_interval(point: Point) -> str:
    low, high = point.interval
    return f"{point.value:.1f} [{low:.0f}, {high:.0f}]"


def _ends(interval: Interval) -> list[float]:
    return [round(interval.low, 2), round(interval.high, 2)]


def _range(interval: Interval) -> str:
    return f"[{interval.low:.3g}, {interval.high:.3g}]"
