"""What a device is to extraction: how tensors get there, and how much it has room for."""

from __future__ import annotations

import math
from pathlib import Path

import psutil
import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device, without waiting for what runs there.

    A copy from memory that is not pinned would wait until the device is done with all before it,
    and the next pass could not be prepared meanwhile.
    """
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(min(psutil.virtual_memory().available, _room_in_container()))


def _room_in_container(folder: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that a container's limit leaves (cgroup v2); infinite without one.

    The machine's free memory is not a pod's: past its limit the kernel ends it.
    """
    try:
        limit = (folder / "memory.max").read_text().strip()
        if limit == "max":
            return math.inf
        used = int((folder / "memory.current").read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
        # Cached files are given back when memory is wanted.
        cached = int(dict(line.split() for line in lines)["inactive_file"])
    except (OSError, KeyError, ValueError):
        return math.inf
    return max(0, int(limit) - used + cached)
