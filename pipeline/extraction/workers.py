"""Extraction on Ray Data: one row of work is a shard or a few, computed and written by one worker.

Activations never pass through Ray's object store or the driver: a worker writes its shards to the
store itself (`shard_worker`) and returns only receipts.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pipeline.errors import InvalidInput
from pipeline.extraction.engines import (
    EngineChoice,
    EngineName,
    choose_engine,
    memory_share,
    weight_bytes,
    worker_memory,
)
from pipeline.extraction.models import DtypeName
from pipeline.extraction.parity import Parity
from pipeline.extraction.shard_worker import PoolWorker, Receipt, ShardWorker
from pipeline.prompts.plan import Plan
from pipeline.ray_runtime import Pool, check_device, ray_session, warn_without_room
from pipeline.reduction.kept import forget_inexact
from store.activations import ActivationCache
from store.location import Location

log = logging.getLogger(__name__)

_INIT_DEATHS: Final = 16
"""Workers in a row that may die as they start, as on a node that goes away."""

_MOST_AT_ONCE: Final = 32
"""Shards that a worker is given at once where layers are streamed."""

_DEATHS: Final = 8
"""Workers that may die over one row of work: more is no accident."""

_SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class Extraction:
    """What a run did.

    Attributes:
        parity: The worst of what the workers found; None if nothing was left to compute.
        shards_computed: Shards of this run, repaired ones included; the rest was there already.
        shards_repaired: Shards that were there and damaged.
        quarantined: Reasons by array row, of this run and those before it.
        seconds: By phase. start: until the first worker began its first shard; parity, compute and
            write: of all workers together.
        computing_seconds: From then until the last shard was written.
        engine: What computed; None if nothing was left to compute.
    """

    parity: Parity | None = None
    shards_computed: int = 0
    shards_repaired: int = 0
    tokens: int = 0
    quarantined: Mapping[int, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(
        default_factory=lambda: dict.fromkeys(("start", "parity", "compute", "write"), 0.0)
    )
    computing_seconds: float = 0.0
    engine: EngineChoice | None = None


def extract(
    planned: Plan,
    root: Location,
    *,
    pool: Pool,
    device: str = "cpu",
    address: str | None = None,
    engine: EngineName | None = None,
    on_receipt: Callable[[Receipt], None] = lambda receipt: None,
) -> Extraction:
    """Compute every shard that is missing or damaged, and close the cache.

    A cache that is complete costs some listings and a read of each quarantine. A worker that dies,
    also with its node, is replaced and its shard computed again; a driver that dies is run again
    and goes on where the commit records end. A worker's first shard passes the parity gate before
    it is written.

    Args:
        planned: From `plan`.
        root: The store that the plan was made in.
        pool: The workers.
        device: ``cpu`` or ``cuda``.
        address: A Ray cluster, or None for a local Ray.
        engine: None: the one that the memory of a worker allows.
        on_receipt: Called for every shard that was written.

    Raises:
        GateRefused: The parity gate failed.
        InvalidInput: A local run on ``cuda`` and PyTorch sees no GPU here, workers that cannot be
            had, or more quarantined rows than `prompts.max_quarantined` allows.
        store.errors.Unavailable: kind "no_space", the store is full.
    """
    check_device(device, address)
    pool.resources(device)
    cache = planned.cache
    damaged = cache.damaged()
    # Repairing writes what is missing of a damaged shard too, and looks at what is there.
    missing = set(cache.missing()) - damaged
    quarantined = cache.quarantined()
    check_quarantined(planned, quarantined)
    if not missing and not damaged:
        if not cache.is_complete:
            _seal(cache, root)
        return Extraction(quarantined=quarantined)

    def rows(engine: EngineName) -> list[dict[str, Any]]:
        # Where layers are streamed, loading them is shared by all shards that a worker has at once.
        size = at_once(engine, len(missing) + len(damaged), pool)
        return [*_rows(sorted(damaged), size, True), *_rows(sorted(missing), size, False)]

    result = run_workers(
        planned,
        root,
        WorkOrder(PoolWorker, rows),
        quarantined,
        pool=pool,
        device=device,
        address=address,
        engine=engine,
        on_receipt=on_receipt,
    )
    _seal(cache, root)
    return result


def _seal(cache: ActivationCache, root: Location) -> None:
    forget_inexact(root, cache.digest)
    cache.seal()


@dataclass(frozen=True, slots=True)
class WorkOrder:
    """What the workers of a pool do.

    Attributes:
        worker: Class of the workers, a `ShardWorker`.
        rows: The rows of work for an engine.
        arguments: What such a worker is made with, behind those of every `ShardWorker`.
    """

    worker: type[ShardWorker]
    rows: Callable[[EngineName], Sequence[Mapping[str, Any]]]
    arguments: tuple[str, ...] = ()


def at_once(engine: EngineName, to_do: int, pool: Pool) -> int:
    """Shards, of so many to do, that a worker is given at once."""
    return min(-(-to_do // (2 * pool.max_workers)), _MOST_AT_ONCE) if engine == "streamed" else 1


def run_workers(
    planned: Plan,
    root: Location,
    order: WorkOrder,
    quarantined: Mapping[int, str],
    *,
    pool: Pool,
    device: str,
    address: str | None,
    engine: EngineName | None,
    on_receipt: Callable[[Receipt], None],
) -> Extraction:
    """Have a pool of workers do rows of work; arguments and errors as for `extract`.

    Args:
        order: The work.
        quarantined: Reasons by array row, of runs before.
    """
    resources = pool.resources(device)
    digest, dtype = planned.cache.digest, planned.cache.capture["model"]["dtype"]
    start = time.perf_counter()
    first_began, last_written = None, start
    seconds = dict.fromkeys(("start", "parity", "compute", "write"), 0.0)
    worst: Parity | None = None
    num_computed = num_repaired = tokens = 0
    with ray_session(address, pool.max_workers, cpus_per_worker=pool.cpus):
        warn_without_room(resources)
        choice = _engine(planned, dtype, engine, pool, device, address)
        log.info("engine", extra={"engine": choice.name, "why": choice.why})
        share = memory_share(device, pool.max_workers, pool.cpus, resources["num_gpus"])
        where = (root.url, digest, str(planned.model.path), dtype, device, choice.name, share)
        receipts = _receipts(
            order.worker, order.rows(choice.name), (*where, *order.arguments), pool, resources
        )
        for receipt in receipts:
            last_written = time.perf_counter()
            if first_began is None:
                first_began = last_written - receipt.age
            for phase, value in receipt.seconds.items():
                seconds[phase] = seconds.get(phase, 0.0) + value
            if receipt.parity and (worst is None or receipt.parity.worst > worst.worst):
                worst = receipt.parity
            num_computed += 1
            num_repaired += receipt.repaired
            tokens += receipt.tokens
            on_receipt(receipt)
            if receipt.quarantined:
                quarantined = {**quarantined, **receipt.quarantined}
                check_quarantined(planned, quarantined)
    began = start if first_began is None else first_began
    return Extraction(
        parity=worst,
        shards_computed=num_computed,
        shards_repaired=num_repaired,
        tokens=tokens,
        quarantined=quarantined,
        seconds=seconds | {"start": began - start},
        computing_seconds=last_written - began,
        engine=choice,
    )


def _engine(
    planned: Plan,
    dtype: DtypeName,
    asked: EngineName | None,
    pool: Pool,
    device: str,
    address: str | None,
) -> EngineChoice:
    """The engine of all workers; on a cluster, a worker's machine is asked for its memory."""
    resources = pool.resources(device)
    gpus = resources["num_gpus"]
    memory = 0
    if asked is None:
        room = (device, pool.max_workers, pool.cpus, gpus)
        if device == "cpu" and address is None:
            memory = worker_memory(*room)
        else:
            import ray

            memory = ray.get(ray.remote(**resources)(worker_memory).remote(*room))
    return choose_engine(asked, weight_bytes(planned.model, dtype), memory, device, gpus)


