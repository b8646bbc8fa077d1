"""Preflight: what an extraction is going to cost, told from the plan before anything runs.

Sizes are counted; times are FLOPs over a stated share of a device's peak, and so are estimates.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers

from pipeline.errors import InvalidInput
from pipeline.extraction.engines import (
    EngineName,
    choose_engine,
    weight_bytes,
    worker_memory,
)
from pipeline.extraction.loading import meta_body
from pipeline.extraction.models import DTYPES, DtypeName
from pipeline.prompts.plan import MIN_SHARDS, Plan
from pipeline.prompts.trie import build_packs
from pipeline.prompts.worklist import read_shard
from steering_service.adapters.sites import ModelSites
from store.layout import StreamLayout, choose_rows_per_shard

_SAMPLED_SHARDS: Final = 64


@dataclass(frozen=True, slots=True)
class Hardware:
    """A device that a time is estimated for.

    Attributes:
        memory: Bytes.
        tflops: Dense peak by dtype, as its maker gives it (float32 without tensor cores); of this
            machine's CPU measured.
        utilization: Share of the peak that is assumed.
    """

    name: str
    memory: int
    tflops: Mapping[DtypeName, float]
    utilization: float


def _gpu(name: str, gib: int, bfloat16: float, float32: float) -> Hardware:
    return Hardware(name, gib << 30, {"bfloat16": bfloat16, "float32": float32}, 0.5)


HARDWARE: Final[Mapping[str, Hardware]] = {
    hardware.name: hardware
    for hardware in (
        _gpu("h200", 141, 989, 67),
        _gpu("h100", 80, 989, 67),
        _gpu("a100-80gb", 80, 312, 19.5),
        _gpu("a100-40gb", 40, 312, 19.5),
        _gpu("l40s", 48, 362, 91.6),
        _gpu("a10g", 24, 70, 31.2),
        _gpu("l4", 24, 121, 30.3),
        _gpu("rtx5090", 32, 210, 105),
        _gpu("rtx4090", 24, 165, 82.6),
    )
}


@dataclass(frozen=True, slots=True)
class Preflight:
    """What a run will cost.

    Attributes:
        prompts: That the figures are for: those of the plan, or as many as were asked for.
        engine: That computes, and why.
        tokens: Of all prompts.
        trie_nodes: Different ones, in the order of the plan.
        tokens_computed: With what packs and shards compute again, and padding; of a sample of
            shards if there are many.
        tflop: Of the blocks up to the highest wanted layer, attention included.
        num_bytes: Of the arrays.
        objects: That the cache will consist of.
        weight_bytes: Of the model, in the dtype of the computation.
        shard_bytes: That a worker gathers before it writes.
        pack_bytes: Working memory of one pass, roughly: what the widest layer makes of its tokens.
        shard_balance: Tokens of the largest sampled shard over their mean.
        hours: On all workers together, without loading the model; an estimate.
        hardware: What that is for.
        assumed_utilization: Share of its peak that the estimate assumes.
    """

    prompts: int
    engine: EngineName
    engine_why: str
    tokens: int
    trie_nodes: int
    tokens_computed: int
    tflop: float
    num_bytes: int
    objects: int
    weight_bytes: int
    shard_bytes: int
    pack_bytes: int
    shard_balance: float
    workers: int
    hours: float
    hardware: str
    assumed_utilization: float

    def summary(self) -> dict[str, Any]:
        """What `steerage plan --explain --json` adds."""
        return asdict(self)

    def readable(self) -> dict[str, str]:
        """The same for people, with units."""
        saved = 1 - self.tokens_computed / self.tokens
        return {
            "engine": f"{self.engine} ({self.engine_why})",
            "tokens": f"{self.tokens:,} in the prompts, {self.trie_nodes:,} different ones, "
            f"{self.tokens_computed:,} computed ({saved:.0%} saved)",
            "compute": f"{self.tflop:,.4g} TFLOP; the largest shard is {self.shard_balance:.2f} "
            "times the mean",
            "store": f"{size(self.num_bytes)} in {self.objects:,} objects",
            "memory a worker": f"weights {size(self.weight_bytes)}, shard "
            f"{size(self.shard_bytes)} twice, pack about {size(self.pack_bytes)}",
            "time": f"about {duration(self.hours)} on {self.workers} worker(s) of "
            f"{self.hardware}, at an assumed {self.assumed_utilization:.0%} of its peak, without "
            "starting and loading",
        }


def preflight(
    planned: Plan,
    *,
    workers: int,
    device: str = "cpu",
    engine: EngineName | None = None,
    hardware: str | None = None,
    gpus: float = 1,
    cpus: float = 1,
    prompts: int | None = None,
    shard_mib: float = 128,
) -> Preflight:
    """Count what a plan will cost.

    Args:
        planned: From `plan`.
        workers: Workers at a time.
        device: ``cpu`` or ``cuda``.
        engine: As asked for; None to choose.
        hardware: Name in `HARDWARE`; None for this machine.
        gpus: GPUs of a worker.
        cpus: CPUs of a worker.
        prompts: Count as if there were so many prompts, like those of the plan; None: its own.
        shard_mib: `capture.shard_mib` of the run, which then sizes the shards.

    Raises:
        InvalidInput: Unknown hardware, or an engine that it cannot run.
    """
    dtype: DtypeName = planned.cache.capture["model"]["dtype"]
    named = _hardware(hardware, device, dtype)
    on_gpu = named.name in HARDWARE or device == "cuda"
    if hardware is None and device == "cpu":
        memory = worker_memory("cpu", workers, cpus, 0)
    else:
        memory = int(named.memory * min(gpus, 1))
    weights = _weights(planned, dtype)
    choice = choose_engine(engine, weights, memory, "cuda" if on_gpu else "cpu", gpus)
    active, widest, attention = _block_sizes(planned, dtype)
    factor = 1.0 if prompts is None else prompts / planned.num_prompts
    tokens, contexts, balance = _tokens(planned)
    tokens, contexts = round(factor * tokens), factor * contexts
    flop = 2.0 * active * tokens + attention * contexts
    # Workers that share a GPU have no more of it together.
    devices = workers * (gpus if on_gpu else 1)
    layouts = layouts_of(planned, prompts, shard_mib).values()
    layout = next(iter(layouts))
    itemsize = DTYPES[dtype].itemsize
    return Preflight(
        prompts=planned.num_prompts if prompts is None else prompts,
        engine=choice.name,
        engine_why=choice.why,
        tokens=round(factor * planned.num_tokens),
        trie_nodes=round(factor * planned.num_nodes),
        tokens_computed=tokens,
        tflop=flop / 1e12,
        num_bytes=sum(int(np.prod(one.shape)) * one.itemsize for one in layouts),
        # Of each stream its shards and their records; the metadata, the plan, the marker.
        objects=len(layouts) * (2 * layout.num_shards + 1) + 6,
        weight_bytes=weights,
        shard_bytes=sum(one.shard_nbytes(0) for one in layouts),
        pack_bytes=planned.packing.tokens * widest * itemsize,
        shard_balance=balance,
        workers=workers,
        hours=flop / (named.tflops[dtype] * 1e12 * named.utilization * devices) / 3600,
        hardware=named.name,
        assumed_utilization=named.utilization,
    )


def layouts_of(
    planned: Plan, prompts: int | None = None, shard_mib: float = 128
) -> dict[str, StreamLayout]:
    """Layouts of a plan's arrays, or of those of a corpus of so many prompts like its own.

    Args:
        prompts: See `preflight`.
        shard_mib: See `preflight`.
    """
    streams = planned.cache.streams
    if prompts is None:
        return streams
    num_rows = max(round(planned.num_rows * prompts / planned.num_prompts), 1)
    first = next(iter(streams.values()))
    by_size = choose_rows_per_shard(
        len(first.layers),
        [layout.width for layout in streams.values()],
        first.itemsize,
        target_bytes=int(shard_mib * 2**20),
    )
    # A small corpus is split all the same; see `plan`.
    chunks = -(-num_rows // (MIN_SHARDS * first.rows_per_chunk))
    rows_per_shard = min(by_size, chunks * first.rows_per_chunk)
    return {
        stream: replace(layout, num_rows=num_rows, rows_per_shard=rows_per_shard)
        for stream, layout in streams.items()
    }


def _weights(planned: Plan, dtype: DtypeName) -> int:
    """As `weight_bytes`; by its index if a model has one, so that its files need not be there."""
    index = Path(planned.model.path) / "model.safetensors.index.json"
    if not index.is_file():
        return weight_bytes(planned.model, dtype)
    try:
        total = int(json.loads(index.read_text())["metadata"]["total_size"])
    except (ValueError, KeyError, TypeError):
        # Older tools write none.
        return weight_bytes(planned.model, dtype)
    return total * DTYPES[dtype].itemsize // (2 if planned.model.stored_half else 4)


def _hardware(name: str | None, device: str, dtype: DtypeName) -> Hardware:
    if name is not None:
        if name not in HARDWARE:
            raise InvalidInput(
                f"--hardware {name!r} is not known; expected one of {', '.join(sorted(HARDWARE))}, "
                "or leave it out for this machine",
                kind="hardware",
            )
        return HARDWARE[name]
    if device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        wanted = properties.name.lower().replace(" ", "").replace("-", "")
        for known in HARDWARE.values():
            if known.name.split("-")[0] in wanted:
                return Hardware(
                    properties.name, properties.total_memory, known.tflops, known.utilization
                )
        measured = {dtype: _measured_tflops("cuda", dtype)}
        return Hardware(properties.name, properties.total_memory, measured, 0.6)
    if device == "cuda":
        raise InvalidInput(
            "--device cuda: PyTorch sees no GPU here to tell the time for; name one with "
            f"--hardware, of {', '.join(sorted(HARDWARE))}",
            kind="hardware",
        )
    measured = {dtype: _measured_tflops("cpu", dtype)}
    return Hardware("this machine, one thread a worker", 0, measured, 0.6)


def _measured_tflops(device: str, dtype: DtypeName) -> float:
    """Of a large product, the best of some: on a CPU of one thread, as a worker has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    size = 1024 if device == "cpu" else 8192
    try:
        a = torch.ones(size, size, dtype=DTYPES[dtype], device=device)
        best = float("inf")
        for _ in range(4):
            start = time.perf_counter()
            float((a @ a)[0, 0])
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return 2 * size**3 / best / 1e12


