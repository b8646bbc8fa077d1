"""Fitters: each takes one layer's training rows, shard after shard, and gives its directions.

They are for the methods that Moments are not enough for. Fed side by side, they share one read of
the layer.

Shapes: R rows of a shard, N rows, A array rows, W width of a stream, H heads, D width of a site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InvalidInput
from pipeline.reduction.components import PairStream, first_component
from pipeline.reduction.crossing import CrossSum
from pipeline.reduction.directions import split_heads, whitened_difference
from pipeline.reduction.moments import CrossMoments
from pipeline.reduction.probes import Probes, fit_counted_probes
from pipeline.reduction.sources import TrainingRows
from store.layout import StreamLayout

_LEAST_ROWS: Final = 2
"""Training rows of a class that a half needs for a direction of its own."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerFit:
    """What a method has found at one layer.

    Attributes:
        vectors_3W: Float32 [3, W], norm 1 a site: of all rows, and of each half of them; NaN where
            a half has too few.
        threshold_H: Float64 [H], the projection on the unit direction above which a row counts as
            positive; None where the method has none of its own.
    """

    vectors_3W: NDArray[np.float32]
    threshold_H: NDArray[np.float64] | None = None


class Fitter(Protocol):
    """One method at one layer."""

    def begin(self, source: TrainingRows) -> None:
        """The rows that follow are of this source."""

    def add(self, rows: range, values_RW: NDArray[np.float32]) -> None:
        """A shard's rows, behind those before."""

    def fit(self) -> LayerFit:
        """The directions, once all rows were added.

        Raises:
            InvalidInput: The method cannot be fitted to them.
        """


class ComponentFitter:
    """First principal component of pairs' differences; of either sign.

    In memory are two [H, D, D] matrices and the rows of pairs that a cut between shards divides.
    """

    def __init__(self, layout: StreamLayout, device: str) -> None:
        self._layout = layout
        self._sums = [_cross_sum(layout, device) for _ in range(2)]

    def begin(self, source: TrainingRows) -> None:
        self._source = source
        self._stream = PairStream(source.positive_P, source.negative_P)

    def add(self, rows: range, values_RW: NDArray[np.float32]) -> None:
        for pairs_Q, differences_QW in self._stream.feed(rows, values_RW):
            ordered_QW = differences_QW * self._source.signs_P[pairs_Q, None]
            ordered_QHD = split_heads(ordered_QW, self._layout)
            half_Q = self._source.half_P[pairs_Q]
            for half, total in enumerate(self._sums):
                total.add(ordered_QHD[half_Q == bool(half)])

    def fit(self) -> LayerFit:
        halves = [total.moments() for total in self._sums]
        return LayerFit(
            np.stack(
                [
                    _vector([first_component(m2_DD) for m2_DD in moments.m2_HDD])
                    if moments.count >= _LEAST_ROWS
                    else _nothing(self._layout)
                    for moments in (halves[0].merge(halves[1]), *halves)
                ]
            )
        )


class WhitenedFitter:
    """Whitened difference of means (LDA). In memory are four [H, D, D] matrices, and up to twelve
    more in the end."""

    def __init__(self, layout: StreamLayout, device: str, *, shrinkage: float) -> None:
        self._layout, self._shrinkage = layout, shrinkage
        self._sums_2C = [[_cross_sum(layout, device) for _ in range(2)] for _ in range(2)]

    def begin(self, source: TrainingRows) -> None:
        self._source = source

    def add(self, rows: range, values_RW: NDArray[np.float32]) -> None:
        values_RHD = split_heads(values_RW, self._layout)
        counts_2CR = self._source.counts_2CA[:, :, rows.start : rows.stop].astype(np.int64)
        for half, sums_C in enumerate(self._sums_2C):
            for label, total in enumerate(sums_C):
                total.add(values_RHD, counts_2CR[half, label])

    def fit(self) -> LayerFit:
        halves = [[total.moments() for total in sums_C] for sums_C in self._sums_2C]
        whole = [first.merge(second) for first, second in zip(*halves, strict=True)]
        return LayerFit(np.stack([self._direction(*whole), *(self._half(*h) for h in halves)]))

    def _direction(self, negative: CrossMoments, positive: CrossMoments) -> NDArray[np.float32]:
        return _vector(whitened_difference(positive, negative, self._shrinkage))

    def _half(self, negative: CrossMoments, positive: CrossMoments) -> NDArray[np.float32]:
        if min(negative.count, positive.count) < _LEAST_ROWS:
            return _nothing(self._layout)
        try:
            return self._direction(negative, positive)
        except InvalidInput as error:
            if error.kind != "shrinkage":
                raise
            # Of half the rows a covariance may be singular where that of all is not.
            return _nothing(self._layout)


