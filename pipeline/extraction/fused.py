"""`steerage extract --no-cache`: extraction and the counting of Moments in one.

No array of the capture is ever written. Workers count the shards of a part and write its Moments
and its kept rows (`parts`, `part_store`); when all parts are there they become the capture's
StoredMoments and the cache of the kept rows, and are removed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from pipeline.extraction.engines import EngineName
from pipeline.extraction.finishing import SavedRows, finish, reasons
from pipeline.extraction.fused_worker import FusedPoolWorker, packed
from pipeline.extraction.part_store import PartRecord, PartStore, remove_parts
from pipeline.extraction.parts import MOST_APART, Part, in_rows_of_work, plan_parts
from pipeline.extraction.shard_worker import Receipt
from pipeline.extraction.workers import (
    Extraction,
    WorkOrder,
    at_once,
    check_quarantined,
    run_workers,
)
from pipeline.prompts.plan import Plan
from pipeline.ray_runtime import Pool, check_device, ray_session
from pipeline.reduction.kept import (
    KEEP_ROWS,
    NoCacheRecord,
    create_kept,
    find_kept,
    find_record,
    write_record,
)
from pipeline.reduction.moment_store import StoredMoments
from store.activations import ActivationCache
from store.location import Location
from store.records import QuarantinedRow


@dataclass(frozen=True, slots=True)
class FusedExtraction:
    """What a run did.

    Attributes:
        run: As of an extraction that writes all rows.
        record: What the capture comes to; None if all its rows are in its cache already.
        kept: The kept rows; None as `record`.
        num_parts: Parts of the capture.
        parts_computed: Parts of this run; the rest was there already.
        part_bytes: Of all parts, which are removed by now; 0 if all was done before.
    """

    run: Extraction
    record: NoCacheRecord | None = None
    kept: ActivationCache | None = None
    num_parts: int = 0
    parts_computed: int = 0
    part_bytes: int = 0


def extract_moments(
    planned: Plan,
    root: Location,
    *,
    pool: Pool,
    device: str = "cpu",
    address: str | None = None,
    engine: EngineName | None = None,
    keep_rows: int | None = None,
    most_apart: int = MOST_APART,
    on_start: Callable[[int], None] = lambda shards_done: None,
    on_receipt: Callable[[Receipt], None] = lambda receipt: None,
) -> FusedExtraction:
    """Compute every shard, and write Moments and kept rows alone.

    A worker that dies takes the part with it that it was at; a driver that dies is run again and
    goes on where the records of parts end. What is written is the same, whatever was killed and
    however many workers there are. A capture that is done is not computed again, unless kept rows
    are damaged, nor is one of which the cache is complete.

    Args:
        planned: From `plan`.
        root: The store that the plan was made in.
        pool: The workers.
        device: ``cpu`` or ``cuda``.
        address: A Ray cluster, or None for a local Ray.
        engine: None: the one that the memory of a worker allows.
        keep_rows: Rows that are kept as they are; None: those that are kept, or else `KEEP_ROWS`.
        most_apart: See `plan_parts`.
        on_start: Called with the shards that need no computing, if any do.
        on_receipt: Called for every shard that was computed, when its part was written.

    Raises:
        GateRefused: The parity gate failed.
        InvalidInput: As `workers.extract`.
        Corrupt: A part, or the record of a run before, is damaged.
        store.errors.Unavailable: kind "no_space", the store is full.
    """
    check_device(device, address)
    cache = planned.cache
    if cache.is_complete:
        return FusedExtraction(Extraction(quarantined=cache.quarantined()))
    record = find_record(root, cache.digest)
    if record is not None and keep_rows in (None, record.keep_rows):
        kept = find_kept(root, cache.digest)
        is_whole = kept is not None and not kept.damaged()
        if is_whole and StoredMoments.exists(root, cache.digest):
            # A run before may have been killed while it removed them.
            remove_parts(root, cache.digest)
            return FusedExtraction(Extraction(quarantined=reasons([record])), record, kept)
        keep_rows = record.keep_rows
    keep_rows = keep_rows or KEEP_ROWS
    kept, rows_K = create_kept(cache, root, keep_rows)
    layouts = list(cache.streams.values())
    plan = plan_parts(cache.index(), layouts, rows_K, most_apart)
    store = PartStore(root, cache.digest, kept.digest)
    found = [store.find(part) for part in plan.parts]
    missing = [part for part, one in zip(plan.parts, found, strict=True) if one is None]
    quarantined = reasons([one for one in found if one is not None])
    check_quarantined(planned, quarantined)
    to_do = sum(len(part.shards) for part in missing)
    on_start(cache.num_shards - to_do)
    run = Extraction(quarantined=quarantined)
    session = ray_session(address, pool.max_workers, cpus_per_worker=pool.cpus)
    with session if address is not None else nullcontext():
        if missing:

            def rows(name: EngineName) -> list[Mapping[str, Any]]:
                size = at_once(name, to_do, pool)
                return [packed(group) for group in in_rows_of_work(missing, size)]

            run = run_workers(
                planned,
                root,
                WorkOrder(FusedPoolWorker, rows, (kept.digest,)),
                quarantined,
                pool=pool,
                device=device,
                address=address,
                engine=engine,
                on_receipt=on_receipt,
            )
        records = [_written(store, part) for part in plan.parts]
        quarantined = reasons(records)
        apart = plan.apart_without(list(quarantined))
        saved = SavedRows(root, cache.digest, kept.digest, plan.saved_rows, records)
        finish(cache, kept, rows_K, saved, apart, address)
    left_out = sum(one.left_out for one in records)
    record = NoCacheRecord(
        capture=cache.digest,
        kept=kept.digest,
        keep_rows=keep_rows,
        num_rows=planned.num_rows,
        quarantined=tuple(
            QuarantinedRow(row=r, reason=quarantined[r]) for r in sorted(quarantined)
        ),
        left_out=left_out,
        partners_counted=plan.in_blocks_of(list(quarantined)) - left_out,
        pairs_counted=sum(one.pairs_counted for one in records) + len(apart),
        pairs_apart=plan.pairs_apart,
    )
    write_record(root, record)
    remove_parts(root, cache.digest)
    return FusedExtraction(
        run=run,
        record=record,
        kept=kept,
        num_parts=len(plan.parts),
        parts_computed=len(missing),
        part_bytes=sum(one.num_bytes for one in records),
    )


def _written(store: PartStore, part: Part) -> PartRecord:
    record = store.find(part)
    assert record is not None, f"part {part.number} was computed and has no record"
    return record
