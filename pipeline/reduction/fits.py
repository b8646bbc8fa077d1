"""Fits: from training rows to directions, for every layer and head.

Methods that compare means take them from Moments. The others read rows: a Ray task takes a layer
of a stream, reads it once for all of them, and only directions leave it. What a task reads follows
from the caches alone, so the directions have the same bits however many workers there are.

Shapes: L layers, W width, H heads, S sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.reduction.directions import difference_of_means, paired_difference, site_names
from pipeline.reduction.fitters import Fitter, LayerFit, make_fitter
from pipeline.reduction.moment_store import StoredMoments
from pipeline.reduction.moments import Moments
from pipeline.reduction.passes import MOST_RETRIES, wait_for
from pipeline.reduction.sources import TrainingRows
from store.activations import ActivationCache
from store.bfloat16 import to_float32
from store.layout import StreamLayout
from store.location import Location

Vectors = dict[str, NDArray[np.float32]]
"""Float32 [L, W] by stream."""


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """What a method has found.

    Attributes:
        directions_LW: Float32 [L, W] by stream.
        halves_LW: The same of each half of the training rows; NaN where a half has too few.
        threshold_LH: Float64 [L, H] by stream, the projection on the unit direction above which a
            row counts as positive; None where the method has none of its own.
    """

    directions_LW: Vectors
    halves_LW: tuple[Vectors, Vectors]
    threshold_LH: dict[str, NDArray[np.float64]] | None = None


def fit_moments(moments: StoredMoments, streams: Sequence[str], method: str) -> Fit:
    """Directions of a method that Moments are enough for."""
    whole, first, second = (
        {stream: _of_moments(moments, stream, method, half) for stream in streams}
        for half in (None, False, True)
    )
    return Fit(whole, (first, second))


def _of_moments(
    moments: StoredMoments, stream: str, method: str, half: bool | None
) -> NDArray[np.float32]:
    parts: list[Moments]
    if method == "paired_difference":
        pairs = moments.pairs(stream, half=half)
        assert pairs is not None, "check_pairs comes first"
        parts, vectors_LW = [pairs], paired_difference(pairs)
    else:
        parts = [moments.of(stream, label=label, half=half) for label in (True, False)]
        vectors_LW = difference_of_means(*parts)
    if min(part.count for part in parts) == 0:
        return np.full_like(vectors_LW, np.nan)
    return vectors_LW


def shuffled_difference(moments: StoredMoments, streams: Sequence[str]) -> Vectors:
    """Difference of means under shuffled labels: what chance gives."""
    return {
        stream: difference_of_means(
            moments.shuffled(stream, label=True), moments.shuffled(stream, label=False)
        )
        for stream in streams
    }


def num_layer_tasks(streams: Mapping[str, StreamLayout]) -> int:
    """Tasks of `fit_layers`, or of `scoring.score`."""
    return sum(len(layout.layers) for layout in streams.values())


def fit_layers(
    root: Location,
    streams: Mapping[str, StreamLayout],
    sources: Sequence[TrainingRows],
    methods: Mapping[str, Mapping[str, int | float]],
    *,
    device: str,
    on_done: Callable[[int], None],
) -> dict[str, Fit]:
    """Fit methods that read rows, by name, all of them in one read of each layer.

    Args:
        streams: What the sources have in common.
        methods: Parameters by name.
        device: ``cuda``: each task has a GPU to itself, for its covariances.
    """
    import ray

    if not methods:
        return {}
    task = ray.remote(num_cpus=1, num_gpus=int(device == "cuda"), max_retries=MOST_RETRIES)(
        _fit_layer
    )
    shared = ray.put(list(sources))
    wanted = [(stream, layer) for stream, layout in streams.items() for layer in layout.layers]
    references = [task.remote(root.url, shared, *one, dict(methods), device) for one in wanted]
    wait_for(references, on_done)
    found = dict(zip(wanted, ray.get(references), strict=True))
    return {
        method: _joined(
            {
                stream: [found[stream, layer][method] for layer in layout.layers]
                for stream, layout in streams.items()
            }
        )
        for method in methods
    }


def _joined(layers: Mapping[str, Sequence[LayerFit]]) -> Fit:
    whole, first, second = (
        {
            stream: np.stack([fit.vectors_3W[part] for fit in fits])
            for stream, fits in layers.items()
        }
        for part in range(3)
    )
    thresholds = {
        stream: np.stack([fit.threshold_H for fit in fits if fit.threshold_H is not None])
        for stream, fits in layers.items()
        if fits[0].threshold_H is not None
    }
    return Fit(whole, (first, second), thresholds or None)


def _fit_layer(
    store_url: str,
    sources: Sequence[TrainingRows],
    stream: str,
    layer: int,
    methods: Mapping[str, Mapping[str, int | float]],
    device: str,
) -> dict[str, LayerFit]:
    import torch

    # The number of threads decides the last bits of a sum.
    torch.set_num_threads(1)
    root = Location.open(store_url)
    fitters: dict[str, Fitter] = {}
    for source in sources:
        cache = ActivationCache.open(root, source.digest)
        layout = cache.layout(stream)
        if not fitters:
            names = [str(site) for site in site_names({stream: layout}) if site.layer == layer]
            fitters = {
                method: make_fitter(method, parameters, layout, device=device, names=names)
                for method, parameters in methods.items()
            }
        for fitter in fitters.values():
            fitter.begin(source)
        for shard, _, values_RW in cache.scan(stream, [layer]):
            rows_RW = to_float32(values_RW)
            for fitter in fitters.values():
                fitter.add(layout.shard_rows(shard), rows_RW)
    # Taken out, so that what a fitter holds is free for the next.
    return {method: fitters.pop(method).fit() for method in list(fitters)}
