"""Sources: the rows that a reduction is computed from, of one capture or of several of one model.

Shapes: N samples, A array rows, P pairs, S sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InvalidInput, NotFound
from pipeline.reduction.kept import find_kept, find_record
from pipeline.reduction.pairs import Pairs, find_pairs, pair_order
from pipeline.reduction.samples import Samples, read_samples
from store.activations import ActivationCache
from store.layout import StreamLayout
from store.location import Location

SPLITS: Final = ("train", "validation", "test")

_SAME_PROMPTS: Final = ("template", "system", "close_turn")
"""Settings of [prompts] that decide what an activation is of."""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The samples of one capture.

    Attributes:
        cache: The capture, whose digest names its Moments.
        rows: The cache in which activations lie: the same, or the kept rows of a capture that was
            extracted with ``--no-cache``.
        samples: Those of `rows` that count.
        left_out: Samples of `cache` that do not, as far as is known.
    """

    cache: ActivationCache
    rows: ActivationCache
    samples: Samples
    left_out: int

    @classmethod
    def open(cls, root: Location, cache: ActivationCache) -> Source:
        """The rows of a capture, or those that were kept of it.

        Raises:
            NotFound: Its cache is not complete, and no rows were kept.
        """
        if cache.is_complete:
            samples = read_samples(cache)
            return cls(cache, cache, samples, samples.left_out)
        record, kept = find_record(root, cache.digest), find_kept(root, cache.digest)
        if record is None or kept is None:
            raise NotFound(
                f"cache {cache.digest[:12]} lacks {len(cache.missing())} of {cache.num_shards} "
                "shards; run `steerage extract` on the same run file first",
                kind="cache_incomplete",
            )
        return cls(cache, kept, read_samples(kept), record.left_out)

    @property
    def where(self) -> str:
        """What to call it in errors."""
        return f"cache {self.cache.digest[:12]}"

    def chosen(self, split: str) -> NDArray[np.bool_]:
        """Bool [N], the samples of a split."""
        return np.asarray(self.samples.split_N == split)

    def pairs(self, split: str) -> Pairs:
        """Pairs of samples of a split."""
        return find_pairs(self.samples.index, self.chosen(split))


@dataclass(frozen=True, slots=True, eq=False)
class TrainingRows:
    """What a fit needs to know of a source; small enough for every Ray task.

    Attributes:
        digest: Of the cache that holds the rows.
        counts_2CA: Int32 [2, 2, A], how many training samples of each half and class (negative,
            positive) an array row has.
        drawn_2CA: The same of the samples that methods use which hold all rows in memory.
        positive_P, negative_P: Int64, array rows of the training pairs.
        signs_P: Float64, the order within each pair that `pca` reads it in.
        half_P: Bool, which half a pair is in.
    """

    digest: str
    counts_2CA: NDArray[np.int32]
    drawn_2CA: NDArray[np.int32]
    positive_P: NDArray[np.int64]
    negative_P: NDArray[np.int64]
    signs_P: NDArray[np.float64]
    half_P: NDArray[np.bool_]

    @classmethod
    def of(cls, source: Source, *, pair_order_seed: int, max_rows: int) -> TrainingRows:
        """The training rows of a source.

        Args:
            max_rows: Most samples that `drawn_2CA` counts.
        """
        samples, train_N = source.samples, source.chosen("train")
        pairs = source.pairs("train")
        drawn_N = drawn_blocks(samples.block_N, train_N, max_rows)
        return cls(
            source.rows.digest,
            _counts(samples, train_N),
            _counts(samples, drawn_N),
            samples.row_N[pairs.positive_P],
            samples.row_N[pairs.negative_P],
            pair_order(pairs.names, pair_order_seed),
            samples.half_N[pairs.positive_P],
        )


def _counts(samples: Samples, chosen_N: NDArray[np.bool_]) -> NDArray[np.int32]:
    return np.array(
        [
            [
                samples.counts(chosen_N & (samples.half_N == half) & (samples.label_N == label))
                for label in (False, True)
            ]
            for half in (False, True)
        ],
        np.int32,
    )


def drawn_blocks(
    block_N: NDArray[np.int64], chosen_N: NDArray[np.bool_], most: int
) -> NDArray[np.bool_]:
    """Bool [N]: of the chosen samples at most so many, whole blocks, the same in every run."""
    if chosen_N.sum() <= most:
        return chosen_N
    names, sizes = np.unique(block_N[chosen_N], return_counts=True)
    order = np.random.default_rng(0).permutation(len(names))
    kept = order[: int(np.searchsorted(np.cumsum(sizes[order]), most, side="right"))]
    return chosen_N & np.isin(block_N, names[kept])


def kept_rows(root: Location, caches: Sequence[ActivationCache]) -> dict[str, str]:
    """Digests of the kept rows of those captures whose own rows were not written, by theirs."""
    return {
        cache.digest: kept.digest
        for cache in caches
        if not cache.is_complete and (kept := find_kept(root, cache.digest)) is not None
    }


def check_alike(sources: Sequence[Source]) -> dict[str, StreamLayout]:
    """The layouts that all sources share, but for their numbers of rows.

    Raises:
        InvalidInput: kind "sources_differ".
    """
    first = sources[0]
    for other in sources[1:]:
        mine, theirs = _kind(first.cache), _kind(other.cache)
        if mine != theirs:
            wrong = next(key for key in mine if mine[key] != theirs.get(key))
            raise InvalidInput(
                f"{other.where} cannot extend {first.where}: {wrong} differs, expected "
                f"{mine[wrong]!r}, got {theirs.get(wrong)!r}; reduce.extends takes run files that "
                "differ in their prompts alone",
                kind="sources_differ",
            )
    return dict(first.rows.streams)


def _kind(cache: ActivationCache) -> dict[str, Any]:
    prompts = cache.capture.get("prompts", {})
    return (
        {name: cache.capture.get(name) for name in ("model", "tokens")}
        | {f"prompts.{name}": prompts.get(name) for name in _SAME_PROMPTS}
        | {
            f"the shape of {name}": (layout.layers, layout.width, layout.num_heads)
            for name, layout in cache.streams.items()
        }
    )