class ProbeFitter:
    """Logistic probes, all heads as one batched problem; holds the layer's training rows.

    Args:
        names: Of the layer's sites, for messages.
    """

    def __init__(self, layout: StreamLayout, *, l2: float, names: Sequence[str]) -> None:
        self._layout = layout
        self._l2, self._names = l2, names
        self._values_NW: list[NDArray[np.float32]] = []
        self._counts_2CN: list[NDArray[np.int32]] = []

    def begin(self, source: TrainingRows) -> None:
        self._source = source

    def add(self, rows: range, values_RW: NDArray[np.float32]) -> None:
        counts_2CR = self._source.counts_2CA[:, :, rows.start : rows.stop]
        used_R = counts_2CR.any(axis=(0, 1))
        self._values_NW.append(values_RW[used_R])
        self._counts_2CN.append(counts_2CR[:, :, used_R])

    def fit(self) -> LayerFit:
        values_NW = np.concatenate(self._values_NW)
        self._values_NW.clear()
        counts_2CN = np.concatenate(self._counts_2CN, axis=2).astype(np.int64)
        whole = self._probes(values_NW, counts_2CN.sum(axis=0))
        norm_H = np.maximum(np.linalg.norm(whole.weights_SD, axis=1), 1e-300)
        vectors = [
            _vector(whole.weights_SD / norm_H[:, None]),
            *(self._half(values_NW, counts_CN) for counts_CN in counts_2CN),
        ]
        return LayerFit(np.stack(vectors), -whole.intercept_S / norm_H)

    def _half(
        self, values_NW: NDArray[np.float32], counts_CN: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        if counts_CN.sum(axis=1).min() < _LEAST_ROWS:
            return _nothing(self._layout)
        used_N = counts_CN.any(axis=0)
        try:
            weights_HD = self._probes(values_NW[used_N], counts_CN[:, used_N]).weights_SD
        except InvalidInput as error:
            if error.kind != "probe_convergence":
                raise
            # Half of the rows may be apart where all are not.
            return _nothing(self._layout)
        norms_H1 = np.maximum(np.linalg.norm(weights_HD, axis=1, keepdims=True), 1e-300)
        return _vector(weights_HD / norms_H1)

    def _probes(self, values_NW: NDArray[np.float32], counts_CN: NDArray[np.int64]) -> Probes:
        features_HND = split_heads(values_NW, self._layout).swapaxes(0, 1)
        negative_N, positive_N = counts_CN
        return fit_counted_probes(
            features_HND, positive_N, negative_N, l2=self._l2, names=self._names
        )


def make_fitter(
    method: str,
    parameters: Mapping[str, int | float],
    layout: StreamLayout,
    *,
    device: str,
    names: Sequence[str],
) -> Fitter:
    """The fitter of a method at a layer whose sites have these names."""
    makers: dict[str, Callable[[], Fitter]] = {
        "pca": lambda: ComponentFitter(layout, device),
        "lda": lambda: WhitenedFitter(layout, device, shrinkage=float(parameters["shrinkage"])),
        "probe": lambda: ProbeFitter(layout, l2=float(parameters["l2"]), names=names),
    }
    return makers[method]()


def _cross_sum(layout: StreamLayout, device: str) -> CrossSum:
    num_heads = layout.num_heads or 1
    return CrossSum(num_heads, layout.width // num_heads, device)


def _vector(sites_HD: Sequence[NDArray[np.float64]] | NDArray[np.float64]) -> NDArray[np.float32]:
    return np.concatenate(list(sites_HD)).astype(np.float32)


def _nothing(layout: StreamLayout) -> NDArray[np.float32]:
    return np.full(layout.width, np.nan, np.float32)
