"""Figures of how well sites tell the classes apart: by layer, by head, and row by row.

What has no colour of its own to rely on has a shape: classes are filled and hatched, controls are
grey crosses and triangles, heads that do not stand out from chance are hatched.

Shapes: L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from pipeline.report.charts import (
    BEST,
    WIDE,
    Chart,
    any_finite,
    chart,
    legend_below,
    ring,
    round_ticks,
)
from pipeline.report.figures import COLOURS, GREY, bare
from pipeline.report.site_scores import Histogram

_LINES: Final = (COLOURS[1], COLOURS[0], *COLOURS[2:])
_MARKERS: Final = "osD^v"
_POSITIVE, _NEGATIVE = COLOURS[:2]


@dataclass(frozen=True, slots=True, eq=False)
class LayerLine:
    """Separability of the layers of one stream.

    Attributes:
        stream: Its name.
        layers: L numbers.
        auroc_L, low_L, high_L: Float64 [L]; the ends of the intervals may be NaN.
        random_L, shuffled_L: Float64 [L], the controls, above 0.5; may be NaN.
        best: Which of these layers is marked, if any.
    """

    stream: str
    layers: Sequence[int]
    auroc_L: NDArray[np.float64]
    low_L: NDArray[np.float64]
    high_L: NDArray[np.float64]
    random_L: NDArray[np.float64]
    shuffled_L: NDArray[np.float64]
    best: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Classes:
    """Projections of the two classes at one site, in units of its sigma."""

    site: str
    histogram: Histogram
    sigma: float


def separability(lines: Sequence[LayerLine], label: str) -> Chart:
    """AUROC by layer, with intervals and controls.

    Args:
        lines: A stream each, at most five.
        label: Of the values.
    """

    def draw(figure: Figure, is_narrow: bool) -> None:
        axes = figure.subplots()
        axes.axhline(0.5, color=GREY, linewidth=1)
        spread = 0.5 / max(len(lines), 2)
        for kind, marker, name, shift in (
            ("random_L", "x", "random direction", -0.2),
            ("shuffled_L", "^", "shuffled labels", 0.2),
        ):
            layers, values = _highest(lines, kind)
            if any_finite(values):
                axes.plot(
                    # Beside the layer, or what is as good as it would hide behind it.
                    *(np.array(layers) + shift, values, marker),
                    color=GREY,
                    markerfacecolor="none",
                    ms=4.5,
                    label=f"control: {name}",
                )
        for number, line in enumerate(lines):
            x = np.array(line.layers) + (number - (len(lines) - 1) / 2) * spread * (len(lines) > 1)
            colour = _LINES[number]
            axes.plot(x, line.auroc_L, color=colour, linewidth=1.2, alpha=0.6)
            arms = np.nan_to_num(
                np.maximum([line.auroc_L - line.low_L, line.high_L - line.auroc_L], 0)
            )
            axes.errorbar(
                *(x, line.auroc_L),
                yerr=arms,
                fmt=_MARKERS[number],
                color=colour,
                ms=5 if len(line.layers) <= 40 else 3.5,
                elinewidth=1.4,
                label=line.stream,
            )
            if line.best is not None:
                axes.plot(
                    *(x[line.best], line.auroc_L[line.best], "o"),
                    **ring(),
                    label=f"best: {line.stream}.{line.layers[line.best]}",
                )
        layers = sorted({layer for line in lines for layer in line.layers})
        axes.set_xticks(round_ticks(layers, 12 if is_narrow else 26))
        axes.set_xlim(layers[0] - 0.7, layers[-1] + 0.7)
        ends = np.concatenate([[0.5], *(np.r_[line.auroc_L, line.low_L] for line in lines)])
        axes.set_ylim(float(np.nanmin(ends)) - 0.03, 1.03)
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        bare(axes)
        legend_below(figure, 2 if is_narrow else 4)

    parts = []
    for line in lines:
        top = int(np.nanargmax(line.auroc_L))
        parts.append(
            f"{line.stream}: from {line.auroc_L[0]:.2f} at layer {line.layers[0]} to "
            f"{line.auroc_L[-1]:.2f} at layer {line.layers[-1]}, highest {line.auroc_L[top]:.3f} "
            f"at layer {line.layers[top]}"
        )
    controls = [
        np.nanmax(v) for k in ("random_L", "shuffled_L") if any_finite(v := _highest(lines, k)[1])
    ]
    if controls:
        parts.append(f"controls reach {max(controls):.2f} at most")
    return chart("layers", draw, WIDE, (3.3, 3.4), f"AUROC by layer. {'; '.join(parts)}.")


def head_map(
    value_LH: NDArray[np.float64],
    survives_LH: NDArray[np.bool_],
    layers: Sequence[int],
    best: tuple[int, int] | None,
    label: str,
) -> Chart:
    """AUROC of every head; those that do not stand out from chance are pale and hatched.

    Args:
        value_LH: [L, H]; NaN where there is none.
        survives_LH: All true where there was no test.
        layers: L numbers.
        best: Row and column of the head that is marked.
        label: Of the values.
    """
    num_layers, num_heads = value_LH.shape
    row_height = float(np.clip(5.5 / num_layers, 0.075, 0.32))

    def draw(figure: Figure, is_narrow: bool) -> None:
        axes = figure.subplots()
        paper = mpl.rcParams["figure.facecolor"]
        ink = axes.xaxis.label.get_color()
        image = axes.imshow(value_LH, cmap="cividis", vmin=0.5, vmax=1.0, aspect="auto")
        if not survives_LH.all():
            pale = _runs(~survives_LH)
            axes.add_patch(PathPatch(pale, facecolor=paper, alpha=0.6, linewidth=0))
            # By itself: a pattern is as see-through as what it fills.
            with mpl.rc_context({"hatch.linewidth": 1.4 if num_heads <= 32 else 0.7}):
                axes.add_patch(
                    PathPatch(pale, facecolor="none", edgecolor=paper, hatch="/////", linewidth=0)
                )
        if num_heads <= (10 if is_narrow else 24) and row_height > 0.16:
            for (row, column), value in np.ndenumerate(value_LH):
                style: dict[str, Any] = {"color": "#111111" if value > 0.75 else "#f4f4f4"}
                if not survives_LH[row, column]:
                    # Hatching runs through it.
                    style = {
                        "color": ink,
                        "path_effects": [withStroke(linewidth=2.5, foreground=paper)],
                    }
                size = 8 if num_heads <= 16 else 7
                axes.text(
                    *(column, row, _short(value)), ha="center", va="center", fontsize=size, **style
                )
        if best is not None:
            corner = (best[1] - 0.5, best[0] - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=BEST, linewidth=2.2))
        axes.set_xticks(round_ticks(range(num_heads), 8 if is_narrow else 16))
        rows = round_ticks(range(num_layers), 20)
        axes.set_yticks(rows, [str(layers[row]) for row in rows])
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        below = bool((value_LH < 0.5).any())
        bar = figure.colorbar(
            image,
            ax=axes,
            pad=0.02,
            extend="min" if below else "neither",
            **(
                {"location": "top", "aspect": 30} if is_narrow else {"fraction": 0.05, "aspect": 36}
            ),
        )
        bar.outline.set_visible(False)
        bar.set_label(label)

    text = f"{label} of {num_layers} × {num_heads} heads, median {np.nanmedian(value_LH):.2f}. "
    if best is not None:
        text += f"Best: layer {layers[best[0]]} head {best[1]}, {value_LH[best]:.3f}. "
    text += f"{int((~survives_LH).sum())} are hatched, as they do not stand out from chance."
    height = 0.9 + row_height * num_layers
    return chart("heads", draw, WIDE, (height, height + 0.7), text)


def class_histograms(shown: Sequence[Classes], split: str) -> Chart:
    """Projections of the two classes, a panel a site."""

    def draw(figure: Figure, is_narrow: bool) -> None:
        shape = (len(shown), 1) if is_narrow else (1, len(shown))
        panels = figure.subplots(*shape, squeeze=False).ravel()
        for axes, classes in zip(panels, shown, strict=True):
            _draw_classes(axes, classes)
            axes.set_ylabel(f"{split} rows")
        legend_below(figure, 2 if is_narrow else 3)

    parts = []
    for classes in shown:
        low, high = _class_means(classes)
        parts.append(
            f"{classes.site}: the negative class lies around {low:+.1f}, the positive around "
            f"{high:+.1f}"
        )
    alt = f"Histograms of projections, in sigma from the midpoint. {'; '.join(parts)}."
    narrow = 0.6 + 2.2 * len(shown)
    return chart("histograms", draw, WIDE, (3.0, narrow), alt)


def _highest(lines: Sequence[LayerLine], kind: str) -> tuple[list[int], NDArray[np.float64]]:
    """Layers, and the highest of the streams' controls at each."""
    found: dict[int, float] = {}
    for line in lines:
        for layer, value in zip(line.layers, getattr(line, kind), strict=True):
            found[layer] = float(np.fmax(found.get(layer, np.nan), value))
    layers = sorted(found)
    return layers, np.array([found[layer] for layer in layers])


