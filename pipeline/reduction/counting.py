"""Counting: Moments of groups of rows and of pair differences, from one read of a cache.

Shapes: R rows, A array rows of the cache, P pairs, G groups, K groups of pairs, L layers, W width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.reduction.grouped import GroupedMoments, GroupSums
from pipeline.reduction.passes import layer_blocks, merge_tasks, shard_groups
from store.activations import ActivationCache
from store.layout import StreamLayout
from store.location import Location

_PARTNERS_AT_A_TIME: Final = 512


@dataclass(frozen=True, slots=True, eq=False)
class Counted:
    """What was counted of one stream.

    Attributes:
        groups: [G, L, W], of the rows.
        pairs: [K, L, W], of the positive minus the negative row of each pair; None where no pairs
            were asked for.
    """

    groups: GroupedMoments
    pairs: GroupedMoments | None

    def merge(self, other: Counted) -> Counted:
        """Both together; see `GroupedMoments.merge`."""
        pairs = self.pairs
        if pairs is not None and other.pairs is not None:
            pairs = pairs.merge(other.pairs)
        return Counted(self.groups.merge(other.groups), pairs)


@dataclass(frozen=True, slots=True, eq=False)
class Counting:
    """What is counted. Plain arrays, so that it travels to Ray tasks.

    Attributes:
        counts_GA: Integers [G, A], how often an array row counts in a group.
        positive_P: Int64 [P], array rows. Several pairs may share a row.
        negative_P: Int64 [P], their partners.
        group_P: Int64 [P], the pair group of each.
        num_pair_groups: K; 0: pairs are not counted.
    """

    counts_GA: NDArray[np.integer[Any]]
    positive_P: NDArray[np.int64]
    negative_P: NDArray[np.int64]
    group_P: NDArray[np.int64]
    num_pair_groups: int

    def cut(self, rows: range) -> Counting:
        """What concerns consecutive array rows: counts of these alone, [G, R], and the pairs whose
        positive row is among them. Pairs still name rows of the whole cache.
        """
        mine = np.flatnonzero((self.positive_P >= rows.start) & (self.positive_P < rows.stop))
        return Counting(
            self.counts_GA[:, rows.start : rows.stop],
            self.positive_P[mine],
            self.negative_P[mine],
            self.group_P[mine],
            self.num_pair_groups,
        )


def count_shard(
    values: Mapping[str, NDArray[Any]], rows: range, counting: Counting
) -> dict[str, Counted]:
    """Count rows that are all in memory, such as a shard that has just been extracted.

    Args:
        values: [R, L, W] of every stream; float32 or uint16 bits of bfloat16.
        rows: Which array rows they are.
        counting: Pairs with a row elsewhere are not counted.

    Returns:
        By stream, Moments [G, L, W] and [K, L, W].

    Raises:
        InvalidInput: kind "values", another dtype, or another number of rows.
    """
    counts_GR = counting.counts_GA[:, rows.start : rows.stop]
    inside_P = pairs_within(counting, rows)
    positive_N = counting.positive_P[inside_P] - rows.start
    negative_N = counting.negative_P[inside_P] - rows.start
    counted = {}
    for stream, values_RLW in values.items():
        pairs = None
        if counting.num_pair_groups:
            sums = GroupSums(counting.num_pair_groups, values_RLW.shape[1:])
            sums.add_differences(
                (values_RLW, positive_N), (values_RLW, negative_N), counting.group_P[inside_P]
            )
            pairs = sums.moments()
        counted[stream] = Counted(GroupedMoments.of(values_RLW, counts_GR), pairs)
    return counted


def pairs_within(counting: Counting, rows: range) -> NDArray[np.int64]:
    """Numbers of the pairs of which both rows are among these."""
    positive_P, negative_P = counting.positive_P, counting.negative_P
    return np.flatnonzero(
        (np.minimum(positive_P, negative_P) >= rows.start)
        & (np.maximum(positive_P, negative_P) < rows.stop)
    )


def num_tasks(streams: Mapping[str, StreamLayout], num_moments: int) -> int:
    """Tasks of `count`, but for merges.

    Args:
        streams: Layouts of the cache.
        num_moments: Groups and groups of pairs together.
    """
    return sum(
        len(layer_blocks(layout, num_moments)) * len(shard_groups(layout))
        for layout in streams.values()
    )


def count(
    cache: ActivationCache,
    root: Location,
    counting: Counting,
    *,
    on_done: Callable[[int], None],
) -> dict[str, Counted]:
    """Count a cache; a Ray task takes a block of layers of a group of shards.

    Only Moments leave a task, and they are merged in a tree of tasks. What a task reads, and what
    is merged with what, follow from the cache alone: the result has the same bits in every run,
    however many workers there are and however many of them are lost.

    Every byte is read once, but for pairs whose rows lie in different shards: the negative row of
    such a pair is read a second time, with the chunk that it lies in. Sent from task to task
    instead, such rows would fill every worker's memory where the classes of a corpus lie apart,
    which they do if pairs differ in their first words.

    In memory a task has Moments (8 MiB, or those of a layer), a layer of a shard, from a bucket a
    few more that are read ahead, and the partners of some hundred rows.

    Args:
        cache: The cache.
        root: The store that holds it.
        counting: What to count.
        on_done: Called with the number of tasks done.

    Returns:
        By stream, Moments [G, L, W] and [K, L, W].

    Raises:
        Corrupt: A shard is damaged.
    """
    import ray

    part_task = ray.remote(num_cpus=1, num_returns=2, max_retries=-1)(_count_part)
    merge_task = ray.remote(num_cpus=1, max_retries=-1)(_merge)
    num_moments = len(counting.counts_GA) + counting.num_pair_groups
    num_done = 0

    def on_one() -> None:
        nonlocal num_done
        num_done += 1
        on_done(num_done)

    counted = {}
    for stream, layout in cache.streams.items():
        blocks = []
        for layers in layer_blocks(layout, num_moments):
            where = (root.url, cache.digest, stream, layers)
            begin = (
                partial(part_task.remote, *where, shards, counting.cut(_rows(layout, shards)))
                for shards in shard_groups(layout)
            )
            merged = ray.get(merge_tasks(begin, merge_task, on_one))
            # A copy, as the object store is small.
            blocks.append(copy.deepcopy(merged))
        counted[stream] = _joined(blocks)
    return counted


def _rows(layout: StreamLayout, shards: Sequence[int]) -> range:
    return range(layout.shard_rows(shards[0]).start, layout.shard_rows(shards[-1]).stop)


def _count_part(
    store_url: str,
    digest: str,
    stream: str,
    layers: Sequence[int],
    shards: Sequence[int],
    counting: Counting,
) -> tuple[Counted, None]:
    """Count some layers of consecutive shards.

    Args:
        counting: `Counting.cut` to the shards' rows.

    Returns:
        Moments [G, L, W] and [K, L, W]; and nothing, for a driver that wants to know when.
    """
    # The number of threads decides the last bits of a sum.
    torch.set_num_threads(1)
    cache = ActivationCache.open(Location.open(store_url), digest)
    layout = cache.layout(stream)
    num_groups, num_pair_groups = len(counting.counts_GA), counting.num_pair_groups
    groups = {layer: GroupSums(num_groups, (layout.width,)) for layer in layers}
    pairs = {layer: GroupSums(num_pair_groups, (layout.width,)) for layer in layers}
    first_row = layout.shard_rows(shards[0]).start
    for shard, layer, values_RW in cache.scan(stream, layers, shards, reuse=True):
        rows = layout.shard_rows(shard)
        here = slice(rows.start - first_row, rows.stop - first_row)
        groups[layer].add_rows(values_RW, counting.counts_GA[:, here])
        partners = _partners(cache, stream, layer, rows, values_RW, counting)
        for positive_N, negative, group_N in partners:
            pairs[layer].add_differences((values_RW, positive_N), negative, group_N)
    pair_moments = _stacked(pairs.values()) if num_pair_groups else None
    return Counted(_stacked(groups.values()), pair_moments), None


def _partners(
    cache: ActivationCache,
    stream: str,
    layer: int,
    rows: range,
    values_RW: NDArray[Any],
    counting: Counting,
) -> Iterator[tuple[NDArray[np.int64], tuple[NDArray[Any], NDArray[np.int64]], NDArray[np.int64]]]:
    """Pairs whose positive row is here.

    Yields:
        Which of these rows the positive ones are, values and which of them the negative ones are,
        and the pairs' groups: those of the pairs that are all here, then some of the others at a
        time.
    """
    positive_P, negative_P = counting.positive_P, counting.negative_P
    mine_P = (positive_P >= rows.start) & (positive_P < rows.stop)
    both_P = mine_P & (negative_P >= rows.start) & (negative_P < rows.stop)
    whole = np.flatnonzero(both_P)
    negative = (values_RW, negative_P[whole] - rows.start)
    yield positive_P[whole] - rows.start, negative, counting.group_P[whole]
    apart = np.flatnonzero(mine_P & ~both_P)
    # Partners near each other are in the same chunks.
    apart = apart[np.argsort(negative_P[apart], kind="stable")]
    for at in range(0, len(apart), _PARTNERS_AT_A_TIME):
        some = apart[at : at + _PARTNERS_AT_A_TIME]
        partners_NW = cache.read_rows(stream, layer, negative_P[some].tolist())
        negative = (partners_NW, np.arange(len(some)))
        yield positive_P[some] - rows.start, negative, counting.group_P[some]


def _stacked(layers: Iterable[GroupSums]) -> GroupedMoments:
    moments = [sums.moments() for sums in layers]
    return GroupedMoments(
        moments[0].count_G,
        np.stack([item.mean for item in moments], axis=1),
        np.stack([item.m2 for item in moments], axis=1),
    )


def _joined(blocks: Sequence[Counted]) -> Counted:
    """Blocks of layers, one behind the other."""

    def join(parts: Sequence[GroupedMoments]) -> GroupedMoments:
        return GroupedMoments(
            parts[0].count_G,
            np.concatenate([part.mean for part in parts], axis=1),
            np.concatenate([part.m2 for part in parts], axis=1),
        )

    pairs = [block.pairs for block in blocks if block.pairs is not None]
    return Counted(join([block.groups for block in blocks]), join(pairs) if pairs else None)


def _merge(*parts: Counted) -> Counted:
    return reduce(Counted.merge, parts)
