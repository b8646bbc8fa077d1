"""Fits: each method's pass of Ray tasks over the cache, from training rows to directions.

Every fit reads the cache once. Which rows and layers a task reads, and the order in which results
are merged, follow from the cache alone: the directions have the same bits however many workers
there are.

Shapes: A array rows of the cache, N of them, R rows of a shard, L layers, W width, H heads, D width
of a site, S sites.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.reduction.components import LayerPart, OrderedPairs, layer_component, layer_part
from pipeline.reduction.directions import difference_of_means, site_names, split_heads
from pipeline.reduction.moments import Moments
from pipeline.reduction.passes import matrix_groups, shard_groups, wait_for
from pipeline.reduction.probes import fit_counted_probes
from store.activations import ActivationCache
from store.bfloat16 import to_float32
from store.location import Location

_MERGED_PER_TASK: Final = 8

ClassMoments = dict[str, tuple[Moments, Moments]]
"""By stream: Moments [L, W] of the positive and the negative training rows."""


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """What a method has found.

    Attributes:
        directions_LW: Float32 [L, W] by stream.
        threshold_S: Float64 [S], the projection on the unit direction above which a row counts as
            positive; None where the method has none of its own.
    """

    directions_LW: dict[str, NDArray[np.float32]]
    threshold_S: NDArray[np.float64] | None = None


def num_tasks(cache: ActivationCache, method: str) -> int:
    """Tasks of a method's fit, for progress."""
    if method == "difference_of_means":
        return len(shard_groups(cache.num_shards))
    return sum(len(layout.layers) for layout in cache.streams.values())


@dataclass(frozen=True, slots=True, eq=False)
class TrainingCounts:
    """How many training samples each array row has, by class; see `samples.Samples.counts`.

    Attributes:
        positive_A: Int64 [A].
        negative_A: Int64 [A].
    """

    positive_A: NDArray[np.int64]
    negative_A: NDArray[np.int64]


def fit_means(
    cache: ActivationCache,
    root: Location,
    counts: TrainingCounts,
    on_done: Callable[[int], None],
) -> Fit:
    """Difference of class means of the training samples; a task takes a group of shards.

    Only Moments leave a task; they are merged in a tree.
    """
    import ray

    shard_task = ray.remote(num_cpus=1)(_shard_moments)
    merge_task = ray.remote(num_cpus=1)(_merge)
    shared = ray.put(counts)
    level = [
        shard_task.remote(root.url, cache.digest, group, shared)
        for group in shard_groups(cache.num_shards)
    ]
    wait_for(level, on_done)
    while len(level) > 1:
        # Merged in the order of the shards, so that the result is the same in every run.
        level = [
            merge_task.remote(*level[first : first + _MERGED_PER_TASK])
            for first in range(0, len(level), _MERGED_PER_TASK)
        ]
    merged: ClassMoments = ray.get(level[0])
    return Fit(
        {
            stream: difference_of_means(positive, negative)
            for stream, (positive, negative) in merged.items()
        }
    )


def fit_components(
    cache: ActivationCache, root: Location, pairs: OrderedPairs, on_done: Callable[[int], None]
) -> Fit:
    """First principal component of the pairs' differences; a task takes a layer of some shards.

    Only matrices, counts and rows whose partner lies in other shards leave a task, and if one task
    reads all of a layer, only its directions.

    Returns:
        Directions of norm 1 a site, or 0 where nothing varies, of either sign.
    """
    import ray

    whole_task = ray.remote(num_cpus=1)(_whole_component)
    part_task = ray.remote(num_cpus=1)(_part)
    merge_task = ray.remote(num_cpus=1)(_merged_component)
    shared = ray.put(pairs)
    references = []
    for stream, layout in cache.streams.items():
        groups = matrix_groups(layout)
        for layer in layout.layers:
            where = (root.url, cache.digest, stream)
            if len(groups) == 1:
                references.append(whole_task.remote(*where, layer, groups[0], shared))
            else:
                parts = [part_task.remote(*where, layer, group, shared) for group in groups]
                references.append(merge_task.remote(*where, shared, *parts))
    wait_for(references, on_done)
    return Fit(_by_stream(cache, ray.get(references)))


