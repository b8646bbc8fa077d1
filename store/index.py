"""The index of an activation cache: one entry for each sample, which says what its row is.

Usually entry i is of array row i. Where a capture stores what several prompts share only once,
several entries name one row in the column `row`.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from store.errors import Corrupt, InvalidInput
from store.location import Location

INDEX = "index.parquet"
ROW = "row"


def read_index(location: Location) -> pa.Table:
    """The index of the cache at `location`, see `ActivationCache.index`."""
    data = location.get(INDEX)
    try:
        return with_rows(pq.read_table(pa.BufferReader(data)))
    except (pa.ArrowException, OSError) as error:
        message = (
            f"{location.url}/{INDEX} is damaged: {error}; restore it from a backup, or remove the "
            "cache and run `steerage extract RUN.toml`"
        )
        raise Corrupt(message, kind="index") from error


def with_rows(index: pa.Table) -> pa.Table:
    """The index with its column `row` (int64); an index without one names the rows in order."""
    if ROW in index.column_names:
        return index
    return index.append_column(ROW, pa.array(np.arange(index.num_rows), pa.int64()))


def check_index(index: pa.Table, num_rows: int) -> None:
    """Refuse an index that does not say of every array row what it is.

    Raises:
        InvalidInput: kind "index", it has another number of entries than there are rows and no
            column `row`; or that column is not of int64, or is not exactly the rows 0 to
            num_rows - 1, each at least once.
    """
    if ROW not in index.column_names:
        if index.num_rows != num_rows:
            message = (
                f"the index must have one entry per array row: {num_rows} expected, got "
                f"{index.num_rows}; where several share a row, name it in a column {ROW!r}"
            )
            raise InvalidInput(message, kind="index")
        return
    column = index[ROW]
    if column.type != pa.int64() or column.null_count:
        message = (
            f"the index's column {ROW!r} must be int64 without nulls, got {column.type} with "
            f"{column.null_count} nulls"
        )
        raise InvalidInput(message, kind="index")
    rows_N = column.to_numpy()
    outside = np.flatnonzero((rows_N < 0) | (rows_N >= num_rows))
    if len(outside):
        entry = int(outside[0])
        message = (
            f"the index's column {ROW!r} must hold rows 0 to {num_rows - 1}, entry {entry} has "
            f"{rows_N[entry]}"
        )
        raise InvalidInput(message, kind="index")
    named_N = np.zeros(num_rows, np.bool_)
    named_N[rows_N] = True
    if not named_N.all():
        message = (
            f"no entry of the index is of row {int(np.argmin(named_N))}, one of "
            f"{int((~named_N).sum())} of {num_rows} rows that its column {ROW!r} leaves out"
        )
        raise InvalidInput(message, kind="index")
