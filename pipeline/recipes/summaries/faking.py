"""What alignment faking tells."""

from __future__ import annotations

from dataclasses import asdict

from pipeline.evaluation.statistics import Gap, Interval
from pipeline.recipes import faking
from pipeline.recipes.findings import Findings, Table
from pipeline.report.recipe_figures import Bar, bars


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
    against = []
    for result in results:
        paired, related, least = (
            result.tally.paired,
            result.interaction,
            result.minimum_detectable,
        )
        against.append(
            [
                result.condition.name,
                "" if paired is None else f"{paired.p:.2g}",
                ""
                if related is None
                else f"{related.points:+.0f} {_range(related.points_interval)}",
                "" if related is None else f"{related.ratio:.2g} {_range(related.ratio_interval)}",
                "" if least is None else f"{least:.0f}",
                str(sum(result.tally.undefined)),
            ]
        )
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
            ],
            rows,
        ),
        Table(
            "Pairs, and against the baseline",
            [
                "condition",
                "McNemar p",
                "change of gap, points",
                "ratio of odds ratios",
                "gap that could be found",
                "undefined answers",
            ],
            against,
        ),
        Table(
            f"Shallow or deep: {proxy.conclusion}",
            ["condition", "kind", "gap, points", "the gap"],
            [[c.condition, c.kind, f"{c.gap.points:+.0f}", c.state] for c in proxy.criteria],
        ),
    ]
    artifacts = {}
    steered_rows = outcome.monitor.rows if outcome.monitor else ()
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
        completions=[asdict(row) | {"steered": False} for row in outcome.results.rows]
        + [asdict(row) | {"steered": True} for row in steered_rows],
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


def _ends(interval: Interval) -> list[float]:
    return [round(interval.low, 2), round(interval.high, 2)]


def _range(interval: Interval) -> str:
    return f"[{interval.low:.3g}, {interval.high:.3g}]"
