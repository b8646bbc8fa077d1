"""Parts in the store, until the last of them is there.

moments/MOMENTS/parts/KEPT/
  00000012.STREAM.safetensors  Moments of part 12
  00000012.rows.safetensors    its saved rows; absent where it has none
  00000012.json                part 12 counts; without this it may be garbage of a killed writer

MOMENTS is `moments_digest` of the capture, KEPT begins the digest of the kept rows: a run that
keeps others finds no parts of this one. Everything is create-only, as shards are
(`store.commits`).

Shapes: K saved rows of a part, G groups, L layers, W width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat

from pipeline.extraction.parts import CountedPart, Part
from pipeline.reduction.counting import Counted
from pipeline.reduction.grouped import GroupedMoments
from pipeline.reduction.moment_store import moments_digest
from store.digest import sha256_hex
from store.errors import Conflict, Corrupt, NotFound
from store.location import Location
from store.records import Digest, QuarantinedRow, Record, parse_record

log = logging.getLogger(__name__)

_ROWS = "rows"
_WAY_ON = "remove the objects of its part, and run `steerage extract --no-cache` again"


class PartRecord(Record):
    """A part that has this record counts.

    Attributes:
        capture: Digest of the whole capture.
        part: Number of the part.
        rows: First array row and one past the last.
        objects: sha256 of each of its objects, by stream, and by ``rows``.
        num_bytes: Of all its objects.
        quarantined: Rows of the whole capture that do not count.
        left_out: Training samples that are in no Moments.
        pairs_counted: Pairs of which the difference is in the Moments.
        seconds: Timings of whoever made it; the only field that may differ between runs.
    """

    schema_version: Literal[1] = 1
    capture: Digest
    part: int = Field(ge=0)
    rows: tuple[int, int] = Field(strict=False)
    objects: dict[str, Digest]
    num_bytes: int = Field(ge=0)
    quarantined: tuple[QuarantinedRow, ...] = Field(default=(), strict=False)
    left_out: int = Field(ge=0)
    pairs_counted: int = Field(ge=0)
    seconds: dict[str, FiniteFloat]


class PartStore:
    """The parts of one run.

    Attributes:
        location: Where they lie.
    """

    def __init__(self, root: Location, capture: str, kept: str) -> None:
        self.location = root.child(f"{parts_folder(capture)}/{kept[:16]}")
        self._capture = capture

    def find(self, part: Part) -> PartRecord | None:
        """The record of a part, None if it is not done.

        Raises:
            Corrupt: kind "record", it is unreadable or of other rows.
        """
        key = _record_key(part.number)
        try:
            data = self.location.get(key)
        except NotFound:
            return None
        where = f"{self.location.url}/{key}"
        record = parse_record(PartRecord, data, where=where, kind="record", way_on=_WAY_ON)
        expected = (self._capture, part.number, (part.rows.start, part.rows.stop))
        if (record.capture, record.part, record.rows) != expected:
            found = (record.capture, record.part, record.rows)
            message = f"{where} is the record of {found}, expected {expected}; {_WAY_ON}"
            raise Corrupt(message, kind="record")
        return record

    def write(self, part: Part, counted: CountedPart, seconds: Mapping[str, float]) -> PartRecord:
        """Store a part and record it. May be repeated, also after a crash at any moment.

        Raises:
            Conflict: kind "not_deterministic", it is recorded with other bytes.
            Unavailable: kind "no_space", the store is full; what is recorded stays.
        """
        objects = {stream: _encode(one) for stream, one in counted.counted.items()}
        if len(part.saved_rows):
            objects[_ROWS] = safetensors.numpy.save(
                {stream: np.ascontiguousarray(rows) for stream, rows in counted.saved.items()}
            )
        record = PartRecord(
            capture=self._capture,
            part=part.number,
            rows=(part.rows.start, part.rows.stop),
            objects={name: sha256_hex(data) for name, data in objects.items()},
            num_bytes=sum(map(len, objects.values())),
            quarantined=tuple(
                QuarantinedRow(row=row, reason=reason)
                for row, reason in sorted(counted.quarantined.items())
            ),
            left_out=counted.left_out,
            pairs_counted=counted.pairs_counted,
            seconds={step: float(value) for step, value in seconds.items()},
        )
        if (found := self.find(part)) is not None:
            return _check_same(found, record)
        for name, data in objects.items():
            self._put(_object_key(part.number, name), data)
        try:
            self.location.put_new(_record_key(part.number), record.to_bytes())
        except Conflict:
            return _check_same(self.find(part) or record, record)
        log.info("part written", extra={"part": part.number, "num_bytes": record.num_bytes})
        return record

    def moments(self, record: PartRecord, stream: str) -> Counted:
        """The Moments of a part.

        Raises:
            Corrupt: kind "blob_checksum", they are not as recorded.
        """
        return _decode(safetensors.numpy.load(self._get(record, stream)))

    def saved_rows(self, record: PartRecord) -> dict[str, NDArray[Any]]:
        """Values [K, L, W] of a part's saved rows by stream; errors as for `moments`."""
        return safetensors.numpy.load(self._get(record, _ROWS))

    def _put(self, key: str, data: bytes) -> None:
        try:
            self.location.put_same(key, data)
        except Conflict:
            # Left by a killed writer on other hardware: without its record it is nothing yet.
            log.warning("part of a killed writer replaced", extra={"key": key})
            self.location.replace(key, data)

    def _get(self, record: PartRecord, name: str) -> bytes:
        key = _object_key(record.part, name)
        try:
            data = self.location.get(key)
        except NotFound:
            data = b""
        if (found := sha256_hex(data)) != record.objects[name]:
            message = (
                f"{self.location.url}/{key} has sha256 {found}, expected {record.objects[name]}; "
                f"{_WAY_ON}"
            )
            raise Corrupt(message, kind="blob_checksum")
        return data


