"""The work list of a cache, `prompts.parquet`: what each shard's worker has to read, and no more.

Row group I holds the prompts that have rows in shard I, so that a worker reads its shard's alone,
however many prompts there are. A prompt with rows in several shards is in each of their groups.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.prompts.rows import Rows, Spans
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
    return _encode(
        [prompt.example.prompt_id for prompt in prompts],
        [prompt.token_ids for prompt in prompts],
        [prompt.text for prompt in prompts],
        rows,
        (rows_per_shard, num_shards),
    )


def select_worklist(
    cache: ActivationCache, index: pa.Table, rows_per_shard: int, num_shards: int
) -> bytes:
    """The work list of some rows of a planned cache.

    A row that prompts share belongs to the first of them that is selected, as in a plan of these
    prompts alone.

    Args:
        cache: The planned cache.
        index: Entries of whole prompts, in row order, their rows renumbered from 0.
    """
    wanted = pa.array(index["prompt_id"].unique())
    token_ids: dict[str, Any] = {}
    texts: dict[str, str] = {}
    file = _open(cache)
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=["prompt_id", "token_ids", "text"])
        table = table.filter(pc.is_in(table["prompt_id"], value_set=wanted))
        names = table["prompt_id"].to_pylist()
        token_ids.update(zip(names, _lists(table["token_ids"]), strict=True))
        texts.update(zip(names, table["text"].to_pylist(), strict=True))
    names = wanted.to_pylist()
    codes_N = index["prompt_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    row_N = index["row"].to_numpy()
    spans_N2 = np.stack(
        [index["first_position"].to_numpy(), index["position"].to_numpy() + 1], axis=1
    )
    first_rows: list[int] = []
    spans: list[Spans] = []
    num_rows = 0
    ends = np.searchsorted(codes_N, np.arange(len(names) + 1)).tolist()
    for start, stop in pairwise(ends):
        own = spans_N2[start:stop][row_N[start:stop] >= num_rows]
        first_rows.append(num_rows)
        spans.append(own)
        num_rows += len(own)
    rows = Rows(first_rows, spans, num_rows, index)
    return _encode(
        names,
        [token_ids[name] for name in names],
        [texts[name] for name in names],
        rows,
        (rows_per_shard, num_shards),
    )


def _encode(
    prompt_ids: Sequence[str],
    token_ids: Sequence[Any],
    texts: Sequence[str],
    rows: Rows,
    shards: tuple[int, int],
) -> bytes:
    rows_per_shard, num_shards = shards
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
                "prompt_id": [prompt_ids[i] for i in group],
                "token_ids": [token_ids[i] for i in group],
                "first_row": [rows.first_rows[i] for i in group],
                "starts": [rows.spans[i][:, 0] for i in group],
                "stops": [rows.spans[i][:, 1] for i in group],
                "text": [texts[i] for i in group],
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
