"""Figures of the recipes' pages.

Shapes: L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

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


def share_map(share_LH: NDArray[Any], title: str) -> Drawing:
    """Shares of every head in points: layers down, heads across."""
    num_layers, num_heads = share_LH.shape

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        image = axes.imshow(share_LH, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        axes.set_xticks(range(num_heads) if num_heads <= 32 else range(0, num_heads, 8))
        axes.set_yticks(range(num_layers) if num_layers <= 48 else range(0, num_layers, 8))
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if num_heads <= 32:
            for (layer, head), value in np.ndenumerate(share_LH):
                ink = "#111111" if value > 55 else "#f4f4f4"
                text = "–" if np.isnan(value) else f"{value:.0f}"
                axes.text(head, layer, text, ha="center", va="center", color=ink, fontsize=8)
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("target choice, %")
        axes.set_title(title, loc="left")

    best = np.unravel_index(int(np.nanargmax(share_LH)), share_LH.shape)
    alt = f"{title}. Furthest: layer {best[0]} head {best[1]}, {share_LH[best]:.0f} %."
    return both(draw, (7.2, 1.4 + 0.36 * num_layers), alt)
