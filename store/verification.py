"""Checking a whole activation cache against its records."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from store.ahead import map_ahead
from store.creation import COMPLETE
from store.digest import sha256_hex
from store.errors import REPAIR, Corrupt, InvalidInput, NotFound, Unavailable
from store.layout import StreamLayout
from store.location import Location
from store.reading import describe_shard
from store.records import CommitRecord, CompleteMarker, parse_record
from store.shard import check_chunks, read_index

if TYPE_CHECKING:
    from store.activations import ActivationCache

_PIECE_BYTES = 8 << 20
"""Read at a time; with a few threads, what checking a cache of any size takes in memory."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a cache.

    Attributes:
        stream: Of the shard, "" for the cache as a whole.
        shard: Its number, -1 for the cache as a whole.
        kind: One of `store.errors.KINDS`.
        detail: For people: what, where, expected and found.
    """

    stream: str
    shard: int
    kind: str
    detail: str


def find_problems(
    cache: ActivationCache,
    quarantines: Mapping[int, str],
    find_quarantine: Callable[[int], bytes | None],
    on_checked: Callable[[int], None],
) -> Iterator[Problem]:
    """Yield what is wrong, in the order of streams and shards; nothing for a sound cache.

    Args:
        cache: Complete or not.
        quarantines: sha256 of its quarantine objects by shard, as they were at the start.
        find_quarantine: A shard's quarantine object as it is now.
        on_checked: See `ActivationCache.verify`.
    """
    shards = [
        (layout, shard) for layout in cache.streams.values() for shard in range(layout.num_shards)
    ]

    def find(place: tuple[StreamLayout, int]) -> Problem | None:
        return _find_problem(cache, *place, quarantines, find_quarantine)

    with closing(map_ahead(find, shards)) as found:
        for (layout, shard), problem in zip(shards, found, strict=True):
            on_checked(layout.shard_nbytes(shard))
            if problem:
                yield problem
    for check in (cache.index, lambda: _check_marker(cache)):
        try:
            check()
        except (Corrupt, NotFound) as error:
            yield Problem("", -1, error.kind, str(error))


def _find_problem(
    cache: ActivationCache,
    layout: StreamLayout,
    shard: int,
    quarantines: Mapping[int, str],
    find_quarantine: Callable[[int], bytes | None],
) -> Problem | None:
    try:
        record = cache.read_record(layout.stream, shard)
        check_object(cache.location, layout, record)
        found = quarantines.get(shard)
        if record.quarantine != found:
            # Written since the start, perhaps: quarantines come before their records.
            data = find_quarantine(shard)
            found = sha256_hex(data) if data is not None else None
        if record.quarantine != found:
            message = (
                f"shard {describe_shard(cache.location.url, layout, shard)}: its record names a "
                f"quarantine of sha256 {record.quarantine}, there is {found}; "
                f"{REPAIR}"
            )
            return Problem(layout.stream, shard, "quarantine", message)
    except (Corrupt, NotFound) as error:
        return Problem(layout.stream, shard, error.kind, str(error))
    except Unavailable as error:
        if error.kind != "io":  # a bad sector is damage; a network that is down says nothing
            raise
        return Problem(layout.stream, shard, error.kind, f"{error}; {REPAIR}")
    return None


def check_object(location: Location, layout: StreamLayout, record: CommitRecord) -> None:
    """Check a shard's size, every checksum in it, and its sha256, a piece at a time.

    Raises:
        Corrupt: kind "shard_missing", "shard_size", "shard_index" or "shard_checksum".
    """
    shard = record.shard
    key = layout.shard_key(shard)
    where = describe_shard(location.url, layout, shard)
    try:
        num_bytes = location.size(key)
        if num_bytes != record.num_bytes or num_bytes != layout.shard_nbytes(shard):
            message = (
                f"shard {where} was recorded with {record.num_bytes} bytes, it has {num_bytes}; "
                f"{REPAIR}"
            )
            raise Corrupt(message, kind="shard_size")
        # First, as they can say which chunk.
        actual = _check_pieces(location, layout, shard, where)
    except NotFound as error:
        message = f"shard {where} is recorded but gone; {REPAIR}"
        raise Corrupt(message, kind="shard_missing") from error
    except InvalidInput as error:
        if error.kind != "out_of_range":
            raise
        message = f"shard {where} was cut off while it was read: {error}; {REPAIR}"
        raise Corrupt(message, kind="shard_size") from error
    if actual != record.sha256:
        message = (
            f"shard {where} was recorded with sha256 {record.sha256}, it has {actual}; {REPAIR}"
        )
        raise Corrupt(message, kind="shard_checksum")


def _check_pieces(location: Location, layout: StreamLayout, shard: int, where: str) -> str:
    """The sha256 of an object of which every checksum is right."""
    key = layout.shard_key(shard)
    tail = location.get_tail(key, layout.index_nbytes)
    read_index(tail, layout, shard, where=where)
    hasher = hashlib.sha256()
    nbytes = layout.stored_chunk_nbytes
    num_chunks = layout.present_chunks(shard) * len(layout.layers)
    step = max(_PIECE_BYTES // nbytes, 1)
    for first in range(0, num_chunks, step):
        length = min(step, num_chunks - first) * nbytes
        piece = location.get_range(key, first * nbytes, length)
        check_chunks(piece, layout, shard, where=where, first_chunk=first)
        hasher.update(piece)
    hasher.update(tail)
    return hasher.hexdigest()


def _check_marker(cache: ActivationCache) -> None:
    if not cache.is_complete:
        return
    where = f"{cache.location.url}/{COMPLETE}"
    data = cache.location.get(COMPLETE)
    way_on = (
        "if no shard is damaged, remove this file and run `steerage extract RUN.toml`, which "
        "writes it again"
    )
    marker = parse_record(CompleteMarker, data, where=where, kind="complete_marker", way_on=way_on)
    if (expected := cache.summary()) != marker:
        message = f"{where} says {marker}, its records come to {expected}; {way_on}"
        raise Corrupt(message, kind="complete_marker")
