"""Components: the first principal component of within-pair differences (RepE, Jailbreak Antidote).

arXiv 2310.01405 and 2410.02298; METHODS 3. Differences are recentred, so the order within pairs has
to vary: in a fixed order all differences hold the same mean, recentring takes it away, and what is
left is the nuisance. `pairs.pair_order` turns half of the pairs around.

Shapes: P pairs, Q of them, N differences, R rows, W width of a stream, D width of a site, S sites.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from pipeline.reduction.moments import CrossMoments

_PAIRS_PER_BLOCK: Final = 512


def pca_of_pairs(differences_ND: NDArray[Any], signs_N: NDArray[Any]) -> NDArray[np.float64]:
    """First principal component of within-pair differences, recentred, not whitened.

    Args:
        differences_ND: [N, D] positive minus negative.
        signs_N: [N] of +1 and -1, the order within each pair. All alike is the trap of METHODS 3:
            the component is then orthogonal to the mean difference wherever nuisance varies.

    Returns:
        Float64 [D] of norm 1, or zero where nothing varies. Its sign says nothing about the
        classes: see `sign_by_pairs`.
    """
    ordered_N1D = (np.asarray(differences_ND, np.float64) * signs_N[:, None])[:, None]
    return first_component(CrossMoments.of(ordered_N1D).m2_HDD[0])


def first_component(m2_DD: NDArray[np.float64]) -> NDArray[np.float64]:
    """The eigenvector of the largest eigenvalue; its largest entry is positive.

    Returns:
        Float64 [D] of norm 1, or zero where nothing varies; NaN where a value is not finite.
    """
    width = len(m2_DD)
    if not np.isfinite(m2_DD).all():
        return np.full(width, np.nan)
    values, vectors_D1 = scipy.linalg.eigh(m2_DD, subset_by_index=[width - 1, width - 1])
    if values[0] <= 0:
        return np.zeros(width)
    vector_D = np.asarray(vectors_D1[:, 0], np.float64)
    vector_D = vector_D / np.linalg.norm(vector_D)
    return vector_D if vector_D[np.abs(vector_D).argmax()] > 0 else -vector_D


def sign_by_pairs(
    positive_PS: NDArray[np.float32], negative_PS: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The sign that makes + the positive class: the one under which it is more often the larger.

    Args:
        positive_PS: [P, S] projections of the positive rows.
        negative_PS: [P, S] those of their partners.

    Returns:
        Float32 [S] of +1 and -1; +1 where as many pairs are one way as the other.
    """
    larger_S = (positive_PS > negative_PS).sum(axis=0)
    smaller_S = (positive_PS < negative_PS).sum(axis=0)
    return np.where(larger_S >= smaller_S, 1, -1).astype(np.float32)


class PairStream:
    """Differences within pairs of array rows, from shards that come one after the other.

    A row whose partner lies in a later shard is held until that comes, so what is in memory beside
    a shard is the rows of the pairs that a cut between shards divides.

    Args:
        positive_P: Int64 [P], array rows.
        negative_P: Int64 [P], their partners. Several pairs may share a row, also both sides of
            one.
    """

    def __init__(self, positive_P: NDArray[np.int64], negative_P: NDArray[np.int64]) -> None:
        self._positive_P, self._negative_P = positive_P, negative_P
        self._first_P = np.minimum(positive_P, negative_P)
        self._last_P = np.maximum(positive_P, negative_P)
        self._by_first = np.argsort(self._first_P, kind="stable")
        self._by_last = np.argsort(self._last_P, kind="stable")
        self._sorted_first_P = self._first_P[self._by_first]
        self._sorted_last_P = self._last_P[self._by_last]
        self._held: dict[int, NDArray[np.float32]] = {}
        self._uses_left: dict[int, int] = {}

    def feed(
        self, rows: range, values_RW: NDArray[np.float32]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """Take a shard's rows.

        Args:
            rows: Array rows, behind those of the call before.
            values_RW: Float32 [R, W].

        Yields:
            Pair numbers Int64 [Q] and differences, positive minus negative, Float64 [Q, W], of
            some of the pairs whose last row is here.
        """
        ends = [rows.start, rows.stop]
        closing = self._by_last[slice(*np.searchsorted(self._sorted_last_P, ends))]
        closing = np.sort(closing)
        for at in range(0, len(closing), _PAIRS_PER_BLOCK):
            block = closing[at : at + _PAIRS_PER_BLOCK]
            sides = [self._take(side_P[block], rows, values_RW) for side_P in self._sides]
            yield block, sides[0].astype(np.float64) - sides[1]
        opening = self._by_first[slice(*np.searchsorted(self._sorted_first_P, ends))]
        opening = opening[self._last_P[opening] >= rows.stop]
        for row, uses in zip(*np.unique(self._first_P[opening], return_counts=True), strict=True):
            # A view would keep the whole shard in memory.
            self._held[int(row)] = values_RW[row - rows.start].copy()
            self._uses_left[int(row)] = int(uses)

    @property
    def num_held(self) -> int:
        """Rows that wait for a partner."""
        return len(self._held)

    @property
    def _sides(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self._positive_P, self._negative_P

    def _take(
        self, wanted_Q: NDArray[np.int64], rows: range, values_RW: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        here_Q = wanted_Q >= rows.start
        taken_QW = np.empty((len(wanted_Q), values_RW.shape[1]), np.float32)
        taken_QW[here_Q] = values_RW[wanted_Q[here_Q] - rows.start]
        for at in np.flatnonzero(~here_Q):
            row = int(wanted_Q[at])
            taken_QW[at] = self._held[row]
            self._uses_left[row] -= 1
            if not self._uses_left[row]:
                del self._held[row], self._uses_left[row]
        return taken_QW
