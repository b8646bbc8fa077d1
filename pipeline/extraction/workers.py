"""Extraction on Ray Data: one row of work is one shard, computed and written by one worker.

Activations never pass through Ray's object store or the driver: a worker writes its shard to the
store itself and returns only a receipt.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from pipeline.errors import OUR_ERRORS
from pipeline.extraction.engine import ResidentEngine
from pipeline.extraction.models import DtypeName
from pipeline.extraction.parity import Parity, check_parity
from pipeline.extraction.passes import ShardWork
from pipeline.prompts.packing import Packing
from pipeline.prompts.plan import Plan
from pipeline.prompts.worklist import read_prompts, read_shard
from pipeline.ray_runtime import check_device, ray_session
from store.activations import ActivationCache
from store.location import Location

_THREADS: Final = 1
"""Threads of a worker on a CPU. Fixed, because the number of threads decides the last bits of a
sum; a machine with more cores runs more workers."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a worker says of a shard that it has written.

    Attributes:
        tokens: Tokens computed for it, padding not counted.
        seconds: From the first forward pass to the commit record.
    """

    shard: int
    num_rows: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Extraction:
    """What a run did.

    Attributes:
        parity: None if nothing was left to compute.
        shards_computed: Shards of this run; the rest was there already.
    """

    parity: Parity | None
    shards_computed: int
    tokens: int
    seconds: float


class ShardWorker:
    """A Ray actor that holds a model and computes shards."""

    def __init__(
        self, store_url: str, digest: str, model: str, dtype: DtypeName, device: str
    ) -> None:
        torch.set_num_threads(_THREADS)
        self._cache = ActivationCache.open(Location.open(store_url), digest)
        packing = Packing.read(self._cache.capture)
        self._engine = ResidentEngine.load(Path(model), dtype, self._cache.streams, packing, device)
        self._layout = next(iter(self._cache.streams.values()))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Compute and commit one shard; see `Receipt` for what comes back.

        An error of ours comes back as a value. If it were raised, Ray Data would put it under one
        of its own, where it loses its cause, and write its advice into the message.
        """
        shard = int(row["shard"])
        try:
            return asdict(self._compute(shard)) | {"error": b""}
        except OUR_ERRORS as error:
            return asdict(Receipt(shard, 0, 0, 0.0)) | {"error": pickle.dumps(error)}

    def _compute(self, shard: int) -> Receipt:
        rows = self._layout.shard_rows(shard)
        start = time.perf_counter()
        work = ShardWork(shard, rows, read_shard(self._cache, shard))
        (result,) = self._engine.run([work])
        computed = time.perf_counter()
        self._cache.write_shard(shard, result.values, {"compute": computed - start})
        tokens = result.tokens
        return Receipt(shard, len(rows), tokens, time.perf_counter() - start)


def extract(
    planned: Plan,
    root: Location,
    *,
    num_workers: int,
    device: str = "cpu",
    address: str | None = None,
    on_receipt: Callable[[Receipt], None] = lambda receipt: None,
) -> Extraction:
    """Compute every shard that is missing, and close the cache.

    A cache that is complete costs one listing. A worker that dies is replaced and its shard
    computed again; a driver that dies is run again and goes on where the commit records end.

    Args:
        planned: From `plan`.
        root: The store that the plan was made in.
        num_workers: Most workers at a time.
        device: ``cpu`` or ``cuda``; a worker on a GPU takes a whole one.
        address: A Ray cluster, or None for a local Ray.
        on_receipt: Called for every shard that was written.

    Raises:
        GateRefused: The parity gate failed, or activations are not finite.
        InvalidInput: A local run on ``cuda``, and PyTorch sees no GPU here.
    """
    check_device(device, address)
    cache = planned.cache
    start = time.perf_counter()
    if cache.is_complete:
        return Extraction(None, 0, 0, 0.0)
    missing = cache.missing()
    parity = None
    tokens = 0
    if missing:
        dtype: DtypeName = cache.capture["model"]["dtype"]
        where = (root.url, cache.digest, str(planned.model.path), dtype, device)
        # Ray Data restarts a lost actor and retries its row without limit by default.
        resources: dict[str, float] = {"num_cpus": 1, "num_gpus": int(device == "cuda")}
        with ray_session(address, num_workers):
            import ray

            # On a worker: the driver may sit on a machine without the GPU, or the memory.
            parity = ray.get(ray.remote(**resources)(_parity).remote(*where))
            work = ray.data.from_items(
                [{"shard": shard} for shard in missing], override_num_blocks=len(missing)
            )
            receipts = work.map(
                ShardWorker,
                fn_constructor_args=where,
                compute=ray.data.ActorPoolStrategy(
                    min_size=1, max_size=min(num_workers, len(missing))
                ),
                **resources,
            )
            for row in receipts.iter_rows():
                if error := row.pop("error"):
                    raise pickle.loads(error)
                receipt = Receipt(**row)
                tokens += receipt.tokens
                on_receipt(receipt)
    cache.seal()
    return Extraction(parity, len(missing), tokens, time.perf_counter() - start)


def _parity(store_url: str, digest: str, model: str, dtype: DtypeName, device: str) -> Parity:
    torch.set_num_threads(_THREADS)
    cache = ActivationCache.open(Location.open(store_url), digest)
    packing = Packing.read(cache.capture)
    engine = ResidentEngine.load(Path(model), dtype, cache.streams, packing, device)
    return check_parity(engine, read_prompts(cache), dtype)
