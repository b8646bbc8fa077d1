"""Comparing: how directions agree between methods and layers, and how few entries would do.

Shapes: K directions, L layers, W width of a stream, D width of a site, N samples, R rows of a
shard, F fractions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InvalidInput
from pipeline.reduction.results import Reduction, reduction_digest
from pipeline.reduction.samples import read_samples
from pipeline.reduction.scores import auroc
from steering_service.core.site import Site
from store.activations import ActivationCache
from store.bfloat16 import to_float32
from store.location import Location

ANTIDOTE_FRACTION: Final = 0.05
"""What Jailbreak Antidote keeps (arXiv 2410.02298; METHODS 3)."""
FRACTIONS: Final = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.03, ANTIDOTE_FRACTION),
    *(0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0),
)
MAX_ROWS: Final = 20_000


@dataclass(frozen=True, slots=True, eq=False)
class SparsityCurve:
    """What is left of a direction where only its largest entries are kept.

    Attributes:
        site: Where.
        width: D.
        num_kept_F: Int64 [F], increasing; the last is D.
        norm_F: Float64 [F], share of the direction's norm that those entries have.
        auroc_F: Float64 [F], of projections of held-out rows on the masked direction; its length
            does not matter. NaN where a class has no row.
        random_auroc_F: Float64 [F], with as many entries chosen at random (seed 0).
        num_samples: Held-out samples that these are of, 0 where there is no cache to read.
    """

    site: Site
    width: int
    num_kept_F: NDArray[np.int64]
    norm_F: NDArray[np.float64]
    auroc_F: NDArray[np.float64]
    random_auroc_F: NDArray[np.float64]
    num_samples: int

    def at(self, fraction: float) -> int | None:
        """Where int(fraction * D) entries are kept, as `sparse.top_fraction` does."""
        found = np.flatnonzero(self.num_kept_F == int(fraction * self.width))
        return int(found[0]) if len(found) else None


def direction_at(reduction: Reduction, site: Site) -> NDArray[np.float64]:
    """Float64 [D], a reduction's vector at a site. Unlike `Reduction.direction`, it may be zero."""
    layer = list(reduction.capture["layers"]).index(site.layer)
    vector_1W = reduction.directions_LW[site.stream][layer : layer + 1]
    vector_D = _site_columns(vector_1W, site, reduction.num_heads or 1)[0]
    return np.asarray(vector_D, np.float64)


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


def stored_reductions(
    root: Location, capture_digest: str, wanted: Mapping[str, Mapping[str, int | float]]
) -> list[Reduction]:
    """What else of a cache has been computed, at most one reduction a method.

    Args:
        wanted: Parameters by method. A method that is not stored with these is looked for in the
            records of all reductions, and the one of the first digest is taken.

    Returns:
        In the order of `wanted`.
    """
    digests = {
        method: reduction_digest(capture_digest, method, parameters)
        for method, parameters in wanted.items()
    }
    found = {method: name for method, name in digests.items() if Reduction.exists(root, name)}
    if len(found) < len(wanted):
        for name in root.folders("reductions"):
            if not Reduction.exists(root, name):
                # What a killed run has left.
                continue
            record = json.loads(root.get(f"reductions/{name}/reduction.json"))
            if record["capture_digest"] == capture_digest and record["method"] in wanted:
                found.setdefault(record["method"], name)
    return [Reduction.open(root, found[method]) for method in wanted if method in found]