def _runs(chosen_LH: NDArray[np.bool_]) -> Path:
    """One outline of all chosen cells, neighbours in a row as one rectangle."""
    vertices: list[tuple[float, float]] = []
    codes: list[Any] = []
    for row, chosen_H in enumerate(chosen_LH):
        edges = np.flatnonzero(np.diff(np.r_[0, chosen_H.astype(int), 0]))
        for start, stop in edges.reshape(-1, 2) - 0.5:
            low, high = row - 0.5, row + 0.5
            vertices += [(start, low), (stop, low), (stop, high), (start, high), (start, low)]
            codes += [Path.MOVETO, *[Path.LINETO] * 3, Path.CLOSEPOLY]
    return Path(vertices, codes)


def _draw_classes(axes: Any, classes: Classes) -> None:
    histogram, scale = classes.histogram, classes.sigma if classes.sigma > 0 else 1.0
    middle = np.nan_to_num(histogram.midpoint)
    edges = (histogram.edges_B1 - middle) / scale
    for counts, colour, hatch, name in (
        (histogram.negative_B, _NEGATIVE, None, "negative class"),
        (histogram.positive_B, _POSITIVE, "////", "positive class"),
    ):
        axes.stairs(counts, edges, fill=True, color=colour, alpha=0.45, linewidth=0)
        axes.stairs(
            *(counts, edges),
            fill=True,
            facecolor="none",
            edgecolor=colour,
            hatch=hatch,
            linewidth=1.4,
            label=name,
        )
    axes.axvline(
        0, color=axes.xaxis.label.get_color(), linewidth=1.2, linestyle="--", label="midpoint"
    )
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_title(classes.site, loc="left")
    axes.set_xlabel("projection, sigma from the midpoint" if classes.sigma > 0 else "projection")
    bare(axes)


def _class_means(classes: Classes) -> tuple[float, float]:
    histogram = classes.histogram
    centres_B = (histogram.edges_B1[1:] + histogram.edges_B1[:-1]) / 2
    scale = classes.sigma if classes.sigma > 0 else 1.0
    means = []
    for counts in (histogram.negative_B, histogram.positive_B):
        mean = float(np.average(centres_B, weights=counts)) if counts.any() else np.nan
        means.append((mean - float(np.nan_to_num(histogram.midpoint))) / scale)
    return means[0], means[1]


def _short(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}".removeprefix("0")
