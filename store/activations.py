"""The activation cache: one capture's result, written shard by shard, sealed, then never changed.

caches/DIGEST/
  capture.json         the request, whose sha256 is DIGEST; written last: now the cache exists
  index.parquet        one row per array row: prompt, position, token
  zarr.json, STREAM/zarr.json, STREAM/c/I/0/0
                       a plain Zarr v3 group, which other tools can read
  _commits/STREAM/IIIIIIII.json
                       shard I counts; without this it may be garbage
  _COMPLETE            every shard counts
  any other files      what the caller put there, such as its plan
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from store.commits import CommitLog
from store.creation import COMPLETE, INDEX, create_cache, open_cache
from store.digest import canonical_json, sha256_hex
from store.errors import Conflict, InvalidInput, NotFound
from store.layout import StreamLayout
from store.location import Location
from store.reading import ShardReader
from store.records import CommitRecord, CompleteMarker
from store.verification import Problem, find_problems

if TYPE_CHECKING:
    import zarr

log = logging.getLogger(__name__)

_LEFTOVER_AGE_S = 3600.0
_NUM_READERS = 8


class ActivationCache:
    """One capture's activations: an array [row, layer, width] for each stream.

    Writers of different shards, in any number of processes, need no coordination. A reader sees a
    shard once its commit record exists. Pickles as its location and digest, so that Ray workers can
    open it again.

    Usage:
        cache = ActivationCache.create(root, capture, layouts, index)
        for shard in cache.missing():
            cache.write_shard(shard, {"resid_post": values_RLW})
        cache.seal()
        for shard, layer, values_RW in cache.scan("resid_post", layers=[12]):
            ...

    Attributes:
        location: Where the cache lies.
        digest: sha256 of the canonical JSON of the capture.
        capture: The request that it answers.
        streams: Layouts by stream name, sorted by name.
    """

    def __init__(
        self,
        root: Location,
        digest: str,
        capture: dict[str, Any],
        streams: Mapping[str, StreamLayout],
    ) -> None:
        self._root = root
        self.location = root.child(f"caches/{digest}")
        self.digest = digest
        self.capture = capture
        self.streams = dict(sorted(streams.items()))
        self._commits = CommitLog(self.location, digest)
        self._committed: dict[str, set[int]] = {stream: set() for stream in streams}
        self._reader = ShardReader(self._commits)
        self._is_complete = False

    @classmethod
    def create(
        cls,
        root: Location,
        capture: Mapping[str, Any],
        streams: Sequence[StreamLayout],
        index: pa.Table,
        files: Mapping[str, bytes] | None = None,
        *,
        notes: Mapping[str, bytes] | None = None,
    ) -> ActivationCache:
        """Make an empty cache, or open the one that the same capture made before.

        Args:
            root: Where caches live.
            capture: The request, any JSON object.
            streams: Layouts that agree on num_rows and rows_per_shard.
            index: One row per array row.
            files: More files to keep beside it, by name, such as the plan. In a cache that exists
                they must be the same: `*.parquet` as tables, the rest byte for byte.
            notes: Files for people, such as a log of what was left out. Kept, never compared: a
                cache that exists keeps the notes it has.

        Raises:
            InvalidInput: layouts disagree, the index has another number of rows, or a file name is
                reserved or given twice.
            Conflict: kind "cache_differs", the capture's cache exists with another layout, index or
                file. Open it and use what it has, or put into the capture what made the difference.
        """
        return cls.open(root, create_cache(root, capture, streams, index, files or {}, notes or {}))

    @classmethod
    def open(cls, root: Location, digest: str) -> ActivationCache:
        """Open a cache, complete or not.

        Raises:
            NotFound: kind "no_cache".
            Corrupt: the capture does not have this digest, or an array's metadata was edited.
        """
        capture, layouts = open_cache(root, digest)
        return cls(root, digest, capture, layouts)

    @classmethod
    def list_digests(cls, root: Location) -> list[str]:
        """Digests of the caches under `root`, sorted."""
        return [
            name for name in root.folders("caches") if root.exists(f"caches/{name}/capture.json")
        ]

    @property
    def num_shards(self) -> int:
        return self._any_layout.num_shards

    @property
    def num_rows(self) -> int:
        return self._any_layout.num_rows

    @cached_property
    def _any_layout(self) -> StreamLayout:
        return next(iter(self.streams.values()))

    def index(self) -> pa.Table:
        """The table that says what each row is."""
        return pq.read_table(pa.BufferReader(self.location.get(INDEX)))

    def read_file(self, name: str) -> bytes:
        """A file that was given to `create`.

        Raises:
            NotFound: no such file.
        """
        return self.location.get(name)

    def layout(self, stream: str) -> StreamLayout:
        """Layout of a stream.

        Raises:
            NotFound: kind "no_stream".
        """
        if stream not in self.streams:
            message = f"cache {self.digest} has streams {list(self.streams)}, asked for {stream!r}"
            raise NotFound(message, kind="no_stream")
        return self.streams[stream]

    # Writing

    def committed(self) -> set[int]:
        """Shards for which every stream has its commit record; one listing a stream."""
        for stream, known in self._committed.items():
            known.update(self._commits.shards(stream))
        return set.intersection(*self._committed.values())

    def missing(self) -> list[int]:
        """Shards still to be written, in order."""
        return sorted(set(range(self.num_shards)) - self.committed())

    def write_shard(
        self,
        shard: int,
        values: Mapping[str, npt.NDArray[Any]],
        seconds: Mapping[str, float] | None = None,
    ) -> list[CommitRecord]:
        """Store one shard of every stream and record it. May be repeated, also after a crash at any
        moment.

        A whole shard that a killed writer left without a record is recorded as it is; see
        `CommitLog.write`.

        Args:
            shard: Number of the shard.
            values: [rows, L, W] of every stream; uint16 bits for bfloat16, else float32.
            seconds: Timings to keep in the records, by step.

        Returns:
            One record a stream.

        Raises:
            InvalidInput: kind "values", a stream is missing or unknown, or has a wrong dtype or
                shape.
            Conflict: kind "not_deterministic", the shard is recorded with other bytes.
        """
        if set(values) != set(self.streams):
            message = (
                f"shard {shard}: expected values of streams {list(self.streams)}, got "
                f"{sorted(values)}"
            )
            raise InvalidInput(message, kind="values")
        for stream, layout in self.streams.items():
            if len(values[stream]) != len(layout.shard_rows(shard)):
                message = (
                    f"shard {shard} of stream {stream!r} has rows {layout.shard_rows(shard)}: "
                    f"{len(layout.shard_rows(shard))} expected, got {len(values[stream])}"
                )
                raise InvalidInput(message, kind="values")
        records = []
        for stream, layout in self.streams.items():
            records.append(self._commits.write(layout, shard, values[stream], seconds or {}))
            self._committed[stream].add(shard)
        return records

    def read_record(self, stream: str, shard: int) -> CommitRecord:
        """The commit record of a shard.

        Raises:
            NotFound: kind "not_committed".
            Corrupt: kind "record", it is unreadable or names another shard.
        """
        return self._commits.read(self.layout(stream), shard)

    @property
    def is_complete(self) -> bool:
        """Whether the cache is sealed."""
        self._is_complete = self._is_complete or self.location.exists(COMPLETE)
        return self._is_complete

    def seal(self) -> CompleteMarker:
        """Close the cache once every shard is recorded. May be repeated.

        Raises:
            Conflict: kind "incomplete", shards are missing; the message names the first ones.
        """
        if missing := self.missing():
            message = (
                f"cache {self.digest} cannot be sealed: {len(missing)} of {self.num_shards} shards "
                f"have no record, first {missing[:5]}; write them"
            )
            raise Conflict(message, kind="incomplete")
        marker = self.summary()
        self.location.put_same(COMPLETE, marker.to_bytes())
        self._is_complete = True
        num_removed = self.location.remove_leftovers(older_than_s=_LEFTOVER_AGE_S)
        log.info("cache sealed", extra={"digest": self.digest, "num_leftovers": num_removed})
        return marker

    def summary(self) -> CompleteMarker:
        """What all commit records come to; `_COMPLETE` holds it once the cache is sealed.

        Raises:
            NotFound: kind "not_committed", a shard has no record.
        """
        pairs = [(stream, shard) for stream in self.streams for shard in range(self.num_shards)]
        with ThreadPoolExecutor(_NUM_READERS) as executor:
            records = list(executor.map(lambda pair: self.read_record(*pair), pairs))
        content = [
            [record.stream, record.shard, record.num_bytes, record.sha256] for record in records
        ]
        return CompleteMarker(
            capture=self.digest,
            num_rows=self.num_rows,
            num_shards=self.num_shards,
            num_bytes=sum(record.num_bytes for record in records),
            records_sha256=sha256_hex(canonical_json(content)),
        )

    # Reading

    def read_layer(self, stream: str, layer: int, shard: int) -> npt.NDArray[Any]:
        """One layer of one shard, [rows, W]; uint16 bits for bfloat16 (see `store.bfloat16`) or
        float32.

        Raises:
            NotFound: no such stream, layer or shard, or kind "not_committed": never NaN in its
                place.
            Corrupt: the object is missing, cut off or damaged; the message names shard and chunk.
        """
        return self._reader.layer(self.layout(stream), layer, shard)

    def scan(
        self, stream: str, layers: Iterable[int] | None = None, shards: Iterable[int] | None = None
    ) -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
        """Yield (shard, layer, [rows, W]) for the given layers of the given shards, or of all; see
        `read_layer`.

        Shards come in the order given, and a shard's layers in the order given. A few reads run
        ahead.
        """
        layout = self.layout(stream)
        wanted_layers = list(layout.layers if layers is None else layers)
        wanted_shards = list(range(self.num_shards) if shards is None else shards)
        pairs = [(shard, layer) for shard in wanted_shards for layer in wanted_layers]
        with ThreadPoolExecutor(_NUM_READERS) as executor:
            ahead = [
                executor.submit(self.read_layer, stream, layer, shard)
                for shard, layer in pairs[:_NUM_READERS]
            ]
            try:
                for number, (shard, layer) in enumerate(pairs):
                    values_RW = ahead.pop(0).result()
                    if number + _NUM_READERS < len(pairs):
                        next_shard, next_layer = pairs[number + _NUM_READERS]
                        ahead.append(
                            executor.submit(self.read_layer, stream, next_layer, next_shard)
                        )
                    yield shard, layer, values_RW
            finally:
                executor.shutdown(wait=True, cancel_futures=True)

    def read_rows(self, stream: str, layer: int, rows: Sequence[int]) -> npt.NDArray[Any]:
        """Chosen rows of one layer, [len(rows), W], in the order given; fetches only their chunks.

        Raises:
            InvalidInput: kind "rows", no such row. Else as `read_layer`.
        """
        return self._reader.rows(self.layout(stream), layer, rows)

    def verify(self) -> Iterator[Problem]:
        """Compare every shard with its record and every chunk with its checksum; reads the whole
        cache.
        """
        return find_problems(self)

    def open_zarr(self) -> zarr.Group:
        """The arrays as a read-only zarr-python group; bfloat16 appears as uint16 bits.

        Unlike `read_layer`, zarr reads shards that are missing as NaN: ask `is_complete` first.
        """
        # zarr takes a second to import and is not needed to write or read a cache.
        import zarr.storage

        from store.zarr_dtype import register

        register()
        if remote := self.location.obstore_and_prefix():
            store = zarr.storage.ObjectStore(remote[0], read_only=True)
            return zarr.open_group(store, path=remote[1], mode="r", zarr_format=3)
        path = self.location.local_path()
        return zarr.open_group(
            zarr.storage.LocalStore(str(path), read_only=True), mode="r", zarr_format=3
        )

    def __repr__(self) -> str:
        streams = list(self.streams)
        return f"ActivationCache({self.location.url!r}, {streams=}, num_shards={self.num_shards})"

    def __reduce__(self) -> tuple[object, ...]:
        return ActivationCache.open, (self._root, self.digest)
