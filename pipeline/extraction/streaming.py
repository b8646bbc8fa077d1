"""The streamed engine: one block of weights at a time, for models larger than the memory.

For prompts, the order of layers is free: every pack of a wave of shards goes through block L, while
the weights of block L + 1 are loaded, before any goes through L + 1. Of the model no more than two
blocks are held. What is computed is what the resident engine computes, pack by pack, bit for bit.

Shapes: N nodes of a pack, d width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from pipeline.extraction.attention import NAME, Carried
from pipeline.extraction.devices import free_memory, moved
from pipeline.extraction.engine import Engine, ResidentEngine, drop_blocks, tapped
from pipeline.extraction.gather import Buffers, ShardResult
from pipeline.extraction.models import DtypeName
from pipeline.extraction.passes import Pass, Passes, ShardWork
from pipeline.extraction.recording import Recording, record_calls
from pipeline.extraction.weights import StreamedBody
from pipeline.prompts.packing import Packing
from steering_service.adapters.sites import ModelSites
from store.layout import StreamLayout

_WAVE_SHARE: Final = 0.25
"""Share of the free memory that the hidden states and rows of a wave may take: blocks, their
working memory and masks need room too."""

_PARITY_BLOCKS: Final = 2


@dataclass(slots=True)
class _Running:
    """A pass between two blocks.

    Attributes:
        before: The pass whose keys and values it carries; None if it carries none.
        hidden: [1, N, d] or [B, T, d].
    """

    one: Pass
    buffers: Buffers | None
    before: _Running | None
    recording: Recording
    hidden: Tensor


class StreamedEngine:
    """Computes waves of shards with a body whose blocks are loaded one by one.

    Args:
        body: Of the model.
        layouts: The arrays that are written, by stream.
        packing: How prompts become forward passes.
        reference: Opens the model again, to attend as transformers would have it.
        wave_bytes: Most memory that the hidden states and rows of a wave take; by default a share
            of what is free when the wave begins.
        memory_share: Of what is free; other workers have the rest.
    """

    def __init__(
        self,
        body: StreamedBody,
        layouts: Mapping[str, StreamLayout],
        packing: Packing,
        reference: Callable[[], StreamedBody],
        wave_bytes: int | None = None,
        memory_share: float = 1.0,
    ) -> None:
        self.layouts, self.packing = layouts, packing
        self._body, self._reference = body, reference
        parameter = next(p for p in body.body.parameters() if not p.is_meta)
        self._device, self._dtype = parameter.device, parameter.dtype
        self._sites = ModelSites.of(body.body)
        self._passes = Passes(packing, self._device, self._dtype)
        self._num_layers = max(layout.layers[-1] for layout in layouts.values()) + 1
        self._wave_bytes, self._memory_share = wave_bytes, memory_share
        for site in Buffers.sites(layouts):
            self._sites.check(site)

    @classmethod
    def load(
        cls,
        path: Path,
        dtype: DtypeName,
        layouts: Mapping[str, StreamLayout],
        packing: Packing,
        device: str,
        wave_bytes: int | None = None,
        memory_share: float = 1.0,
    ) -> StreamedEngine:
        """Open a model; its blocks stay on the disk."""
        attention = NAME if packing.layout == "trie" else None
        body = StreamedBody.open(path, dtype, device, attn_implementation=attention)
        reference = partial(StreamedBody.open, path, dtype, device)
        return cls(body, layouts, packing, reference, wave_bytes, memory_share)

    def run(self, work: Sequence[ShardWork]) -> Iterator[ShardResult]:
        """Compute shards, as many at a time as the memory holds; see `Engine`."""
        for wave in self._waves(work):
            yield from self._run_wave(wave)

    def for_parity(self) -> tuple[Engine, ResidentEngine]:
        """See `Engine`: of both the first blocks alone, since the whole model would not fit where
        it is streamed. They record all of them, whichever layers are wanted."""
        layers = tuple(range(min(_PARITY_BLOCKS, self._sites.num_layers)))
        layouts = {name: replace(layout, layers=layers) for name, layout in self.layouts.items()}
        body = self._reference()
        for layer in layers:
            body.load_block(layer)
        drop_blocks(body.body, len(layers))
        shallow = StreamedEngine(self._body, layouts, self.packing, self._reference)
        return shallow, ResidentEngine(body.body, layouts, self.packing)

    def _waves(self, work: Sequence[ShardWork]) -> Iterator[list[ShardWork]]:
        free = int(_WAVE_SHARE * self._memory_share * free_memory(self._device))
        limit = self._wave_bytes or free
        # In and out of a block, and what is gathered.
        per_token = 2 * self._sites.d_model * self._dtype.itemsize
        per_row = sum(
            len(layout.layers) * layout.width * layout.itemsize for layout in self.layouts.values()
        )
        wave: list[ShardWork] = []
        taken = 0
        for shard in work:
            tokens = sum(one.num_tokens for one in self._passes.of_shard(shard))
            needed = tokens * per_token + len(shard.rows) * per_row
            if wave and taken + needed > limit:
                yield wave
                wave, taken = [], 0
            wave.append(shard)
            taken += needed
        if wave:
            yield wave

    def _run_wave(self, wave: Sequence[ShardWork]) -> Iterator[ShardResult]:
        prefix: _Running | None = None
        running: list[_Running] = []
        every_buffers = [Buffers(self.layouts, shard.rows) for shard in wave]
        tokens = [0] * len(wave)
        for number, (shard, buffers) in enumerate(zip(wave, every_buffers, strict=True)):
            before: _Running | None = None
            for one in self._passes.of_shard(shard):
                if before is None and one.carries:
                    if prefix is None:
                        of_prefix = self._passes.of_prefix(shard.prompts[0].token_ids)
                        prefix = self._begin(of_prefix, None, None)
                        running.insert(0, prefix)
                        tokens[number] += of_prefix.num_tokens
                    before = prefix
                before = self._begin(one, buffers, before if one.carries else None)
                running.append(before)
                tokens[number] += one.num_tokens
        self._through_blocks(running)
        alone: list[_Running] = []
        for number, (shard, buffers) in enumerate(zip(wave, every_buffers, strict=True)):
            for one in self._passes.of_poisoned(shard, buffers):
                alone.append(self._begin(one, buffers, None))
                tokens[number] += one.num_tokens
        if alone:
            self._through_blocks(alone)
        for shard, buffers, count in zip(wave, every_buffers, tokens, strict=True):
            yield buffers.result(shard.shard, count)

    def _begin(self, one: Pass, buffers: Buffers | None, before: _Running | None) -> _Running:
        """Run a pass up to the first block, and note what blocks are called with."""
        inputs = {name: moved(value, self._device) for name, value in one.inputs.items()}
        with torch.inference_mode():
            recording = record_calls(self._body.body, self._body.block_list, **inputs)
        return _Running(one, buffers, before, recording, recording.hidden)

    def _through_blocks(self, running: Sequence[_Running]) -> None:
        for layer, block in self._body.blocks(range(self._num_layers)):
            for pack in running:
                carried: list[Carried] = []
                if pack.before and pack.before.one.attention:
                    carried = pack.before.one.attention.kept
                with (
                    torch.inference_mode(),
                    tapped(pack.one, carried, pack.buffers, self._sites, layer),
                ):
                    pack.hidden = pack.recording.call(block, pack.hidden, layer)
                if pack.before and pack.before.buffers and pack.before.one.attention:
                    # Read by this pass alone; only the prefix, which writes no rows, by others.
                    pack.before.one.attention.begin([])
            for pack in running:
                if pack.one.attention is not None:
                    pack.one.attention.begin([])