def parts_folder(capture: str) -> str:
    """The folder of all parts of a capture."""
    return f"moments/{moments_digest(capture)}/parts"


def remove_parts(root: Location, capture: str) -> int:
    """Remove the parts of a capture, whichever rows they kept; bytes of them.

    Records go first, so that what a crash leaves is taken for garbage and not for parts.
    """
    folder = root.child(parts_folder(capture))
    objects = sorted(folder.list(), key=lambda info: not info.key.endswith(".json"))
    for info in objects:
        try:
            folder.delete(info.key)
        except NotFound:
            log.info("part removed by another run", extra={"key": info.key})
    folder.remove_leftovers(older_than_s=0.0)
    return sum(info.size for info in objects)


def _check_same(found: PartRecord, record: PartRecord) -> PartRecord:
    if (found.objects, found.quarantined) != (record.objects, record.quarantined):
        raise Conflict(
            f"part {record.part} is not deterministic: recorded with {dict(found.objects)}, now "
            f"{dict(record.objects)}; the recorded one stays. Look for what differs between the "
            "machines (hardware, software)",
            kind="not_deterministic",
        )
    return found


def _encode(counted: Counted) -> bytes:
    tensors = _tensors("groups", counted.groups)
    if counted.pairs is not None:
        tensors |= _tensors("pairs", counted.pairs)
    return safetensors.numpy.save(tensors)


def _decode(tensors: Mapping[str, NDArray[Any]]) -> Counted:
    pairs = _grouped(tensors, "pairs") if "pairs.count_G" in tensors else None
    return Counted(groups=_grouped(tensors, "groups"), pairs=pairs)


def _tensors(name: str, moments: GroupedMoments) -> dict[str, NDArray[Any]]:
    return {
        f"{name}.count_G": np.ascontiguousarray(moments.count_G),
        f"{name}.mean": np.ascontiguousarray(moments.mean),
        f"{name}.m2": np.ascontiguousarray(moments.m2),
    }


def _grouped(tensors: Mapping[str, NDArray[Any]], name: str) -> GroupedMoments:
    return GroupedMoments(*(tensors[f"{name}.{field}"] for field in ("count_G", "mean", "m2")))


def _record_key(part: int) -> str:
    return f"{part:08d}.json"


def _object_key(part: int, name: str) -> str:
    return f"{part:08d}.{name}.safetensors"
