"""The commit protocol: a shard's bytes first, then its record, both create-only, so it is the same
everywhere.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from store.digest import sha256_hex
from store.errors import Conflict, Corrupt, NotFound
from store.layout import StreamLayout
from store.location import Location
from store.records import CommitRecord, parse_record
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
        shards = set()
        for info in self.location.list(f"_commits/{stream}"):
            match = _RECORD.fullmatch(info.key.rpartition("/")[2])
            if match and info.key == _record_key(stream, int(match[1])):
                shards.add(int(match[1]))
        return shards

    def read(self, layout: StreamLayout, shard: int) -> CommitRecord:
        """The record of a shard.

        Raises:
            NotFound: kind "not_committed", or "no_shard".
            Corrupt: kind "record", it is unreadable or names another shard.
        """
        rows = layout.shard_rows(shard)
        key = _record_key(layout.stream, shard)
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
        record = parse_record(CommitRecord, data, where=where, kind="record")
        expected = (self.digest, layout.stream, shard, (rows.start, rows.stop))
        found = (record.capture, record.stream, record.shard, record.rows)
        if found != expected:
            raise Corrupt(
                f"{where} is the record of {found}, expected {expected}; restore it", kind="record"
            )
        return record

    def write(
        self,
        layout: StreamLayout,
        shard: int,
        values_RLW: npt.NDArray[Any],
        seconds: Mapping[str, float],
    ) -> CommitRecord:
        """Store a shard and its record; see `ActivationCache.write_shard`.

        An object without a record was left by a writer that was killed. If it is whole it is
        recorded as it is: overwriting it could pull the bytes from under the record of a slow twin.
        If not, it is replaced.
        """
        data = build_shard(values_RLW, layout, buffer=self._buffer(layout.shard_nbytes(shard)))
        recorded = self._find(layout, shard)
        if recorded is not None:
            return self._check_same(recorded, sha256_hex(data))
        with ThreadPoolExecutor(1) as executor:  # hashing overlaps the disk; both release the GIL
            hashing = executor.submit(sha256_hex, data)
            left_behind = self._put(layout, shard, data)
            sha256 = left_behind or hashing.result()
        rows = layout.shard_rows(shard)
        record = CommitRecord(
            capture=self.digest,
            stream=layout.stream,
            shard=shard,
            rows=(rows.start, rows.stop),
            num_bytes=len(data),
            sha256=sha256,
            seconds={step: float(value) for step, value in seconds.items()},
        )
        try:
            self.location.put_new(_record_key(layout.stream, shard), record.to_bytes())
        except Conflict:
            return self._check_same(self.read(layout, shard), sha256)
        log.info(
            "shard written", extra={"stream": layout.stream, "shard": shard, "num_bytes": len(data)}
        )
        return record

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

    def _find(self, layout: StreamLayout, shard: int) -> CommitRecord | None:
        try:
            return self.read(layout, shard)
        except NotFound:
            return None

    @staticmethod
    def _check_same(recorded: CommitRecord, sha256: str) -> CommitRecord:
        if recorded.sha256 != sha256:
            message = (
                f"shard {recorded.shard} of stream {recorded.stream!r} is not deterministic: "
                "recorded with sha256 "
                f"{recorded.sha256}, now {sha256}; the recorded one stays. Ask missing() before "
                "computing, and if "
                "both came from one capture, look for what differs (hardware, software, batch "
                "order)"
            )
            raise Conflict(message, kind="not_deterministic")
        return recorded


def _record_key(stream: str, shard: int) -> str:
    return f"_commits/{stream}/{shard:08d}.json"
