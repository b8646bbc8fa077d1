"""The activation cache: one capture's result, written shard by shard, sealed, then never changed.

caches/DIGEST/
  capture.json         the request, whose sha256 is DIGEST; written last: now the cache exists
  index.parquet        which prompt, position and token each array row is
  zarr.json, STREAM/zarr.json, STREAM/c/I/0/0
                       a plain Zarr v3 group, which other tools can read
  _commits/STREAM/IIIIIIII.json
                       shard I counts; without this it may be garbage
  _quarantine/IIIIIIII.json
                       rows of shard I that do not count, and why; written before the records
  _damaged/STREAM/IIIIIIII.json
                       shard I was found damaged and waits to be computed again
  _COMPLETE            every shard counts
  any other files      what the caller put there, such as its plan
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import pyarrow as pa

from store.commits import CommitLog, check_same, check_values
from store.creation import COMPLETE, create_cache, open_cache
from store.digest import sha256_hex
from store.errors import Conflict, NotFound
from store.index import read_index
from store.layout import StreamLayout
from store.location import Location
from store.quarantine import Quarantine
from store.reading import ShardReader
from store.records import CommitRecord, CompleteMarker
from store.repair import find_damaged, repair
from store.verification import Problem, find_problems

if TYPE_CHECKING:
    import zarr

log = logging.getLogger(__name__)

_LEFTOVER_AGE_S = 3600.0


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
        self._quarantine = Quarantine(self.location, digest)
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
            index: One entry per array row, in order; or entries with a column `row` (int64) that
                says which array row each is and leaves none out, so that several may share one.
            files: More files to keep beside it, by name, such as the plan. In a cache that exists
                they must be the same: `*.parquet` as tables, the rest byte for byte.
            notes: Files for people, such as a log of what was left out. Kept, never compared: a
                cache that exists keeps the notes it has.

        Raises:
            InvalidInput: layouts disagree, the index does not fit the rows, or a file name is
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
        """The table that says what each row is: one entry for each sample, whose values are those
        of the array row in the column `row`. Leave out entries whose row is in `quarantined`.

        Raises:
            Corrupt: kind "index".
        """
        return read_index(self.location)

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
        quarantined: Mapping[int, str] | None = None,
    ) -> list[CommitRecord]:
        """Store one shard of every stream and record it. May be repeated, also after a crash at any
        moment.

        A whole shard that a killed writer left without a record is recorded as it is; see
        `CommitLog.write`.

        Args:
            shard: Number of the shard.
            values: [rows, L, W] of every stream; uint16 bits for bfloat16, else float32.
            seconds: Timings to keep in the records, by step.
            quarantined: Reasons by array row, for rows that do not count; their values are NaN.

        Returns:
            One record a stream.

        Raises:
            InvalidInput: kind "values", a stream is missing or unknown, or has a wrong dtype or
                shape; "rows", a quarantined row is not of this shard, or has no reason.
            Conflict: kind "not_deterministic", the shard is recorded with other bytes or other
                quarantined rows.
            Unavailable: kind "no_space", the store is full. What is recorded stays; make space and
                write this shard again.
        """
        check_values(self.streams, shard, values)
        rows = self._any_layout.shard_rows(shard)
        data = self._quarantine.encode(shard, rows, quarantined or {})
        digest = sha256_hex(data) if data is not None else None
        layouts = self.streams.values()
        recorded = [record for s in layouts if (record := self._commits.find(s, shard))]
        for record in recorded:
            check_same(record, record.sha256, digest)
        if not recorded:
            self._quarantine.write(shard, data, layouts)
        records = []
        for stream, layout in self.streams.items():
            records.append(
                self._commits.write(layout, shard, values[stream], seconds or {}, digest)
            )
            self._committed[stream].add(shard)
        return records

    def quarantined(self) -> dict[int, str]:
        """Reasons by array row, for the rows that do not count; their values are NaN.

        Raises:
            Corrupt: kind "quarantine", a quarantine is unreadable.
        """
        return self._quarantine.rows()

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
        return self._commits.summary(self.streams.values())

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
        self,
        stream: str,
        layers: Iterable[int] | None = None,
        shards: Iterable[int] | None = None,
        *,
        reuse: bool = False,
    ) -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
        """Yield (shard, layer, [rows, W]) for the given layers of the given shards, or of all; see
        `read_layer`.

        Shards come in the order given, and a shard's layers in the order given. A few reads run
        ahead.

        Args:
            stream: Name of the stream.
            layers: Which layers.
            shards: Which shards.
            reuse: An array may be that of the step before, with other values: keep none of them,
                and no view, when asking for the next. Fresh memory costs about as much as the read
                of a file that the system holds in memory.
        """
        layout = self.layout(stream)
        wanted_layers = list(layout.layers if layers is None else layers)
        wanted_shards = list(range(self.num_shards) if shards is None else shards)
        return self._reader.scan(layout, wanted_layers, wanted_shards, reuse=reuse)

    def read_rows(self, stream: str, layer: int, rows: Sequence[int]) -> npt.NDArray[Any]:
        """Chosen rows of one layer, [len(rows), W], in the order given; fetches only their chunks.

        Raises:
            InvalidInput: kind "rows", no such row. Else as `read_layer`.
        """
        return self._reader.rows(self.layout(stream), layer, rows)

    # Damage

    def verify(
        self, on_checked: Callable[[int], None] = lambda num_bytes: None
    ) -> Iterator[Problem]:
        """Compare every shard with its record and every chunk with its checksum; reads the whole
        cache, with several threads, a piece of a shard at a time.

        Args:
            on_checked: Called with the bytes of each shard of each stream that was checked.
        """
        quarantine = self._quarantine
        return find_problems(self, quarantine.digests(), quarantine.find, on_checked)

    def damaged(self) -> set[int]:
        """Shards to repair: those that `steerage verify` has marked, and those of which one listing
        shows that an object or, in a complete cache, a record is gone or has another size.

        Reads no shard, so it does not see flipped bits: `verify` does, and marks what it finds.
        """
        return find_damaged(self)

    def repair_shard(
        self,
        shard: int,
        values: Mapping[str, npt.NDArray[Any]],
        quarantined: Mapping[int, str] | None = None,
    ) -> list[str]:
        """Put a damaged shard right, from the values that it had; marks of it are removed.

        Every stream is read and compared with its record; only what is damaged is replaced, each
        object atomically. May be repeated, also after a crash at any moment.

        Args:
            shard: Number of the shard.
            values: As for `write_shard`.
            quarantined: As for `write_shard`.

        Returns:
            Keys of the objects that were replaced or made.

        Raises:
            InvalidInput: As `write_shard`.
            Conflict: kind "not_deterministic", the values give other bytes than those recorded for
                a damaged stream. Nothing of that stream is changed.
        """
        check_values(self.streams, shard, values)
        rows = self._any_layout.shard_rows(shard)
        data = self._quarantine.encode(shard, rows, quarantined or {})
        return repair(self, self._commits, self._quarantine, shard, values, data)

    def open_zarr(self) -> zarr.Group:
        """The arrays as a read-only zarr-python group; bfloat16 appears as uint16 bits.

        Unlike `read_layer`, zarr reads shards that are missing as NaN: ask `is_complete` first.
        """
        # zarr takes a second to import and is not needed to write or read a cache.
        from store.zarr_dtype import open_group

        return open_group(self.location)

    def __repr__(self) -> str:
        streams = list(self.streams)
        return f"ActivationCache({self.location.url!r}, {streams=}, num_shards={self.num_shards})"

    def __reduce__(self) -> tuple[object, ...]:
        return ActivationCache.open, (self._root, self.digest)
