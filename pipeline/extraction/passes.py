"""Forward passes: what a shard's packs or batches are to a model, and where their rows go.

Both engines compute the same passes in the same order; they differ in which weights they hold.

Shapes: B prompts of a batch, T positions (padded on the right), N nodes of a pack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.extraction.attention import PackAttention
from pipeline.extraction.gather import Buffers, Gather
from pipeline.prompts.packing import Packing
from pipeline.prompts.trie import Ids, Pack, PlannedPrompt, build_packs, prefix_pack


@dataclass(frozen=True, slots=True)
class ShardWork:
    """What an engine is asked for.

    Attributes:
        shard: Its number.
        rows: Its rows.
        prompts: Those with rows in it, in row order.
    """

    shard: int
    rows: range
    prompts: Sequence[PlannedPrompt]


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass.

    Attributes:
        inputs: The body's arguments, on the CPU.
        gather: Its rows; None if it has none.
        attention: How it attends along the trie; None for a batch, which attends as usual.
        carries: Whether it takes over keys and values: the first pass of a shard those of the
            prefix, another those of the pass before.
        num_tokens: Tokens computed, padding not counted.
    """

    inputs: dict[str, Tensor]
    gather: Gather | None
    attention: PackAttention | None
    carries: bool
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Passes:
    """Makes the passes of shards.

    Args:
        packing: How prompts become passes.
        device: Where they run, or begin.
        dtype: That the model computes in.
    """

    packing: Packing
    device: torch.device
    dtype: torch.dtype

    def of_shard(self, work: ShardWork) -> Iterator[Pass]:
        """The passes of a shard, in the order in which they carry."""
        packing = self.packing
        if packing.layout == "batches":
            for batch in packing.batches(work.prompts, work.rows):
                yield self._batch(batch, work.rows)
            return
        for pack in build_packs(
            work.prompts, work.rows, packing.tokens, packing.prefix, packing.carries
        ):
            yield self._pack(pack)

    def of_prefix(self, prompt_ids: Ids) -> Pass:
        """The pass that computes what all prompts begin with."""
        return self._pack(prefix_pack(prompt_ids[: self.packing.prefix]))

    def of_poisoned(self, work: ShardWork, buffers: Buffers) -> Iterator[Pass]:
        """A pass for each prompt of which a row is not finite, alone.

        One poisoned prompt makes others of its pack NaN, since zero weight times NaN is NaN. Alone,
        only the poisoned ones stay so.
        """
        poisoned = buffers.not_finite()
        for prompt in work.prompts if poisoned else ():
            rows = range(prompt.first_row, prompt.first_row + len(prompt.spans))
            if any(row in poisoned for row in rows):
                if self.packing.layout == "batches":
                    yield self._batch([prompt], work.rows)
                else:
                    tokens = len(prompt.token_ids)
                    yield from map(self._pack, build_packs([prompt], work.rows, tokens, 0, False))

    def _pack(self, pack: Pack) -> Pass:
        inputs = {
            "input_ids": torch.from_numpy(pack.token_ids)[None],
            "position_ids": torch.from_numpy(pack.positions[pack.carried :])[None],
        }
        if self.packing.layout == "masks":
            inputs["attention_mask"] = _dense_mask(pack)
        return Pass(
            inputs,
            Gather.of_pack(pack) if pack.rows else None,
            PackAttention(pack, self.device, self.dtype),
            pack.carried > 0,
            pack.num_tokens,
        )

    def _batch(self, batch: Sequence[PlannedPrompt], rows: range) -> Pass:
        # Padding is on the right: a causal mask alone keeps it from every real token, so no
        # attention mask is needed and attention takes its fastest path.
        longest = max(len(prompt.token_ids) for prompt in batch)
        ids_BT = torch.zeros((len(batch), longest), dtype=torch.int64)
        for i, prompt in enumerate(batch):
            ids_BT[i, : len(prompt.token_ids)] = torch.from_numpy(prompt.token_ids)
        num_tokens = sum(len(prompt.token_ids) for prompt in batch)
        gather = Gather.of_batch(batch, rows, longest)
        return Pass({"input_ids": ids_BT}, gather, None, False, num_tokens)


def _dense_mask(pack: Pack) -> Tensor:
    """Bool [1, 1, N, N], for models that only take a mask; such packs carry nothing."""
    node = np.arange(pack.num_tokens)
    allowed: np.ndarray[Any, Any] = (node[None] <= node[:, None]) & (node[:, None] < pack.ends)
    return torch.from_numpy(allowed)[None, None]
