"""Engine: packs go through the decoder body, and hooks keep only the rows that were asked for.

The language-model head never runs, blocks above the highest wanted layer are dropped, and whole
hidden states are never kept: each hook writes its rows into the shard's buffer at once.

Shapes: B prompts of a pack, T positions (padded on the right), R rows of a shard, L layers,
W width of a stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import GateRefused
from pipeline.extraction.models import DTYPES, DtypeName, load_body
from pipeline.prompts.plan import PlannedPrompt, shard_packs
from steering_service.adapters.hooks import Tap, hooked
from steering_service.adapters.sites import ModelSites
from steering_service.core.site import Site, Stream
from store.layout import StreamLayout


class Engine:
    """A decoder body that turns packs into rows of activations.

    Args:
        body: A decoder without head, in evaluation mode.
        layouts: The arrays that are written, by stream.
    """

    def __init__(self, body: nn.Module, layouts: Mapping[str, StreamLayout]) -> None:
        self._sites = ModelSites.of(body)
        self._layouts = layouts
        self._device = next(body.parameters()).device
        self._body = body
        for layout in layouts.values():
            for layer in layout.layers:
                self._sites.check(_site(layout, layer))

    @classmethod
    def load(
        cls, path: Path, dtype: DtypeName, layouts: Mapping[str, StreamLayout], device: str
    ) -> Engine:
        """Load a model's body and drop the blocks that no wanted layer needs."""
        body = load_body(path, dtype, device)
        blocks = next(
            module
            for module in body.modules()
            if isinstance(module, nn.ModuleList) and tuple(module) == ModelSites.of(body).blocks
        )
        del blocks[max(layout.layers[-1] for layout in layouts.values()) + 1 :]
        return cls(body, layouts)

    def run_shard(
        self, prompts: Sequence[PlannedPrompt], rows: range, tokens_per_pack: int
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Compute one shard.

        Args:
            prompts: All prompts of the plan, in row order.
            rows: The rows of the shard.
            tokens_per_pack: Most tokens of a pack, padding included.

        Returns:
            By stream, [R, L, W] as stored: float32, or bfloat16 as uint16 bits.

        Raises:
            GateRefused: A value is NaN or infinite; the message names the prompt's row and layer.
        """
        buffers = {
            name: torch.empty(
                (len(rows), len(layout.layers), layout.width), dtype=DTYPES[layout.dtype]
            )
            for name, layout in self._layouts.items()
        }
        for pack in shard_packs(prompts, rows, tokens_per_pack):
            self.run_pack(pack, rows, buffers)
        for name, buffer_RLW in buffers.items():
            _check_finite(name, self._layouts[name], buffer_RLW, rows)
        return {
            name: (b.view(torch.uint16) if b.dtype == torch.bfloat16 else b).numpy()
            for name, b in buffers.items()
        }

    def run_pack(
        self, pack: Sequence[PlannedPrompt], rows: range, buffers: Mapping[str, Tensor]
    ) -> None:
        """Run one pack and write its rows into the buffers."""
        gather = _Gather.of(pack, rows, self._device)
        taps: dict[Site, Tap] = {}
        for name, layout in self._layouts.items():
            for position, layer in enumerate(layout.layers):
                taps[_site(layout, layer)] = gather.into(buffers[name][:, position])
        # Padding is on the right: a causal mask alone keeps it from every real token, so no
        # attention mask is needed and attention takes its fastest path.
        longest = max(len(prompt.token_ids) for prompt in pack)
        ids_BT = torch.zeros((len(pack), longest), dtype=torch.int64)
        for i, prompt in enumerate(pack):
            ids_BT[i, : len(prompt.token_ids)] = torch.from_numpy(prompt.token_ids)
        with torch.inference_mode(), hooked(self._sites, taps):
            self._body(input_ids=ids_BT.to(self._device), use_cache=False)


@dataclass(frozen=True, slots=True)
class _Gather:
    """Which positions of a pack go to which rows of a shard.

    Attributes:
        slots: Int64 [N], rows of the shard's buffer.
        flat: Int64 [M], positions of the pack flattened to [B * T].
        segment: Int64 [M], which of the N rows each position belongs to; None if M = N.
        counts: Float32 [N], positions a row.
    """

    slots: Tensor
    flat: Tensor
    segment: Tensor | None
    counts: Tensor

    @classmethod
    def of(cls, pack: Sequence[PlannedPrompt], rows: range, device: torch.device) -> _Gather:
        longest = max(len(prompt.token_ids) for prompt in pack)
        slots: list[int] = []
        flat: list[int] = []
        segment: list[int] = []
        for i, prompt in enumerate(pack):
            for j, (start, stop) in enumerate(prompt.spans):
                row = prompt.first_row + j
                if row in rows:
                    flat.extend(range(i * longest + start, i * longest + stop))
                    segment.extend([len(slots)] * (stop - start))
                    slots.append(row - rows.start)
        single = len(flat) == len(slots)
        return cls(
            torch.tensor(slots),
            torch.tensor(flat, device=device),
            None if single else torch.tensor(segment, device=device),
            torch.bincount(torch.tensor(segment), minlength=len(slots)).to(device, torch.float32),
        )

    def into(self, buffer_RW: Tensor) -> Tap:
        def tap(h_BTW: Tensor) -> None:
            taken_MW = h_BTW.reshape(-1, h_BTW.shape[-1]).index_select(0, self.flat)
            if self.segment is not None:
                # Means are taken in float32: a bfloat16 sum of a long prompt loses its last terms.
                sums_NW = torch.zeros(
                    (len(self.slots), h_BTW.shape[-1]), dtype=torch.float32, device=h_BTW.device
                ).index_add_(0, self.segment, taken_MW.float())
                taken_MW = sums_NW / self.counts[:, None]
            buffer_RW[self.slots] = taken_MW.to(buffer_RW.device, buffer_RW.dtype)

        return tap


def _site(layout: StreamLayout, layer: int) -> Site:
    stream: Stream = Site.parse(f"{layout.stream}.{layer}").stream
    return Site(stream, layer)


def _check_finite(stream: str, layout: StreamLayout, buffer_RLW: Tensor, rows: range) -> None:
    finite_RL = torch.isfinite(buffer_RLW).all(dim=-1)
    if bool(finite_RL.all()):
        return
    row, layer = (int(i) for i in torch.nonzero(~finite_RL)[0])
    raise GateRefused(
        f"{stream}.{layout.layers[layer]}: activations of row {rows.start + row} are NaN or "
        "infinite; see index.parquet for its prompt. Computing in another dtype (model.dtype) or "
        "removing the prompt are the ways out",
        kind="activation_not_finite",
    )
