"""What a device is to extraction: how tensors get there, and how much it has room for."""

from __future__ import annotations

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
    return int(psutil.virtual_memory().available)
