"""The streams inside the blocks, checked on real tokens against the sums that define them.

Shapes: B batch, T positions, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from typing import Any, Final

import torch
from torch import Tensor, nn

from steering_service.adapters.hooks import hooked
from steering_service.adapters.sites import ModelSites
from steering_service.core.errors import InvalidInput
from steering_service.core.site import Site, Stream

_TERMS: Final[tuple[Stream, ...]] = ("resid_pre", "attn_out", "mlp_out")
_INNER: Final[frozenset[Stream]] = frozenset(("attn_out", "mlp_out", "resid_mid"))


def check_sums(sites: ModelSites, ids_BT: Tensor, wanted: Collection[Site]) -> None:
    """Check that the wanted sites are what they are said to be.

    At the layers where a stream inside the block is wanted: resid_post = resid_pre + attn_out +
    mlp_out, and resid_mid = resid_pre + attn_out, within the rounding of the dtype; where ``z`` is:
    attention returns what its output projection makes of ``z``.

    Args:
        ids_BT: Int64 [B, T], a few tokens without padding, on the model's device.
        wanted: Sites; there is nothing to check at resid_pre and resid_post.

    Raises:
        InvalidInput: A sum is not right, which names the layer; or the model has no such site.
    """
    inner = sorted({s.layer for s in wanted if s.stream in _INNER})
    middle = sorted({s.layer for s in wanted if s.stream == "resid_mid"})
    projected = sorted({s.layer for s in wanted if s.stream == "z"})
    kept: dict[str, Tensor] = {}
    read = [Site(stream, layer) for layer in inner for stream in (*_TERMS, "resid_post")]
    read += [Site("resid_mid", layer) for layer in middle]
    with ExitStack() as stack:
        stack.enter_context(hooked(sites, {site: _keep(kept, str(site)) for site in read}))
        for name, module in _projections(sites, projected):
            stack.callback(module.register_forward_hook(_output(_keep(kept, name))).remove)
        if inner or projected:
            with torch.inference_mode():
                sites.body(input_ids=ids_BT, use_cache=False)
    for site in read:
        value = kept[str(site)]
        if value.shape != (*ids_BT.shape, sites.d_model):
            raise InvalidInput(
                f"{site}: expected values [{', '.join(map(str, ids_BT.shape))}, {sites.d_model}] "
                f"(sequences, positions, d_model), got {tuple(value.shape)}; take resid_pre or "
                "resid_post of this model",
                kind="model_sums",
            )
    for layer in inner:
        terms = [kept[f"{term}.{layer}"] for term in _TERMS]
        _compare(f"resid_post.{layer}", kept[f"resid_post.{layer}"], terms)
    for layer in middle:
        terms = [kept[f"{term}.{layer}"] for term in _TERMS[:2]]
        _compare(f"resid_mid.{layer}", kept[f"resid_mid.{layer}"], terms)
    for layer in projected:
        if f"attention.{layer}" in kept:
            returned, made = kept[f"attention.{layer}"], kept[f"projection.{layer}"]
            name = f"the output of the attention of block {layer}"
            _compare(name, returned, [made.reshape(returned.shape)])


def _projections(sites: ModelSites, layers: list[int]) -> Iterator[tuple[str, nn.Module]]:
    """Attention and output projection of each block, named."""
    for layer in layers:
        projection = sites.output_projection(layer)
        try:
            attention = sites.wiring(layer).attention
        except InvalidInput:
            # Nothing to compare with: the projection of such a block was found by its name alone.
            continue
        yield f"attention.{layer}", attention
        yield f"projection.{layer}", projection


def _keep(kept: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    def keep(h_BTD: Tensor) -> None:
        kept[name] = h_BTD.detach().clone()

    return keep


def _output(keep: Callable[[Tensor], None]) -> Callable[[nn.Module, Any, Any], None]:
    return lambda module, args, output: keep(output[0] if isinstance(output, tuple) else output)


def _compare(name: str, got_BTD: Tensor, terms: list[Tensor]) -> None:
    """Refuse a sum that is further from its terms than two additions in their dtype can be."""
    terms_NBTD = torch.stack([t.to("cpu", torch.float64) for t in terms])
    bound_BTD = 2 * torch.finfo(got_BTD.dtype).eps * terms_NBTD.abs().sum(0)
    error_BTD = (got_BTD.to("cpu", torch.float64) - terms_NBTD.sum(0)).abs()
    # What is infinite or NaN in the terms says nothing.
    if bool(((error_BTD <= bound_BTD) | ~bound_BTD.isfinite()).all()):
        return
    made_of = {1: "what its projection made", 2: "resid_pre + attn_out", 3: " + ".join(_TERMS)}
    error, allowed = (float(t.nan_to_num().max()) for t in (error_BTD, bound_BTD))
    raise InvalidInput(
        f"{name} is not {made_of[len(terms)]}: they differ by {error:.2e}, and the rounding of "
        f"{got_BTD.dtype} allows {allowed:.2e}. The model's blocks are not what they seem, so "
        "the streams inside them cannot be taken; resid_pre and resid_post can. Please report it "
        "with the model's config.json",
        kind="model_sums",
    )
