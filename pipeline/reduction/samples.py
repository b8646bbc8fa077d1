"""Samples: what a reduction or a controller is fitted on, one for each entry of a cache's index.

A sample's values are those of its array row. Several samples may share a row, since a capture of
every token stores what prompts have in common once; and rows in quarantine have no values.

Shapes: N samples, A array rows of the cache, W width.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from store.activations import ActivationCache

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """The samples of a cache that count.

    Attributes:
        index: Their entries of the cache's index, N rows.
        row_N: Int64 [N], the array row of each.
        num_rows: A, array rows of the cache.
        left_out: Samples that do not count: those in quarantined rows, and the others of their
            pairs.
    """

    index: pa.Table
    row_N: NDArray[np.int64]
    num_rows: int
    left_out: int

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
        return Samples(index, row_N, cache.num_rows, 0)
    if "pair" in index.column_names:
        code_N = _codes(index["pair"])
        bad_N |= np.isin(code_N, code_N[bad_N & (code_N >= 0)])
    left_out = int(bad_N.sum())
    log.warning(
        "quarantined samples left out",
        extra={"samples": left_out, "of": len(row_N), "quarantined_rows": len(quarantined)},
    )
    return Samples(index.filter(pa.array(~bad_N)), row_N[~bad_N], cache.num_rows, left_out)


def _codes(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """A number for each value of a column; -1 where it has none."""
    indices = column.combine_chunks().dictionary_encode().indices
    return np.asarray(indices.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)
