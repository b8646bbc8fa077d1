"""Figures of an evaluation: what steering buys against what it costs, and each suite by strength.

Every mark has a shape of its own besides its colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from matplotlib.figure import Figure

from pipeline.evaluation.suites import Metric, Point
from pipeline.report.figures import COLOURS, GREY, Drawing, bare, both

STEERED: Final = COLOURS[1]
PROMPT: Final = COLOURS[0]

AXES: Final[dict[Metric, str]] = {
    "share": "share of prompts, %",
    "probability": "mean probability, %",
    "perplexity": "perplexity",
    "kl": "KL, nats a token",
}


@dataclass(frozen=True, slots=True)
class Conditions:
    """One suite under all four conditions.

    Attributes:
        falls: Whether it is the worse the less it is, as a skill's share.
        steered: By strength, ascending.
        random: By seed, then strength; without strength 0.
    """

    name: str
    metric: Metric
    falls: bool
    plain: Point
    prompt: Point
    steered: Sequence[Point]
    random: Sequence[Point]


def trade_off(target: Conditions, cost: Conditions) -> Drawing:
    """A point a strength: the target suite upwards, the cost to the right.

    Args:
        target, cost: Measured at the same strengths and seeds.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        bare(axes)
        axes.grid(axis="x", alpha=0.2)
        _cross(axes, cost, target, "random", GREY, "x", "random directions, same norm", size=5)
        x = [p.value for p in cost.steered]
        y = [p.value for p in target.steered]
        axes.plot(x, y, "-", color=STEERED, linewidth=1.6, zorder=2)
        _cross(axes, cost, target, "steered", STEERED, "o", "steered, by strength", size=7)
        _cross(axes, cost, target, "prompt", PROMPT, "D", "asked by the prompt", size=9)
        _cross(axes, cost, target, "plain", "ink", "s", "no steering", size=9)
        _limits(axes, target, cost)
        figure.draw_without_rendering()
        for at, text in _labels(axes, x, y, [p.strength for p in cost.steered]):
            axes.annotate(text, at, xytext=(7, 7), textcoords="offset points", fontsize=9, zorder=5)
        worse = "less is worse" if cost.falls else "more is worse"
        axes.set_xlabel(f"{cost.name},\n{AXES[cost.metric]} ({worse})")
        axes.set_ylabel(AXES[target.metric])
        axes.set_title(f"Target: {target.name}", loc="left")
        figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=2)

    alt = f"{target.name} against {cost.name}. " + "; ".join(
        f"strength {t.strength:+g}: {t.value:.3g} at a cost of {c.value:.3g}"
        for t, c in zip(target.steered, cost.steered, strict=True)
    )
    return both(draw, (5.6, 4.4), alt)


def suite_curve(suite: Conditions) -> Drawing:
    """One suite by strength, with the prompt and the random directions."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        bare(axes)
        for seed in sorted({p.seed or 0 for p in suite.random}):
            line = [*(p for p in suite.random if (p.seed or 0) == seed), suite.plain]
            line.sort(key=lambda p: p.strength)
            axes.plot(
                [p.strength for p in line],
                [p.value for p in line],
                "x--",
                color=GREY,
                linewidth=1,
                ms=4,
            )
        x = [p.strength for p in suite.steered]
        ends = [p.interval for p in suite.steered]
        axes.fill_between(
            x, [e[0] for e in ends], [e[1] for e in ends], color=STEERED, alpha=0.2, linewidth=0
        )
        axes.plot(x, [p.value for p in suite.steered], "o-", color=STEERED, linewidth=2, ms=5)
        axes.axhline(suite.prompt.value, color=PROMPT, linewidth=1.8, linestyle="-.")
        values = [p.value for p in (*suite.steered, *suite.random, suite.prompt)]
        if suite.metric in ("share", "probability"):
            axes.set_ylim(-4, 104)
        elif suite.metric == "perplexity" and max(values) > 5 * min(values):
            axes.set_yscale("log")
        axes.set_xlabel("strength")
        axes.set_ylabel(AXES[suite.metric])
        axes.set_title(suite.name, loc="left", fontsize=10)

    alt = (
        f"{suite.name}: {suite.plain.value:.3g} without steering, {suite.prompt.value:.3g} asked "
        "by the prompt, steered "
        + ", ".join(f"{p.value:.3g} at {p.strength:+g}" for p in suite.steered)
    )
    return both(draw, (4.6, 2.9), alt)


def _cross(
    axes: Any,
    cost: Conditions,
    target: Conditions,
    condition: str,
    colour: str,
    marker: str,
    label: str,
    *,
    size: float,
) -> None:
    """The points of one condition, with their intervals both ways but for the controls."""
    pairs = {
        "plain": ([cost.plain], [target.plain]),
        "prompt": ([cost.prompt], [target.prompt]),
        "steered": (cost.steered, target.steered),
        "random": (cost.random, target.random),
    }[condition]
    if not pairs[0]:
        return
    x, y = ([p.value for p in points] for points in pairs)
    if colour == "ink":
        colour = axes.xaxis.label.get_color()
    if condition != "random":
        axes.errorbar(
            x,
            y,
            xerr=_arms(pairs[0]),
            yerr=_arms(pairs[1]),
            fmt="none",
            ecolor=colour,
            alpha=0.35,
            elinewidth=1,
            zorder=1,
        )
    hollow = {"markerfacecolor": "none", "markeredgewidth": 2} if condition == "plain" else {}
    axes.plot(
        x, y, marker, color=colour, ms=size, label=label, zorder=4, linestyle="none", **hollow
    )


def _arms(points: Sequence[Point]) -> list[list[float]]:
    """Lengths of the two arms of each interval."""
    return [
        [max(0.0, p.value - p.interval[0]) for p in points],
        [max(0.0, p.interval[1] - p.value) for p in points],
    ]


def _limits(axes: Any, target: Conditions, cost: Conditions) -> None:
    if target.metric in ("share", "probability"):
        axes.set_ylim(-5, 109)
    values = [p.value for p in (*cost.steered, *cost.random, cost.prompt)]
    if cost.metric == "perplexity" and max(values) > 5 * min(values):
        axes.set_xscale("log")
    if cost.falls:
        # So that the right is the worse side of every cost.
        axes.invert_xaxis()


def _labels(
    axes: Any, x: Sequence[float], y: Sequence[float], strengths: Sequence[float]
) -> list[tuple[tuple[float, float], str]]:
    """Where to write which strengths: those that lie on one spot share a label."""
    groups: list[tuple[tuple[float, float], tuple[float, float], list[float]]] = []
    for at, strength in sorted(zip(zip(x, y, strict=True), strengths, strict=True), key=_second):
        pixel = axes.transData.transform(at)
        for _, other, members in groups:
            # The width and height of a label.
            if abs(pixel - other)[0] < 36 and abs(pixel - other)[1] < 14:
                members.append(strength)
                break
        else:
            groups.append((at, pixel, [strength]))
    return [(at, _joined([f"{s:+g}" if s else "0" for s in m])) for at, _, m in groups]


def _joined(texts: Sequence[str]) -> str:
    return ", ".join(texts) if len(texts) < 3 else f"{texts[0]} … {texts[-1]}"


def _second(pair: tuple[Any, float]) -> float:
    return pair[1]
