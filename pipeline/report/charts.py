"""Charts: figures of a page in every shape that it needs, and what they have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.report.figures import COLOURS, Drawing, bitmap, both

WIDE: Final = 7.2
HALF: Final = 4.6
BEST: Final = COLOURS[4]
"""What is picked out has a ring or a frame of this colour."""
_NARROW: Final = 3.9


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure of the page.

    Attributes:
        name: Of its file, without ending.
        wide, narrow: For pages of the two widths.
        is_half: Whether the wide one takes half of the page.
        png: The wide one, light.
    """

    name: str
    wide: Drawing
    narrow: Drawing
    is_half: bool
    png: bytes


def chart(
    name: str,
    draw: Callable[[Figure, bool], None],
    width: float,
    heights: tuple[float, float],
    alt: str,
) -> Chart:
    """Draw a figure in every shape.

    Args:
        name: Of its file.
        draw: Draws it; the flag says whether on a narrow page.
        width: `WIDE` or `HALF`, in inches.
        heights: On a wide and on a narrow page, in inches.
        alt: What it shows, for those who do not see it.
    """
    wide, narrow = (width, heights[0]), (_NARROW, heights[1])
    return Chart(
        name,
        both(lambda figure: draw(figure, False), wide, alt),
        both(lambda figure: draw(figure, True), narrow, alt),
        width == HALF,
        bitmap(lambda figure: draw(figure, False), wide),
    )


def legend_below(figure: Figure, columns: int) -> None:
    """What the first panel shows; controls come last."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    last = ("best", "control")
    order = sorted(
        range(len(labels)),
        key=lambda number: [labels[number].startswith(word) for word in last][::-1],
    )
    figure.legend(
        [handles[number] for number in order],
        [labels[number] for number in order],
        frameon=False,
        fontsize=9,
        loc="outside lower center",
        ncols=columns,
    )


def ring() -> dict[str, Any]:
    """How the mark around what is picked out looks."""
    return {
        "ms": 11,
        "markerfacecolor": "none",
        "markeredgecolor": BEST,
        "markeredgewidth": 1.8,
    }


def round_ticks(numbers: Sequence[int], most: int) -> list[int]:
    """Of these numbers, at most so many, evenly apart, at round steps."""
    for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100):
        ticks = [number for number in numbers if number % step == 0]
        if len(ticks) <= most:
            return ticks or list(numbers)[:1]
    return list(numbers)[:: max(1, len(numbers) // most)]


def any_finite(values: NDArray[np.float64]) -> bool:
    """Whether there is anything to draw."""
    return bool(np.isfinite(values).any())
