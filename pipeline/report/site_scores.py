"""Scores of a reduction as arrays: what its page shows of every site.

Shapes: S sites, L layers, H heads, B bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.reduction.results import Reduction
from steering_service.core.site import Site

Split = Literal["validation", "test"]

SIGNIFICANT: Final = 0.05
"""Share of false discoveries that is allowed (Benjamini and Hochberg)."""


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Projections of held-out rows on a site's unit direction.

    Attributes:
        edges_B1: Float64 [B + 1], in activation units.
        positive_B, negative_B: Int64 [B], rows.
    """

    edges_B1: NDArray[np.float64]
    positive_B: NDArray[np.int64]
    negative_B: NDArray[np.int64]

    @property
    def midpoint(self) -> float:
        """Half way between the classes' means, to half a bin; NaN where a class has no row."""
        centres_B = (self.edges_B1[1:] + self.edges_B1[:-1]) / 2
        counts = (self.positive_B, self.negative_B)
        if not all(count_B.any() for count_B in counts):
            return float("nan")
        return float(np.mean([np.average(centres_B, weights=count_B) for count_B in counts]))


@dataclass(frozen=True, slots=True, eq=False)
class SiteScores:
    """Scores of every site.

    Attributes:
        sites: S sites, in the reduction's order.
        columns: Float64 [S] by name.
        histograms: By site, where there are any.
        reported: The split that figures are of: test, or validation where test has no class to tell
            apart; None where neither has.
        chosen: The split that the best sites are chosen on: validation, or test as above.
    """

    sites: tuple[Site, ...]
    columns: Mapping[str, NDArray[np.float64]]
    histograms: Mapping[Site, Histogram]
    reported: Split | None
    chosen: Split | None

    @classmethod
    def of(cls, reduction: Reduction) -> SiteScores:
        """Of a stored reduction, whichever columns it has."""
        table = reduction.scores
        sites = tuple(Site.parse(name) for name in table["site"].to_pylist())
        columns = {}
        for name in table.column_names:
            values = table[name].to_pylist()
            if name != "site" and not any(isinstance(value, list) for value in values):
                columns[name] = np.array(
                    [np.nan if value is None else value for value in values], np.float64
                )

        def measured(split: Split) -> bool:
            return bool(np.isfinite(columns.get(f"auroc_{split}", np.nan)).any())

        order: tuple[Split, Split] = ("test", "validation")
        return cls(
            sites,
            columns,
            _histograms(table, sites),
            next((split for split in order if measured(split)), None),
            next((split for split in order[::-1] if measured(split)), None),
        )

    def column(self, name: str) -> NDArray[np.float64]:
        """Float64 [S]; NaN where the reduction has no such column."""
        return self.columns.get(name, np.full(len(self.sites), np.nan))

    def held_out(self, name: str) -> NDArray[np.float64]:
        """A column on the split that is reported, float64 [S]."""
        return self.column(f"{name}_{self.reported}")

    def numbers(self, *, heads: bool) -> NDArray[np.int64]:
        """Which sites are heads, or layers."""
        return np.flatnonzero([(site.head is not None) == heads for site in self.sites])

    def ranked(self, *, heads: bool) -> list[int]:
        """Layers or heads, best first, as `Reduction.ranked` has them; all the same without a row
        to choose on.
        """
        chosen = {
            name: np.nan_to_num(self.column(f"{name}_{self.chosen}"))
            for name in ("auroc", "cohens_d")
        }
        return sorted(
            self.numbers(heads=heads).tolist(),
            key=lambda n: (-chosen["auroc"][n], -chosen["cohens_d"][n], self.sites[n]),
        )

    def best(self, *, heads: bool) -> int | None:
        """The first of `ranked`; None without such a site or without a row to choose on."""
        ranked = self.ranked(heads=heads)
        return ranked[0] if ranked and self.chosen is not None else None

    @property
    def survives(self) -> NDArray[np.bool_]:
        """Bool [S]: above chance after the correction for the number of sites. False where that was
        not computed: see `tested`.
        """
        return np.asarray(self.column("q_test") < SIGNIFICANT)

    @property
    def tested(self) -> NDArray[np.bool_]:
        """Bool [S], where there is a q value."""
        return np.isfinite(self.column("q_test"))

    def control(self, kind: Literal["random", "shuffled"]) -> NDArray[np.float64]:
        """Float64 [S], AUROC of a control, turned so that it is above 0.5: a control has no sign to
        keep, and one that tells the classes apart the wrong way round does tell them apart.
        """
        values_S = self.column(f"auroc_{kind}_test")
        return np.maximum(values_S, 1 - values_S)

    def streams(self) -> list[str]:
        """Streams without heads."""
        return list(dict.fromkeys(s.stream for s in self.sites if s.head is None))

    def of_stream(self, stream: str) -> NDArray[np.int64]:
        """The layers of a stream without heads, in order."""
        return np.flatnonzero([s.stream == stream and s.head is None for s in self.sites])

    def head_grid(self, values_S: NDArray[Any]) -> tuple[list[int], NDArray[Any]]:
        """Layers, and a value of every head, [L, H]."""
        chosen = self.numbers(heads=True)
        layers = list(dict.fromkeys(self.sites[n].layer for n in chosen))
        return layers, values_S[chosen].reshape(len(layers), -1)


def _histograms(table: Any, sites: Sequence[Site]) -> dict[Site, Histogram]:
    names = [f"histogram_{part}" for part in ("start", "stop", "positive", "negative")]
    if not set(names) <= set(table.column_names):
        return {}
    found = {}
    rows = zip(sites, *(table[name].to_pylist() for name in names), strict=True)
    for site, start, stop, positive, negative in rows:
        if positive and negative and np.isfinite([start, stop]).all() and sum(positive + negative):
            if stop <= start:
                # All rows are equal, but bins need a width.
                start, stop = start - 0.5, start + 0.5
            found[site] = Histogram(
                np.linspace(start, stop, len(positive) + 1),
                np.array(positive, np.int64),
                np.array(negative, np.int64),
            )
    return found
