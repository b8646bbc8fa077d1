"""Samples: what a reduction or a controller is fitted on, one for each entry of a cache's index.

A sample's values are those of its array row. Several samples may share a row, since a capture of
every token stores what prompts have in common once; and rows in quarantine have no values.

Shapes: N samples, A array rows of the cache, W width.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import InvalidInput
from store.activations import ActivationCache

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Samples that belong together: those of a pair, or else those of a prompt.

    What is resampled, halved or relabelled is whole blocks: two sides of a pair share more than
    their class. Halves and shuffled labels follow from a hash of the block's name, so they are the
    same in every run, and balanced within each split.

    Attributes:
        block_N: Int64 [N], equal for samples of one block.
        half_N: Bool [N], in which half of its split a sample's block is.
        shuffled_N: Bool [N], shuffled labels: the other class in half of the blocks. Of a pair both
            sides change, so that each shuffled class has as many of either label, but for an odd
            block.
    """

    block_N: NDArray[np.int64]
    half_N: NDArray[np.bool_]
    shuffled_N: NDArray[np.bool_]

    @classmethod
    def of(cls, index: pa.Table) -> Blocks:
        """Blocks of the samples of an index."""
        label_N = np.asarray(index["label"].to_numpy())
        block_N, names = block_names(index)
        digests_B = [hashlib.blake2b(name, digest_size=8).digest() for name in names]
        hash_B = np.frombuffer(b"".join(digests_B), ">u8")
        _, first_B = np.unique(block_N, return_index=True)
        sides_B = [np.bincount(block_N[label_N == side], minlength=len(names)) for side in (0, 1)]
        # Blocks of one class are balanced within the class, those of both within themselves.
        kind_B = (sides_B[0] > 0).astype(np.int64) + 2 * (sides_B[1] > 0)
        _, split_N = np.unique(index["split"].to_numpy(zero_copy_only=False), return_inverse=True)
        group_B = split_N[first_B] * 4 + kind_B
        order = np.lexsort((hash_B, group_B))
        starts = np.flatnonzero(np.diff(group_B[order], prepend=-1))
        sizes = np.diff(np.append(starts, len(order)))
        rank_B = np.empty(len(order), np.int64)
        rank_B[order] = np.arange(len(order)) - np.repeat(starts, sizes)
        # 0 1 1 0: half of the blocks, however many there are.
        turned_N = ((rank_B + 1) // 2 % 2 == 1)[block_N]
        return cls(block_N, (rank_B % 2 == 1)[block_N], label_N ^ turned_N)


def block_names(index: pa.Table) -> tuple[NDArray[np.int64], list[bytes]]:
    """A number for each entry's block, see `Blocks`, and the blocks' names by number."""
    num = len(index)
    code_N, names = np.full(num, -1, np.int64), list[bytes]()
    for column in ("pair", "prompt_id"):
        open_N = code_N < 0
        if column in index.column_names and open_N.any():
            encoded = index[column].combine_chunks().dictionary_encode()
            named_N = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
            chosen_N = open_N & (named_N >= 0)
            used, numbers = np.unique(named_N[chosen_N], return_inverse=True)
            code_N[chosen_N] = len(names) + numbers
            values = encoded.dictionary.to_pylist()
            names += [f"{column}/{values[number]}".encode() for number in used]
    alone = np.flatnonzero(code_N < 0)
    code_N[alone] = len(names) + np.arange(len(alone))
    return code_N, names + [f"entry/{number}".encode() for number in alone]


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """The samples of a cache that count.

    Attributes:
        index: Their entries of the cache's index, N rows.
        row_N: Int64 [N], the array row of each.
        num_rows: A, array rows of the cache.
        left_out: Samples that do not count: those in quarantined rows, and the others of their
            pairs.
        blocks: Which samples belong together, and how they are halved and relabelled.
    """

    index: pa.Table
    row_N: NDArray[np.int64]
    num_rows: int
    left_out: int
    blocks: Blocks

    def __len__(self) -> int:
        return len(self.row_N)

    @property
    def label_N(self) -> NDArray[np.bool_]:
        """Bool [N], the class of each."""
        return np.asarray(self.index["label"].to_numpy())

    @property
    def split_N(self) -> NDArray[Any]:
        """Split names [N]."""
        return np.asarray(self.index["split"].to_numpy(zero_copy_only=False))

    @property
    def block_N(self) -> NDArray[np.int64]:
        """See `Blocks`."""
        return self.blocks.block_N

    @property
    def half_N(self) -> NDArray[np.bool_]:
        """See `Blocks`."""
        return self.blocks.half_N

    @property
    def shuffled_N(self) -> NDArray[np.bool_]:
        """See `Blocks`."""
        return self.blocks.shuffled_N

    def of(self, values: NDArray[Any]) -> NDArray[Any]:
        """The samples' values [N, ...] from those of all array rows [A, ...]; where each row is one
        sample, the very same array.
        """
        if len(self) == self.num_rows and (np.diff(self.row_N, prepend=-1) == 1).all():
            return values
        return values[self.row_N]

    def counts(self, chosen_N: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Int64 [A], how many of the chosen samples each array row has."""
        return np.bincount(self.row_N[chosen_N], minlength=self.num_rows)

    def in_rows(self, rows: range) -> NDArray[np.int64]:
        """Numbers of the samples in these array rows, such as a shard's."""
        return np.flatnonzero((self.row_N >= rows.start) & (self.row_N < rows.stop))


def read_samples(cache: ActivationCache) -> Samples:
    """The samples of a cache, without those in quarantined rows.

    Nor are the others of their pairs taken: a method that compares the sides of a pair has nothing
    to compare, and one that compares classes would see a prompt in one class only.

    Raises:
        Corrupt: The index or a quarantine is damaged.
    """
    index = cache.index()
    row_N = index["row"].to_numpy()
    quarantined = np.array(sorted(cache.quarantined()), np.int64)
    bad_N = np.isin(row_N, quarantined)
    if not bad_N.any():
        return Samples(index, row_N, cache.num_rows, 0, Blocks.of(index))
    if "pair" in index.column_names:
        code_N = _codes(index["pair"])
        bad_N |= np.isin(code_N, code_N[bad_N & (code_N >= 0)])
    left_out = int(bad_N.sum())
    log.warning(
        "quarantined samples left out",
        extra={"samples": left_out, "of": len(row_N), "quarantined_rows": len(quarantined)},
    )
    index = index.filter(pa.array(~bad_N))
    return Samples(index, row_N[~bad_N], cache.num_rows, left_out, Blocks.of(index))


def _codes(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """A number for each value of a column; -1 where it has none."""
    indices = column.combine_chunks().dictionary_encode().indices
    return np.asarray(indices.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)


def not_finite(what: str) -> InvalidInput:
    """The error of values that are NaN or infinite where no row is in quarantine."""
    return InvalidInput(
        f"{what} is not finite, so rows that are not in quarantine hold NaN or infinity; run "
        "`steerage verify`, which finds a quarantine that was lost",
        kind="not_finite",
    )
