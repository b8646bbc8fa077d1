"""Arithmetic of a GPU: what it can do, and what a model asks of it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Final

import torch

_SIZE: Final = 8192
_REPEATS: Final = 50


def peak_flops(dtype: str) -> float:
    """FLOP/s of a large matrix product, measured: the best of three tries."""
    a, b = (torch.randn(_SIZE, _SIZE, device="cuda", dtype=getattr(torch, dtype)) for _ in range(2))
    best = 0.0
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(_REPEATS):
            a @ b
        torch.cuda.synchronize()
        # The first try, in which the library chooses its kernel, is never the best.
        best = max(best, 2 * _SIZE**3 * _REPEATS / (time.perf_counter() - start))
    del a, b
    torch.cuda.empty_cache()
    return best


def flops(model: Path, tokens: int, attended: int) -> float:
    """FLOPs of a Llama's blocks, without embedding and head.

    Args:
        model: Its folder.
        tokens: Tokens that are computed.
        attended: Sum over them of how many tokens each attends to.
    """
    config = json.loads((model / "config.json").read_text())
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or width // heads
    weights = width * head_dim * (2 * heads + 2 * kv_heads) + 3 * width * inner
    # Scores and their product with the values.
    attention = 4 * heads * head_dim
    return float(config["num_hidden_layers"] * (2 * weights * tokens + attention * attended))
