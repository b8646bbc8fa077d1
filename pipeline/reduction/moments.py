"""Moments: count, mean and centred second moment, mergeable in any order.

Shapes: N rows, ... any trailing shape, such as [L, W]; H heads, D width of a site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Moments of a set of rows.

    float64 and centred: the shortcut mean(x^2) - mean(x)^2 in float32 is off by 3 % already at a
    mean of 300 standard deviations, and residual streams have such dimensions.

    Attributes:
        count: Rows.
        mean: Float64 [...].
        m2: Float64 [...], the sum of squared distances from the mean.
    """

    count: int
    mean: Float64
    m2: Float64

    @classmethod
    def of(cls, values: NDArray[Any]) -> Moments:
        """Moments of rows.

        Args:
            values: [N, ...], any float dtype; N may be 0.
        """
        rows = np.asarray(values, dtype=np.float64)
        if len(rows) == 0:
            return cls.empty(rows.shape[1:])
        mean = rows.mean(axis=0)
        return cls(len(rows), mean, np.square(rows - mean).sum(axis=0))

    @classmethod
    def of_counted(cls, values: NDArray[Any], counts_N: NDArray[np.int64]) -> Moments:
        """Moments of rows of which each counts as often as `counts_N` says, 0 included.

        Args:
            values: [N, ...], any float dtype. Rows that count 0 times may be NaN.
            counts_N: Int64 [N].
        """
        counted_N = counts_N > 0
        if (counts_N <= 1).all():
            return cls.of(values[counted_N])
        rows = np.asarray(values[counted_N], dtype=np.float64)
        weights_N = counts_N[counted_N].astype(np.float64)
        count = int(counts_N.sum())
        mean = np.tensordot(weights_N / count, rows, axes=1)
        return cls(count, mean, np.tensordot(weights_N, np.square(rows - mean), axes=1))

    @classmethod
    def empty(cls, shape: Sequence[int]) -> Moments:
        """Moments of no rows: the neutral element of `merge`."""
        return cls(0, np.zeros(tuple(shape)), np.zeros(tuple(shape)))

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together (Chan, Golub and LeVeque 1979, the pairwise update)."""
        if self.count == 0:
            return other
        if other.count == 0:
            return self
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.m2 + other.m2 + np.square(delta) * (self.count * other.count / count),
        )

    @property
    def variance(self) -> Float64:
        """Float64 [...], of the population."""
        return self.m2 / max(self.count, 1)


@dataclass(frozen=True, slots=True, eq=False)
class CrossMoments:
    """Moments of a set of rows, of which the second is a matrix for every head.

    Attributes:
        count: Rows.
        mean_HD: Float64 [H, D].
        m2_HDD: Float64 [H, D, D], the sum of outer products of the distances from the mean.
    """

    count: int
    mean_HD: Float64
    m2_HDD: Float64

    @classmethod
    def of(cls, values_NHD: NDArray[Any]) -> CrossMoments:
        """Moments of rows.

        Args:
            values_NHD: [N, H, D], any float dtype; N may be 0.
        """
        if len(values_NHD) == 0:
            return cls.empty(*values_NHD.shape[1:])
        rows_HND = np.ascontiguousarray(values_NHD.swapaxes(0, 1), dtype=np.float64)
        mean_HD = rows_HND.mean(axis=1)
        rows_HND = rows_HND - mean_HD[:, None]
        return cls(len(values_NHD), mean_HD, rows_HND.swapaxes(1, 2) @ rows_HND)

    @classmethod
    def empty(cls, num_heads: int, width: int) -> CrossMoments:
        """Moments of no rows: the neutral element of `merge`."""
        return cls(0, np.zeros((num_heads, width)), np.zeros((num_heads, width, width)))

    def merge(self, other: CrossMoments) -> CrossMoments:
        """Moments of both sets together; see `Moments.merge`."""
        if self.count == 0:
            return other
        if other.count == 0:
            return self
        count = self.count + other.count
        delta_HD = other.mean_HD - self.mean_HD
        outer_HDD = delta_HD[:, :, None] * delta_HD[:, None, :]
        return CrossMoments(
            count,
            self.mean_HD + delta_HD * (other.count / count),
            self.m2_HDD + other.m2_HDD + outer_HDD * (self.count * other.count / count),
        )
