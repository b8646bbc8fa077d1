"""Reduce: a finished cache becomes a direction and scores for every layer and every head.

Two passes of Ray tasks over the cache. The first makes Moments a class and merges them in a tree;
the second projects every row on the directions, which is what sigma and the held-out scores need.
Only Moments and projections leave a task.

Shapes: N rows, R rows of a shard, L layers, W width, H heads, D width of a site, S sites.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import InvalidInput, NotFound
from pipeline.ray_runtime import ray_session
from pipeline.reduction.directions import difference_of_means, site_names, split_heads
from pipeline.reduction.moments import Moments
from pipeline.reduction.results import Reduction, reduction_digest
from pipeline.reduction.scores import accuracy, auroc, cohens_d
from store.activations import ActivationCache
from store.bfloat16 import to_float32
from store.location import Location

_SHARDS_PER_TASK: Final = 4
_MERGED_PER_TASK: Final = 8

ClassMoments = dict[str, tuple[Moments, Moments]]
"""By stream: Moments [L, W] of the positive and the negative training rows."""


@dataclass(frozen=True, slots=True)
class _Projections:
    """What the second pass brings back from some shards.

    Attributes:
        rows: Int64 [N], rows of the cache.
        values_NS: Float32 [N, S], projections on the unit directions.
        norms_NS: Float32 [N, S], norms of the activations at each site.
    """

    rows: NDArray[np.int64]
    values_NS: NDArray[np.float32]
    norms_NS: NDArray[np.float32]


def reduce(
    cache: ActivationCache,
    root: Location,
    *,
    method: str,
    num_workers: int,
    address: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Reduction:
    """Compute directions and scores of a complete cache, or find those computed before.

    Directions and sigma come from the rows of split ``train``; ``validation`` is there to choose
    with, ``test`` to report.

    Args:
        root: The store that holds the cache and takes the result.
        method: ``difference_of_means``.
        num_workers: Most Ray tasks at a time on a local Ray.
        address: A Ray cluster, or None for a local Ray.
        on_progress: Called with steps done and in all.

    Raises:
        NotFound: The cache is not complete.
        InvalidInput: A class has no training row.
    """
    digest = reduction_digest(cache.digest, method)
    if Reduction.exists(root, digest):
        return Reduction.open(root, digest)
    if not cache.is_complete:
        raise NotFound(
            f"cache {cache.digest[:12]} lacks {len(cache.missing())} of {cache.num_shards} shards; "
            "run `steerage extract` on the same run file first",
            kind="cache_incomplete",
        )
    index = cache.index()
    label_N = index["label"].to_numpy()
    split_N = index["split"].to_numpy(zero_copy_only=False)
    train_N = split_N == "train"
    for name, num in (
        ("positive", (train_N & label_N).sum()),
        ("negative", (train_N & ~label_N).sum()),
    ):
        if num == 0:
            raise InvalidInput(
                f"cache {cache.digest[:12]}: no {name} row in the training split; "
                "check the labels and the split shares of the run file",
                kind="class_empty",
            )
    with ray_session(address, num_workers):
        groups = [
            list(range(first, min(first + _SHARDS_PER_TASK, cache.num_shards)))
            for first in range(0, cache.num_shards, _SHARDS_PER_TASK)
        ]
        total = 2 * len(groups)
        moments = _moments(cache, root, groups, lambda done: on_progress(done, total))
        directions_LW = {
            stream: difference_of_means(positive, negative)
            for stream, (positive, negative) in moments.items()
        }
        parts = _projections(
            cache, root, groups, directions_LW, lambda done: on_progress(len(groups) + done, total)
        )
    values_NS, norms_NS = _assemble(cache, parts)
    table = _score_table(cache, moments, directions_LW, values_NS, norms_NS, label_N, split_N)
    return Reduction.write(
        root,
        cache=cache,
        method=method,
        directions_LW=directions_LW,
        scores=table,
        counts={
            f"{split}_{name}": int(((split_N == split) & (label_N == label)).sum())
            for split in ("train", "validation", "test")
            for name, label in (("positive", True), ("negative", False))
        },
    )


def _moments(
    cache: ActivationCache,
    root: Location,
    groups: Sequence[list[int]],
    on_done: Callable[[int], None],
) -> ClassMoments:
    import ray

    shard_task = ray.remote(num_cpus=1)(_shard_moments)
    merge_task = ray.remote(num_cpus=1)(_merge)
    level = [shard_task.remote(root.url, cache.digest, group) for group in groups]
    _wait(level, on_done)
    while len(level) > 1:
        # Merged in the order of the shards, so that the result is the same in every run.
        level = [
            merge_task.remote(*level[first : first + _MERGED_PER_TASK])
            for first in range(0, len(level), _MERGED_PER_TASK)
        ]
    merged: ClassMoments = ray.get(level[0])
    return merged


def _projections(
    cache: ActivationCache,
    root: Location,
    groups: Sequence[list[int]],
    directions_LW: dict[str, NDArray[np.float32]],
    on_done: Callable[[int], None],
) -> list[_Projections]:
    import ray

    task = ray.remote(num_cpus=1)(_shard_projections)
    shared = ray.put(directions_LW)
    references = [task.remote(root.url, cache.digest, group, shared) for group in groups]
    _wait(references, on_done)
    parts: list[_Projections] = ray.get(references)
    return parts


def _wait(references: Sequence[Any], on_done: Callable[[int], None]) -> None:
    import ray

    waiting = list(references)
    while waiting:
        finished, waiting = ray.wait(waiting)
        # Raises what the task raised.
        ray.get(finished)
        on_done(len(references) - len(waiting))


def _shard_moments(store_url: str, digest: str, shards: Sequence[int]) -> ClassMoments:
    cache = ActivationCache.open(Location.open(store_url), digest)
    index = cache.index()
    label_N = index["label"].to_numpy()
    train_N = index["split"].to_numpy(zero_copy_only=False) == "train"
    result: ClassMoments = {}
    for stream, layout in cache.streams.items():
        by_layer: list[tuple[Moments, Moments]] = []
        for layer in layout.layers:
            positive = negative = Moments.empty((layout.width,))
            for shard in shards:
                rows = layout.shard_rows(shard)
                train_R = train_N[rows.start : rows.stop]
                label_R = label_N[rows.start : rows.stop]
                values_RW = to_float32(cache.read_layer(stream, layer, shard))
                positive = positive.merge(Moments.of(values_RW[train_R & label_R]))
                negative = negative.merge(Moments.of(values_RW[train_R & ~label_R]))
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


def _shard_projections(
    store_url: str,
    digest: str,
    shards: Sequence[int],
    directions_LW: dict[str, NDArray[np.float32]],
) -> _Projections:
    cache = ActivationCache.open(Location.open(store_url), digest)
    rows, values, norms = [], [], []
    for shard in shards:
        columns, lengths = [], []
        for stream, layout in cache.streams.items():
            rows_of_shard = layout.shard_rows(shard)
            for position, layer in enumerate(layout.layers):
                h_RW = to_float32(cache.read_layer(stream, layer, shard))
                h_RHD = split_heads(h_RW, layout)
                u_HD = split_heads(directions_LW[stream][position], layout).astype(np.float64)
                u_HD /= np.maximum(np.linalg.norm(u_HD, axis=-1, keepdims=True), 1e-300)
                columns.append(np.einsum("rhd,hd->rh", h_RHD, u_HD.astype(np.float32)))
                lengths.append(np.linalg.norm(h_RHD, axis=-1))
        rows.append(np.arange(rows_of_shard.start, rows_of_shard.stop))
        values.append(np.concatenate(columns, axis=1))
        norms.append(np.concatenate(lengths, axis=1))
    return _Projections(np.concatenate(rows), np.concatenate(values), np.concatenate(norms))


def _assemble(
    cache: ActivationCache, parts: Sequence[_Projections]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    num_sites = parts[0].values_NS.shape[1]
    num_rows = next(iter(cache.streams.values())).num_rows
    values_NS = np.empty((num_rows, num_sites), np.float32)
    norms_NS = np.empty_like(values_NS)
    for part in parts:
        values_NS[part.rows] = part.values_NS
        norms_NS[part.rows] = part.norms_NS
    return values_NS, norms_NS


def _score_table(
    cache: ActivationCache,
    moments: ClassMoments,
    directions_LW: dict[str, NDArray[np.float32]],
    values_NS: NDArray[np.float32],
    norms_NS: NDArray[np.float32],
    label_N: NDArray[np.bool_],
    split_N: NDArray[Any],
) -> pa.Table:
    """One row a site: norms and sigma of the training rows, scores of the others."""
    train_N = split_N == "train"
    midpoint_S = (
        values_NS[train_N & label_N].mean(axis=0, dtype=np.float64)
        + values_NS[train_N & ~label_N].mean(axis=0, dtype=np.float64)
    ) / 2
    columns: dict[str, Any] = {
        "site": [str(site) for site in site_names(cache.streams)],
        "norm": np.concatenate(
            [
                np.linalg.norm(split_heads(directions_LW[stream], layout), axis=-1).reshape(-1)
                for stream, layout in cache.streams.items()
            ]
        ).astype(np.float64),
        "sigma": values_NS[train_N].std(axis=0, dtype=np.float64),
        "activation_norm": norms_NS[train_N].mean(axis=0, dtype=np.float64),
    }
    for split in ("validation", "test"):
        chosen_N = split_N == split
        columns[f"auroc_{split}"] = auroc(values_NS[chosen_N], label_N[chosen_N])
        columns[f"accuracy_{split}"] = accuracy(values_NS[chosen_N], label_N[chosen_N], midpoint_S)
        columns[f"cohens_d_{split}"] = cohens_d(values_NS[chosen_N], label_N[chosen_N])
    return pa.table(columns)
