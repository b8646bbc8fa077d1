"""Kept rows: the sample of a capture's rows that `steerage extract --no-cache` writes.

What needs rows and not Moments alone (PCA, probes, LDA, sigma, the held-out scores) takes them from
here. They are a cache like any other, with a capture of its own that names the whole one, so every
method runs on them unchanged.

moments/MOMENTS/no_cache.json   what the run came to, beside the Moments; written last
caches/KEPT                     the kept rows

Shapes: N entries of the whole capture's index, K kept rows.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from pipeline.prompts.worklist import PROMPTS_FILE, select_worklist
from pipeline.reduction.moment_store import moments_digest
from pipeline.reduction.samples import block_names
from store.activations import ActivationCache
from store.errors import NotFound
from store.location import Location
from store.records import Digest, QuarantinedRow, Record, parse_record

KEEP_ROWS: Final = 8192
"""Rows that are kept unless said otherwise: AUROCs of the usual splits are then within about 1 %,
and a matrix of a head's 128 dimensions has 64 rows a dimension."""

_MOST_SHARDS: Final = 32
_RECORD: Final = "no_cache.json"
_RULE: Final = "whole pairs, in the order of blake2b('kept/' + name)"


class NoCacheRecord(Record):
    """What `steerage extract --no-cache` has done with a capture.

    Attributes:
        capture: Digest of the whole capture.
        kept: Digest of the kept rows' capture.
        keep_rows: Rows that were asked for.
        num_rows: Rows of the whole capture that were computed.
        quarantined: Rows of the whole capture that do not count, and why.
        left_out: Training samples that are in no Moments: those of quarantined rows, and the others
            of their pairs as far as they were computed after them or in the same shard.
        partners_counted: Training samples that are in the Moments although another of their pair
            is in quarantine.
        pairs_counted: Training pairs of which the difference is in the Moments.
        pairs_apart: Training pairs of which it is not, as their rows are computed in different
            parts of the work.
    """

    schema_version: Literal[1] = 1
    capture: Digest
    kept: Digest
    keep_rows: int = Field(ge=1)
    num_rows: int
    quarantined: tuple[QuarantinedRow, ...] = Field(default=(), strict=False)
    left_out: int = 0
    partners_counted: int = 0
    pairs_counted: int = 0
    pairs_apart: int = 0


def find_record(root: Location, capture_digest: str) -> NoCacheRecord | None:
    """What `--no-cache` has done with a capture; None if it has not, or is not done.

    Raises:
        Corrupt: kind "record", it is unreadable.
    """
    key = _key(capture_digest)
    try:
        data = root.get(key)
    except NotFound:
        return None
    way_on = "remove it and run `steerage extract --no-cache` again"
    return parse_record(
        NoCacheRecord, data, where=f"{root.url}/{key}", kind="record", way_on=way_on
    )


def write_record(root: Location, record: NoCacheRecord) -> None:
    """Close a run. Another of the same capture, that kept more rows or fewer, gives way to it."""
    root.replace(_key(record.capture), record.to_bytes())


def find_kept(root: Location, capture_digest: str) -> ActivationCache | None:
    """The kept rows of a capture: a complete cache. None if there is none, as where all rows were
    written, or `--no-cache` is not done.

    Raises:
        Corrupt: The record, or the cache, is damaged.
    """
    record = find_record(root, capture_digest)
    if record is None:
        return None
    try:
        kept = ActivationCache.open(root, record.kept)
    except NotFound:
        return None
    return kept if kept.is_complete else None


def forget_inexact(root: Location, capture_digest: str) -> None:
    """Once all rows of a capture are there, Moments that left something out give way to Moments
    that are counted from them. May be repeated, also after a crash at any moment.
    """
    record = find_record(root, capture_digest)
    if record is None or not (record.pairs_apart or record.quarantined):
        return
    folder = root.child(f"moments/{moments_digest(capture_digest)}")
    # What says that Moments are there goes first, what says that they are not exact last.
    order = {"moments.json": 0, _RECORD: 2}
    for key in sorted((info.key for info in folder.list()), key=lambda key: order.get(key, 1)):
        folder.delete(key)


def choose_entries(index: pa.Table, keep_rows: int) -> NDArray[np.bool_]:
    """Which entries of a capture's index are of kept rows, Bool [N].

    Whole pairs (a prompt without a pair alone), in the order of a hash of their names, as many as
    have no more rows than asked for, and at least one. So it is a random sample of the pairs, of
    all splits and classes, and every kept sample has its partner. Of rows that prompts share, only
    the entries of kept prompts count.

    Args:
        index: Of the whole capture.
        keep_rows: Most array rows.
    """
    block_N, names = block_names(index)
    row_N = index["row"].to_numpy()
    by_block = np.argsort(block_N, kind="stable")
    ends = np.searchsorted(block_N[by_block], np.arange(len(names) + 1))
    digests = [hashlib.blake2b(b"kept/" + name, digest_size=16).digest() for name in names]
    taken: set[int] = set()
    chosen_N = np.zeros(len(index), np.bool_)
    for block in sorted(range(len(names)), key=digests.__getitem__):
        entries = by_block[ends[block] : ends[block + 1]]
        rows = set(row_N[entries].tolist())
        if taken and len(taken) + len(rows - taken) > keep_rows:
            break
        taken |= rows
        chosen_N[entries] = True
    return chosen_N


def create_kept(
    cache: ActivationCache, root: Location, keep_rows: int
) -> tuple[ActivationCache, NDArray[np.int64]]:
    """Make the cache of the kept rows of a planned capture, or open it.

    Returns:
        It, and the rows of the whole capture that its rows are, Int64 [K], increasing.
    """
    index = cache.index()
    index = index.filter(pa.array(choose_entries(index, keep_rows)))
    row_N = index["row"].to_numpy()
    rows_K = np.unique(row_N)
    position = index.column_names.index("row")
    renumbered = pa.array(np.searchsorted(rows_K, row_N).astype(np.int64))
    index = index.set_column(position, index.schema.field(position), renumbered)
    layouts = []
    for layout in cache.streams.values():
        per_chunk = layout.rows_per_chunk
        # As in a plan: few rows are still in several shards, so that several tasks read them.
        chunks = -(-len(rows_K) // (_MOST_SHARDS * per_chunk))
        rows_per_shard = min(layout.rows_per_shard, chunks * per_chunk)
        layouts.append(replace(layout, num_rows=len(rows_K), rows_per_shard=rows_per_shard))
    first = layouts[0]
    worklist = select_worklist(cache, index, first.rows_per_shard, first.num_shards)
    kept = ActivationCache.create(
        root, _capture(cache, keep_rows), layouts, index, {PROMPTS_FILE: worklist}
    )
    return kept, rows_K


def _capture(cache: ActivationCache, keep_rows: int) -> dict[str, Any]:
    """The capture of the kept rows: that of all rows, and which of them."""
    capture = {name: value for name, value in cache.capture.items() if name != "rows_per_shard"}
    return capture | {"kept": {"of": cache.digest, "rule": _RULE, "rows": keep_rows}}


def _key(capture_digest: str) -> str:
    return f"moments/{moments_digest(capture_digest)}/{_RECORD}"
