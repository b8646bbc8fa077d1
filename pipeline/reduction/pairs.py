"""Pairs: which row of the positive class belongs with which row of the negative one.

Shapes: N rows of the cache, P pairs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import InvalidInput

_NAMED = 3
"""Rows without a partner that a message names."""


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Contrastive pairs of rows.

    Attributes:
        positive_P: Int64 [P], rows of the cache.
        negative_P: Int64 [P], their partners.
        names: P names, equal for the same pair in any cache: the index's `pair`, and behind a slash
            which of the pair's rows it is, as a pair may hold several of each class.
        unpaired: Int64, rows that were asked about and have no partner.
    """

    positive_P: NDArray[np.int64]
    negative_P: NDArray[np.int64]
    names: tuple[str, ...]
    unpaired: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)


def find_pairs(index: pa.Table, chosen_N: NDArray[np.bool_]) -> Pairs:
    """Pairs among the chosen rows: equal `pair`, different label.

    A pair's first positive row goes with its first negative one, the second with the second: with
    one row a prompt these are its prompts, with ``tokens = "all"`` its tokens in order.

    Args:
        index: The cache's index. Without a column `pair`, no row has a partner.
        chosen_N: Bool [N], such as the rows of a split: a pair does not reach across splits.
    """
    rows = np.flatnonzero(chosen_N)
    if "pair" not in index.column_names or len(rows) == 0:
        none = np.zeros(0, np.int64)
        return Pairs(none, none, (), rows)
    encoded = index["pair"].combine_chunks().dictionary_encode()
    # Rows without a pair have code -1.
    code_N = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    label_N = index["label"].to_numpy().astype(np.int64)
    rows = rows[code_N[rows] >= 0]
    rows = rows[np.lexsort((rows, label_N[rows], code_N[rows]))]
    class_of = code_N[rows] * 2 + label_N[rows]
    first = np.flatnonzero(np.diff(class_of, prepend=-1))
    sizes = np.diff(np.append(first, len(rows)))
    ordinal = np.arange(len(rows)) - np.repeat(first, sizes)
    key = code_N[rows] * (int(ordinal.max(initial=0)) + 1) + ordinal
    positive = label_N[rows] == 1
    _, at_positive, at_negative = np.intersect1d(key[positive], key[~positive], return_indices=True)
    positive_P = rows[positive][at_positive]
    negative_P = rows[~positive][at_negative]
    names = encoded.dictionary.to_pylist()
    paired_N = np.zeros(len(chosen_N), np.bool_)
    paired_N[positive_P] = paired_N[negative_P] = True
    return Pairs(
        positive_P,
        negative_P,
        tuple(
            f"{names[code]}/{number}"
            for code, number in zip(code_N[positive_P], ordinal[positive][at_positive], strict=True)
        ),
        np.flatnonzero(chosen_N & ~paired_N),
    )


def check_pairs(pairs: Pairs, index: pa.Table, *, method: str, where: str) -> None:
    """Refuse rows without a partner.

    Raises:
        InvalidInput: kind "pair_missing", a training row has no partner, or the index says nothing
            of pairs.
    """
    way_on = (
        "give the rows of a pair the same `pair` and split in the prompt file, capture one row a "
        'prompt (tokens = "last"), or set reduce.method = "difference_of_means"'
    )
    if "pair" not in index.column_names:
        raise InvalidInput(
            f"{where}: method {method} compares the two rows of a pair, and the index has no "
            f"column 'pair'; {way_on}",
            kind="pair_missing",
        )
    if len(pairs.unpaired):
        columns = [name for name in ("pair", "label", "prompt_id") if name in index.column_names]
        named = index.select(columns).take(pa.array(pairs.unpaired[:_NAMED])).to_pylist()
        examples = "; ".join(
            f"pair {row['pair']!r} lacks a {'negative' if row['label'] else 'positive'} row for "
            f"{row.get('prompt_id') or f'row {number}'}"
            for number, row in zip(pairs.unpaired, named, strict=False)
        )
        raise InvalidInput(
            f"{where}: method {method} needs a partner of the other class for every training row; "
            f"{len(pairs.unpaired)} of {len(pairs.unpaired) + 2 * len(pairs)} rows have none, "
            f"first: {examples}; {way_on}",
            kind="pair_missing",
        )


def check_enough(num_pairs: int, *, method: str, where: str) -> None:
    """Refuse too few pairs to compare.

    Raises:
        InvalidInput: kind "pair_missing", there are fewer than two.
    """
    if num_pairs < 2:
        raise InvalidInput(
            f"{where}: method {method} needs at least 2 training pairs, got {num_pairs}; "
            "add pairs, or lower the validation and test shares of the run file",
            kind="pair_missing",
        )


def pair_order(names: tuple[str, ...], seed: int) -> NDArray[np.float64]:
    """Which pairs are read as negative minus positive: half of them, by a hash of name and seed.

    It depends on the pairs alone: not on rows, shards or workers. Exactly half (rounded down) are
    turned, as the share that is not balanced is lost from the direction when the differences are
    recentred.

    Returns:
        Float64 [P], +1 for positive minus negative and -1 for the other way round.
    """
    order = sorted(
        range(len(names)),
        key=lambda item: hashlib.sha256(f"{seed}/{names[item]}".encode()).digest(),
    )
    signs_P = np.ones(len(names))
    signs_P[order[: len(names) // 2]] = -1.0
    return signs_P
