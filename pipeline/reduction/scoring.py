"""Scoring: how well each direction tells the classes apart, beside what chance gives.

A Ray task takes a layer of a stream, reads it once, projects its rows on the directions of all
methods, and answers with scores. Projections do not leave it, so that what it holds is bounded by
the held-out rows, of which at most `MOST_SCORED` a split count.

Shapes: N samples, A array rows, R rows of a shard, L layers, W width, H heads of a layer, D width
of a site, K directions that are projected on, P pairs, B bins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.reduction.components import sign_by_pairs
from pipeline.reduction.directions import random_directions, split_heads
from pipeline.reduction.fits import Fit, Vectors
from pipeline.reduction.held_out import (
    HELD_OUT,
    Columns,
    Places,
    ProjectedSplit,
    ScoredRows,
    scored_rows,
)
from pipeline.reduction.moments import Moments
from pipeline.reduction.passes import MOST_RETRIES, wait_for
from pipeline.reduction.samples import not_finite
from pipeline.reduction.scores import auroc
from pipeline.reduction.sources import Source
from store.activations import ActivationCache
from store.bfloat16 import to_float32
from store.layout import StreamLayout
from store.location import Location

RANDOM_SEED: Final = 0
"""Of the random directions that every method is compared with."""


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """Scores of one method.

    Attributes:
        columns: By stream, of all its sites.
        sign_LH: By stream, Float32 [L, H]: what the directions are to be multiplied by, so that +
            is the positive class of most training pairs. All 1 but for ``pca``.
        in_doubt_LH: By stream, Bool [L, H]: the class means disagree with that sign.
    """

    columns: dict[str, Columns]
    sign_LH: dict[str, NDArray[np.float32]]
    in_doubt_LH: dict[str, NDArray[np.bool_]]


def score(
    root: Location,
    streams: Mapping[str, StreamLayout],
    sources: Sequence[Source],
    fits: Mapping[str, Fit],
    shuffled_LW: Vectors,
    *,
    on_done: Callable[[int], None],
) -> dict[str, Scored]:
    """Score the directions of some methods, by name, in one read of each layer.

    Args:
        streams: What the sources have in common.
        shuffled_LW: Directions of shuffled labels, a control.
    """
    import ray

    task = ray.remote(num_cpus=1, max_retries=MOST_RETRIES)(_score_layer)
    shared = ray.put(scored_rows(sources))
    references = []
    for stream, layout in streams.items():
        random_LW = random_directions(layout, RANDOM_SEED)
        for number, layer in enumerate(layout.layers):
            directions_KW = {
                method: fit.directions_LW[stream][number] for method, fit in fits.items()
            }
            controls_KW = {"random": random_LW[number], "shuffled": shuffled_LW[stream][number]}
            thresholds_KH = {
                method: fit.threshold_LH[stream][number]
                for method, fit in fits.items()
                if fit.threshold_LH is not None
            }
            references.append(
                task.remote(
                    root.url, shared, stream, layer, directions_KW, controls_KW, thresholds_KH
                )
            )
    wait_for(references, on_done)
    layers = iter(ray.get(references))
    by_stream = {
        stream: [next(layers) for _ in layout.layers] for stream, layout in streams.items()
    }
    return {method: _joined(method, by_stream) for method in fits}


def _joined(method: str, by_stream: Mapping[str, Sequence[dict[str, _LayerScores]]]) -> Scored:
    of_method = {stream: [found[method] for found in rows] for stream, rows in by_stream.items()}
    return Scored(
        {
            stream: {
                name: np.concatenate([row.columns[name] for row in rows])
                for name in rows[0].columns
            }
            for stream, rows in of_method.items()
        },
        {stream: np.stack([row.sign_H for row in rows]) for stream, rows in of_method.items()},
        {stream: np.stack([row.in_doubt_H for row in rows]) for stream, rows in of_method.items()},
    )


@dataclass(frozen=True, slots=True, eq=False)
class _LayerScores:
    columns: Columns
    sign_H: NDArray[np.float32]
    in_doubt_H: NDArray[np.bool_]


@dataclass(slots=True, eq=False)
class _Projected:
    """What one read of a layer leaves.

    Attributes:
        train: Moments [H, K] of the projections of the negative and the positive training samples.
        norm: Moments [H] of the activations' norms, of all training samples.
        held: By split, Float32 [N, H, K].
        pairs_2PH: Projections of the training pairs on the component, [2, P, H]; empty without.
    """

    train: list[Moments]
    norm: Moments
    held: dict[str, NDArray[np.float32]]
    pairs_2PH: NDArray[np.float32]


def _score_layer(
    store_url: str,
    sources: Sequence[ScoredRows],
    stream: str,
    layer: int,
    directions_KW: Mapping[str, NDArray[np.float32]],
    controls_KW: Mapping[str, NDArray[np.float32]],
    thresholds_KH: Mapping[str, NDArray[np.float64]],
) -> dict[str, _LayerScores]:
    root = Location.open(store_url)
    names = [*directions_KW, *controls_KW]
    component = names.index("pca") if "pca" in directions_KW else None
    vectors = [*directions_KW.values(), *controls_KW.values()]
    parts = [
        _project(
            ActivationCache.open(root, source.digest), source, stream, layer, vectors, component
        )
        for source in sources
    ]
    train = [parts[0].train[c] for c in (0, 1)]
    norm = parts[0].norm
    for part in parts[1:]:
        train = [mine.merge(theirs) for mine, theirs in zip(train, part.train, strict=True)]
        norm = norm.merge(part.norm)
    held = {
        split: ProjectedSplit.of(
            [source.held[split] for source in sources], [part.held[split] for part in parts]
        )
        for split in HELD_OUT
    }
    if not all(np.isfinite(one.values_NHK).all() for one in held.values()):
        # They would count as answers of one class.
        raise not_finite(f"a held-out row's projection at {stream}.{layer}")
    pairs_2PH = np.concatenate([part.pairs_2PH for part in parts], axis=1)
    controls = {
        name: auroc(held["test"].values_NHK[:, :, names.index(name)], held["test"].label_N)
        for name in controls_KW
    }
    found = {}
    for number, method in enumerate(directions_KW):
        sign_H = np.ones(held["test"].values_NHK.shape[1], np.float32)
        in_doubt_H = np.zeros(len(sign_H), np.bool_)
        if number == component:
            positive_PH, negative_PH = pairs_2PH
            sign_H = sign_by_pairs(positive_PH, negative_PH)
            gap_H = sign_H * (positive_PH.astype(np.float64) - negative_PH).mean(axis=0)
            in_doubt_H = gap_H < 0
        both = train[0].merge(train[1])
        threshold_H = thresholds_KH.get(method)
        if threshold_H is None:
            threshold_H = sign_H * (train[0].mean[:, number] + train[1].mean[:, number]) / 2
        columns: Columns = {
            "sigma": np.sqrt(both.variance[:, number]),
            "activation_norm": norm.mean,
        }
        for split in HELD_OUT:
            split_held = held[split]
            columns |= split_held.scores(
                split, sign_H * split_held.values_NHK[:, :, number], threshold_H
            )
        tested = held["test"]
        columns |= tested.tests(sign_H * tested.values_NHK[:, :, number])
        columns |= {f"auroc_{name}_test": values_H for name, values_H in controls.items()}
        shown = tested if len(tested.label_N) else held["validation"]
        columns |= shown.histograms(sign_H * shown.values_NHK[:, :, number])
        found[method] = _LayerScores(columns, sign_H, in_doubt_H)
    return found


def _project(
    cache: ActivationCache,
    source: ScoredRows,
    stream: str,
    layer: int,
    vectors: Sequence[NDArray[np.float32]],
    component: int | None,
) -> _Projected:
    layout = cache.layout(stream)
    units_HDK = np.stack([_units(vector_W, layout) for vector_W in vectors], axis=-1)
    num_heads, _, num_directions = units_HDK.shape
    train = [Moments.empty((num_heads, num_directions)) for _ in range(2)]
    norm = Moments.empty((num_heads,))
    held = {
        split: np.full((len(one.row_N), num_heads, num_directions), np.nan, np.float32)
        for split, one in source.held.items()
    }
    places = {split: Places.of(one.row_N) for split, one in source.held.items()}
    pair_rows = source.pair_rows_2P if component is not None else np.zeros((2, 0), np.int64)
    pairs_2PH = np.full((*pair_rows.shape, num_heads), np.nan, np.float32)
    pair_places = Places.of(pair_rows.reshape(-1))
    for shard, _, values_RW in cache.scan(stream, [layer]):
        rows = layout.shard_rows(shard)
        counts_2R = source.train_2A[:, rows.start : rows.stop].astype(np.int64)
        h_RHD = split_heads(to_float32(values_RW), layout)
        projected_RHK = (h_RHD.swapaxes(0, 1) @ units_HDK).swapaxes(0, 1)
        for label in (0, 1):
            train[label] = train[label].merge(Moments.of_counted(projected_RHK, counts_2R[label]))
        norms_RH = np.linalg.norm(h_RHD, axis=-1)
        norm = norm.merge(Moments.of_counted(norms_RH, counts_2R.sum(axis=0)))
        for split, at in places.items():
            numbers, here = at.within(rows)
            held[split][numbers] = projected_RHK[here]
        numbers, here = pair_places.within(rows)
        if len(numbers):
            pairs_2PH.reshape(-1, num_heads)[numbers] = projected_RHK[here, :, component]
    return _Projected(train, norm, held, pairs_2PH)


def _units(vector_W: NDArray[np.float32], layout: StreamLayout) -> NDArray[np.float32]:
    sites_HD = split_heads(vector_W, layout).astype(np.float64)
    norm_H1 = np.linalg.norm(sites_HD, axis=-1, keepdims=True)
    return np.asarray(sites_HD / np.maximum(norm_H1, 1e-300), dtype=np.float32)
