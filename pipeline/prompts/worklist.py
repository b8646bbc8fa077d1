"""The work list of a cache, `prompts.parquet`: what each shard's worker has to read, and no more.

Row group I holds the prompts that have rows in shard I, so that a worker reads its shard's alone,
however many prompts there are. A prompt with rows in several shards is in each of their groups.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.prompts.rows import Rows
from pipeline.prompts.tokens import TokenizedPrompt
from pipeline.prompts.trie import PlannedPrompt
from store.activations import ActivationCache
from store.location import Location

PROMPTS_FILE: Final = "prompts.parquet"

_SCHEMA: Final = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("first_row", pa.int64()),
        ("starts", pa.list_(pa.int32())),
        ("stops", pa.list_(pa.int32())),
        ("text", pa.large_string()),
    ]
)
_COLUMNS: Final = ["token_ids", "first_row", "starts", "stops"]


def write_worklist(
    prompts: Sequence[TokenizedPrompt], rows: Rows, rows_per_shard: int, num_shards: int
) -> bytes:
    """The file's bytes.

    Args:
        prompts: In row order.
        rows: Theirs.
    """
    groups: list[list[int]] = [[] for _ in range(num_shards)]
    for i, (first_row, spans) in enumerate(zip(rows.first_rows, rows.spans, strict=True)):
        first = min(first_row // rows_per_shard, num_shards - 1)
        last = (first_row + max(len(spans), 1) - 1) // rows_per_shard
        for shard in range(first, min(last, num_shards - 1) + 1):
            groups[shard].append(i)
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, _SCHEMA, compression="zstd", write_statistics=False) as writer:
        for group in groups:
            columns = {
                "prompt_id": [prompts[i].example.prompt_id for i in group],
                "token_ids": [prompts[i].token_ids for i in group],
                "first_row": [rows.first_rows[i] for i in group],
                "starts": [rows.spans[i][:, 0] for i in group],
                "stops": [rows.spans[i][:, 1] for i in group],
                "text": [prompts[i].text for i in group],
            }
            table = pa.table(columns, schema=_SCHEMA)
            writer.write_table(table, row_group_size=max(len(group), 1))
    return sink.getvalue()


def read_shard(cache: ActivationCache, shard: int) -> list[PlannedPrompt]:
    """The prompts with rows in a shard, in row order; reads their part of the file alone."""
    return _planned(_open(cache).read_row_group(shard, columns=_COLUMNS))


def read_prompts(cache: ActivationCache) -> list[PlannedPrompt]:
    """All prompts of a planned cache, in row order, such as share another's rows included."""
    file = _open(cache)
    prompts: list[PlannedPrompt] = []
    seen: set[str] = set()
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=["prompt_id", *_COLUMNS])
        for name, prompt in zip(table["prompt_id"].to_pylist(), _planned(table), strict=True):
            # A prompt whose rows lie in two shards is named twice.
            if name not in seen:
                seen.add(name)
                prompts.append(prompt)
    return prompts


def _planned(table: pa.Table) -> list[PlannedPrompt]:
    token_ids, starts, stops = (_lists(table[name]) for name in ("token_ids", "starts", "stops"))
    first_rows = table["first_row"].to_numpy()
    return [
        PlannedPrompt(
            token_ids[i].astype(np.int64),
            int(first_rows[i]),
            tuple(zip(starts[i].tolist(), stops[i].tolist(), strict=True)),
        )
        for i in range(len(table))
    ]


def _lists(column: pa.ChunkedArray) -> list[np.ndarray[Any, Any]]:
    lists = column.combine_chunks()
    offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy()
    return [values[offsets[i] : offsets[i + 1]] for i in range(len(lists))]


def _open(cache: ActivationCache) -> pq.ParquetFile:
    return pq.ParquetFile(io.BufferedReader(_Object(cache.location, PROMPTS_FILE), 1 << 20))


class _Object(io.RawIOBase):
    """An object of a Location as a file that is read where it is needed."""

    def __init__(self, location: Location, key: str) -> None:
        self._location, self._key = location, key
        self._size = location.size(key)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._size - self._position))
        if length:
            buffer[:length] = self._location.get_range(self._key, self._position, length)
            self._position += length
        return length
