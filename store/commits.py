"""The commit protocol: a shard's bytes first, then its record, both create-only, so it is the same
everywhere.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from store.ahead import map_ahead
from store.digest import canonical_json, sha256_hex
from store.errors import REPAIR, Conflict, Corrupt, InvalidInput, NotFound
from store.layout import StreamLayout
from store.location import Location
from store.records import CommitRecord, CompleteMarker, parse_record
from store.shard import build_shard, decode_shard

log = logging.getLogger(__name__)

_RECORD = re.compile(r"([0-9]{8,})\.json")


class CommitLog:
    """Writes the shards of one cache and tells which of them count.

    Attributes:
        location: Of the cache.
        digest: Of its capture.
    """

    def __init__(self, location: Location, digest: str) -> None:
        self.location = location
        self.digest = digest
        self._scratch = threading.local()

    def shards(self, stream: str) -> set[int]:
        """Shards of a stream that have a record; one listing. Other files there do not count."""
        infos = self.location.list(f"_commits/{stream}")
        return {shard for info in infos if (shard := shard_of_record(info.key, stream)) is not None}

    def read(self, layout: StreamLayout, shard: int) -> CommitRecord:
        """The record of a shard.

        Raises:
            NotFound: kind "not_committed", or "no_shard".
            Corrupt: kind "record", it is unreadable or names another shard.
        """
        rows = layout.shard_rows(shard)
        key = record_key(layout.stream, shard)
        try:
            data = self.location.get(key)
        except NotFound as error:
            message = (
                f"shard {shard} of stream {layout.stream!r} is not committed in cache "
                f"{self.digest}; finish "
                "the capture (missing() says what is left)"
            )
            raise NotFound(message, kind="not_committed") from error
        where = f"{self.location.url}/{key}"
        record = parse_record(CommitRecord, data, where=where, kind="record", way_on=REPAIR)
        expected = (self.digest, layout.stream, shard, (rows.start, rows.stop))
        found = (record.capture, record.stream, record.shard, record.rows)
        if found != expected:
            message = f"{where} is the record of {found}, expected {expected}; {REPAIR}"
            raise Corrupt(message, kind="record")
        return record

    def find(self, layout: StreamLayout, shard: int) -> CommitRecord | None:
        """The record of a shard, None if it has none; else as `read`."""
        try:
            return self.read(layout, shard)
        except NotFound as error:
            if error.kind != "not_committed":
                raise
            return None

    def summary(self, layouts: Collection[StreamLayout]) -> CompleteMarker:
        """What all records come to; see `ActivationCache.summary`."""
        pairs = [(layout, shard) for layout in layouts for shard in range(layout.num_shards)]
        records = list(map_ahead(lambda pair: self.read(*pair), pairs))
        content = [
            [record.stream, record.shard, record.num_bytes, record.sha256]
            + ([record.quarantine] if record.quarantine else [])
            for record in records
        ]
        any_layout = next(iter(layouts))
        return CompleteMarker(
            capture=self.digest,
            num_rows=any_layout.num_rows,
            num_shards=any_layout.num_shards,
            num_bytes=sum(record.num_bytes for record in records),
            records_sha256=sha256_hex(canonical_json(content)),
        )

    def write(
        self,
        layout: StreamLayout,
        shard: int,
        values_RLW: npt.NDArray[Any],
        seconds: Mapping[str, float],
        quarantine: str | None,
    ) -> CommitRecord:
        """Store a shard and its record; see `ActivationCache.write_shard`.

        `quarantine` is the sha256 of the shard's quarantine object, which is there by now.

        An object without a record was left by a writer that was killed. If it is whole it is
        recorded as it is: overwriting it could pull the bytes from under the record of a slow twin.
        If not, it is replaced.
        """
        data = self.build(layout, shard, values_RLW)
        recorded = self.find(layout, shard)
        if recorded is not None:
            return check_same(recorded, sha256_hex(data), quarantine)
        with ThreadPoolExecutor(1) as executor:  # hashing overlaps the disk; both release the GIL
            hashing = executor.submit(sha256_hex, data)
            left_behind = self._put(layout, shard, data)
            sha256 = left_behind or hashing.result()
        record = self.record(layout, shard, sha256, seconds, quarantine)
        try:
            self.location.put_new(record_key(layout.stream, shard), record.to_bytes())
        except Conflict:
            return check_same(self.read(layout, shard), sha256, quarantine)
        log.info(
            "shard written", extra={"stream": layout.stream, "shard": shard, "num_bytes": len(data)}
        )
        return record

    def build(self, layout: StreamLayout, shard: int, values_RLW: npt.NDArray[Any]) -> memoryview:
        """The bytes of a shard, in memory that this thread's next call overwrites."""
        return build_shard(values_RLW, layout, buffer=self._buffer(layout.shard_nbytes(shard)))

    def record(
        self,
        layout: StreamLayout,
        shard: int,
        sha256: str,
        seconds: Mapping[str, float],
        quarantine: str | None,
    ) -> CommitRecord:
        """The record that a shard of these digests has."""
        rows = layout.shard_rows(shard)
        return CommitRecord(
            capture=self.digest,
            stream=layout.stream,
            shard=shard,
            rows=(rows.start, rows.stop),
            num_bytes=layout.shard_nbytes(shard),
            sha256=sha256,
            seconds={step: float(value) for step, value in seconds.items()},
            quarantine=quarantine,
        )

    def _put(self, layout: StreamLayout, shard: int, data: memoryview) -> str | None:
        """Create the object. The sha256 of what was left there, or None if it now holds `data`."""
        key = layout.shard_key(shard)
        try:
            self.location.put_new(key, data)
        except Conflict:
            found = self.location.get(key)
            try:
                decode_shard(found, layout, shard, where=f"{self.location.url}/{key}")
            except Corrupt as error:
                log.warning("damaged shard replaced", extra={"key": key, "error": str(error)})
                self.location.replace(key, data)
                return None
            log.info("shard adopted", extra={"key": key})
            return sha256_hex(found)
        return None

    def _buffer(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Memory that this thread reuses from shard to shard; see `build_shard`."""
        buffer: npt.NDArray[np.uint8] | None = getattr(self._scratch, "buffer", None)
        if buffer is None or len(buffer) < num_bytes:
            buffer = self._scratch.buffer = np.empty(num_bytes, np.uint8)
        return buffer


def check_values(
    layouts: Mapping[str, StreamLayout], shard: int, values: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Refuse values that are not those of one shard of every stream.

    Raises:
        InvalidInput: kind "values".
        NotFound: kind "no_shard".
    """
    if set(values) != set(layouts):
        message = f"shard {shard}: expected values of streams {list(layouts)}, got {sorted(values)}"
        raise InvalidInput(message, kind="values")
    for stream, layout in layouts.items():
        if len(values[stream]) != len(layout.shard_rows(shard)):
            message = (
                f"shard {shard} of stream {stream!r} has rows {layout.shard_rows(shard)}: "
                f"{len(layout.shard_rows(shard))} expected, got {len(values[stream])}"
            )
            raise InvalidInput(message, kind="values")


def check_same(recorded: CommitRecord, sha256: str, quarantine: str | None) -> CommitRecord:
    """The record, if these are the digests of the shard and of the quarantine that it names.

    Raises:
        Conflict: kind "not_deterministic".
    """
    for what, before, now in (
        ("sha256", recorded.sha256, sha256),
        ("a quarantine of sha256", recorded.quarantine, quarantine),
    ):
        if before != now:
            message = (
                f"shard {recorded.shard} of stream {recorded.stream!r} is not deterministic: "
                f"recorded with {what} {before}, now {now}; the recorded one stays. Ask missing() "
                "before computing, and if both came from one capture, look for what differs "
                "(hardware, software, batch order)"
            )
            raise Conflict(message, kind="not_deterministic")
    return recorded


def record_key(stream: str, shard: int) -> str:
    """Key of a shard's record under the cache."""
    return f"_commits/{stream}/{shard:08d}.json"


def shard_of_record(key: str, stream: str) -> int | None:
    """The shard whose record has this key; None for any other file."""
    match = _RECORD.fullmatch(key.rpartition("/")[2])
    return int(match[1]) if match and key == record_key(stream, int(match[1])) else None
