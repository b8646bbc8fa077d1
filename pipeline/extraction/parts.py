"""Parts: the shards whose Moments are written together where the activations are not.

Which shards are a part follows from the plan alone, and Moments are merged in the order of the
shards, so the same bits come out however many workers there are, and whatever was killed.

Shapes: A array rows, R rows of a shard, M training samples of a part, P pairs, G groups, L layers,
W width, K rows that are written as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.extraction.gather import ShardResult
from pipeline.reduction.counting import Counted, Counting, count_shard
from pipeline.reduction.moment_store import training_counting
from pipeline.reduction.pairs import find_pairs
from pipeline.reduction.samples import Blocks, Samples
from store.layout import StreamLayout

Int64 = NDArray[np.int64]

_SHARE: Final = 0.05
"""Of a part's activations, that its Moments may take."""

_MIN_PARTS: Final = 32
"""A small corpus is split further than that, so that several workers have something to do; its
Moments are still few bytes, those of at most 32 * 160 / itemsize rows."""

MOST_APART: Final = 8192
"""Rows that are saved so that pairs in different parts can be counted. Not more where more rows are
kept: the Moments of a capture are the same however many are."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What is counted together. It pickles, and holds nothing of other parts.

    Attributes:
        number: In the order of the rows.
        shards: Neighbours.
        rows: Their array rows.
        saved_rows: Int64, array rows that are written as they are, increasing.
        row_M: Int64 [M], array row of each training sample, increasing.
        group_M: Int64 [M], group of its Moments.
        block_M: Int64 [M], equal for samples that stand or fall together.
        num_groups: G.
        positive_P: Int64 [P], numbers of samples, of the pairs that lie in this part.
        negative_P: Int64 [P], their partners.
        group_P: Int64 [P], groups of the Moments of their differences.
        num_pair_groups: Groups of these.
    """

    number: int
    shards: range
    rows: range
    saved_rows: Int64
    row_M: Int64
    group_M: Int64
    block_M: Int64
    num_groups: int
    positive_P: Int64
    negative_P: Int64
    group_P: Int64
    num_pair_groups: int


