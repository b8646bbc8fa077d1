"""Figures of the recipes' pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from pipeline.report.figures import COLOURS, GREY, Drawing, bare, both


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar, with an interval or without; controls are grey."""

    label: str
    value: float
    interval: tuple[float, float] | None = None
    is_control: bool = False


def bars(shown: Sequence[Bar], title: str, label: str) -> Drawing:
    """Bars side by side, their values written at their ends."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        places = range(len(shown))[::-1]
        for place, bar in zip(places, shown, strict=True):
            colour = GREY if bar.is_control else COLOURS[1]
            axes.barh(place, bar.value, color=colour, height=0.62)
            end = bar.value
            if bar.interval is not None:
                low, high = bar.interval
                axes.plot([low, high], [place, place], color=COLOURS[0], linewidth=2)
                end = max(end, high)
            axes.text(max(end, 0) + 1.5, place, f"{bar.value:+.1f}", va="center", fontsize=9)
        axes.set_yticks(list(places), [bar.label for bar in shown])
        ends = [e for bar in shown for e in (bar.value, *(bar.interval or ()))]
        axes.set_xlim(min(0.0, *ends) - 4, max(10.0, *ends) + 14)
        axes.axvline(0, color=GREY, linewidth=1)
        axes.set_xlabel(label)
        bare(axes)
        axes.grid(axis="y", visible=False)
        axes.set_title(title, loc="left")

    values = "; ".join(f"{bar.label} {bar.value:+.1f}" for bar in shown)
    return both(draw, (7.2, 1.2 + 0.42 * len(shown)), f"{title}: {values}.")