def fit_all_probes(
    cache: ActivationCache,
    root: Location,
    counts: TrainingCounts,
    *,
    l2: float,
    on_done: Callable[[int], None],
) -> Fit:
    """Logistic probes; a task takes a layer, and fits all its heads as one batched problem.

    A task holds its layer's training rows in memory, twice as float64, each once however many
    samples share it, and its directions and thresholds leave it.

    Returns:
        Directions of norm 1, or 0 where no feature varies, and the projections at logit 0.
    """
    import ray

    task = ray.remote(num_cpus=1)(_layer_probes)
    shared = ray.put(counts)
    references = [
        task.remote(root.url, cache.digest, stream, layer, shared, l2)
        for stream, layout in cache.streams.items()
        for layer in layout.layers
    ]
    wait_for(references, on_done)
    results = ray.get(references)
    return Fit(
        _by_stream(cache, [directions_W for directions_W, _ in results]),
        np.concatenate([threshold_H for _, threshold_H in results]),
    )


def _by_stream(
    cache: ActivationCache, layers: Sequence[NDArray[np.float32]]
) -> dict[str, NDArray[np.float32]]:
    rest = iter(layers)
    return {
        stream: np.stack([next(rest) for _ in layout.layers])
        for stream, layout in cache.streams.items()
    }


def _shard_moments(
    store_url: str, digest: str, shards: Sequence[int], counts: TrainingCounts
) -> ClassMoments:
    cache = ActivationCache.open(Location.open(store_url), digest)
    result: ClassMoments = {}
    for stream, layout in cache.streams.items():
        by_layer: list[tuple[Moments, Moments]] = []
        for layer in layout.layers:
            positive = negative = Moments.empty((layout.width,))
            for shard in shards:
                rows = layout.shard_rows(shard)
                positive_R = counts.positive_A[rows.start : rows.stop]
                negative_R = counts.negative_A[rows.start : rows.stop]
                values_RW = to_float32(cache.read_layer(stream, layer, shard))
                positive = positive.merge(Moments.of_counted(values_RW, positive_R))
                negative = negative.merge(Moments.of_counted(values_RW, negative_R))
            by_layer.append((positive, negative))
        result[stream] = (
            _stack([positive for positive, _ in by_layer]),
            _stack([negative for _, negative in by_layer]),
        )
    return result


def _stack(layers: Sequence[Moments]) -> Moments:
    return Moments(
        layers[0].count,
        np.stack([item.mean for item in layers]),
        np.stack([item.m2 for item in layers]),
    )


def _merge(*parts: ClassMoments) -> ClassMoments:
    merged = dict(parts[0])
    for part in parts[1:]:
        for stream, (positive, negative) in part.items():
            merged[stream] = (
                merged[stream][0].merge(positive),
                merged[stream][1].merge(negative),
            )
    return merged


def _part(
    store_url: str,
    digest: str,
    stream: str,
    layer: int,
    shards: Sequence[int],
    pairs: OrderedPairs,
) -> LayerPart:
    cache = ActivationCache.open(Location.open(store_url), digest)
    return layer_part(cache, stream, layer, shards, pairs)


def _merged_component(
    store_url: str, digest: str, stream: str, pairs: OrderedPairs, *parts: LayerPart
) -> NDArray[np.float32]:
    cache = ActivationCache.open(Location.open(store_url), digest)
    return layer_component(parts, pairs, cache.streams[stream])


def _whole_component(
    store_url: str,
    digest: str,
    stream: str,
    layer: int,
    shards: Sequence[int],
    pairs: OrderedPairs,
) -> NDArray[np.float32]:
    cache = ActivationCache.open(Location.open(store_url), digest)
    part = layer_part(cache, stream, layer, shards, pairs)
    return layer_component([part], pairs, cache.streams[stream])


def _layer_probes(
    store_url: str,
    digest: str,
    stream: str,
    layer: int,
    counts: TrainingCounts,
    l2: float,
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    cache = ActivationCache.open(Location.open(store_url), digest)
    layout = cache.streams[stream]
    counts_A = counts.positive_A + counts.negative_A
    parts: list[NDArray[Any]] = []
    for shard in range(cache.num_shards):
        at = layout.shard_rows(shard)
        values_RW = to_float32(cache.read_layer(stream, layer, shard))
        parts.append(values_RW[counts_A[at.start : at.stop] > 0])
    features_HND = split_heads(np.concatenate(parts), layout).swapaxes(0, 1)
    names = [str(site) for site in site_names({stream: layout}) if site.layer == layer]
    train_A = counts_A > 0
    probes = fit_counted_probes(
        features_HND, counts.positive_A[train_A], counts.negative_A[train_A], l2=l2, names=names
    )
    norm_H = np.maximum(np.linalg.norm(probes.weights_SD, axis=1), 1e-300)
    directions_HD = probes.weights_SD / norm_H[:, None]
    return directions_HD.astype(np.float32).reshape(-1), -probes.intercept_S / norm_H
