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

_SAME_PROMPTS: Final = ("template", "system", "close_turn", "validation_share", "test_share")
"""Settings of [prompts] that decide what an activation is of, and which split it is in: a prompt of
both must not be trained on by one and tested by the other."""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The samples of one capture.

    Attributes:
        cache: The capture, whose digest names its Moments.
        rows: The cache in which activations lie: the same, or the kept rows of a capture that was
            extracted with ``--no-cache``.
        samples: Those of `rows` that count.
        left_out: Samples of `cache` that do not, as far as is known.
        pairs_apart: Training pairs of `cache` that are not in its Moments.
    """

    cache: ActivationCache
    rows: ActivationCache
    samples: Samples
    left_out: int
    pairs_apart: int = 0

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
        return cls(cache, kept, read_samples(kept), record.left_out, record.pairs_apart)

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
            positive) an array row has, of those that were drawn.
        positive_P, negative_P: Int64, array rows of the drawn training pairs.
        signs_P: Float64, the order within each pair that `pca` reads it in.
        half_P: Bool, which half a pair is in.
    """

    digest: str
    counts_2CA: NDArray[np.int32]
    positive_P: NDArray[np.int64]
    negative_P: NDArray[np.int64]
    signs_P: NDArray[np.float64]
    half_P: NDArray[np.bool_]

    @classmethod
    def of(cls, source: Source, *, pair_order_seed: int, max_rows: int) -> TrainingRows:
        """The training rows of a source.

        Args:
            max_rows: Most samples of it; see `drawn`.
        """
        samples = source.samples
        drawn_N = drawn(samples, source.chosen("train"), max_rows)
        pairs = find_pairs(samples.index, drawn_N)
        counts_2CA = [
            [
                samples.counts(drawn_N & (samples.half_N == half) & (samples.label_N == label))
                for label in (False, True)
            ]
            for half in (False, True)
        ]
        return cls(
            source.rows.digest,
            np.array(counts_2CA, np.int32),
            samples.row_N[pairs.positive_P],
            samples.row_N[pairs.negative_P],
            pair_order(pairs.names, pair_order_seed),
            samples.half_N[pairs.positive_P],
        )


def parts_of(most: int, sizes: Sequence[int]) -> list[int]:
    """Most samples of each source, in proportion to its size, so that there are `most` in all."""
    total = sum(sizes)
    if total <= most:
        return list(sizes)
    return [most * size // total for size in sizes]


def drawn(samples: Samples, chosen_N: NDArray[np.bool_], most: int) -> NDArray[np.bool_]:
    """Bool [N]: of the chosen samples about so many, whole blocks, the same in every run.

    Pairs and blocks of either class are drawn in proportion, and at least one of each, however
    large: a class that is there stays there.
    """
    size = int(chosen_N.sum())
    if size <= most:
        return chosen_N
    block_N, label_N = samples.block_N, samples.label_N
    names = np.unique(block_N[chosen_N])
    sides_2B = np.array(
        [
            np.bincount(
                np.searchsorted(names, block_N[chosen_N & (label_N == label)]),
                minlength=len(names),
            )
            for label in (False, True)
        ]
    )
    kind_B = (sides_2B[0] > 0) + 2 * (sides_2B[1] > 0)
    kept = []
    for kind in np.unique(kind_B):
        blocks = np.random.default_rng(0).permutation(np.flatnonzero(kind_B == kind))
        ends = np.cumsum(sides_2B[:, blocks].sum(axis=0))
        wanted = most * int(ends[-1]) // size
        kept.append(blocks[: max(1, int(np.searchsorted(ends, wanted, side="right")))])
    return chosen_N & np.isin(block_N, names[np.concatenate(kept)])


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
            wrong = next(key for key in mine | theirs if mine.get(key) != theirs.get(key))
            raise InvalidInput(
                f"{other.where} cannot extend {first.where}: {wrong} differs, expected "
                f"{mine.get(wrong)!r}, got {theirs.get(wrong)!r}; reduce.extends takes run files "
                "that differ in their prompts alone",
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
