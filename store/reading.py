"""Reading the shards of one cache: the index once, then one range for a layer or a chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from store.commits import CommitLog
from store.errors import REPAIR, Corrupt, InvalidInput, NotFound
from store.layout import StreamLayout
from store.shard import (
    Index,
    chunk_range,
    decode_chunks,
    decode_layer,
    layer_range,
    read_index,
    stored_dtype,
)

NUM_READERS = 8
"""Threads that read ahead from a bucket, where one request is slow and many are not."""
_READS_AHEAD = 2
"""From a local disk, with one thread: two workers of one thread each read what a disk gives. More
threads cost a third more processor time, as each has fresh memory to be mapped.
"""
_MAX_INDEXES = 4096  # of about 5 kB each


class ShardReader:
    """Reads shards that are committed; safe to share between threads.

    Raises, from every method:
        NotFound: kind "no_layer", "no_shard" or "not_committed".
        Corrupt: the object is gone, cut off or damaged; the message names shard and chunk.

    Args:
        commits: Tells which shards count.
    """

    def __init__(self, commits: CommitLog) -> None:
        self._commits = commits
        self._location = commits.location
        self._indexes: dict[tuple[str, int], Index] = {}

    def layer(self, layout: StreamLayout, layer: int, shard: int) -> npt.NDArray[Any]:
        """One layer of one shard, [rows, W]."""
        position = layout.layer_position(layer)
        index = self._index(layout, shard)
        stored = self._ranges(layout, shard, [layer_range(index, layout, position)])[0]
        where = self._where(layout, shard)
        return decode_layer(stored, layout, shard, where=where, layer=layer)

    def rows(self, layout: StreamLayout, layer: int, rows: Sequence[int]) -> npt.NDArray[Any]:
        """Chosen rows of one layer, [len(rows), W], in the order given; fetches only their chunks.

        Raises:
            InvalidInput: kind "rows", no such row.
        """
        position = layout.layer_position(layer)
        shards = np.array([layout.shard_of_row(int(row)) for row in rows], dtype=np.int64)
        wanted = np.array([int(row) for row in rows], dtype=np.int64)
        chunks = wanted % layout.rows_per_shard // layout.rows_per_chunk
        values_RW = np.empty((len(wanted), layout.width), stored_dtype(layout))
        for shard in np.unique(shards).tolist():
            index = self._index(layout, shard)
            where = self._where(layout, shard)
            numbers = np.unique(chunks[shards == shard]).tolist()
            ranges = [chunk_range(index, position, number) for number in numbers]
            found = self._ranges(layout, shard, ranges)
            for number, stored in zip(numbers, found, strict=True):
                chunk_RW = decode_chunks(
                    stored, layout, where=where, layer=layer, first_chunk=number
                )
                chosen = (shards == shard) & (chunks == number)
                values_RW[chosen] = chunk_RW[wanted[chosen] % layout.rows_per_chunk]
        return values_RW

    def scan(
        self, layout: StreamLayout, layers: Sequence[int], shards: Sequence[int]
    ) -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
        """Yield (shard, layer, [rows, W]), layers within shards, a few reads ahead."""
        is_local = self._location.local_path() is not None
        num_ahead = _READS_AHEAD if is_local else NUM_READERS
        pairs = [(shard, layer) for shard in shards for layer in layers]
        with ThreadPoolExecutor(1 if is_local else NUM_READERS) as executor:
            ahead = [
                executor.submit(self.layer, layout, layer, shard)
                for shard, layer in pairs[:num_ahead]
            ]
            try:
                for number, (shard, layer) in enumerate(pairs):
                    values_RW = ahead.pop(0).result()
                    if number + num_ahead < len(pairs):
                        next_shard, next_layer = pairs[number + num_ahead]
                        ahead.append(executor.submit(self.layer, layout, next_layer, next_shard))
                    yield shard, layer, values_RW
                    # Its memory is the next layer's.
                    del values_RW
            finally:
                executor.shutdown(wait=True, cancel_futures=True)

    def _index(self, layout: StreamLayout, shard: int) -> Index:
        index = self._indexes.get((layout.stream, shard))
        if index is None:
            self._commits.read(layout, shard)
            where = self._where(layout, shard)
            try:
                tail = self._location.get_tail(layout.shard_key(shard), layout.index_nbytes)
            except NotFound as error:
                raise _lost(where) from error
            index = read_index(tail, layout, shard, where=where)
            while len(self._indexes) >= _MAX_INDEXES:
                self._indexes.pop(next(iter(self._indexes)), None)
            self._indexes[layout.stream, shard] = index
        return index

    def _ranges(
        self, layout: StreamLayout, shard: int, ranges: list[tuple[int, int]]
    ) -> list[bytes]:
        try:
            return self._location.get_ranges(layout.shard_key(shard), ranges)
        except NotFound as error:
            raise _lost(self._where(layout, shard)) from error
        except InvalidInput as error:
            message = f"shard {self._where(layout, shard)} is cut off: {error}; {REPAIR}"
            raise Corrupt(message, kind="shard_size") from error

    def _where(self, layout: StreamLayout, shard: int) -> str:
        return describe_shard(self._location.url, layout, shard)


def describe_shard(url: str, layout: StreamLayout, shard: int) -> str:
    """What to call a shard in errors, behind the word "shard"."""
    rows = layout.shard_rows(shard)
    return (
        f"{shard} of stream {layout.stream!r} (rows {rows.start} to {rows.stop - 1}), "
        f"{url}/{layout.shard_key(shard)}"
    )


def _lost(where: str) -> Corrupt:
    return Corrupt(f"shard {where} is recorded but gone; {REPAIR}", kind="shard_missing")
