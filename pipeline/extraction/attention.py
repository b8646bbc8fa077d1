"""Attention along a token trie, registered with transformers' attention interface.

Models keep their own projections, rotations and norms; only how queries meet keys is ours. What a
pack's nodes may attend to is not passed through the model, whose mask code knows no tries, but
held here while the pack runs.

Shapes: H query heads, G key heads, N own nodes of a pack, C carried ones, K = C + N keys,
D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from pipeline.errors import InvalidInput
from pipeline.extraction.devices import moved
from pipeline.prompts.trie import Pack

NAME: Final = "steerage_trie"

_BLOCK_NODES: Final = {"cpu": 64, "cuda": 2048}
"""Up to how many nodes of neighbouring subtrees attend as one block with a dense mask. A block
costs a call, a dense mask the products that it throws away. On a CPU calls are cheap."""

Carried = tuple[Tensor, Tensor]
"""Keys and values [1, G, C, D] of one attention layer, rotated as that layer uses them."""


@dataclass(frozen=True, slots=True)
class _Block:
    """Queries that attend together: own nodes [start, stop).

    Attributes:
        keys: Ranges of the keys that any of them attends to: those above the block, then its own.
        chain: Whether nothing is above it and each node is the only child of the one before.
    """

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]
    chain: bool


@dataclass(slots=True)
class PackAttention:
    """How one pack attends; used for every layer of its forward pass.

    Args:
        pack: The pack.
        device: Where it runs.
        dtype: Of the queries; masks are added in it.
        carried: By attention layer, in the order in which layers attend, what the pack before kept.

    Attributes:
        kept: By attention layer, what the next pack carries; filled as layers run.
    """

    pack: Pack
    device: torch.device
    dtype: torch.dtype
    carried: list[Carried] = field(default_factory=list)
    kept: list[Carried] = field(default_factory=list)
    _blocks: tuple[_Block, ...] = ()
    _masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)
    _ends: Tensor = field(init=False)
    _positions: Tensor = field(init=False)
    _keep: Tensor | None = None
    _calls: int = 0

    def __post_init__(self) -> None:
        self._blocks = tuple(_blocks(self.pack, _BLOCK_NODES[self.device.type]))
        self._ends = moved(torch.from_numpy(self.pack.ends), self.device)
        self._positions = moved(torch.from_numpy(self.pack.positions), self.device)
        if len(self.pack.keep):
            self._keep = moved(torch.from_numpy(self.pack.keep), self.device)

    def begin(self, carried: list[Carried]) -> None:
        """Begin the pass anew, or, where layers are run one by one, the next of them.

        Args:
            carried: As given at the start, for the layers that run until this is called again.
        """
        self.carried, self.kept, self._calls = carried, [], 0

    def keys(self, key_1GND: Tensor, value_1GND: Tensor) -> Carried:
        """The own keys and values with the carried ones before them; keeps what is to be kept."""
        call, self._calls = self._calls, self._calls + 1
        if self.pack.carried:
            key, value = self.carried[call]
            # A model on several devices attends on each.
            key_1GND = torch.cat([key.to(key_1GND.device), key_1GND], dim=2)
            value_1GND = torch.cat([value.to(value_1GND.device), value_1GND], dim=2)
        if self._keep is not None:
            keep = self._keep.to(key_1GND.device)
            self.kept.append((key_1GND.index_select(2, keep), value_1GND.index_select(2, keep)))
        return key_1GND, value_1GND

    def blocks(self, window: int | None) -> Iterator[tuple[_Block, Tensor | None]]:
        """The blocks, each with the [n, keys] mask that is added to its scores, or None if it is
        causal within itself and nothing else is needed."""
        for number, block in enumerate(self._blocks):
            cached = (number, window)
            if cached not in self._masks:
                self._masks[cached] = self._mask(block, window)
            yield block, self._masks[cached]

    def _mask(self, block: _Block, window: int | None) -> Tensor | None:
        # Made on the device: on a GPU it would cost the host more than the attention costs there.
        num = block.stop - block.start
        if block.chain:
            if window is None or num <= window:
                return None
            # Nothing of its size is made but what is needed: a long prompt is one such block.
            allowed = torch.ones(num, num, dtype=torch.bool, device=self.device)
            return self._added(allowed.tril_().triu_(1 - window))
        carried = self.pack.carried
        own = torch.arange(carried + block.start, carried + block.stop, device=self.device)
        keys = torch.cat([torch.arange(a, b, device=self.device) for a, b in block.keys])
        allowed = (keys[None] <= own[:, None]) & (own[:, None] < self._ends[keys][None])
        if window is not None:
            allowed &= self._positions[own][:, None] - self._positions[keys][None] < window
        return self._added(allowed)

    def _added(self, allowed: Tensor) -> Tensor:
        mask = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(~allowed, -torch.inf)


_CURRENT: ContextVar[PackAttention] = ContextVar("pack attention")


@contextmanager
def attending(attention: PackAttention) -> Iterator[None]:
    """Have every model that is loaded with `NAME` attend along a pack inside the block."""
    token = _CURRENT.set(attention)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def trie_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in place of its own.

    Args:
        query: [1, H, N, D].
        key: [1, G, N, D]; value likewise.
        sliding_window: A query sees keys at less than this distance, counted in positions.
        softcap: Scores are squashed to ± this (Gemma 2).
        s_aux: [H], a score of each head that takes weight and gives no value (GPT-OSS).

    Returns:
        [1, N, H, D], and None for the weights.

    Raises:
        InvalidInput: The model adds a bias by position, which a trie does not know.
    """
    if position_bias is not None:
        raise InvalidInput(
            f"{type(module).__name__} adds a bias to its attention scores by position, which packs "
            'of a token trie do not carry; set packing = "batches" under [capture]',
            kind="attention_bias",
        )
    attention = _CURRENT.get()
    key, value = attention.keys(key, value)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    out_1HND = query.new_empty((*query.shape[:3], value.shape[-1]))
    for block, mask in attention.blocks(sliding_window):
        k, v = _ranges(key, block.keys), _ranges(value, block.keys)
        q = query[:, :, block.start : block.stop]
        mask = mask if mask is None else mask.to(q.device)
        if softcap is None and s_aux is None:
            out = scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling
            )
        else:
            out = _explicit(q, k, v, mask, scaling, softcap, s_aux)
        out_1HND[:, :, block.start : block.stop] = out
    return out_1HND.transpose(1, 2).contiguous(), None


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention with what no fused kernel on a CPU has, as transformers' eager path computes it."""
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.full(scores.shape[-2:], -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    scores = scores + mask
    if s_aux is not None:
        sink = s_aux.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return weights[..., : k.shape[2]] @ v


def _ranges(keys_1HKD: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    parts = [keys_1HKD[:, :, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _blocks(pack: Pack, block_nodes: int) -> Iterator[_Block]:
    """Cut a pack's own nodes into blocks.

    A run of only children is always within one block, as it needs no more than a causal mask.
    Subtrees next to one another are taken together up to a size, larger under a long path, whose
    keys each block copies.
    """
    carried, ends, positions = pack.carried, pack.ends, pack.positions
    key, num_keys = carried, len(ends)
    while key < num_keys:
        position = int(positions[key])
        size = max(block_nodes, position // 4)
        stop = int(ends[key])
        if stop - key > size:
            # Up to where the run of only children branches: there the ends begin to differ.
            different = np.flatnonzero(ends[key:stop] != ends[key])
            stop = key + int(different[0]) if len(different) else stop
        else:
            while stop < num_keys and positions[stop] == position and ends[stop] - key <= size:
                stop = int(ends[stop])
        above = np.flatnonzero(ends[:key] > key)
        keys = np.concatenate([above, np.arange(key, stop)])
        chain = not len(above) and bool((np.diff(positions[key:stop]) == 1).all())
        yield _Block(key - carried, stop - carried, _as_ranges(keys), chain)
        key = stop


def _as_ranges(keys: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """Ascending keys as [start, stop) ranges."""
    cuts = np.flatnonzero(np.diff(keys) > 1)
    starts = [int(keys[0]), *(int(keys[i + 1]) for i in cuts)]
    stops = [*(int(keys[i]) + 1 for i in cuts), int(keys[-1]) + 1]
    return tuple(zip(starts, stops, strict=True))


AttentionInterface.register(NAME, trie_attention)