def _block_sizes(planned: Plan, dtype: DtypeName) -> tuple[float, int, float]:
    """Weights that a token meets, the widest output of a layer, and attention's FLOPs per token and
    key, over the blocks up to the highest wanted layer."""
    body = meta_body(planned.model.path, DTYPES[dtype], None)
    sites = ModelSites.of(body)
    config: Any = body.config
    text = config.get_text_config()
    last = max(layout.layers[-1] for layout in planned.cache.streams.values())
    blocks = sites.blocks[: last + 1]
    active, widest = 0.0, sites.d_model
    for block in blocks:
        for name, parameter in block.named_parameters():
            share = _expert_share(text) if ".experts." in f".{name}" else 1.0
            active += share * parameter.numel()
            if parameter.ndim == 2:
                widest = max(widest, *parameter.shape)
    # Scores and their sum over values: two products of a multiply and an addition each.
    attention = 4.0 * sites.num_heads * sites.head_dim * len(blocks)
    return active, widest, attention


def _expert_share(text: transformers.PretrainedConfig) -> float:
    """Share of the experts that a token goes to."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    total = next((getattr(text, name) for name in names if getattr(text, name, None)), 1)
    return float(getattr(text, "num_experts_per_tok", None) or 1) / float(total)


def _tokens(planned: Plan) -> tuple[int, float, float]:
    """Tokens computed, their keys, and the largest shard over the mean."""
    cache, packing = planned.cache, planned.packing
    layout = next(iter(cache.streams.values()))
    step = max(1, layout.num_shards // _SAMPLED_SHARDS)
    shards = range(0, layout.num_shards, step)
    counts, keys = [], []
    for shard in shards:
        prompts, rows = read_shard(cache, shard), layout.shard_rows(shard)
        if packing.layout == "batches":
            # Padding is computed as well.
            padded = [
                (len(batch), max(len(prompt.token_ids) for prompt in batch))
                for batch in packing.batches(prompts, rows)
            ]
            counts.append(sum(size * longest for size, longest in padded))
            keys.append(sum(size * longest * (longest + 1) / 2 for size, longest in padded))
            continue
        packs = list(build_packs(prompts, rows, packing.tokens, packing.prefix, packing.carries))
        counts.append(sum(pack.num_tokens for pack in packs))
        keys.append(float(sum(np.sum(pack.positions[pack.carried :] + 1) for pack in packs)))
    share = layout.num_shards / len(shards)
    balance = max(counts) / (sum(counts) / len(counts))
    return round(share * sum(counts)) + packing.prefix, share * sum(keys), balance


def size(num_bytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB"


def duration(hours: float) -> str:
    """Hours for people."""
    if hours < 1 / 60:
        return f"{hours * 3600:.2g} s"
    return f"{hours * 60:.3g} min" if hours < 1 else f"{hours:.3g} h"
