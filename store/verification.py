"""Checking a whole activation cache against its records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from store.creation import COMPLETE
from store.digest import sha256_hex
from store.errors import Corrupt, NotFound
from store.layout import StreamLayout
from store.records import CompleteMarker, parse_record
from store.shard import decode_shard

if TYPE_CHECKING:
    from store.activations import ActivationCache


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


def find_problems(cache: ActivationCache) -> Iterator[Problem]:
    """Yield what is wrong, shard by shard; nothing for a sound cache. Holds one shard in memory."""
    for stream, layout in cache.streams.items():
        for shard in range(layout.num_shards):
            try:
                _check_shard(cache, layout, shard)
            except (Corrupt, NotFound) as error:
                yield Problem(stream, shard, error.kind, str(error))
    if cache.is_complete:
        try:
            _check_marker(cache)
        except (Corrupt, NotFound) as error:
            yield Problem("", -1, error.kind, str(error))


def _check_shard(cache: ActivationCache, layout: StreamLayout, shard: int) -> None:
    key = layout.shard_key(shard)
    where = f"{cache.location.url}/{key}"
    record = cache.read_record(layout.stream, shard)
    try:
        data = cache.location.get(key)
    except NotFound as error:
        raise Corrupt(
            f"shard {where} is recorded but gone; restore it", kind="shard_missing"
        ) from error
    if len(data) != record.num_bytes:
        message = (
            f"shard {where} was recorded with {record.num_bytes} bytes, it has {len(data)}; "
            "restore it"
        )
        raise Corrupt(message, kind="shard_size")
    decode_shard(data, layout, shard, where=where)  # first, as it can say which chunk
    if (actual := sha256_hex(data)) != record.sha256:
        message = (
            f"shard {where} was recorded with sha256 {record.sha256}, it has {actual}; restore it"
        )
        raise Corrupt(message, kind="shard_checksum")


def _check_marker(cache: ActivationCache) -> None:
    where = f"{cache.location.url}/{COMPLETE}"
    data = cache.location.get(COMPLETE)
    marker = parse_record(CompleteMarker, data, where=where, kind="complete_marker")
    if (expected := cache.summary()) != marker:
        message = f"{where} says {marker}, its records come to {expected}; restore the records"
        raise Corrupt(message, kind="complete_marker")
