"""Figures of a report, each drawn for a light and a dark page.

Colours are Okabe and Ito's set and the map `cividis`, which people with any common colour
blindness can tell apart; the dark drawing changes ink and paper, never the data's colours.

Shapes: L layers, H heads.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

COLOURS: Final = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00")
GREY: Final = "#8a8a8a"
_INK: Final = {"light": "#1c2733", "dark": "#e6e9ee"}
_PAPER: Final = {"light": "#ffffff", "dark": "#14181d"}
_BITMAP_DPI: Final = 192
"""Two pixels for each of a page's."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """One figure in two inks.

    Attributes:
        light: SVG text for a light page.
        dark: SVG text for a dark page.
        alt: What it shows, for those who do not see it.
    """

    light: str
    dark: str
    alt: str


@dataclass(frozen=True, slots=True)
class Line:
    """A line with intervals.

    Attributes:
        label: For the legend; None leaves the line out of it.
        x: Strengths.
        y: Shares in points.
        low, high: Ends of the intervals.
        is_control: Controls are grey and dashed.
    """

    label: str | None
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    is_control: bool = False


def heat_map(
    value_LH: NDArray[Any],
    layers: Sequence[int],
    title: str,
    *,
    ends: tuple[float, float] = (0.5, 1.0),
    label: str = "AUROC, held out",
    decimals: int = 2,
) -> Drawing:
    """A value of every head: layers down, heads across, written in each cell.

    Args:
        value_LH: [L, H]; NaN where there is none.
        ends: Values at the ends of the colours.
        label: What the values are.
    """
    num_layers, num_heads = value_LH.shape

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        image = axes.imshow(value_LH, cmap="cividis", vmin=ends[0], vmax=ends[1], aspect="auto")
        axes.set_xticks(range(0, num_heads, 1 if num_heads <= 32 else 8))
        shown = range(0, num_layers, 1 if num_layers <= 48 else 8)
        axes.set_yticks(shown, [str(layers[i]) for i in shown])
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        # Numbers are readable up to about 32 heads; larger maps show colour alone.
        if num_heads <= 32:
            for (layer, head), value in np.ndenumerate(value_LH):
                ink = "#111111" if value > sum(ends) / 2 else "#f4f4f4"
                text = f"{value:.{decimals}f}"
                if decimals:
                    text = text.removeprefix("0")
                if np.isnan(value):
                    text, ink = "–", GREY
                axes.text(head, layer, text, ha="center", va="center", color=ink, fontsize=8)
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label(label)
        axes.set_title(title, loc="left")

    best = np.unravel_index(int(np.nanargmax(value_LH)), value_LH.shape)
    alt = (
        f"{title}. Best: layer {layers[int(best[0])]} head {int(best[1])}, "
        f"{value_LH[best]:.{decimals + bool(decimals)}f}; "
        f"median {np.nanmedian(value_LH):.{decimals + bool(decimals)}f}."
    )
    return both(draw, (7.2, 1.4 + 0.36 * num_layers), alt)


def layer_bars(auroc_L: NDArray[Any], layers: Sequence[int], title: str) -> Drawing:
    """AUROC of every layer of the residual stream."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.bar(range(len(layers)), auroc_L - 0.5, bottom=0.5, color=COLOURS[1], width=0.7)
        for i, value in enumerate(auroc_L):
            axes.text(i, value + 0.01, f"{value:.2f}", ha="center", va="bottom", fontsize=8)
        axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
        axes.set_ylim(min(0.5, float(np.nanmin(auroc_L))) - 0.02, 1.08)
        axes.axhline(0.5, color=GREY, linewidth=1)
        axes.set_xlabel("layer (its output, resid_post)")
        axes.set_ylabel("AUROC, held out")
        bare(axes)
        axes.set_title(title, loc="left")

    values = ", ".join(f"{n}: {v:.2f}" for n, v in zip(layers, auroc_L, strict=True))
    return both(draw, (7.2, 2.6), f"{title}. By layer {values}.")


def strength_curve(
    lines: Sequence[Line],
    chosen: Sequence[float],
    title: str,
    unit: str = "1 = the whole difference of means",
) -> Drawing:
    """Shares by strength with 95 % intervals; upright lines mark the chosen strengths."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for strength in chosen:
            axes.axvline(strength, color=GREY, linewidth=1, linestyle=":")
        colours = iter(COLOURS)
        for line in lines:
            colour = GREY if line.is_control else next(colours)
            if line.is_control:
                axes.plot(line.x, line.y, "--", color=colour, linewidth=1.2, label=line.label)
                continue
            axes.plot(line.x, line.y, "o-", color=colour, ms=4, linewidth=2.2, label=line.label)
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.16, linewidth=0)
        axes.set_ylim(-3, 103)
        axes.set_xlabel(f"strength ({unit})")
        axes.set_ylabel("share of answers, %")
        bare(axes)
        axes.set_title(title, loc="left")
        axes.legend(
            frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2
        )

    alt = (
        title
        + ". "
        + "; ".join(
            f"{line.label}: {line.y[0]:.0f} % at {line.x[0]:+g}, "
            f"{line.y[-1]:.0f} % at {line.x[-1]:+g}"
            for line in lines
        )
    )
    return both(draw, (7.2, 4.2), alt)


def bare(axes: Any) -> None:
    """Leave the left and the bottom line alone, with a faint grid across."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", alpha=0.2)


def both(draw: Callable[[Figure], None], size: tuple[float, float], alt: str) -> Drawing:
    """Draw a figure in both inks.

    Args:
        draw: Draws it; called twice.
        size: Width and height in inches.
        alt: See `Drawing`.
    """
    drawn = {}
    for theme in _INK:
        sink = io.StringIO()
        # No date in the metadata: the same numbers give the same file.
        save = {"format": "svg", "transparent": True, "metadata": {"Date": None}}
        _draw(draw, size, theme, sink, save)
        text = sink.getvalue()
        drawn[theme] = text[text.index("<svg") :]
    return Drawing(drawn["light"], drawn["dark"], alt)


def bitmap(draw: Callable[[Figure], None], size: tuple[float, float]) -> bytes:
    """The light drawing as a PNG on white paper, two pixels for each of a page's.

    Args:
        draw: Draws it.
        size: Width and height in inches.
    """
    sink = io.BytesIO()
    _draw(draw, size, "light", sink, {"format": "png", "dpi": _BITMAP_DPI})
    return sink.getvalue()


def _draw(
    draw: Callable[[Figure], None],
    size: tuple[float, float],
    theme: str,
    sink: IO[Any],
    save: Mapping[str, Any],
) -> None:
    ink, paper = _INK[theme], _PAPER[theme]
    settings: Any = {
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": ink,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "xtick.color": ink,
        "ytick.color": ink,
        # Not painted on a page, but what is drawn may ask for it.
        "figure.facecolor": paper,
        "axes.facecolor": paper,
        "font.size": 10,
        "svg.hashsalt": "steerage",
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(sink, **save)
