"""Damaged shards: marking those that were found, finding those that show, mending them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt

from store.commits import CommitLog, record_key, shard_of_record
from store.creation import COMPLETE
from store.digest import sha256_hex
from store.errors import Conflict, Corrupt, InvalidInput, NotFound, StoreError, Unavailable
from store.layout import StreamLayout
from store.quarantine import Quarantine, object_key
from store.reading import describe_shard
from store.records import CommitRecord, DamageMark
from store.shard import decode_shard
from store.verification import Problem, check_object

if TYPE_CHECKING:
    from store.activations import ActivationCache

log = logging.getLogger(__name__)

_MARK = re.compile(r"_damaged/([a-z][a-z0-9_]*)/([0-9]{8,})\.json")
_OBJECT = re.compile(r"([a-z][a-z0-9_]*)/c/([0-9]+)/0/0")


def find_and_mark(
    cache: ActivationCache,
    on_checked: Callable[[int], None] = lambda num_bytes: None,
    on_unmarked: Callable[[StoreError], None] = lambda error: None,
) -> Iterator[Problem]:
    """Verify a cache, leaving a mark for each damaged shard as soon as it is found.

    Shards that nobody has finished are not damaged: those of a cache that is not complete are not
    among the problems. Marks of shards that turn out to be sound, as after a restore from a backup,
    are removed.

    Args:
        cache: Complete or not.
        on_checked: See `ActivationCache.verify`.
        on_unmarked: Called with the error where the store takes no marks, as one that is full or
            may only be read.
    """
    is_complete = cache.is_complete
    # A mark that another run leaves meanwhile may be of damage that came after our look.
    before = _marks(cache)
    sound = {
        (stream, shard)
        for stream, layout in cache.streams.items()
        for shard in range(layout.num_shards)
    }
    for problem in cache.verify(on_checked):
        sound.discard((problem.stream, problem.shard))
        if problem.kind == "not_committed" and not is_complete:
            continue
        if problem.stream:
            try:
                leave_mark(cache, problem)
            except (InvalidInput, Unavailable) as error:
                on_unmarked(error)
        yield problem
    for stream, shard in before & sound:
        try:
            remove_mark(cache, stream, shard)
        except (InvalidInput, Unavailable) as error:
            on_unmarked(error)


def leave_mark(cache: ActivationCache, problem: Problem) -> None:
    """Mark a shard as damaged; the first mark stays."""
    mark = DamageMark(
        capture=cache.digest,
        stream=problem.stream,
        shard=problem.shard,
        kind=problem.kind,
        detail=problem.detail,
    )
    try:
        cache.location.put_new(_mark_key(problem.stream, problem.shard), mark.to_bytes())
    except Conflict:
        log.info("shard marked before", extra={"stream": problem.stream, "shard": problem.shard})


def remove_mark(cache: ActivationCache, stream: str, shard: int) -> None:
    """Forget that a shard was damaged; nothing happens if it has no mark."""
    try:
        cache.location.delete(_mark_key(stream, shard))
    except NotFound:
        return


def find_damaged(cache: ActivationCache) -> set[int]:
    """See `ActivationCache.damaged`."""
    marked: set[int] = set()
    recorded: dict[str, set[int]] = {stream: set() for stream in cache.streams}
    whole: dict[str, set[int]] = {stream: set() for stream in cache.streams}
    is_complete = False
    for info in cache.location.list():
        if match := _OBJECT.fullmatch(info.key):
            layout = cache.streams.get(match[1])
            shard = int(match[2])
            if layout and shard < layout.num_shards and info.size == layout.shard_nbytes(shard):
                whole[match[1]].add(shard)
        elif match := _MARK.fullmatch(info.key):
            marked.add(int(match[2]))
        elif info.key == COMPLETE:
            is_complete = True
        else:
            stream = info.key.split("/")[1] if info.key.startswith("_commits/") else ""
            number = shard_of_record(info.key, stream)
            if stream in recorded and number is not None:
                recorded[stream].add(number)
    damaged = {shard for shard in marked if shard < cache.num_shards}
    for stream, layout in cache.streams.items():
        finished = set(range(layout.num_shards)) if is_complete else recorded[stream]
        damaged |= finished - (recorded[stream] & whole[stream])
    return damaged


def repair(
    cache: ActivationCache,
    commits: CommitLog,
    quarantine: Quarantine,
    shard: int,
    values: Mapping[str, npt.NDArray[Any]],
    quarantined: bytes | None,
) -> list[str]:
    """See `ActivationCache.repair_shard`; `quarantined` is the shard's quarantine object."""
    layouts = list(cache.streams.values())
    records = {layout.stream: _read_record(commits, layout, shard) for layout in layouts}
    replaced, digest = _repair_quarantine(cache, quarantine, shard, records, quarantined)
    for layout in layouts:
        record = records[layout.stream]
        if isinstance(record, CommitRecord):
            replaced += _repair_object(cache, commits, layout, record, values[layout.stream])
        elif record == "damaged":
            values_RLW = values[layout.stream]
            changed = object_key(shard) in replaced
            replaced += _repair_record(cache, commits, layout, shard, values_RLW, digest, changed)
        else:
            commits.write(layout, shard, values[layout.stream], {}, digest)
            replaced.append(record_key(layout.stream, shard))
    for layout in layouts:
        remove_mark(cache, layout.stream, shard)
    log.info("shard repaired", extra={"shard": shard, "keys": replaced})
    return replaced


