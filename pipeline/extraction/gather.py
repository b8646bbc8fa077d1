"""Gathering rows from a forward pass into a shard's buffers, and finding those that are not finite.

Shapes: R rows of a shard, L layers, W width of a stream, M gathered positions, N gathered rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.extraction.devices import moved
from pipeline.extraction.models import DTYPES
from pipeline.prompts.trie import Pack, PlannedPrompt
from steering_service.adapters.hooks import Tap
from steering_service.core.site import Site, Stream
from store.layout import StreamLayout


@dataclass(frozen=True, slots=True)
class ShardResult:
    """One shard's activations.

    Attributes:
        values: By stream, [R, L, W] as stored: float32, or bfloat16 as uint16 bits.
        quarantined: Rows of the arrays whose activations are not finite, and why; they are NaN.
        tokens: Tokens computed, each node of the trie once.
    """

    shard: int
    values: dict[str, np.ndarray[Any, Any]]
    quarantined: dict[int, str]
    tokens: int


@dataclass(frozen=True, slots=True)
class Gather:
    """Which positions of a forward pass go to which rows.

    Attributes:
        rows: Int64 [N], rows of the arrays.
        flat: Int64 [M], positions of the pass, its batch flattened.
        counts: Int64 [N], positions a row; a row of several is their mean.
    """

    rows: np.ndarray[Any, Any]
    flat: np.ndarray[Any, Any]
    counts: np.ndarray[Any, Any]

    @classmethod
    def of_pack(cls, pack: Pack) -> Gather:
        return cls(
            np.array([source.row for source in pack.rows], np.int64),
            np.concatenate([source.nodes for source in pack.rows]),
            np.array([len(source.nodes) for source in pack.rows], np.int64),
        )

    @classmethod
    def of_batch(cls, batch: Sequence[PlannedPrompt], rows: range, longest: int) -> Gather:
        """Of prompts padded to `longest` positions."""
        found = [
            (prompt.first_row + j, i * longest + start, i * longest + stop)
            for i, prompt in enumerate(batch)
            for j, (start, stop) in enumerate(prompt.spans)
            if prompt.first_row + j in rows
        ]
        return cls(
            np.array([row for row, _, _ in found], np.int64),
            np.concatenate([np.arange(start, stop) for _, start, stop in found]),
            np.array([stop - start for _, start, stop in found], np.int64),
        )


class Buffers:
    """Where the rows of one shard are gathered: a [R, W] tensor a site, on the site's device.

    Args:
        layouts: The arrays, by stream.
        rows: The rows of the shard.
    """

    def __init__(self, layouts: Mapping[str, StreamLayout], rows: range) -> None:
        self._layouts = layouts
        self._rows = rows
        # Layer by layer, as a shard's bytes lie, so that writing it copies straight through.
        self._host: dict[str, Tensor] = {
            name: torch.full(
                (len(layout.layers), len(rows), layout.width), torch.nan, dtype=DTYPES[layout.dtype]
            )
            for name, layout in layouts.items()
        }
        self._on_device: dict[Site, Tensor] = {}
        self._not_finite: dict[int, str] | None = None

    @staticmethod
    def sites(layouts: Mapping[str, StreamLayout]) -> Iterator[Site]:
        """Every site that is written, stream by stream."""
        for name, layout in layouts.items():
            for layer in layout.layers:
                yield Buffers._site(name, layer)

    def taps(self, gather: Gather, layer: int | None = None) -> dict[Site, Tap]:
        """Taps that write a pass's rows, at all layers or one."""
        slots = torch.from_numpy(gather.rows - self._rows.start)
        flat = torch.from_numpy(gather.flat)
        several = bool((gather.counts != 1).any())
        plan = _Moved(slots, flat, torch.from_numpy(gather.counts) if several else None)
        taps: dict[Site, Tap] = {}
        for name, layout in self._layouts.items():
            for position, number in enumerate(layout.layers):
                if layer is None or number == layer:
                    site = self._site(name, number)
                    taps[site] = self._tap(site, self._host[name][position], plan)
        return taps

    def _tap(self, site: Site, host_RW: Tensor, plan: _Moved) -> Tap:
        def tap(h_BTW: Tensor) -> None:
            slots, flat, counts = plan.on(h_BTW.device)
            taken_MW = h_BTW.reshape(-1, h_BTW.shape[-1]).index_select(0, flat)
            if counts is not None:
                # Means are taken in float32: a bfloat16 sum of a long prompt loses its last terms.
                # Term by term in order, so that a GPU gives the same bits each time.
                taken_MW = torch.segment_reduce(taken_MW.float(), "mean", lengths=counts, axis=0)
            # On a GPU rows stay there until the shard is done, so that nothing waits for a copy.
            buffer_RW = host_RW
            if h_BTW.device.type != "cpu":
                if site not in self._on_device:
                    self._on_device[site] = torch.full_like(host_RW, torch.nan, device=h_BTW.device)
                buffer_RW = self._on_device[site]
            buffer_RW[slots] = taken_MW.to(buffer_RW.dtype)
            self._not_finite = None

        return tap

    def not_finite(self) -> dict[int, str]:
        """Rows with a value that is NaN or infinite, and where it is; also rows not gathered."""
        if self._not_finite is None:
            found: dict[int, str] = {}
            for site in self.sites(self._layouts):
                finite_R = torch.isfinite(self._buffer(site)).all(dim=-1)
                for slot in torch.nonzero(~finite_R)[:, 0].tolist():
                    found.setdefault(
                        self._rows.start + slot,
                        f"activations are NaN or infinite at {site}; computing in another dtype "
                        "(model.dtype) may mend it",
                    )
            self._not_finite = found
        return self._not_finite

    def result(self, shard: int, tokens: int) -> ShardResult:
        """The shard, once all its passes have run; rows that are not finite become NaN."""
        poisoned = self.not_finite()
        for site, buffer_RW in self._on_device.items():
            self._host_buffer(site).copy_(buffer_RW)
        slots = [row - self._rows.start for row in poisoned]
        for host_LRW in self._host.values():
            host_LRW[:, slots] = torch.nan
        values = {
            name: (b.view(torch.uint16) if b.dtype == torch.bfloat16 else b).transpose(0, 1).numpy()
            for name, b in self._host.items()
        }
        return ShardResult(shard, values, poisoned, tokens)

    def _buffer(self, site: Site) -> Tensor:
        return self._on_device.get(site, self._host_buffer(site))

    def _host_buffer(self, site: Site) -> Tensor:
        return self._host[site.stream][self._layouts[site.stream].layers.index(site.layer)]

    @staticmethod
    def _site(name: str, layer: int) -> Site:
        stream: Stream = Site.parse(f"{name}.{layer}").stream
        return Site(stream, layer)


class _Moved:
    """The index tensors of a gather, moved to each device once."""

    def __init__(self, *tensors: Tensor | None) -> None:
        self._at: dict[torch.device, tuple[Any, ...]] = {torch.device("cpu"): tensors}
        self._tensors = tensors

    def on(self, device: torch.device) -> tuple[Any, ...]:
        if device not in self._at:
            self._at[device] = tuple(
                None if tensor is None else moved(tensor, device) for tensor in self._tensors
            )
        return self._at[device]