@dataclass(frozen=True, slots=True, eq=False)
class Apart:
    """Training pairs whose sides lie in different parts: they are counted last, from saved rows.

    Attributes:
        positive_P: Int64 [P], array rows.
        negative_P: Int64 [P], their partners.
        group_P: Int64 [P], groups of the Moments of their differences.
        block_P: Int64 [P], see `Parts`.
        num_groups: Groups of these Moments.
    """

    positive_P: Int64
    negative_P: Int64
    group_P: Int64
    block_P: Int64
    num_groups: int

    def __len__(self) -> int:
        return len(self.group_P)

    @property
    def rows(self) -> Int64:
        """Array rows of either side, increasing."""
        return np.union1d(self.positive_P, self.negative_P)

    def of(self, chosen_P: NDArray[np.bool_]) -> Apart:
        """Some of the pairs."""
        return Apart(
            self.positive_P[chosen_P],
            self.negative_P[chosen_P],
            self.group_P[chosen_P],
            self.block_P[chosen_P],
            self.num_groups,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """The parts of a capture.

    Attributes:
        parts: In order.
        apart: Pairs that are counted last.
        pairs_apart: Pairs that are not counted, as too many lie apart.
        saved_rows: Int64, those of all parts, increasing.
        row_N: Int64, array row of each training sample.
        block_N: Int64, equal for samples that stand or fall together.
    """

    parts: Sequence[Part]
    apart: Apart
    pairs_apart: int
    saved_rows: Int64
    row_N: Int64
    block_N: Int64

    def in_blocks_of(self, rows: Sequence[int]) -> int:
        """Training samples in these array rows, and the others of their blocks."""
        return int(np.isin(self.block_N, self._blocks_of(rows)).sum())

    def apart_without(self, rows: Sequence[int]) -> Apart:
        """Pairs that are counted last if these rows do not count."""
        return self.apart.of(~np.isin(self.apart.block_P, self._blocks_of(rows)))

    def _blocks_of(self, rows: Sequence[int]) -> Int64:
        return self.block_N[np.isin(self.row_N, np.asarray(rows, np.int64))]


def shards_per_part(layouts: Sequence[StreamLayout], num_groups: int) -> int:
    """Shards of a part, of which the last may have fewer.

    Args:
        layouts: Of all streams.
        num_groups: Groups of Moments, those of pairs included.
    """
    first = layouts[0]
    # Mean and second moment, float64.
    moments = num_groups * 2 * 8
    rows = moments / (_SHARE * min(layout.itemsize for layout in layouts))
    num_parts = max(int(first.num_rows / rows), min(_MIN_PARTS, first.num_shards))
    return -(-first.num_shards // num_parts)


def plan_parts(
    index: pa.Table,
    layouts: Sequence[StreamLayout],
    kept_rows: Int64,
    most_apart: int = MOST_APART,
    per_part: int | None = None,
) -> Parts:
    """Cut a capture into parts.

    Args:
        index: The cache's index.
        layouts: Of all streams.
        kept_rows: Array rows that are kept, increasing.
        most_apart: Most array rows that are saved for pairs whose sides lie in different parts. If
            there are more, none of these pairs is counted.
        per_part: Shards of a part; None: see `shards_per_part`.
    """
    layout = layouts[0]
    row_N = index["row"].to_numpy()
    # Each sample as if it were a row of its own: this says which group it is counted in.
    alone = Samples(index, np.arange(len(index)), len(index), 0, Blocks.of(index))
    pairs = find_pairs(index, alone.split_N == "train")
    counting = training_counting(alone, pairs)
    trained = np.flatnonzero(counting.counts_GA.any(axis=0))
    trained = trained[np.argsort(row_N[trained], kind="stable")]
    group_M = counting.counts_GA[:, trained].argmax(axis=0).astype(np.int64)
    row_M, block_M = row_N[trained], alone.block_N[trained]
    place_N = np.full(len(index), -1, np.int64)
    place_N[trained] = np.arange(len(trained))
    positive_P, negative_P = place_N[counting.positive_P], place_N[counting.negative_P]
    if per_part is None:
        per_part = shards_per_part(layouts, len(counting.counts_GA) + counting.num_pair_groups)
    rows_per_part = per_part * layout.rows_per_shard
    part_P = row_M[positive_P] // rows_per_part
    apart_P = part_P != row_M[negative_P] // rows_per_part
    apart = Apart(
        row_M[positive_P[apart_P]],
        row_M[negative_P[apart_P]],
        counting.group_P[apart_P],
        block_M[positive_P[apart_P]],
        counting.num_pair_groups,
    )
    pairs_apart = 0
    if len(apart.rows) > most_apart:
        pairs_apart, apart = len(apart), apart.of(np.zeros(len(apart), np.bool_))
    saved_rows = np.union1d(kept_rows, apart.rows)
    parts = []
    for number, first in enumerate(range(0, layout.num_shards, per_part)):
        shards = range(first, min(first + per_part, layout.num_shards))
        rows = range(layout.shard_rows(shards[0]).start, layout.shard_rows(shards[-1]).stop)
        start, stop = np.searchsorted(row_M, [rows.start, rows.stop])
        here_P = (part_P == number) & ~apart_P
        parts.append(
            Part(
                number=number,
                shards=shards,
                rows=rows,
                saved_rows=rows_in(saved_rows, rows),
                row_M=row_M[start:stop],
                group_M=group_M[start:stop],
                block_M=block_M[start:stop],
                num_groups=len(counting.counts_GA),
                positive_P=positive_P[here_P] - start,
                negative_P=negative_P[here_P] - start,
                group_P=counting.group_P[here_P],
                num_pair_groups=counting.num_pair_groups,
            )
        )
    return Parts(parts, apart, pairs_apart, saved_rows, row_M, block_M)


def rows_in(rows: Int64, wanted: range) -> Int64:
    """Those of increasing rows that lie in a range."""
    start, stop = np.searchsorted(rows, [wanted.start, wanted.stop])
    return rows[start:stop]


@dataclass(frozen=True, slots=True, eq=False)
class CountedPart:
    """What is written of a part.

    Attributes:
        counted: Moments by stream.
        saved: Values [K, L, W] of the part's saved rows by stream, as an ActivationCache stores
            them.
        quarantined: Reasons by array row.
        left_out: Training samples that are not in the Moments.
        pairs_counted: Pairs that are in the Moments.
    """

    counted: Mapping[str, Counted]
    saved: Mapping[str, NDArray[Any]]
    quarantined: Mapping[int, str]
    left_out: int
    pairs_counted: int


class PartCount:
    """Counts the shards of a part as they are computed; a shard's values are not held.

    Only rows of pairs whose sides lie in two shards of the part are, until the part is done.
    """

    def __init__(self, part: Part) -> None:
        self._part = part
        self._counted: dict[str, Counted] = {}
        self._saved: dict[str, list[NDArray[Any]]] = {}
        self._quarantined: dict[int, str] = {}
        self._left_out_M = np.zeros(len(part.row_M), np.bool_)
        self._starts: list[int] = []
        self._pairs_counted = 0
        self._held_rows: list[Int64] = []
        self._held: dict[str, list[NDArray[Any]]] = {}

    def add(self, result: ShardResult, rows: range) -> None:
        """Count the next shard.

        Args:
            rows: Its array rows.
        """
        part = self._part
        self._quarantined |= result.quarantined
        self._starts.append(rows.start)
        here_M = (part.row_M >= rows.start) & (part.row_M < rows.stop)
        self._leave_out(here_M)
        counted_M = here_M & ~self._left_out_M
        counts_GR = np.zeros((part.num_groups, len(rows)), np.int64)
        np.add.at(counts_GR, (part.group_M[counted_M], part.row_M[counted_M] - rows.start), 1)
        both_P = here_M[part.positive_P] & here_M[part.negative_P]
        self._count(result.values, part.row_M - rows.start, counts_GR, both_P)
        saved = rows_in(part.saved_rows, rows)
        either_P = here_M[part.positive_P] ^ here_M[part.negative_P]
        ends = np.concatenate([part.positive_P[either_P], part.negative_P[either_P]])
        held = np.unique(part.row_M[ends[here_M[ends]]])
        self._held_rows.append(held)
        for stream, values in result.values.items():
            self._saved.setdefault(stream, []).append(values[saved - rows.start])
            self._held.setdefault(stream, []).append(values[held - rows.start])

    def finish(self) -> CountedPart:
        """What the part comes to, once all its shards were added."""
        part = self._part
        held = np.concatenate(self._held_rows)
        if len(held):
            values = {stream: np.concatenate(rows) for stream, rows in self._held.items()}
            # Rows are held in order, as shards are.
            slot_M = np.searchsorted(held, part.row_M)
            shard_M = np.searchsorted(self._starts, part.row_M, side="right")
            apart_P = shard_M[part.positive_P] != shard_M[part.negative_P]
            none = np.zeros((part.num_groups, len(held)), np.int64)
            self._count(values, slot_M, none, apart_P)
        return CountedPart(
            counted=self._counted,
            saved={stream: np.concatenate(rows) for stream, rows in self._saved.items()},
            quarantined=self._quarantined,
            left_out=int(self._left_out_M.sum()),
            pairs_counted=self._pairs_counted,
        )

    def _leave_out(self, here_M: NDArray[np.bool_]) -> None:
        """Leave the samples of quarantined rows out, and the others of their blocks that are not
        counted yet: Moments cannot be taken back."""
        if not self._quarantined:
            return
        part = self._part
        bad_M = np.isin(part.row_M, np.array(sorted(self._quarantined), np.int64))
        self._left_out_M |= here_M & np.isin(part.block_M, part.block_M[bad_M])

    def _count(
        self,
        values: Mapping[str, NDArray[Any]],
        slot_M: Int64,
        counts_GR: NDArray[np.int64],
        chosen_P: NDArray[np.bool_],
    ) -> None:
        """Count rows, and the chosen pairs, of which no side was left out.

        Args:
            values: [R, L, W] by stream.
            slot_M: Which of these rows a sample is in.
        """
        part = self._part
        out_M = self._left_out_M
        chosen_P = chosen_P & ~out_M[part.positive_P] & ~out_M[part.negative_P]
        counting = Counting(
            counts_GA=counts_GR,
            positive_P=slot_M[part.positive_P[chosen_P]],
            negative_P=slot_M[part.negative_P[chosen_P]],
            group_P=part.group_P[chosen_P],
            num_pair_groups=part.num_pair_groups,
        )
        self._pairs_counted += int(chosen_P.sum())
        counted = count_shard(values, range(counts_GR.shape[1]), counting)
        for stream, one in counted.items():
            before = self._counted.get(stream)
            self._counted[stream] = one if before is None else before.merge(one)


def in_rows_of_work(parts: Sequence[Part], shards_at_once: int) -> Iterator[Sequence[Part]]:
    """Parts in groups that a worker is given at once, of about so many shards."""
    size = max(1, shards_at_once // len(parts[0].shards)) if parts else 1
    for first in range(0, len(parts), size):
        yield parts[first : first + size]
