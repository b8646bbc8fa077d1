"""Extraction on Ray Data: one row of work is a shard or a few, computed and written by one worker.

Activations never pass through Ray's object store or the driver: a worker writes its shards to the
store itself and returns only receipts. A shard is written before the next one is begun, so a worker
that dies takes at most the shard with it that it was at (a wave of them where layers are streamed),
and holds no other in memory: a slow store slows the computing down, and nothing piles up.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from pipeline.errors import OUR_ERRORS, InvalidInput
from pipeline.extraction.engines import (
    EngineChoice,
    EngineName,
    choose_engine,
    load_engine,
    weight_bytes,
    worker_memory,
)
from pipeline.extraction.gather import ShardResult
from pipeline.extraction.models import DtypeName
from pipeline.extraction.parity import Parity, check_parity
from pipeline.extraction.passes import ShardWork
from pipeline.prompts.packing import Packing
from pipeline.prompts.plan import Plan
from pipeline.prompts.worklist import read_shard
from pipeline.ray_runtime import Pool, check_device, ray_session, warn_without_room
from store.activations import ActivationCache
from store.errors import NotFound
from store.location import Location

log = logging.getLogger(__name__)

_THREADS: Final = 1
"""Threads of a worker on a CPU. Fixed, because the number of threads decides the last bits of a
sum; a machine with more cores runs more workers."""

_INIT_DEATHS: Final = 16
"""Workers in a row that may die as they start, as on a node that goes away."""

_MOST_AT_ONCE: Final = 32
"""Shards that a worker is given at once where layers are streamed."""

_SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a worker says of a shard that it has written.

    Attributes:
        num_rows: Rows of the shard, quarantined ones included.
        tokens: Tokens computed for it; 0 if a worker before, that died since, had written it.
        quarantined: Reasons by array row.
        seconds: By phase: parity (of the worker's first shard), compute, write.
        parity: From a worker's first shard.
        repaired: Whether it was there already, and damaged.
    """

    shard: int
    num_rows: int
    tokens: int = 0
    quarantined: Mapping[int, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    parity: Parity | None = None
    repaired: bool = False


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


class ShardWorker:
    """A Ray actor that holds a model and computes shards.

    Its first shard passes the parity gate before anything of it is written, on the very machine
    that computes it: no worker ever writes what its own device has not shown to be right.
    """

    def __init__(
        self,
        store_url: str,
        digest: str,
        model: str,
        dtype: DtypeName,
        device: str,
        engine: EngineName = "resident",
    ) -> None:
        torch.set_num_threads(_THREADS)
        self._dtype: DtypeName = dtype
        self._parity: Parity | None = None
        self._refused: BaseException | None = None
        try:
            self._cache = ActivationCache.open(Location.open(store_url), digest)
            self._layout = next(iter(self._cache.streams.values()))
            packing = Packing.read(self._cache.capture)
            self._engine = load_engine(
                engine, Path(model), dtype, self._cache.streams, packing, device
            )
        except OUR_ERRORS as error:
            # Raised here, Ray Data would take it for a crash and start another worker.
            self._refused = error

    def __call__(self, row: dict[str, Any]) -> list[dict[str, bytes]]:
        """Compute and commit the shards of a row of work; see `Receipt` for what comes back.

        An error of ours comes back as a value. If it were raised, Ray Data would put it under one
        of its own, where it loses its cause, and write its advice into the message.
        """
        try:
            if self._refused is not None:
                raise self._refused
            shards = [int(shard) for shard in row["shards"]]
            receipts = list(self._compute(shards, bool(row.get("repair"))))
            return [{"outcome": pickle.dumps(receipt)} for receipt in receipts]
        except OUR_ERRORS as error:
            return [{"outcome": pickle.dumps(error)}]

    def _compute(self, shards: Sequence[int], repair: bool) -> Iterator[Receipt]:
        work = []
        for shard in shards:
            # A worker that died between its commit and its receipt, or a receipt that died with its
            # node, brings a shard here again.
            if not repair and self._is_committed(shard):
                log.info("shard found", extra={"shard": shard})
                yield self._receipt(shard, quarantined=self._quarantined(shard))
            else:
                log.info("shard begun", extra={"shard": shard})
                prompts = read_shard(self._cache, shard)
                work.append(ShardWork(shard, self._layout.shard_rows(shard), prompts))
        if not work:
            return
        seconds = {"parity": 0.0, "compute": 0.0, "write": 0.0}
        parity = None
        start = time.perf_counter()
        if self._parity is None:
            parity = self._parity = self._check(work)
            seconds["parity"] = time.perf_counter() - start
        results = self._engine.run(work)
        while True:
            start = time.perf_counter()
            result = next(results, None)
            if result is None:
                return
            computed = time.perf_counter()
            self._write(result, computed - start, repair)
            seconds |= {"compute": computed - start, "write": time.perf_counter() - computed}
            log.info("shard written", extra={"shard": result.shard})
            yield self._receipt(
                result.shard,
                tokens=result.tokens,
                quarantined=result.quarantined,
                seconds=seconds,
                parity=parity,
                repaired=repair,
            )
            parity, seconds = None, dict.fromkeys(seconds, 0.0)

    def _check(self, work: Sequence[ShardWork]) -> Parity:
        """The parity gate, on prompts that this worker computes next."""
        prompts = [prompt for item in work for prompt in item.prompts]
        return check_parity(self._engine, prompts, self._dtype)

    def _write(self, result: ShardResult, compute_seconds: float, repair: bool) -> None:
        if repair:
            self._cache.repair_shard(result.shard, result.values, result.quarantined)
        else:
            self._cache.write_shard(
                result.shard, result.values, {"compute": compute_seconds}, result.quarantined
            )

    def _is_committed(self, shard: int) -> bool:
        try:
            for stream in self._cache.streams:
                self._cache.read_record(stream, shard)
        except NotFound:
            return False
        return True

    def _quarantined(self, shard: int) -> dict[int, str]:
        rows = self._layout.shard_rows(shard)
        return {row: why for row, why in self._cache.quarantined().items() if row in rows}

    def _receipt(self, shard: int, **values: Any) -> Receipt:
        return Receipt(shard, len(self._layout.shard_rows(shard)), **values)


class PoolWorker(ShardWorker):
    """A `ShardWorker` in a process of its own, which logs to the file that Ray keeps of it."""

    def __init__(self, *args: Any) -> None:
        # Ray's processes have no command line that would set up logging. What a worker was at when
        # it died is what one looks for here.
        handler = logging.StreamHandler()
        line = "%(asctime)s %(process)d %(message)s %(shard)s"
        handler.setFormatter(logging.Formatter(line, defaults={"shard": ""}))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        super().__init__(*args)


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

    A cache that is complete costs two listings. A worker that dies, also with its node, is replaced
    and its shard computed again; a driver that dies is run again and goes on where the commit
    records end. A worker's first shard passes the parity gate before it is written.

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
    resources = pool.resources(device)
    cache = planned.cache
    missing = set(cache.missing())
    damaged = cache.damaged() - missing
    quarantined = cache.quarantined()
    check_quarantined(planned, quarantined)
    if not missing and not damaged:
        cache.seal()
        return Extraction(quarantined=quarantined)
    dtype: DtypeName = cache.capture["model"]["dtype"]
    start = time.perf_counter()
    first_began, last_written = None, start
    seconds = dict.fromkeys(("start", "parity", "compute", "write"), 0.0)
    worst: Parity | None = None
    num_computed = num_repaired = tokens = 0
    with ray_session(address, pool.max_workers, cpus_per_worker=pool.cpus):
        warn_without_room(resources)
        choice = _engine(planned, dtype, engine, pool, device, address)
        log.info("engine", extra={"engine": choice.name, "why": choice.why})
        # Where layers are streamed, loading them is shared by all shards that a worker has at once.
        size = -(-len(missing) // (2 * pool.max_workers)) if choice.name == "streamed" else 1
        size = min(size, _MOST_AT_ONCE)
        rows = [*_rows(sorted(damaged), size, True), *_rows(sorted(missing), size, False)]
        where = (root.url, cache.digest, str(planned.model.path), dtype, device, choice.name)
        for receipt in _receipts(rows, where, pool, resources):
            last_written = time.perf_counter()
            if first_began is None:
                first_began = last_written - sum(receipt.seconds.values())
            for phase, value in receipt.seconds.items():
                seconds[phase] += value
            if receipt.parity and (worst is None or receipt.parity.worst > worst.worst):
                worst = receipt.parity
            num_computed += 1
            num_repaired += receipt.repaired
            tokens += receipt.tokens
            on_receipt(receipt)
            if receipt.quarantined:
                quarantined |= receipt.quarantined
                check_quarantined(planned, quarantined)
    began = start if first_began is None else first_began
    cache.seal()
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
    rows: Sequence[Mapping[str, Any]],
    where: tuple[str, str, str, DtypeName, str, EngineName],
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
    # Ray Data restarts a lost actor and retries its row without limit by default.
    outcomes = work.flat_map(
        PoolWorker,
        fn_constructor_args=where,
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
        **resources,
    )
    for row in outcomes.iter_rows():
        outcome = pickle.loads(row["outcome"])
        if isinstance(outcome, BaseException):
            raise outcome
        yield outcome
