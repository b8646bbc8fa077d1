"""What Jailbreak Antidote tells."""

from __future__ import annotations

from pipeline.recipes import antidote
from pipeline.recipes.findings import Findings, Table
from pipeline.recipes.summaries.shared import curve_table, line, with_interval
from pipeline.report.figures import strength_curve


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
        "antidote_plain": by[attacks, 0.0].share,
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
            with_interval(by[suite, 0.0]),
            with_interval(by[suite, chosen.strength]),
            f"{shift(suite):+.1f}",
        ]
        for suite in suites
    ]
    caps = (
        "On the rows it was chosen on, of the other splits, it was the strongest within the caps"
        if outcome.kept_caps
        else "No point kept to the caps on the rows of the other splits; it is the best there"
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
            curve_table(outcome.points),
            Table(
                "PCA of shuffled pairs against the difference of means, where its sign is certain",
                ["layer", "cosine", "pairs told apart by PCA, validation"],
                [
                    [str(n), f"{outcome.agreement[n]:.3f}", f"{outcome.layer_accuracy[n]:.3f}"]
                    for n in outcome.layer_accuracy
                ],
            ),
        ],
        figures=[
            strength_curve(
                [
                    line(f"{suite}, {name}", found, suite)
                    for name, found in outcome.points.items()
                    if name in ("sparse", "dense")
                    for suite in (attacks, lookalikes)
                ],
                [chosen.strength],
                "Sparse and dense, at the same norm",
                unit="share of the activations' norm",
            )
        ],
        artifacts=outcome.digests,
    )