def sparsity_curve(
    reduction: Reduction,
    site: Site,
    cache: ActivationCache | None,
    *,
    split: Literal["validation", "test"] = "test",
    fractions: Sequence[float] = FRACTIONS,
    max_rows: int = MAX_ROWS,
) -> SparsityCurve:
    """What a direction keeps as fewer of its entries are kept.

    Reads one layer, a shard at a time; in memory are one shard's layer and 2 F numbers a sample. Of
    more than `max_rows` held-out samples, those of every second (third, …) shard are read.

    Args:
        reduction: Where the direction comes from.
        site: Which; its direction must not be zero.
        cache: Complete; None where its activations are not stored, which leaves the norms.
        split: Which samples are projected.
        fractions: Of the entries, above 0 and at most 1; those that would keep none are left out,
            and all entries are always among them.

    Raises:
        InvalidInput: kind "direction_zero".
    """
    vector_D = direction_at(reduction, site)
    if not vector_D.any():
        raise InvalidInput(
            f"reduction {reduction.digest[:12]}: the direction at {site} is zero, so nothing of it "
            "can be kept; choose another site",
            kind="direction_zero",
        )
    width = len(vector_D)
    kept = {int(fraction * width) for fraction in fractions} | {width}
    num_kept_F = np.array(sorted(kept - {0}), np.int64)
    by_size = np.argsort(-np.abs(vector_D), kind="stable")
    by_chance = np.random.default_rng(0).permutation(width)
    masked_D2F = np.zeros((width, 2 * len(num_kept_F)), np.float32)
    for column, order in enumerate((by_size, by_chance)):
        for number, num_kept in enumerate(num_kept_F):
            chosen = order[:num_kept]
            masked_D2F[chosen, column * len(num_kept_F) + number] = vector_D[chosen]
    norms_F = np.linalg.norm(masked_D2F[:, : len(num_kept_F)].astype(np.float64), axis=0)
    values, labels = _held_out(cache, site, split, masked_D2F, max_rows) if cache else ([], [])
    aurocs_2F = np.full(2 * len(num_kept_F), np.nan)
    if values:
        values_N2F, label_N = np.concatenate(values), np.concatenate(labels)
        # One column at a time: ranks take twice the memory.
        aurocs_2F = np.array(
            [auroc(values_N2F[:, i : i + 1], label_N)[0] for i in range(values_N2F.shape[1])]
        )
    return SparsityCurve(
        site=site,
        width=width,
        num_kept_F=num_kept_F,
        norm_F=norms_F / norms_F[-1],
        auroc_F=aurocs_2F[: len(num_kept_F)],
        random_auroc_F=aurocs_2F[len(num_kept_F) :],
        num_samples=sum(map(len, labels)),
    )


def _held_out(
    cache: ActivationCache,
    site: Site,
    split: str,
    vectors_DK: NDArray[np.float32],
    max_rows: int,
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.bool_]]]:
    """Projections [R, K] and classes of a split's samples, a part a shard that was read."""
    layout = cache.layout(site.stream)
    samples = read_samples(cache)
    label_N = samples.label_N
    held_N = samples.split_N == split
    chosen = np.flatnonzero(held_N)
    by_shard = chosen[np.argsort(samples.row_N[chosen], kind="stable")]
    edges = np.searchsorted(
        samples.row_N[by_shard], [layout.shard_rows(s).start for s in range(layout.num_shards)]
    )
    parts = np.split(by_shard, edges[1:])
    filled = [shard for shard, part in enumerate(parts) if len(part)]
    step = max(1, -(-len(chosen) // max_rows))
    values, labels = [], []
    for shard in filled[::step]:
        h_RW = to_float32(cache.read_layer(site.stream, site.layer, shard))
        h_RD = _site_columns(h_RW, site, layout.num_heads or 1)
        rows = samples.row_N[parts[shard]] - layout.shard_rows(shard).start
        values.append(h_RD[rows] @ vectors_DK)
        labels.append(label_N[parts[shard]])
    return values, labels


def _site_columns(h_RW: NDArray[Any], site: Site, num_heads: int) -> NDArray[Any]:
    """A view [R, D] of a layer's activations [R, W]: a head's, or all of them."""
    if site.head is None:
        return h_RW
    width = h_RW.shape[1] // num_heads
    return h_RW[:, site.head * width : (site.head + 1) * width]
