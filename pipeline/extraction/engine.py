"""Engine: passes go through the decoder body, and hooks keep only the rows that were asked for.

The language-model head never runs, blocks above the highest wanted layer are dropped, and whole
hidden states are never kept: each hook writes its rows into the shard's buffer at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.extraction.attention import NAME, Carried, attending
from pipeline.extraction.devices import moved
from pipeline.extraction.gather import Buffers, ShardResult
from pipeline.extraction.models import DtypeName, load_body
from pipeline.extraction.passes import Pass, Passes, ShardWork
from pipeline.prompts.packing import Packing
from pipeline.prompts.trie import Ids, PlannedPrompt
from steering_service.adapters.hooks import hooked
from steering_service.adapters.sites import ModelSites
from store.layout import StreamLayout


class Engine(Protocol):
    """Computes shards; the same work gives the same bytes, whatever was computed before."""

    layouts: Mapping[str, StreamLayout]

    def run(self, work: Sequence[ShardWork]) -> Iterator[ShardResult]:
        """Compute shards, in order."""

    def for_parity(self) -> tuple[Engine, ResidentEngine]:
        """What the parity gate runs, and whose body it is compared with."""


class ResidentEngine:
    """A decoder body that lies on its device whole.

    Args:
        body: A decoder without head, in evaluation mode, as transformers loads it.
        layouts: The arrays that are written, by stream.
        packing: How prompts become forward passes.
    """

    def __init__(self, body: Any, layouts: Mapping[str, StreamLayout], packing: Packing) -> None:
        self.sites = ModelSites.of(body)
        self.body = body
        self.layouts = layouts
        self.packing = packing
        self._plain_attention = self.body.config._attn_implementation
        if packing.layout == "trie":
            self.body.set_attn_implementation(NAME)
        parameter = next(body.parameters())
        self._device = parameter.device
        self._passes = Passes(packing, parameter.device, parameter.dtype)
        self._prefix: tuple[bytes, list[Carried]] | None = None
        for site in Buffers.sites(layouts):
            self.sites.check(site)

    @classmethod
    def load(
        cls,
        path: Path,
        dtype: DtypeName,
        layouts: Mapping[str, StreamLayout],
        packing: Packing,
        device: str,
        *,
        sharded: bool = False,
    ) -> ResidentEngine:
        """Load a model's body and drop the blocks that no wanted layer needs.

        Args:
            sharded: Whether it is spread over all devices that the process sees. Nothing waits for
                a device within a shard, so that one can begin a pack while the next has the one
                before.
        """
        body: Any = load_body(path, dtype, device, sharded=sharded)
        if sharded and getattr(body, "_hf_hook", None) is not None:
            # It would copy what nobody reads, the last block's output, back to the first device.
            body._hf_hook.io_same_device = False
        drop_blocks(body, max(layout.layers[-1] for layout in layouts.values()) + 1)
        return cls(body, layouts, packing)

    def for_parity(self) -> tuple[Engine, ResidentEngine]:
        """See `Engine`: a second copy of the weights might not fit."""
        return self, self

    def ids(self, prompt: PlannedPrompt) -> Tensor:
        """A prompt's tokens, Int64 [1, T] on the device."""
        return torch.from_numpy(prompt.token_ids)[None].to(self._device)

    @contextmanager
    def attending_plainly(self, implementation: str | None = None) -> Iterator[None]:
        """Have the body attend as transformers has it, by default or as named, for a comparison."""
        self.body.set_attn_implementation(implementation or self._plain_attention)
        try:
            yield
        finally:
            own = NAME if self.packing.layout == "trie" else self._plain_attention
            self.body.set_attn_implementation(own)

    def run(self, work: Sequence[ShardWork]) -> Iterator[ShardResult]:
        """Compute shards one by one; see `Engine`."""
        for shard in work:
            buffers = Buffers(self.layouts, shard.rows)
            tokens = 0
            carried: list[Carried] = []
            for number, one in enumerate(self._passes.of_shard(shard)):
                if number == 0 and one.carries:
                    tokens += self._compute_prefix(shard.prompts[0].token_ids)
                    assert self._prefix is not None
                    carried = self._prefix[1]
                carried = self._run(one, carried, buffers)
                tokens += one.num_tokens
            for one in self._passes.of_poisoned(shard, buffers):
                self._run(one, [], buffers)
                tokens += one.num_tokens
            yield buffers.result(shard.shard, tokens)

    def _compute_prefix(self, prompt_ids: Ids) -> int:
        """Compute what all prompts begin with, once a worker; the tokens computed now."""
        one = self._passes.of_prefix(prompt_ids)
        key = one.inputs["input_ids"].numpy().tobytes()
        if self._prefix is not None and self._prefix[0] == key:
            return 0
        self._prefix = key, self._run(one, [], None)
        return one.num_tokens

    def _run(self, one: Pass, carried: list[Carried], buffers: Buffers | None) -> list[Carried]:
        """Run a pass and write its rows; what the next one carries."""
        inputs = {name: moved(value, self._device) for name, value in one.inputs.items()}
        with torch.inference_mode(), tapped(one, carried, buffers, self.sites):
            self.body(**inputs, use_cache=False)
        return [] if one.attention is None else one.attention.kept


@contextmanager
def tapped(
    one: Pass,
    carried: list[Carried],
    buffers: Buffers | None,
    sites: ModelSites,
    layer: int | None = None,
) -> Iterator[None]:
    """Have a pass attend and write its rows, at all layers or one, inside the block."""
    taps = {}
    if buffers is not None and one.gather is not None:
        taps = buffers.taps(one.gather, layer)
    with ExitStack() as stack:
        if one.attention is not None:
            one.attention.begin(carried)
            stack.enter_context(attending(one.attention))
        stack.enter_context(hooked(sites, taps))
        yield


def drop_blocks(body: nn.Module, keep: int) -> None:
    """Take the blocks above the first `keep` out of a body."""
    blocks = ModelSites.of(body).blocks
    modules = next(
        module
        for module in body.modules()
        if isinstance(module, nn.ModuleList) and tuple(module) == blocks
    )
    del modules[keep:]
