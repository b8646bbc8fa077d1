"""Reading the shards of one cache: the index once, then one range for a layer or a chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from store.ahead import NUM_READERS, map_ahead
from store.commits import CommitLog
from store.errors import REPAIR, Corrupt, InvalidInput, NotFound, StoreError
from store.layout import StreamLayout
from store.shard import (
    Index,
    check_layer,
    chunk_range,
    decode_chunks,
    layer_parts,
    layer_range,
    read_index,
    stored_dtype,
)

_READS_AHEAD = 2
"""From a local disk, by the system: a thread of ours that reads ahead takes turns with the one that
counts, and hands it values through the memory of another core.
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

    def layer(
        self,
        layout: StreamLayout,
        layer: int,
        shard: int,
        *,
        memory_RW: npt.NDArray[Any] | None = None,
    ) -> npt.NDArray[Any]:
        """One layer of one shard, [rows, W]; in `memory_RW`, as large as that of a full shard, if
        it is given.
        """
        position = layout.layer_position(layer)
        start, _ = layer_range(self._index(layout, shard), layout, position)
        present = layout.present_chunks(shard)
        values_RW = self._empty_layer(layout, shard) if memory_RW is None else memory_RW
        values_RW = values_RW[: present * layout.rows_per_chunk]
        checksums_P4 = np.empty((present, 4), np.uint8)
        with self._damage_named(layout, shard):
            self._location.read_into(
                layout.shard_key(shard), start, layer_parts(values_RW, checksums_P4)
            )
        check_layer(values_RW, checksums_P4, where=self._where(layout, shard), layer=layer)
        return values_RW[: len(layout.shard_rows(shard))]

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
        self,
        layout: StreamLayout,
        layers: Sequence[int],
        shards: Sequence[int],
        *,
        reuse: bool = False,
    ) -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
        """Yield (shard, layer, [rows, W]), layers within shards, a few reads ahead; see
        `ActivationCache.scan`.
        """
        pairs = [(shard, layer) for shard in shards for layer in layers]
        if self._location.local_path() is None:
            return self._scan_bucket(layout, pairs)
        return self._scan_disk(layout, pairs, reuse)

    def _scan_disk(
        self, layout: StreamLayout, pairs: Sequence[tuple[int, int]], reuse: bool
    ) -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
        memory_RW = self._empty_layer(layout, 0) if reuse else None
        for pair in pairs[:_READS_AHEAD]:
            self._prefetch(layout, *pair)
        for number, (shard, layer) in enumerate(pairs):
            if number + _READS_AHEAD < len(pairs):
                self._prefetch(layout, *pairs[number + _READS_AHEAD])
            yield shard, layer, self.layer(layout, layer, shard, memory_RW=memory_RW)

    def _scan_bucket(
        self, layout: StreamLayout, pairs: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
        def read(pair: tuple[int, int]) -> npt.NDArray[Any]:
            shard, layer = pair
            return self.layer(layout, layer, shard)

        with closing(map_ahead(read, pairs, ahead=NUM_READERS)) as found:
            for shard, layer in pairs:
                # Kept by no name: while the next one is read, this one's memory is free again.
                yield shard, layer, next(found)

    def _prefetch(self, layout: StreamLayout, shard: int, layer: int) -> None:
        # What is wrong with a shard is said when its turn comes.
        with suppress(StoreError):
            found = layer_range(self._index(layout, shard), layout, layout.layer_position(layer))
            self._location.prefetch(layout.shard_key(shard), *found)

    def _empty_layer(self, layout: StreamLayout, shard: int) -> npt.NDArray[Any]:
        """Memory for a layer of a shard, [P * rows_per_chunk, W]: its last chunk whole."""
        num_rows = layout.present_chunks(shard) * layout.rows_per_chunk
        return np.empty((num_rows, layout.width), stored_dtype(layout))

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
        with self._damage_named(layout, shard):
            return self._location.get_ranges(layout.shard_key(shard), ranges)

    @contextmanager
    def _damage_named(self, layout: StreamLayout, shard: int) -> Iterator[None]:
        try:
            yield
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