_Found = CommitRecord | Literal["damaged", "missing"]


def _read_record(commits: CommitLog, layout: StreamLayout, shard: int) -> _Found:
    try:
        return commits.find(layout, shard) or "missing"
    except Corrupt as error:
        log.warning("damaged record", extra={"error": str(error)})
        return "damaged"


def _repair_quarantine(
    cache: ActivationCache,
    quarantine: Quarantine,
    shard: int,
    records: Mapping[str, _Found],
    wanted: bytes | None,
) -> tuple[list[str], str | None]:
    """Keys that were replaced, and the sha256 of the quarantine that is there now."""
    layouts = list(cache.streams.values())
    digest = sha256_hex(wanted) if wanted is not None else None
    known = [record for record in records.values() if isinstance(record, CommitRecord)]
    found = quarantine.find(shard)
    if known:
        recorded = known[0].quarantine
        if (sha256_hex(found) if found is not None else None) == recorded:
            return [], recorded
        if digest != recorded:
            raise _differs(cache, layouts[0], shard, object_key(shard), recorded, digest)
    elif "damaged" not in records.values():
        quarantine.write(shard, wanted, layouts)
        return [], digest
    # Without a record to read, nothing says which quarantine is right but the values.
    if found == wanted:
        return [], digest
    quarantine.replace(shard, wanted)
    return [object_key(shard)], digest


def _repair_object(
    cache: ActivationCache,
    commits: CommitLog,
    layout: StreamLayout,
    record: CommitRecord,
    values_RLW: npt.NDArray[Any],
) -> list[str]:
    """Replace a shard that is not as recorded."""
    try:
        check_object(cache.location, layout, record)
    except Corrupt as error:
        log.warning("damaged shard", extra={"error": str(error)})
    except Unavailable as error:
        if error.kind != "io":
            raise
        log.warning("unreadable shard", extra={"error": str(error)})
    else:
        return []
    key = layout.shard_key(record.shard)
    data = commits.build(layout, record.shard, values_RLW)
    if (sha256 := sha256_hex(data)) != record.sha256:
        raise _differs(cache, layout, record.shard, key, record.sha256, sha256)
    cache.location.replace(key, data)
    return [key]


def _repair_record(
    cache: ActivationCache,
    commits: CommitLog,
    layout: StreamLayout,
    shard: int,
    values_RLW: npt.NDArray[Any],
    quarantine: str | None,
    quarantine_changed: bool,
) -> list[str]:
    """Make a record anew, of the shard that is there if it is whole, else of these values.


    Whether it is the record that was lost, `_COMPLETE` tells, which `verify` compares.
    """
    key = layout.shard_key(shard)
    replaced = [record_key(layout.stream, shard)]
    try:
        found = cache.location.get(key)
        decode_shard(found, layout, shard, where=describe_shard(cache.location.url, layout, shard))
        sha256 = sha256_hex(found)
    except (NotFound, Corrupt):
        found = b""
    data = commits.build(layout, shard, values_RLW)
    # What belongs to another quarantine is not trusted though it be whole.
    if not found or (quarantine_changed and found != bytes(data)):
        sha256 = sha256_hex(data)
        cache.location.replace(key, data)
        replaced.insert(0, key)
    record = commits.record(layout, shard, sha256, {}, quarantine)
    cache.location.replace(record_key(layout.stream, shard), record.to_bytes())
    return replaced


def _differs(
    cache: ActivationCache,
    layout: StreamLayout,
    shard: int,
    key: str,
    recorded: str | None,
    computed: str | None,
) -> Conflict:
    url = cache.location.url
    message = (
        f"shard {describe_shard(url, layout, shard)} is damaged and was not repaired: {key} was "
        f"recorded with sha256 {recorded}, computed again it has {computed}. It was made on "
        "another kind of hardware or with other software: run `steerage extract RUN.toml` there, "
        f"restore {url}/{key} from a backup, or remove the cache {url} and extract all of it again"
    )
    return Conflict(message, kind="not_deterministic")


def _marks(cache: ActivationCache) -> set[tuple[str, int]]:
    found = (_MARK.fullmatch(info.key) for info in cache.location.list("_damaged"))
    return {(match[1], int(match[2])) for match in found if match}


def _mark_key(stream: str, shard: int) -> str:
    return f"_damaged/{stream}/{shard:08d}.json"
