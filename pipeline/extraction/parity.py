"""Parity gate: before a run, a few prompts are compared with the plain forward of the same weights.

The reference shares no code with the engine: one prompt at a time, no packs, no truncated model,
`output_hidden_states` where it is unambiguous and PyTorch hooks of its own elsewhere.

Shapes: L layers, W width of a stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from pipeline.errors import GateRefused
from pipeline.extraction.engine import Engine
from pipeline.extraction.models import DTYPES, DtypeName, load_body
from pipeline.prompts.plan import PlannedPrompt
from steering_service.adapters.sites import ModelSites
from store.layout import StreamLayout

TOLERANCES: Final[Mapping[DtypeName, float]] = {"float32": 1e-4, "bfloat16": 3e-2}
"""Largest allowed error at a site, relative to the norm of the reference row."""


@dataclass(frozen=True, slots=True)
class Parity:
    """How far the engine is from the plain forward.

    Attributes:
        num_prompts: Prompts that were compared.
        worst: Largest relative error.
        worst_site: Where it was, such as ``resid_post.3``.
    """

    num_prompts: int
    worst: float
    worst_site: str


def check_parity(
    path: Path,
    dtype: DtypeName,
    layouts: Mapping[str, StreamLayout],
    prompts: Sequence[PlannedPrompt],
    device: str,
    num_prompts: int = 4,
) -> Parity:
    """Compare the engine with the plain model.

    Args:
        path: Model folder.
        prompts: The plan's prompts; some are taken from its whole range of lengths.

    Raises:
        GateRefused: They differ by more than the dtype allows; names the site and the error.
    """
    step = max(1, (len(prompts) - 1) // max(1, num_prompts - 1))
    # Packed together, short and long: padding is part of what is checked.
    chosen = list(prompts[::step][:num_prompts])
    rows = [range(p.first_row, p.first_row + len(p.spans)) for p in chosen]
    renumbered, first = [], 0
    for prompt, span in zip(chosen, rows, strict=True):
        renumbered.append(PlannedPrompt(prompt.token_ids, first, prompt.spans))
        first += len(span)
    engine = Engine.load(path, dtype, layouts, device)
    buffers = {
        name: torch.empty((first, len(layout.layers), layout.width), dtype=DTYPES[dtype])
        for name, layout in layouts.items()
    }
    engine.run_pack(renumbered, range(first), buffers)
    plain = load_body(path, dtype, device)
    worst, worst_site = 0.0, "none"
    for prompt in renumbered:
        reference = _plain_rows(plain, prompt, layouts, device)
        for name, layout in layouts.items():
            stop = prompt.first_row + len(prompt.spans)
            got_RLW = buffers[name][prompt.first_row : stop].float()
            want_RLW = reference[name]
            error_RL = (got_RLW - want_RLW).norm(dim=-1) / want_RLW.norm(dim=-1).clamp_min(1e-30)
            # What the plain forward makes NaN as well is no error of the engine's, and the shard
            # that holds it is refused with its row. NaN on one side only is an infinite error.
            both_RL = ~torch.isfinite(got_RLW).all(-1) & ~torch.isfinite(want_RLW).all(-1)
            error_RL = torch.where(both_RL, 0.0, error_RL.nan_to_num(nan=torch.inf))
            for position, layer in enumerate(layout.layers):
                error = float(error_RL[:, position].max())
                if error > worst:
                    worst, worst_site = error, f"{name}.{layer}"
    if worst > TOLERANCES[dtype]:
        raise GateRefused(
            f"parity gate: at {worst_site} the engine differs from the plain forward of "
            f"{str(path)!r} by {worst:.2e} (relative), more than the {TOLERANCES[dtype]:.0e} that "
            f"{dtype} allows; nothing was written. The model's attention may not be causal, or its "
            "blocks may not be what they seem: please report it with the model's config.json",
            kind="parity",
        )
    return Parity(len(chosen), worst, worst_site)


def _plain_rows(
    model: Any, prompt: PlannedPrompt, layouts: Mapping[str, StreamLayout], device: str
) -> dict[str, Tensor]:
    """Float32 [rows, L, W] by stream, from one unpadded forward."""
    sites = ModelSites.of(model)
    kept: dict[str, Tensor] = {}
    handles = []
    for name, layout in layouts.items():
        for layer in layout.layers:
            if name == "z":
                handles.append(
                    sites.output_projection(layer).register_forward_pre_hook(
                        lambda _m, args, key=f"z.{layer}": kept.__setitem__(key, args[0][0])
                    )
                )
            elif name == "resid_post":
                handles.append(
                    sites.blocks[layer].register_forward_hook(
                        lambda _m, _a, out, key=f"resid_post.{layer}": kept.__setitem__(
                            key, (out[0] if isinstance(out, tuple) else out)[0]
                        )
                    )
                )
    try:
        with torch.inference_mode():
            ids_1T = torch.from_numpy(prompt.token_ids)[None].to(device)
            states = model(input_ids=ids_1T, output_hidden_states=True, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    hidden = states.hidden_states
    for layer in range(len(hidden) - 1):
        kept[f"resid_pre.{layer}"] = hidden[layer][0]
        # The last entry is after the final norm, so there the hook's value stands.
        if layer < len(hidden) - 2:
            kept[f"resid_post.{layer}"] = hidden[layer + 1][0]
    return {
        name: torch.stack(
            [
                torch.stack(
                    [
                        kept[f"{name}.{layer}"][start:stop].float().mean(dim=0)
                        for start, stop in prompt.spans
                    ]
                )
                for layer in layout.layers
            ],
            dim=1,
        ).cpu()
        for name, layout in layouts.items()
    }
