"""Parity gate: before a run, a few prompts are compared with the plain forward of the same weights.

The reference shares no code with the engine but where modules are: one prompt at a time, no packs,
transformers' own attention, `output_hidden_states` where it is unambiguous and PyTorch hooks of its
own elsewhere.

Shapes: L layers, W width of a stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from pipeline.errors import GateRefused
from pipeline.extraction.engine import Engine, ResidentEngine
from pipeline.extraction.gather import Buffers
from pipeline.extraction.models import DtypeName
from pipeline.extraction.passes import ShardWork
from pipeline.prompts.trie import PlannedPrompt
from steering_service.adapters.hooks import Tap, hooked
from steering_service.adapters.sums import check_sums
from steering_service.core.site import Site
from store.bfloat16 import to_float32
from store.layout import StreamLayout

TOLERANCES: Final[Mapping[DtypeName, float]] = {"float32": 1e-4, "bfloat16": 3e-2}
"""Largest allowed error at a site, relative to the norm of the reference row."""

_SPANS: Final = 8
"""Most rows of a prompt that are compared."""

_ROUNDINGS: Final = 4.0
"""How many times what roundings alone come to in a deep bfloat16 model is allowed."""


@dataclass(frozen=True, slots=True)
class Parity:
    """How far the engine is from the plain forward.

    Attributes:
        num_prompts: Prompts that were compared.
        worst: Largest relative error; of a mixture of experts in bfloat16 that of a site's median
            row.
        worst_site: Where it was, such as ``resid_post.3``.
    """

    num_prompts: int
    worst: float
    worst_site: str


def check_parity(
    engine: Engine,
    prompts: Sequence[PlannedPrompt],
    dtype: DtypeName,
    num_prompts: int = 4,
    wanted: Mapping[str, StreamLayout] | None = None,
) -> Parity:
    """Compare an engine with the plain forward of its own weights.

    Args:
        engine: Its body, or the first blocks of it, is run twice, packed and plainly.
        prompts: Some are taken from the whole range of lengths, each with its neighbour, which
            shares the most with it.
        wanted: What its rows should be; by default the engine's own.

    Raises:
        GateRefused: They differ by more than the dtype allows; names the site and the error.
        steering_service.core.errors.InvalidInput: A site is not what its stream is defined as.
    """
    packed, plain = engine.for_parity()
    wanted = packed.layouts if wanted is None else wanted
    chosen = _chosen(prompts, num_prompts)
    first = sum(len(prompt.spans) for prompt in chosen)
    (result,) = packed.run([ShardWork(0, range(first), chosen)])
    with plain.attending_plainly():
        # That packs give what plain forwards give, below; that a site is what it is called, here.
        shortest = min(chosen, key=lambda prompt: len(prompt.token_ids))
        check_sums(plain.sites, plain.ids(shortest), list(Buffers.sites(wanted)))
        reference = _all_rows(plain, chosen, wanted)
    got = {name: torch.from_numpy(to_float32(result.values[name])) for name in wanted}
    errors = _errors(got, reference, plain, dtype)
    worst_site, worst = _worst(errors, wanted)
    allowed = TOLERANCES[dtype]
    if worst > allowed and dtype == "bfloat16":
        # A deep model amplifies roundings. What they come to is what the plain forward differs by
        # from itself, where only its attention kernel and a padding that nobody sees are others.
        with plain.attending_plainly("eager"):
            other = _all_rows(plain, chosen, wanted, padding=17)
        allowed = max(
            allowed, _ROUNDINGS * _worst(_errors(other, reference, plain, dtype), wanted)[1]
        )
    if worst > allowed:
        raise GateRefused(
            f"parity gate: at {worst_site} the engine differs from the plain forward of "
            f"{type(plain.body).__name__} by {worst:.2e} (relative), more than the {allowed:.0e} "
            f"that {dtype} allows; this worker wrote nothing. The model's attention may not be "
            'causal, or not be what a token trie needs: try packing = "batches" under [capture], '
            "and please report it with the model's config.json",
            kind="parity",
        )
    return Parity(len(chosen), worst, worst_site)


def _errors(
    got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], plain: ResidentEngine, dtype: DtypeName
) -> dict[str, Tensor]:
    """By stream, the error of each layer, [L]."""
    errors: dict[str, Tensor] = {}
    for name, want_RLW in wanted.items():
        got_RLW = got[name]
        error_RL = (got_RLW - want_RLW).norm(dim=-1) / want_RLW.norm(dim=-1).clamp_min(1e-30)
        # What the plain forward makes NaN as well is no error of the engine's, and its row is
        # quarantined. NaN on one side only is an infinite error.
        wanted_R = torch.isfinite(want_RLW).flatten(1).all(-1)
        error_RL = torch.where(wanted_R[:, None], error_RL.nan_to_num(nan=torch.inf), 0.0)
        # Rounding can send a token to another expert, which changes its row at once and says
        # nothing of the engine; but it does so to few.
        errors[name] = (
            error_RL.median(dim=0).values if _routes(plain, dtype) else error_RL.amax(dim=0)
        )
    return errors


def _worst(errors: Mapping[str, Tensor], layouts: Mapping[str, StreamLayout]) -> tuple[str, float]:
    """The site with the largest error."""
    found = [
        (error, f"{name}.{layer}")
        for name, error_L in errors.items()
        for layer, error in zip(layouts[name].layers, error_L.tolist(), strict=True)
    ]
    worst, site = max(found, key=lambda pair: pair[0])
    return (site, worst) if worst > 0 else ("none", 0.0)


def _routes(plain: ResidentEngine, dtype: DtypeName) -> bool:
    """Whether tokens go to experts that a rounding in bfloat16 can change."""
    text = plain.body.config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return dtype == "bfloat16" and any((getattr(text, name, None) or 1) > 1 for name in names)


def _chosen(prompts: Sequence[PlannedPrompt], num_prompts: int) -> list[PlannedPrompt]:
    """Prompts of all lengths in row order, with neighbours, their rows numbered from 0."""
    able = [i for i, prompt in enumerate(prompts) if prompt.spans]
    by_length = sorted(able, key=lambda i: len(prompts[i].token_ids))
    step = max(1, (len(by_length) - 1) // max(1, num_prompts // 2 - 1))
    numbers = set(by_length[::step][: num_prompts // 2] + by_length[-1:])
    for number in sorted(numbers):
        if len(numbers) < num_prompts + 1 and number + 1 < len(prompts):
            numbers.add(number + 1)
    chosen, first = [], 0
    for number in sorted(numbers.intersection(able)):
        prompt = prompts[number]
        # The last few: of all tokens of a long prompt there may be more than a shard holds.
        spans = prompt.spans[-_SPANS:]
        chosen.append(PlannedPrompt(prompt.token_ids, first, spans))
        first += len(spans)
    return chosen


def _all_rows(
    plain: ResidentEngine,
    prompts: Sequence[PlannedPrompt],
    layouts: Mapping[str, StreamLayout],
    padding: int = 0,
) -> dict[str, Tensor]:
    """Float32 [R, L, W] by stream, each prompt by itself."""
    each = [_plain_rows(plain, prompt, layouts, padding) for prompt in prompts]
    return {name: torch.cat([rows[name] for rows in each]) for name in layouts}


def _plain_rows(
    plain: ResidentEngine,
    prompt: PlannedPrompt,
    layouts: Mapping[str, StreamLayout],
    padding: int,
) -> dict[str, Tensor]:
    """Float32 [rows, L, W] by stream, from one forward."""
    kept: dict[Site, Tensor] = {}
    taps: dict[Site, Tap] = {
        site: partial(_keep, kept, site)
        for site in Buffers.sites(layouts)
        if site.stream != "resid_pre"
    }
    with torch.inference_mode(), hooked(plain.sites, taps):
        states = plain.body(input_ids=plain.ids(prompt), output_hidden_states=True, use_cache=False)
    hidden = states.hidden_states
    for layer in range(len(hidden) - 1):
        kept[Site("resid_pre", layer)] = hidden[layer][0]
        # The last entry is after the final norm, so there the hook's value stands.
        if layer < len(hidden) - 2:
            kept[Site("resid_post", layer)] = hidden[layer + 1][0]
    return {
        name: torch.stack(
            [
                torch.stack(
                    [
                        kept[Site.parse(f"{name}.{layer}")][start:stop].float().mean(dim=0).cpu()
                        for start, stop in prompt.spans
                    ]
                )
                for layer in layout.layers
            ],
            dim=1,
        )
        for name, layout in layouts.items()
    }


def _keep(kept: dict[Site, Tensor], site: Site, h_1TW: Tensor) -> None:
    # A copy: what runs later may write into the same memory.
    kept[site] = h_1TW[0].clone()
