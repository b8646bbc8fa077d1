"""Projections of every row on the unit directions: what sigma and held-out scores need.

Shapes: N rows or samples, R rows of a shard, L layers, W width, H heads, D width of a site,
S sites.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.reduction.directions import split_heads
from pipeline.reduction.passes import shard_groups, wait_for
from pipeline.reduction.samples import Samples
from store.activations import ActivationCache
from store.bfloat16 import to_float32
from store.location import Location


@dataclass(frozen=True, slots=True, eq=False)
class Projections:
    """Projections of some rows, or of samples.

    Attributes:
        values_NS: Float32 [N, S], projections on the unit directions.
        norms_NS: Float32 [N, S], norms of the activations at each site.
    """

    values_NS: NDArray[np.float32]
    norms_NS: NDArray[np.float32]

    def of(self, samples: Samples) -> Projections:
        """The samples' projections from those of all array rows."""
        return Projections(samples.of(self.values_NS), samples.of(self.norms_NS))


def project(
    cache: ActivationCache,
    root: Location,
    directions_LW: dict[str, NDArray[np.float32]],
    on_done: Callable[[int], None],
) -> Projections:
    """Project every row of the cache; a Ray task takes a group of shards.

    Returns:
        All rows, in their order.
    """
    import ray

    task = ray.remote(num_cpus=1)(_shard_projections)
    shared = ray.put(directions_LW)
    references = [
        task.remote(root.url, cache.digest, group, shared)
        for group in shard_groups(cache.num_shards)
    ]
    wait_for(references, on_done)
    # The tasks' groups are in the order of the rows.
    parts: list[Projections] = ray.get(references)
    return Projections(
        np.concatenate([part.values_NS for part in parts]),
        np.concatenate([part.norms_NS for part in parts]),
    )


def _shard_projections(
    store_url: str,
    digest: str,
    shards: Sequence[int],
    directions_LW: dict[str, NDArray[np.float32]],
) -> Projections:
    cache = ActivationCache.open(Location.open(store_url), digest)
    values, norms = [], []
    for shard in shards:
        columns, lengths = [], []
        for stream, layout in cache.streams.items():
            for position, layer in enumerate(layout.layers):
                h_RW = to_float32(cache.read_layer(stream, layer, shard))
                h_RHD = split_heads(h_RW, layout)
                u_HD = split_heads(directions_LW[stream][position], layout).astype(np.float64)
                u_HD /= np.maximum(np.linalg.norm(u_HD, axis=-1, keepdims=True), 1e-300)
                columns.append(np.einsum("rhd,hd->rh", h_RHD, u_HD.astype(np.float32)))
                lengths.append(np.linalg.norm(h_RHD, axis=-1))
        values.append(np.concatenate(columns, axis=1))
        norms.append(np.concatenate(lengths, axis=1))
    return Projections(np.concatenate(values), np.concatenate(norms))
