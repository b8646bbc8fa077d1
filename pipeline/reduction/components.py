"""Components: the first principal component of within-pair differences (RepE, Jailbreak Antidote).

arXiv 2310.01405 and 2410.02298; METHODS 3. Differences are recentred, so the order within pairs has
to vary: in a fixed order all differences hold the same mean, recentring takes it away, and what is
left is the nuisance. `pairs.pair_order` turns half of the pairs around.

Shapes: P pairs, N differences, R rows, L layers, W width of a stream, H heads, D width of a site,
S sites.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from pipeline.reduction.directions import split_heads
from pipeline.reduction.moments import CrossMoments
from store.activations import ActivationCache
from store.bfloat16 import to_float32
from store.layout import StreamLayout

_PAIRS_PER_BLOCK: Final = 4096


@dataclass(frozen=True, slots=True, eq=False)
class OrderedPairs:
    """Pairs of rows, and the order within each.

    Attributes:
        positive_P: Int64 [P], rows of the cache.
        negative_P: Int64 [P], their partners.
        signs_P: Float64 [P], see `pairs.pair_order`.
    """

    positive_P: NDArray[np.int64]
    negative_P: NDArray[np.int64]
    signs_P: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class LayerPart:
    """What some shards say about one layer.

    Attributes:
        moments: Of the ordered differences of the pairs that lie within these shards.
        unmatched: Activations, float32 [W], of the rows of which a partner lies elsewhere, by row.
        shards: Which shards, without a gap.
    """

    moments: CrossMoments
    unmatched: dict[int, NDArray[np.float32]]
    shards: range


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


def layer_part(
    cache: ActivationCache, stream: str, layer: int, shards: Sequence[int], pairs: OrderedPairs
) -> LayerPart:
    """Read one layer of some shards, once.

    In memory are one shard's layer, [H, D, D] matrices, and rows of which a partner has not come
    yet.

    Args:
        cache: The cache.
        stream: Name of the stream.
        layer: Model layer.
        shards: Consecutive shards.
        pairs: Pairs of array rows. Several may share a row, also both sides of one.
    """
    layout = cache.streams[stream]
    num_heads = layout.num_heads or 1
    moments = CrossMoments.empty(num_heads, layout.width // num_heads)
    wanted, uses = np.unique(
        np.concatenate([pairs.positive_P, pairs.negative_P]), return_counts=True
    )
    uses_left = dict(zip(wanted.tolist(), uses.tolist(), strict=True))
    last_P = np.maximum(pairs.positive_P, pairs.negative_P)
    held: dict[int, NDArray[np.float32]] = {}
    for shard in shards:
        rows = layout.shard_rows(shard)
        values_RW = to_float32(cache.read_layer(stream, layer, shard))
        here = wanted[np.searchsorted(wanted, rows.start) : np.searchsorted(wanted, rows.stop)]
        held.update((int(row), values_RW[row - rows.start]) for row in here)
        closed = np.flatnonzero((last_P >= rows.start) & (last_P < rows.stop))
        for block in _blocks(held, uses_left, pairs, closed, layout):
            moments = moments.merge(block)
        for row in here:
            if int(row) in held:
                # A view would keep the whole shard in memory.
                held[int(row)] = held[int(row)].copy()
    return LayerPart(moments, held, range(shards[0], shards[-1] + 1))


def layer_component(
    parts: Sequence[LayerPart], pairs: OrderedPairs, layout: StreamLayout
) -> NDArray[np.float32]:
    """Directions of one layer's sites from parts that cover all shards.

    Args:
        parts: In the order of the shards, so that the result has the same bits in every run.

    Returns:
        Float32 [W], of norm 1 in each head.
    """
    moments = parts[0].moments
    held = dict(parts[0].unmatched)
    for part in parts[1:]:
        moments = moments.merge(part.moments)
        held.update(part.unmatched)
    # Those within one part are in its moments, though others may share their rows.
    first_rows = [part.shards.start * layout.rows_per_shard for part in parts]
    part_of_positive_P = np.searchsorted(first_rows, pairs.positive_P, side="right")
    part_of_negative_P = np.searchsorted(first_rows, pairs.negative_P, side="right")
    apart = np.flatnonzero(part_of_positive_P != part_of_negative_P)
    rows, uses = np.unique(
        np.concatenate([pairs.positive_P[apart], pairs.negative_P[apart]]), return_counts=True
    )
    uses_left = dict(zip(rows.tolist(), uses.tolist(), strict=True))
    for block in _blocks(held, uses_left, pairs, apart, layout):
        moments = moments.merge(block)
    return np.concatenate([first_component(m2_DD) for m2_DD in moments.m2_HDD]).astype(np.float32)


def _blocks(
    held: dict[int, NDArray[np.float32]],
    uses_left: dict[int, int],
    pairs: OrderedPairs,
    candidates: NDArray[np.int64],
    layout: StreamLayout,
) -> Iterator[CrossMoments]:
    """Moments of the pairs of which both rows are held, in pair order, taking out the rows that no
    other pair waits for.
    """
    ready = [
        pair
        for pair in candidates
        if int(pairs.positive_P[pair]) in held and int(pairs.negative_P[pair]) in held
    ]

    def use(row: int) -> NDArray[np.float32]:
        uses_left[row] -= 1
        return held[row] if uses_left[row] else held.pop(row)

    for first in range(0, len(ready), _PAIRS_PER_BLOCK):
        block = ready[first : first + _PAIRS_PER_BLOCK]
        positive_PW = np.stack([use(int(row)) for row in pairs.positive_P[block]])
        negative_PW = np.stack([use(int(row)) for row in pairs.negative_P[block]])
        ordered_PW = positive_PW.astype(np.float64) - negative_PW
        ordered_PW *= pairs.signs_P[block][:, None]
        yield CrossMoments.of(split_heads(ordered_PW, layout))
