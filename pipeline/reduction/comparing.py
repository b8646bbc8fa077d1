"""Comparing: how directions agree between methods and layers, and how few entries would do.

Shapes: K directions, W width of a stream, D width of a site, N samples, R rows of a shard.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.reduction.directions import split_heads
from pipeline.reduction.results import REDUCTION_SCHEMA, Reduction, reduction_digest
from pipeline.reduction.samples import Samples, read_samples
from pipeline.reduction.sparse import SparsityCurve, sparsity_curve
from steering_service.core.direction import Direction
from store.activations import ActivationCache
from store.bfloat16 import to_float32
from store.layout import StreamLayout
from store.location import Location

ANTIDOTE_FRACTION: Final = 0.05
"""What Jailbreak Antidote keeps (arXiv 2410.02298; METHODS 3)."""
FRACTIONS: Final = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.03, ANTIDOTE_FRACTION),
    *(0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0),
)
MOST_READ: Final = 4096
"""Held-out samples that a sparsity curve is of; 128 MiB where a site is 8192 wide. An AUROC of so
many is known to a point."""


@dataclass(frozen=True, slots=True, eq=False)
class Sparsity:
    """What is left of a direction where only some of its entries are kept.

    Attributes:
        direction: Whole.
        largest: Where its largest entries are kept; those numbers of entries that are none, or the
            same as another, are left out.
        random: Where as many are kept at random.
        num_samples: Held-out samples that the AUROCs are of.
    """

    direction: Direction
    largest: SparsityCurve
    random: SparsityCurve
    num_samples: int

    @property
    def width(self) -> int:
        """D."""
        return len(self.direction.vector_D)

    def at(self, fraction: float) -> int | None:
        """The point at which int(fraction * D) entries are kept, if any are."""
        found = np.flatnonzero(self.largest.num_kept_K == int(fraction * self.width))
        return int(found[0]) if len(found) else None


def cosines(vectors_KD: NDArray[Any]) -> NDArray[np.float64]:
    """Cosine of each direction with each.

    Returns:
        Float64 [K, K]; NaN where one of the two is zero, as nothing varied there.
    """
    vectors_KD = np.asarray(vectors_KD, np.float64)
    norms_K1 = np.linalg.norm(vectors_KD, axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit_KD = vectors_KD / norms_K1
    return np.asarray(np.clip(unit_KD @ unit_KD.T, -1.0, 1.0))


def stored_beside(
    root: Location, reduction: Reduction, wanted: Mapping[str, Mapping[str, int | float]]
) -> list[Reduction]:
    """What other methods have found in the same rows, at most one reduction a method.

    Args:
        root: The store that they are in.
        reduction: To be compared with; its own method is left out.
        wanted: Parameters by method. A method that is not stored with these is looked for in the
            records of all reductions, and the one of the first digest is taken.

    Returns:
        In the order of `wanted`.
    """
    capture, extends = reduction.capture_digest, reduction.extends
    wanted = {name: value for name, value in wanted.items() if name != reduction.method}
    digests = {
        method: reduction_digest(capture, method, parameters, extends, reduction.rows_from)
        for method, parameters in wanted.items()
    }
    found = {method: name for method, name in digests.items() if Reduction.exists(root, name)}
    if len(found) < len(wanted):
        for name in root.folders("reductions"):
            if not Reduction.exists(root, name):
                # What a killed run has left.
                continue
            record = json.loads(root.get(f"reductions/{name}/reduction.json"))
            if record.get("schema_version") != REDUCTION_SCHEMA:
                # What another version has left, whose scores are others.
                continue
            same_rows = (
                record["capture_digest"] == capture
                and tuple(record.get("extends", ())) == tuple(extends)
                and record.get("rows_from", {}) == reduction.rows_from
            )
            if same_rows:
                found.setdefault(record["method"], name)
    return [Reduction.open(root, found[method]) for method in wanted if method in found]


def sparsity(
    direction: Direction,
    caches: Sequence[ActivationCache],
    split: str,
    *,
    fractions: Sequence[float] = FRACTIONS,
    most_read: int = MOST_READ,
) -> Sparsity:
    """What a direction keeps as fewer of its entries are kept.

    Args:
        direction: Where it was fitted.
        caches: Complete ones, of which one layer is read, a shard at a time; none leaves the AUROCs
            NaN.
        split: Whose samples are projected.
        fractions: Of the entries, 0 to 1.
        most_read: Of more held-out samples, those of every second (third, …) shard are read. In
            memory are these and one shard's layer.
    """
    width = len(direction.vector_D)
    chosen = {int(fraction * width): fraction for fraction in sorted(fractions, reverse=True)}
    kept = [chosen[num_kept] for num_kept in sorted(chosen) if num_kept]
    values_ND, label_N = _held_out(direction, caches, split, most_read)
    # Of a permutation of 1 to D, the largest are entries at random.
    chance_D = 1 + np.random.default_rng(0).permutation(width).astype(np.float64)
    return Sparsity(
        direction,
        sparsity_curve(direction, values_ND, label_N, kept),
        sparsity_curve(direction, values_ND, label_N, kept, statistic_D=chance_D),
        len(label_N),
    )


def _held_out(
    direction: Direction, caches: Sequence[ActivationCache], split: str, most_read: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A split's activations at a direction's site, float32 [N, D], and their classes, bool [N]."""
    site = direction.site
    values = [np.zeros((0, len(direction.vector_D)), np.float32)]
    labels = [np.zeros(0, np.bool_)]
    held = [(cache, read_samples(cache)) for cache in caches]
    num_held = sum(int((samples.split_N == split).sum()) for _, samples in held)
    step = max(1, -(-num_held // most_read))
    for cache, samples in held:
        layout, label_N = cache.layout(site.stream), samples.label_N
        for shard, chosen in _by_shard(samples, split, layout)[::step]:
            h_RW = to_float32(cache.read_layer(site.stream, site.layer, shard))
            h_RHD = split_heads(h_RW, layout)
            rows = samples.row_N[chosen] - layout.shard_rows(shard).start
            # Picked by number it is a copy, so that the shard can go.
            values.append(h_RHD[rows, site.head or 0])
            labels.append(label_N[chosen])
    return np.concatenate(values), np.concatenate(labels)


def _by_shard(
    samples: Samples, split: str, layout: StreamLayout
) -> list[tuple[int, NDArray[np.int64]]]:
    """Shards that hold samples of a split, and which these are."""
    chosen = np.flatnonzero(samples.split_N == split)
    shard_of = samples.row_N[chosen] // layout.rows_per_shard
    return [(int(shard), chosen[shard_of == shard]) for shard in np.unique(shard_of)]
