"""Held-out rows: which count for scores, and what their projections come to.

Shapes: N samples, A array rows, H heads of a layer, K directions, P pairs, S sites, B bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.reduction.scores import (
    accuracy,
    auroc,
    bootstrap_auroc,
    cohens_d,
    histograms,
    pair_accuracy,
    permutation_p,
)
from pipeline.reduction.sources import SPLITS, Source, drawn, parts_of

HELD_OUT: Final = SPLITS[1:]

MOST_SCORED: Final = 20_000
"""Held-out samples of a split that scores are of; drawn as whole blocks where there are more. An
AUROC of so many is known to half a point."""

Columns = dict[str, NDArray[Any]]
"""Of the score table, [S] or [S, B], for some sites."""


def scored_rows(sources: Sequence[Source]) -> list[ScoredRows]:
    """The rows of some sources that are scored: at most `MOST_SCORED` of a split in all."""
    sizes = {split: [int(one.chosen(split).sum()) for one in sources] for split in HELD_OUT}
    parts = {split: parts_of(MOST_SCORED, sizes[split]) for split in HELD_OUT}
    return [
        ScoredRows.of(source, {split: parts[split][number] for split in HELD_OUT})
        for number, source in enumerate(sources)
    ]


@dataclass(frozen=True, slots=True, eq=False)
class ScoredRows:
    """What scoring needs to know of a source; small enough for every Ray task.

    Attributes:
        digest: Of the cache that holds the rows.
        train_2A: Int32 [2, A], training samples of the negative and the positive class that an
            array row has.
        pair_rows_2P: Int64 [2, P], array rows of the training pairs, positive and negative.
        held: By held-out split.
    """

    digest: str
    train_2A: NDArray[np.int32]
    pair_rows_2P: NDArray[np.int64]
    held: dict[str, HeldOut]

    @classmethod
    def of(cls, source: Source, most: Mapping[str, int]) -> ScoredRows:
        """The rows of a source that are scored, at most so many of each held-out split."""
        samples, label_N = source.samples, source.samples.label_N
        train_N, pairs = source.chosen("train"), source.pairs("train")
        return cls(
            source.rows.digest,
            np.array([samples.counts(train_N & (label_N == c)) for c in (False, True)], np.int32),
            samples.row_N[np.stack([pairs.positive_P, pairs.negative_P])],
            {split: HeldOut.of(source, split, most[split]) for split in HELD_OUT},
        )


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """Samples of a held-out split that scores are of.

    Attributes:
        row_N: Int64 [N], their array rows.
        label_N: Bool [N].
        block_N: Int64 [N].
        pairs_2P: Int64 [2, P], numbers among these samples: positive sides and their partners.
    """

    row_N: NDArray[np.int64]
    label_N: NDArray[np.bool_]
    block_N: NDArray[np.int64]
    pairs_2P: NDArray[np.int64]

    @classmethod
    def of(cls, source: Source, split: str, most: int = MOST_SCORED) -> HeldOut:
        samples = source.samples
        chosen_N = drawn(samples, source.chosen(split), most)
        pairs = source.pairs(split)
        number_N = np.cumsum(chosen_N) - 1
        kept_P = chosen_N[pairs.positive_P] & chosen_N[pairs.negative_P]
        return cls(
            samples.row_N[chosen_N],
            samples.label_N[chosen_N],
            samples.block_N[chosen_N],
            number_N[np.stack([pairs.positive_P[kept_P], pairs.negative_P[kept_P]])],
        )


@dataclass(frozen=True, slots=True, eq=False)
class ProjectedSplit:
    """A held-out split's projections, of all sources; fields as those of `HeldOut`."""

    values_NHK: NDArray[np.float32]
    label_N: NDArray[np.bool_]
    block_N: NDArray[np.int64]
    pairs_2P: NDArray[np.int64]

    @classmethod
    def of(
        cls, held: Sequence[HeldOut], values_NHK: Sequence[NDArray[np.float32]]
    ) -> ProjectedSplit:
        """Of all sources, one behind the other."""
        firsts = np.cumsum([0, *(len(one.row_N) for one in held)])
        blocks = np.cumsum([0, *(int(one.block_N.max(initial=-1)) + 1 for one in held)])
        return cls(
            np.concatenate(values_NHK),
            np.concatenate([one.label_N for one in held]),
            np.concatenate([one.block_N + n for one, n in zip(held, blocks, strict=False)]),
            np.concatenate(
                [one.pairs_2P + n for one, n in zip(held, firsts, strict=False)], axis=1
            ),
        )

    def scores(
        self, split: str, values_NH: NDArray[np.float32], threshold_H: NDArray[np.float64]
    ) -> Columns:
        """Scores by name, of projections Float32 [N, H]."""
        positive_P, negative_P = self.pairs_2P
        return {
            f"auroc_{split}": auroc(values_NH, self.label_N),
            f"accuracy_{split}": accuracy(values_NH, self.label_N, threshold_H),
            f"cohens_d_{split}": cohens_d(values_NH, self.label_N),
            f"pair_accuracy_{split}": pair_accuracy(values_NH[positive_P], values_NH[negative_P]),
        }

    def tests(self, values_NH: NDArray[np.float32]) -> Columns:
        """How sure the AUROC is."""
        low_H, high_H = bootstrap_auroc(values_NH, self.label_N, self.block_N)
        return {
            "auroc_low_test": low_H,
            "auroc_high_test": high_H,
            "p_test": permutation_p(values_NH, self.label_N, self.block_N),
        }

    def histograms(self, values_NH: NDArray[np.float32]) -> Columns:
        """Counts by class."""
        bins = histograms(values_NH, self.label_N)
        return {
            "histogram_start": bins.start_S,
            "histogram_stop": bins.stop_S,
            "histogram_positive": bins.positive_SB,
            "histogram_negative": bins.negative_SB,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Array rows in order, and where each was."""

    sorted_N: NDArray[np.int64]
    order_N: NDArray[np.int64]

    @classmethod
    def of(cls, row_N: NDArray[np.int64]) -> Places:
        order_N = np.argsort(row_N, kind="stable")
        return cls(row_N[order_N], order_N)

    def within(self, rows: range) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Places of those among `rows`, and which of `rows` they are."""
        chosen = slice(*np.searchsorted(self.sorted_N, [rows.start, rows.stop]))
        return self.order_N[chosen], self.sorted_N[chosen] - rows.start
