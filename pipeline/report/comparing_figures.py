"""Figures of how directions agree, and of how few of their entries would do.

Shapes: J directions, M methods, L layers, K numbers of entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from pipeline.reduction.comparing import ANTIDOTE_FRACTION, Sparsity
from pipeline.report.charts import BEST, HALF, WIDE, Chart, any_finite, chart, ring, round_ticks
from pipeline.report.figures import COLOURS, GREY, bare

_EMPTY: Final = "#9aa3ad55"
_WRITTEN: Final = 8
"""Most directions between which cosines are written as numbers too."""


def method_cosines(cosine_MM: NDArray[np.float64], names: Sequence[str], site: str) -> Chart:
    """Cosines between the directions that methods found at one site."""

    def draw(figure: Figure, is_narrow: bool) -> None:
        axes = figure.subplots()
        image = _cosine_image(axes, cosine_MM)
        wrapped = [name.replace(" ", "\n", 1) for name in names]
        axes.set_xticks(range(len(names)), wrapped, rotation=90 if is_narrow else 0, fontsize=8)
        axes.set_yticks(range(len(names)), wrapped, fontsize=8)
        axes.set_title(f"methods, at {site}", loc="left")
        _cosine_bar(figure, axes, image)

    pairs = [
        f"{names[i]} and {names[j]} {cosine_MM[i, j]:.2f}"
        for i in range(len(names))
        for j in range(i)
    ]
    alt = f"Cosines between methods at {site}: {'; '.join(pairs)}."
    return chart("cosines_methods", draw, HALF, (3.6, 3.5), alt)


def layer_cosines(cosine_LL: NDArray[np.float64], layers: Sequence[int], stream: str) -> Chart:
    """Cosines between the directions of a stream's layers."""

    def draw(figure: Figure, is_narrow: bool) -> None:
        axes = figure.subplots()
        image = _cosine_image(axes, cosine_LL)
        ticks = round_ticks(range(len(layers)), 8 if is_narrow else 10)
        names = [str(layers[tick]) for tick in ticks]
        axes.set_xticks(ticks, names)
        axes.set_yticks(ticks, names)
        axes.set_xlabel("layer")
        axes.set_ylabel("layer")
        axes.set_title(f"layers of {stream}", loc="left")
        _cosine_bar(figure, axes, image)

    neighbours = np.diagonal(cosine_LL, 1)
    alt = (
        f"Cosines between layers of {stream}: next to each other "
        f"{np.nanmin(neighbours):.2f} to {np.nanmax(neighbours):.2f}; first to last "
        f"{cosine_LL[0, -1]:.2f}."
        if any_finite(neighbours)
        else f"Cosines between layers of {stream}."
    )
    return chart("cosines_layers", draw, HALF, (3.6, 3.2), alt)


def sparsity_curves(found: Sparsity, split: str) -> Chart:
    """Norm and AUROC that are left as fewer entries are kept."""
    curve, random_K = found.largest, found.random.auroc_K
    share_K = curve.num_kept_K / found.width
    has_auroc = any_finite(curve.auroc_K)
    at = found.at(ANTIDOTE_FRACTION)

    def draw(figure: Figure, is_narrow: bool) -> None:
        num = 2 if has_auroc else 1
        shape = (num, 1) if is_narrow or num == 1 else (1, num)
        panels = figure.subplots(*shape, squeeze=False).ravel()
        panels[0].plot(share_K, curve.norm_share_K, "o-", color=COLOURS[2], ms=4, linewidth=1.8)
        panels[0].set_ylim(0, 1.05)
        panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol="\u00a0%"))
        panels[0].set_title(f"norm kept, {found.direction.site}", loc="left")
        if has_auroc:
            axes = panels[1]
            axes.axhline(
                curve.auroc_K[-1],
                color=COLOURS[2],
                linewidth=1,
                linestyle="--",
                label="all entries",
            )
            axes.plot(
                *(share_K, curve.auroc_K, "o-"),
                **{"color": COLOURS[2], "ms": 4, "linewidth": 1.8, "label": "largest entries"},
            )
            axes.plot(
                *(share_K, random_K, "x--"),
                **{"color": GREY, "ms": 4, "linewidth": 1, "label": "entries at random"},
            )
            axes.set_title(f"AUROC, {split} rows", loc="left")
            low = np.nanmin(np.r_[curve.auroc_K, random_K, 0.5])
            axes.set_ylim(float(low) - 0.03, 1.03)
        for axes in panels:
            axes.set_xscale("log")
            ticks = [t for t in (0.001, 0.01, 0.05, 0.2, 1.0) if t >= share_K[0] * 0.7]
            axes.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks], minor=False)
            axes.set_xticks([], minor=True)
            axes.axvline(ANTIDOTE_FRACTION, color=BEST, linewidth=1.2, linestyle=":")
            axes.set_xlabel("entries kept (log scale)")
            bare(axes)
        if at is not None:
            panels[0].plot(share_K[at], curve.norm_share_K[at], "o", **ring())
            panels[0].annotate(
                f"{100 * curve.norm_share_K[at]:.0f}\u00a0%",
                (share_K[at], curve.norm_share_K[at]),
                textcoords="offset points",
                xytext=(9, -10),
                fontsize=9,
            )
            if has_auroc:
                panels[1].plot(share_K[at], curve.auroc_K[at], "o", **ring())
        if has_auroc:
            panels[1].legend(frameon=False, fontsize=8, loc="lower right")

    shown = range(len(share_K)) if at is None else [at]
    parts = [
        f"{100 * share_K[i]:.3g} % of the entries keep "
        f"{100 * curve.norm_share_K[i]:.0f} % of the norm"
        + (f" and an AUROC of {curve.auroc_K[i]:.3f}" if has_auroc else "")
        for i in shown
    ]
    if has_auroc:
        parts.append(f"all entries have {curve.auroc_K[-1]:.3f}")
    alt = f"Sparsity at {found.direction.site}: {'; '.join(parts)}."
    return chart(
        "sparsity", draw, WIDE if has_auroc else HALF, (2.9, 5.2 if has_auroc else 2.8), alt
    )


def _cosine_image(axes: Any, cosine_JJ: NDArray[np.float64]) -> Any:
    axes.set_facecolor(_EMPTY)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if len(cosine_JJ) <= _WRITTEN:
        for (row, column), value in np.ndenumerate(cosine_JJ):
            text = "–" if np.isnan(value) else f"{value:.2f}".replace("-", "\u2212")
            # Both ends of the map are dark.
            ink = "#f4f4f4" if abs(value) > 0.6 else "#111111"
            size = 9 if len(cosine_JJ) <= 5 else 8
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=size)
    return axes.imshow(cosine_JJ, cmap="PuOr_r", vmin=-1, vmax=1)


def _cosine_bar(figure: Figure, axes: Any, image: Any) -> None:
    bar = figure.colorbar(image, ax=axes, pad=0.03, ticks=[-1, -0.5, 0, 0.5, 1], shrink=0.9)
    bar.outline.set_visible(False)
    bar.set_label("cosine")
