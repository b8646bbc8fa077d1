"""One worker: it holds a model, computes shards, and writes them to the store itself.

A shard is written before the next one is begun, so a worker that dies takes at most the shard with
it that it was at (a wave of them where layers are streamed), and holds no other in memory: a slow
store slows the computing down, and nothing piles up.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

from pipeline.errors import OUR_ERRORS
from pipeline.extraction.engines import EngineName, load_engine
from pipeline.extraction.gather import ShardResult
from pipeline.extraction.models import DtypeName
from pipeline.extraction.parity import Parity, check_parity
from pipeline.extraction.passes import ShardWork
from pipeline.prompts.packing import Packing
from pipeline.prompts.worklist import read_shard
from store.activations import ActivationCache
from store.errors import NotFound
from store.location import Location

log = logging.getLogger(__name__)

_THREADS: Final = 1
"""Threads of a worker on a CPU. Fixed, because the number of threads decides the last bits of a
sum; a machine with more cores runs more workers."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a worker says of a shard that it has written.

    Attributes:
        num_rows: Rows of the shard, quarantined ones included.
        tokens: Tokens computed for it; 0 if a worker before, that died since, had written it.
        quarantined: Reasons by array row.
        seconds: By phase: parity (of the worker's first shard), compute, write; count, of Moments.
        parity: From a worker's first shard.
        repaired: Whether it was there already, and damaged.
        age: Seconds since its row of work was begun, when it was handed back.
    """

    shard: int
    num_rows: int
    tokens: int = 0
    quarantined: Mapping[int, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    parity: Parity | None = None
    repaired: bool = False
    age: float = field(default=0.0, compare=False)


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
        memory_share: float = 1.0,
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
                engine, Path(model), dtype, self._cache.streams, packing, device, memory_share
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
            began = time.perf_counter()
            receipts = list(self._receipts(row))
            age = time.perf_counter() - began
            return [{"outcome": pickle.dumps(replace(one, age=age))} for one in receipts]
        except OUR_ERRORS as error:
            return [{"outcome": pickle.dumps(error)}]

    def _receipts(self, row: Mapping[str, Any]) -> Iterator[Receipt]:
        """Compute and commit the shards of a row of work."""
        repair = bool(row.get("repair"))
        work = []
        for shard in map(int, row["shards"]):
            # A worker that died between its commit and its receipt, or a receipt that died with its
            # node, brings a shard here again.
            if not repair and self._is_committed(shard):
                log.info("shard found", extra={"shard": shard})
                yield self._receipt(shard, quarantined=self._quarantined(shard))
            else:
                work.append(self._begin(shard))
        for result, receipt in self._computed(work):
            start = time.perf_counter()
            self._write(result, receipt.seconds["compute"], repair)
            seconds = {**receipt.seconds, "write": time.perf_counter() - start}
            log.info("shard written", extra={"shard": result.shard})
            yield replace(receipt, seconds=seconds, repaired=repair)

    def _begin(self, shard: int) -> ShardWork:
        log.info("shard begun", extra={"shard": shard})
        prompts = read_shard(self._cache, shard)
        return ShardWork(shard, self._layout.shard_rows(shard), prompts)

    def _computed(self, work: Sequence[ShardWork]) -> Iterator[tuple[ShardResult, Receipt]]:
        """Compute shards, this worker's first ones once they have passed the gate; each with its
        receipt, which lacks what comes after computing."""
        if not work:
            return
        seconds, parity = {"parity": 0.0}, None
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
            seconds["compute"] = time.perf_counter() - start
            yield (
                result,
                self._receipt(
                    result.shard,
                    tokens=result.tokens,
                    quarantined=result.quarantined,
                    seconds=seconds,
                    parity=parity,
                ),
            )
            parity, seconds = None, {"parity": 0.0}

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
        log_to_stderr()
        super().__init__(*args)


def log_to_stderr() -> None:
    """Have a worker say on its stderr what it is at.

    Ray's processes have no command line that would set up logging. What a worker was at when it
    died is what one looks for there.
    """
    handler = logging.StreamHandler()
    line = "%(asctime)s %(process)d %(message)s %(shard)s"
    handler.setFormatter(logging.Formatter(line, defaults={"shard": ""}))
    package = logging.getLogger("pipeline.extraction")
    package.addHandler(handler)
    package.setLevel(logging.INFO)
