"""Which engine runs a model: whole on a device, spread over several, or a block at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch

from pipeline.errors import InvalidInput
from pipeline.extraction.checkpoint import weight_files
from pipeline.extraction.devices import free_memory
from pipeline.extraction.engine import Engine, ResidentEngine
from pipeline.extraction.models import DTYPES, DtypeName, ModelInfo
from pipeline.extraction.streaming import StreamedEngine
from pipeline.prompts.packing import Packing
from store.layout import StreamLayout

EngineName = Literal["resident", "streamed", "sharded"]
ENGINES: Final[tuple[EngineName, ...]] = ("resident", "streamed", "sharded")

_FILL: Final = 0.8
"""Share of a device's free memory that weights may take; packs and shards need room too."""


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """An engine, and why it is this one.

    Attributes:
        why: For people.
    """

    name: EngineName
    why: str


def weight_bytes(model: ModelInfo, dtype: DtypeName) -> int:
    """Bytes of a model's weights in the dtype of the computation, its head included."""
    on_disk = sum(os.path.getsize(file) for file in weight_files(Path(model.path)))
    # float16 and bfloat16 checkpoints take two bytes a weight, float32 ones four.
    stored = 2 if model.stored_half else 4
    return on_disk * DTYPES[dtype].itemsize // stored


def memory_share(device: str, max_workers: int, cpus: float, gpus: float) -> float:
    """Share of a device's free memory that each worker may take, as on the machine this runs on.

    Args:
        max_workers: Most workers at a time, here or anywhere.
        cpus: CPUs that a worker reserves.
        gpus: GPUs that it reserves; part of one if less than 1.
    """
    if device == "cuda":
        return min(gpus, 1.0)
    here = max(1, int(len(os.sched_getaffinity(0)) // cpus))
    return 1 / min(max_workers, here)


def worker_memory(device: str, max_workers: int, cpus: float, gpus: float) -> int:
    """Bytes that each worker may take on its device, on the machine that this runs on; arguments as
    for `memory_share`."""
    share = memory_share(device, max_workers, cpus, gpus)
    return int(share * free_memory(torch.device(device)))


def choose_engine(
    asked: EngineName | None, weights: int, memory: int, device: str, gpus: float
) -> EngineChoice:
    """Choose an engine.

    Args:
        asked: By the user; None to choose.
        weights: Bytes of the weights in the dtype of the computation.
        memory: Bytes that a worker may take on its device.
        device: ``cpu`` or ``cuda``.
        gpus: GPUs of a worker.

    Raises:
        InvalidInput: ``sharded`` without several GPUs a worker.
    """
    if asked == "sharded" and (device != "cuda" or gpus < 2):
        raise InvalidInput(
            f"--engine sharded spreads a model over the GPUs of a worker, which has {gpus:g} on "
            f"--device {device}; name --device cuda --gpus-per-worker 2 or more, or take "
            "--engine streamed",
            kind="engine",
        )
    if asked is not None:
        return EngineChoice(asked, "asked for")
    sizes = f"weights of {_gib(weights)} and {_gib(memory)} of memory a worker"
    if weights <= _FILL * memory:
        return EngineChoice("resident", f"{sizes}: they fit")
    if device == "cuda" and gpus >= 2 and weights <= _FILL * memory * gpus:
        return EngineChoice("sharded", f"{sizes} and GPU, {gpus:g} GPUs: they fit on all together")
    return EngineChoice("streamed", f"{sizes}: they do not fit, so blocks are loaded one by one")


def load_engine(
    name: EngineName,
    path: Path,
    dtype: DtypeName,
    layouts: Mapping[str, StreamLayout],
    packing: Packing,
    device: str,
    memory_share: float = 1.0,
) -> Engine:
    """Load a model into an engine.

    Args:
        memory_share: Of what is free on the device; other workers have the rest.

    Raises:
        NotFound, InvalidInput: The model cannot be loaded, or not by this engine.
    """
    if name == "streamed":
        return StreamedEngine.load(path, dtype, layouts, packing, device, memory_share=memory_share)
    return ResidentEngine.load(path, dtype, layouts, packing, device, sharded=name == "sharded")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
