"""Making and opening an activation cache: everything but the shards, in an order that leaves no
half-made cache visible.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from store.backend import check_key
from store.digest import canonical_json, check_digest, sha256_hex
from store.errors import Conflict, Corrupt, InvalidInput, NotFound
from store.index import INDEX, check_index, with_rows
from store.layout import StreamLayout
from store.location import Location

COMPLETE = "_COMPLETE"

_RESERVED = frozenset(
    {"capture.json", "zarr.json", INDEX, COMPLETE, "_commits", "_quarantine", "_damaged"}
)


def create_cache(
    root: Location,
    capture: Mapping[str, Any],
    streams: Sequence[StreamLayout],
    index: pa.Table,
    files: Mapping[str, bytes],
    notes: Mapping[str, bytes],
) -> str:
    """Write a cache's files, capture.json last; the digest. See `ActivationCache.create`."""
    _check(streams, index, files, notes)
    request = canonical_json(dict(capture))
    digest = sha256_hex(request)
    location = root.child(f"caches/{digest}")
    metadata = {f"{layout.stream}/zarr.json": _json(layout.array_metadata()) for layout in streams}
    group = {"capture": digest, "streams": sorted(layout.stream for layout in streams)}
    metadata["zarr.json"] = _json({"zarr_format": 3, "node_type": "group", "attributes": group})
    if not location.exists("capture.json"):
        sink = pa.BufferOutputStream()
        pq.write_table(index, sink, compression="zstd")
        encoded = {INDEX: sink.getvalue().to_pybytes()}
        for name, data in {**files, **notes, **encoded, **metadata}.items():
            _stage(location, name, data)
        location.put_same("capture.json", request)
    _check_same(location, metadata, index, files)
    return digest


def open_cache(root: Location, digest: str) -> tuple[dict[str, Any], dict[str, StreamLayout]]:
    """A cache's capture and layouts. See `ActivationCache.open`."""
    location = root.child(f"caches/{check_digest(digest)}")
    try:
        request = location.get("capture.json")
    except NotFound as error:
        message = (
            f"no cache {digest} under {root.url}, which has {len(root.folders('caches'))} caches: "
            "it was "
            "never made, or making it was interrupted; create it, or look at list_digests()"
        )
        raise NotFound(message, kind="no_cache") from error
    if (actual := sha256_hex(request)) != digest:
        message = f"{location.url}/capture.json has sha256 {actual}, expected {digest}; restore it"
        raise Corrupt(message, kind="capture_digest")
    try:
        group = json.loads(location.get("zarr.json"))
        texts = {
            stream: location.get(f"{stream}/zarr.json") for stream in group["attributes"]["streams"]
        }
        layouts = {
            stream: StreamLayout.from_metadata(json.loads(text)) for stream, text in texts.items()
        }
    except (NotFound, ValueError, KeyError, TypeError) as error:
        message = f"{location.url}: a zarr.json is missing or was edited: {error!r}; restore it"
        raise Corrupt(message, kind="array_metadata") from error
    return json.loads(request), layouts


def _check(
    streams: Sequence[StreamLayout],
    index: pa.Table,
    files: Mapping[str, bytes],
    notes: Mapping[str, bytes],
) -> None:
    if not streams:
        raise InvalidInput("a cache needs at least one stream", kind="layout")
    names = [layout.stream for layout in streams]
    if len(set(names)) < len(names):
        raise InvalidInput(f"streams are named twice: {names}", kind="layout")
    for name in ("num_rows", "rows_per_shard"):
        # One shard number must mean the same rows in every stream, as it is the unit of work and of
        # resuming.
        if len({getattr(layout, name) for layout in streams}) > 1:
            found = {layout.stream: getattr(layout, name) for layout in streams}
            raise InvalidInput(f"streams must agree on {name}, got {found}", kind="layout")
    check_index(index, streams[0].num_rows)
    if twice := sorted(files.keys() & notes.keys()):
        raise InvalidInput(f"{twice} are given as files and as notes; choose", kind="file_name")
    for name in (*files, *notes):
        if check_key(name).partition("/")[0] in {*_RESERVED, *names}:
            raise InvalidInput(f"file name {name!r} is reserved; choose another", kind="file_name")


def _stage(location: Location, key: str, data: bytes) -> None:
    try:
        location.put_same(key, data)
    except Conflict:
        # Left by a creation that was cut off, perhaps by an older version: without capture.json it
        # is nothing yet.
        location.replace(key, data)


def _check_same(
    location: Location, metadata: Mapping[str, bytes], index: pa.Table, files: Mapping[str, bytes]
) -> None:
    """A cache that existed must be the one asked for, or shards of two plans would mix in it."""
    wanted: dict[str, bytes | pa.Table] = {**metadata, **files, INDEX: index}
    for name, content in wanted.items():
        try:
            found = location.get(name)
        except NotFound:
            raise _differs(location, name) from None
        if found != content and not (name.endswith(".parquet") and _same_table(found, content)):
            raise _differs(location, name)


def _same_table(found: bytes, wanted: bytes | pa.Table) -> bool:
    """Whether two Parquet files hold the same rows: their bytes depend on the library's version."""
    try:
        table = _read(found)
        same: bool = (
            table.equals(_read(wanted))
            if isinstance(wanted, bytes)
            else with_rows(table).equals(with_rows(wanted))
        )
    except (pa.ArrowException, OSError):  # one of them is no Parquet, or damaged
        return False
    return same


def _read(data: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(data))


def _differs(location: Location, name: str) -> Conflict:
    message = (
        f"the cache {location.url} exists for this capture, but with another {name}; open it and "
        "use its own "
        "layout and plan, or put what made the difference into the capture"
    )
    return Conflict(message, kind="cache_differs")


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode()
