"""How `steerage extract` runs: progress bars and summaries."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pipeline.cli.options import progress, stderr, where

if TYPE_CHECKING:
    from pipeline.extraction.shard_worker import Receipt
    from pipeline.extraction.workers import Extraction
    from pipeline.prompts.plan import Plan
    from pipeline.ray_runtime import Pool
    from pipeline.reduction.kept import NoCacheRecord
    from store.activations import ActivationCache
    from store.location import Location

_SHOWN = 10


def extracting(
    planned: Plan,
    root: Location,
    pool: Pool,
    device: str,
    engine: Literal["auto", "resident", "streamed", "sharded"],
    ray: str | None,
    plan_seconds: float = 0.0,
) -> dict[str, Any]:
    """Extract with a progress bar; returns the summary."""
    from pipeline.extraction.workers import extract as run_extraction

    cache = planned.cache
    start = time.perf_counter()
    with extraction_progress(cache.num_shards) as (on_start, on_receipt):
        on_start(cache.num_shards - len(set(cache.missing()) | cache.damaged()))
        result = run_extraction(
            planned,
            root,
            pool=pool,
            device=device,
            address=ray,
            engine=None if engine == "auto" else engine,
            on_receipt=on_receipt,
        )
    return extraction_summary(planned, result, plan_seconds, time.perf_counter() - start)


@contextmanager
def extraction_progress(
    num_shards: int,
) -> Iterator[tuple[Callable[[int], None], Callable[[Receipt], None]]]:
    """A progress bar of shards; what to call with the shards that were done before, and then with
    every receipt."""
    from pipeline.ray_runtime import num_actors_alive

    tokens = quarantined = 0
    first: float | None = None
    with progress("extract", num_shards) as (bar, task):

        def on_start(shards_done: int) -> None:
            # Not `update`: what is there already would count as speed.
            bar.reset(task, completed=shards_done, note="shards · starting workers")

        def on_receipt(receipt: Receipt) -> None:
            nonlocal tokens, quarantined, first
            now = time.perf_counter()
            if first is None:
                first = now - receipt.age
            tokens += receipt.tokens
            quarantined += len(receipt.quarantined)
            parts = [f"shards · {tokens / max(now - first, 1e-9):,.0f} tokens/s"]
            if stderr.is_terminal and (alive := num_actors_alive("PoolWorker")) is not None:
                parts.append(f"{alive} workers")
            bar.update(task, advance=1, note=" · ".join([*parts, f"{quarantined} quarantined"]))

        yield on_start, on_receipt


def extraction_summary(
    planned: Plan, result: Extraction, plan_seconds: float, seconds_since: float
) -> dict[str, Any]:
    """What `steerage extract --json` prints."""
    cache = planned.cache
    seconds = {"plan": plan_seconds} | dict(result.seconds)
    seconds["total"] = plan_seconds + seconds_since
    return {
        "capture": cache.digest,
        "engine": result.engine.name if result.engine else None,
        "engine_why": result.engine.why if result.engine else None,
        "shards": cache.num_shards,
        "shards_computed": result.shards_computed,
        "shards_repaired": result.shards_repaired,
        "rows": planned.num_rows,
        "quarantined": len(planned.quarantined),
        "quarantined_rows": len(result.quarantined),
        "tokens": result.tokens,
        "tokens_per_s": round(result.tokens / max(result.computing_seconds, 1e-9), 1),
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        "parity_worst": result.parity.worst if result.parity else None,
        "parity_site": result.parity.worst_site if result.parity else None,
        "cache": where(cache.location),
    }


def extracting_moments(
    planned: Plan,
    root: Location,
    pool: Pool,
    device: str,
    engine: Literal["auto", "resident", "streamed", "sharded"],
    ray: str | None,
    plan_seconds: float = 0.0,
    keep_rows: int | None = None,
) -> dict[str, Any]:
    """Extract Moments and kept rows with a progress bar; returns the summary."""
    from pipeline.extraction.fused import extract_moments
    from pipeline.reduction.moment_store import moments_digest

    start = time.perf_counter()
    with extraction_progress(planned.cache.num_shards) as (on_start, on_receipt):
        result = extract_moments(
            planned,
            root,
            pool=pool,
            device=device,
            address=ray,
            engine=None if engine == "auto" else engine,
            keep_rows=keep_rows,
            on_start=on_start,
            on_receipt=on_receipt,
        )
    summary = extraction_summary(planned, result.run, plan_seconds, time.perf_counter() - start)
    if result.record is None or result.kept is None:
        # All rows are there already, which is more than was asked for.
        return summary | {"no_cache": False}
    record, kept = result.record, result.kept
    folder = root.child(f"moments/{moments_digest(record.capture)}")
    return summary | {
        "no_cache": True,
        "parts": result.num_parts,
        "parts_computed": result.parts_computed,
        "kept_rows": kept.num_rows,
        "samples_left_out": record.left_out,
        "partners_counted": record.partners_counted,
        "pairs_counted": record.pairs_counted,
        "pairs_apart": record.pairs_apart,
        "quarantine": _named(planned.cache, record),
        "bytes": {
            "all_rows": planned.num_bytes,
            "moments": sum(info.size for info in folder.list()),
            "kept": sum(info.size for info in kept.location.list()),
            "parts": result.part_bytes,
        },
        "moments": where(folder),
        "kept": where(kept.location),
    }


def _named(cache: ActivationCache, record: NoCacheRecord) -> list[str]:
    """The first quarantined rows by the names of their prompts, with their reasons."""
    if not record.quarantined:
        return []
    index = cache.index()
    rows, names = index["row"].to_pylist(), index["prompt_id"].to_pylist()
    # Prompts that begin alike may share a row; the first of them shows where to look.
    first = dict(zip(rows[::-1], names[::-1], strict=True))
    return [f"{first[item.row]}: {item.reason}" for item in record.quarantined[:_SHOWN]]
