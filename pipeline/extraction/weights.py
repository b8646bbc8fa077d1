"""StreamedBody: a decoder body whose blocks are in memory only while they compute.

A model larger than the device, or than the machine's memory, still computes one block after the
other. What is outside the blocks stays on the device; the weights of a block come from the mapped
checkpoint when it is its turn, while the block before it computes, and go when it is done.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from pipeline.errors import InvalidInput
from pipeline.extraction.checkpoint import Checkpoint, touch
from pipeline.extraction.loading import Loader, meta_body
from pipeline.extraction.models import DTYPES, DtypeName
from steering_service.adapters.sites import ModelSites

_Slot = tuple[dict[str, Any], str, Tensor]
"""Where a module keeps a weight, under which name, and what is there while it is not loaded."""


def block_list(body: nn.Module) -> nn.ModuleList:
    """The list in which a decoder body keeps its blocks.

    Raises:
        steering_service.core.errors.InvalidInput: No list of as many blocks as the configuration
            names.
    """
    blocks = ModelSites.of(body).blocks
    return next(
        module
        for module in body.modules()
        if isinstance(module, nn.ModuleList) and tuple(module) == blocks
    )


class StreamedBody:
    """A decoder body with its blocks on the meta device, and the means to load them one by one.

    At most two blocks have their weights at a time: the one that was handed out, and the one that
    is fetched meanwhile. On a CPU, weights that are stored in the dtype that is computed in are
    views of the mapped files and take no memory of their own; others are copies. On CUDA they are
    copied through pinned memory on a side stream; the host then holds one block besides.

    Used from one thread; a second one, its own, fetches.

    Attributes:
        body: The body as `transformers.AutoModel` builds it, in evaluation mode.
        block_list: Its blocks, in order; those not loaded have their weights on the meta device.
    """

    def __init__(
        self, body: nn.Module, checkpoint: Checkpoint, loader: Loader, device: torch.device
    ) -> None:
        self.body = body.eval()
        self.block_list = block_list(body)
        self._checkpoint, self._loader, self._device = checkpoint, loader, device
        prefix = next(name for name, m in body.named_modules() if m is self.block_list)
        prefixes = [f"{prefix}.{layer}." for layer in range(len(self.block_list))]
        layer_of = {start: layer for layer, start in enumerate(prefixes)}
        self._sources: list[list[str]] = [[] for _ in prefixes]
        outside: list[str] = []
        for source, target in loader.targets(checkpoint).items():
            start = prefix + "." + target[len(prefix) + 1 :].split(".", 1)[0] + "."
            within = target.startswith(start) and start in layer_of
            (self._sources[layer_of[start]] if within else outside).append(source)
        # A dry run on the meta device: what is missing is found now, not hours into a run.
        missing = loader.load(
            {name: checkpoint.on_meta(name) for name in checkpoint}, torch.device("meta")
        )
        loader.load({name: checkpoint[name] for name in outside}, device)
        loader.finish(missing, device)
        body.requires_grad_(False)
        self._slots = [_slots(block) for block in self.block_list]
        self._names = [
            [name for name in loader.names if name.startswith(start) and name not in missing]
            for start in prefixes
        ]
        waiting, own = len(_slots(body)), sum(map(len, self._slots))
        if not waiting == own == sum(map(len, self._names)):
            raise InvalidInput(
                f"{type(body).__name__}: {waiting} weights wait for their block to be loaded, "
                f"blocks have {own} and the checkpoint has {sum(map(len, self._names))} for them; "
                "blocks that share weights cannot be streamed. Use the resident engine",
                kind="model_shared_blocks",
            )
        # One thread: two loads at once would hold three blocks.
        self._thread = ThreadPoolExecutor(1, "steerage-weights")
        self._fetching: tuple[int, Future[Any]] | None = None
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._dropped: Any = None

    @classmethod
    def open(
        cls,
        path: Path,
        dtype: DtypeName,
        device: str = "cpu",
        *,
        attn_implementation: str | None = None,
    ) -> Self:
        """Build a body, load what is outside its blocks, and see that all of the blocks is there.

        Args:
            attn_implementation: Passed on to transformers; its own choice if None.

        Raises:
            NotFound, InvalidInput: See `meta_body`, `Loader` and `Checkpoint.open`; a weight is
                missing or of another shape; blocks share weights.
            steering_service.core.errors.InvalidInput: See `block_list`.
        """
        body = meta_body(path, DTYPES[dtype], attn_implementation)
        if (quantised := getattr(body.config, "quantization_config", None)) is not None:
            raise InvalidInput(
                f"model {os.fspath(path)!r} is quantised ({quantised}); its blocks cannot be "
                "loaded one by one. Save it in float32 or bfloat16, or use the resident engine",
                kind="model_quantised",
            )
        loader = Loader(body, DTYPES[dtype], os.fspath(path))
        checkpoint = Checkpoint.open(path, getattr(body.config, "transformers_weights", None))
        return cls(body, checkpoint, loader, torch.device(device))

    def block_bytes(self, layer: int) -> int:
        """Memory that a block's weights take while they are loaded, were none of it mapped."""
        return sum(meta.numel() * meta.itemsize for _, _, meta in self._slots[layer])

    def prefetch(self, layer: int) -> None:
        """Begin to load a block in the background; what was begun before is given up."""
        if self._fetching is not None and self._fetching[0] == layer:
            return
        self._give_up()
        self._fetching = layer, self._thread.submit(self._fetch, layer, self._dropped)

    def load_block(self, layer: int) -> nn.Module:
        """A block with its weights, as from_pretrained would give them.

        It stays until `drop_block`; a loop over `blocks` does both.

        Raises:
            InvalidInput: Its weights could not be converted, for want of memory for instance.
        """
        fetching = self._fetching is not None and self._fetching[0] == layer
        if not fetching and not any(s[leaf].is_meta for s, leaf, _ in self._slots[layer]):
            return self.block_list[layer]
        self.prefetch(layer)
        assert self._fetching is not None
        copied = self._fetching[1].result()
        self._fetching = None
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)
        return self.block_list[layer]

    def drop_block(self, layer: int) -> None:
        """Put a block's weights back on the meta device; what computes with them may go on."""
        for store, leaf, meta in self._slots[layer]:
            store[leaf] = meta
        self._checkpoint.release(self._sources[layer])
        if self._copies is not None:
            # The next fetch waits for this: its copies would overwrite weights still in use.
            self._dropped = torch.cuda.current_stream(self._device).record_event()

    def blocks(self, layers: range | None = None) -> Iterator[tuple[int, nn.Module]]:
        """Blocks in order, each loaded while the one before is in use and dropped after its own.

        Args:
            layers: Which; all if None.
        """
        wanted = range(len(self.block_list)) if layers is None else layers
        try:
            for layer in wanted:
                block = self.load_block(layer)
                if (following := layer + wanted.step) in wanted:
                    self.prefetch(following)
                try:
                    yield layer, block
                finally:
                    del block
                    self.drop_block(layer)
        finally:
            self._give_up()

    def close(self) -> None:
        """Give up what is being fetched and end the thread."""
        self._give_up()
        self._thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _give_up(self) -> None:
        if self._fetching is None:
            return
        layer, fetched = self._fetching
        self._fetching = None
        if not fetched.cancel():
            fetched.exception()  # Waits; whoever asks for the block again gets the error again.
        self.drop_block(layer)

    def _fetch(self, layer: int, dropped: Any) -> Any:
        """Load a block; on CUDA, the event after which it may be used."""
        if dropped is not None:
            dropped.synchronize()
        host = self._device if self._copies is None else torch.device("cpu")
        sources, slots = self._sources[layer], self._slots[layer]
        missing = self._loader.load(
            {name: self._checkpoint[name] for name in sources}, host, self._names[layer]
        )
        assert not missing, missing  # The dry run found them all.
        self.block_list[layer].requires_grad_(False)
        copied = None
        if self._copies is not None:
            with torch.cuda.stream(self._copies):
                for store, leaf, _ in slots:
                    host_weight = store[leaf]
                    # Pinned memory is reused only after its copy, so it need not be kept here.
                    weight = host_weight.pin_memory().to(self._device, non_blocking=True)
                    if isinstance(host_weight, nn.Parameter):
                        weight = nn.Parameter(weight, requires_grad=False)
                    store[leaf] = weight
                copied = self._copies.record_event()
        # What was copied need not stay mapped; what was not is read now, ahead of its use.
        self._checkpoint.release(sources)
        for store, leaf, _ in slots:
            if self._checkpoint.is_view(store[leaf]):
                touch(store[leaf])
        return copied


def _slots(module: nn.Module) -> list[_Slot]:
    """The weights of a module that are on the meta device."""
    return [
        (store, leaf, tensor)
        for part in module.modules()
        for store in (part._parameters, part._buffers)
        for leaf, tensor in store.items()
        if tensor is not None and tensor.is_meta
    ]