def check_quarantined(planned: Plan, quarantined: Mapping[int, str]) -> None:
    """Stop a run of which too many rows cannot be used.

    Rows that planning left out count as well, so that the share is one of the whole corpus.

    Args:
        planned: From `plan`.
        quarantined: Reasons by array row.

    Raises:
        InvalidInput: kind "prompt_quarantine", with the first ten reasons.
    """
    num_bad = len(quarantined) + len(planned.quarantined)
    num_rows = planned.num_rows + len(planned.quarantined)
    if not quarantined or num_bad <= planned.max_quarantined * num_rows:
        return
    index = planned.cache.index()
    # Prompts that begin alike may share a row; any of them shows where to look.
    rows, prompt_ids = index["row"].to_pylist(), index["prompt_id"].to_pylist()
    first = dict(zip(rows[::-1], prompt_ids[::-1], strict=True))
    shown = "\n".join(
        f"  {first[row]}: {reason}" for row, reason in sorted(quarantined.items())[:_SHOWN]
    )
    more = f"\n  and {len(quarantined) - _SHOWN} more" if len(quarantined) > _SHOWN else ""
    raise InvalidInput(
        f"{num_bad} of {num_rows} rows cannot be used, more than prompts.max_quarantined = "
        f"{planned.max_quarantined:g} allows; activations of {len(quarantined)} are bad:\n"
        f"{shown}{more}\nWhat is finished is kept. Compute in another dtype (model.dtype), mend "
        "the prompts, or raise prompts.max_quarantined in the run file and run it again",
        kind="prompt_quarantine",
    )


