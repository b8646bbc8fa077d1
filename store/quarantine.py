"""Rows that do not count: poison prompts, whose values are NaN, each with its reason.

A shard's quarantine is one object, written before the shard's records, which hold its sha256. So
whoever sees the shard sees what is wrong with it, and a lost quarantine is noticed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping

from store.digest import sha256_hex
from store.errors import REPAIR, Conflict, Corrupt, InvalidInput, NotFound
from store.layout import StreamLayout
from store.location import Location
from store.records import QuarantinedRow, QuarantineRecord, parse_record

log = logging.getLogger(__name__)

FOLDER = "_quarantine"

_OBJECT = re.compile(r"([0-9]{8,})\.json")


class Quarantine:
    """The quarantined rows of one cache.

    Attributes:
        location: Of the cache.
        digest: Of its capture.
    """

    def __init__(self, location: Location, digest: str) -> None:
        self.location = location
        self.digest = digest

    def encode(self, shard: int, rows: range, reasons: Mapping[int, str]) -> bytes | None:
        """A shard's quarantine object; None where every row counts.

        Raises:
            InvalidInput: kind "rows", a row is not of this shard, or has no reason.
        """
        if not reasons:
            return None
        for row, reason in reasons.items():
            if int(row) not in rows or not reason:
                message = (
                    f"quarantine of shard {shard}: expected rows {rows.start} to {rows.stop - 1}, "
                    f"each with a reason, got row {row} with {reason!r}"
                )
                raise InvalidInput(message, kind="rows")
        quarantined = [
            QuarantinedRow(row=int(row), reason=reasons[row]) for row in sorted(reasons, key=int)
        ]
        record = QuarantineRecord(capture=self.digest, shard=shard, rows=tuple(quarantined))
        return record.to_bytes()

    def write(self, shard: int, data: bytes | None, layouts: Iterable[StreamLayout]) -> None:
        """Put a shard's quarantine, before anything else of the shard.

        What a killed writer left counts for nothing while nothing else of the shard is there.

        Raises:
            Conflict: kind "not_deterministic", another quarantine is there, and objects of the
                shard as well.
        """
        key = object_key(shard)
        found = self.find(shard)
        if found == data:
            return
        if found is None and data is not None:
            self.location.put_same(key, data)
            return
        if left := [k for k in (s.shard_key(shard) for s in layouts) if self.location.exists(k)]:
            message = (
                f"quarantine of shard {shard}: {self.location.url}/{key} was left by a run that "
                f"found other rows to quarantine, with the shard's {', '.join(left)}: it was made "
                "on another kind of hardware or with other software. Unless another run is at work "
                "on this cache, remove these objects, and go on with `steerage extract RUN.toml`"
            )
            raise Conflict(message, kind="not_deterministic")
        log.warning("quarantine of a killed writer replaced", extra={"key": key})
        self.replace(shard, data)

    def replace(self, shard: int, data: bytes | None) -> None:
        """Make this the shard's quarantine, whatever is there. Only where nobody relies on that."""
        if data is not None:
            self.location.replace(object_key(shard), data)
            return
        try:
            self.location.delete(object_key(shard))
        except NotFound:
            log.info("quarantine removed by another writer", extra={"shard": shard})

    def find(self, shard: int) -> bytes | None:
        """A shard's quarantine object; None if there is none."""
        try:
            return self.location.get(object_key(shard))
        except NotFound:
            return None

    def digests(self) -> dict[int, str]:
        """sha256 of every quarantine object by shard; one listing, and one read of each."""
        return {shard: sha256_hex(data) for shard, data in self._objects()}

    def rows(self) -> dict[int, str]:
        """Reasons by array row, in increasing order of rows.

        Raises:
            Corrupt: kind "quarantine", an object is unreadable or of another shard.
        """
        reasons: dict[int, str] = {}
        for shard, data in self._objects():
            where = f"{self.location.url}/{object_key(shard)}"
            record = parse_record(
                QuarantineRecord, data, where=where, kind="quarantine", way_on=REPAIR
            )
            if (record.capture, record.shard) != (self.digest, shard):
                message = (
                    f"{where} is the quarantine of shard {record.shard} of capture "
                    f"{record.capture}, expected shard {shard} of {self.digest}; {REPAIR}"
                )
                raise Corrupt(message, kind="quarantine")
            reasons.update((item.row, item.reason) for item in record.rows)
        return reasons

    def _objects(self) -> Iterable[tuple[int, bytes]]:
        for info in self.location.list(FOLDER):
            match = _OBJECT.fullmatch(info.key.rpartition("/")[2])
            if match and info.key == object_key(int(match[1])):
                yield int(match[1]), self.location.get(info.key)


def object_key(shard: int) -> str:
    """Key of a shard's quarantine under the cache."""
    return f"{FOLDER}/{shard:08d}.json"