def _rows(shards: Sequence[int], size: int, repair: bool) -> Iterator[dict[str, Any]]:
    for first in range(0, len(shards), size):
        yield {"shards": list(shards[first : first + size]), "repair": repair}


def _receipts(
    worker: type[ShardWorker],
    rows: Sequence[Mapping[str, Any]],
    arguments: tuple[Any, ...],
    pool: Pool,
    resources: Mapping[str, float],
) -> Iterator[Receipt]:
    import ray

    context = ray.data.DataContext.get_current()
    # A worker that has a row waits for nothing, so where all have one a pool that may grow grows.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    context.max_consecutive_actor_init_deaths = _INIT_DEATHS
    # A shard of a large model may take long.
    context.execution_no_progress_timeout_s = -1
    most = min(pool.max_workers, max(pool.min_workers, len(rows)))
    work = ray.data.from_items(list(rows), override_num_blocks=len(rows))
    outcomes = work.flat_map(
        worker,
        fn_constructor_args=arguments,
        compute=ray.data.ActorPoolStrategy(
            # All at once: they load the model beside one another, and a cluster that grows on
            # demand sees the whole demand.
            min_size=min(pool.min_workers, most),
            initial_size=most,
            max_size=most,
            # One that it computes and the next, not begun: with one alone a worker stood still for
            # a fifth of the time, until the driver had seen that it was done.
            max_tasks_in_flight_per_actor=2,
        ),
        # Ray Data restarts a lost worker without limit, and would retry its row so too.
        max_task_retries=_DEATHS,
        **resources,
    )
    try:
        for row in outcomes.iter_rows():
            outcome = pickle.loads(row["outcome"])
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome
    except ray.exceptions.RayActorError as error:
        raise InvalidInput(
            f"workers died again and again: {_DEATHS + 1} times over one shard, or {_INIT_DEATHS} "
            "in a row while they loaded the model. Most often the kernel ends them for want of "
            "memory: take fewer --workers, --engine streamed, or less capture.tokens_per_pack. "
            f"What is finished is kept (Ray says: {str(error).splitlines()[0]})",
            kind="worker_died",
        ) from error
