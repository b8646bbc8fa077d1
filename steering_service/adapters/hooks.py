"""One mechanism to read and to write hidden states, so that extraction and steering cannot disagree
about what a Site means.

Shapes: B batch, T positions, W width of the stream, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steering_service.adapters.sites import ModelSites
from steering_service.adapters.wiring import Branch
from steering_service.core.site import Site

Tap = Callable[[Tensor], Tensor | None]
"""Takes the [B, T, W] values at a site; returns their replacement, or None to leave them.

The model may write into both tensors afterwards: a tap copies what it keeps."""


class Handle(Protocol):
    """What removes a hook."""

    def remove(self) -> None: ...


@contextmanager
def hooked(sites: ModelSites, taps: Mapping[Site, Tap]) -> Iterator[None]:
    """Call each tap with the values at its Site in every forward pass.

    Every hook is removed on exit, whatever was raised.

    Args:
        sites: The model's modules.
        taps: By Site without a head: a tap sees the whole width of the stream.

    Raises:
        InvalidInput: The model has no such site.
    """
    with ExitStack() as stack:
        for site, tap in taps.items():
            stack.callback(attach(sites, site, tap).remove)
        yield


def attach(sites: ModelSites, site: Site, tap: Tap) -> Handle:
    """Attach one tap and return the handle that removes it.

    Raises:
        InvalidInput: The model has no such site; from the forward pass: a replacement at a
            ``resid_mid`` that can only be read.
    """
    sites.check(site)
    if not sites.is_tied(site.layer):
        return _attach(sites, site, tap)
    turns = _Turns(sites, site.layer)

    def in_turn(h_BTW: Tensor) -> Tensor | None:
        return tap(h_BTW) if turns.is_on else None

    turns.handles.append(_attach(sites, site, in_turn))
    return turns


class _Turns:
    """Tells by the count of its calls in a forward pass for which layer a tied block computes."""

    def __init__(self, sites: ModelSites, layer: int) -> None:
        block = sites.blocks[layer]
        places = [i for i, other in enumerate(sites.blocks) if other is block]
        self._turn = places.index(layer)
        self._num_turns = len(places)
        self._count = 0
        # Before the tap's own hook, which may be on the block as well: hooks run in this order.
        self.handles: list[Handle] = [
            sites.body.register_forward_pre_hook(self._begin),
            block.register_forward_pre_hook(self._next),
        ]

    @property
    def is_on(self) -> bool:
        return (self._count - 1) % self._num_turns == self._turn

    def remove(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._count = 0

    def _next(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._count += 1


def _attach(sites: ModelSites, site: Site, tap: Tap) -> Handle:
    block = sites.blocks[site.layer]
    match site.stream:
        case "resid_pre":
            return block.register_forward_pre_hook(_before(tap), with_kwargs=True)
        case "resid_post":
            return block.register_forward_hook(_after(tap))
        case "z":
            projection = sites.output_projection(site.layer)
            return projection.register_forward_pre_hook(_before(tap), with_kwargs=True)
        case "attn_out":
            return _attach_branch(sites.wiring(site.layer).attn_out, tap)
        case "mlp_out":
            return _attach_branch(sites.wiring(site.layer).mlp_out, tap)
    mid = sites.wiring(site.layer).mid
    assert mid is not None
    write = _in_place(tap, lambda: sites.check(site, edit=True))
    return mid.register_forward_pre_hook(_before(write), with_kwargs=True)


def _attach_branch(branch: Branch, tap: Tap) -> Handle:
    if branch.scale == 1.0:
        return branch.end.register_forward_hook(_after(tap))

    def scaled(h_BTD: Tensor) -> Tensor | None:
        added_BTD = h_BTD * branch.scale
        replacement_BTD = tap(added_BTD)
        if replacement_BTD is None:
            return None
        # The block multiplies again: what was not edited keeps its bits, and its gradient.
        unscaled_BTD = (replacement_BTD / branch.scale).to(h_BTD.dtype)
        exact_BTD = torch.where(replacement_BTD == added_BTD, h_BTD, unscaled_BTD)
        if not unscaled_BTD.requires_grad:
            return exact_BTD
        return unscaled_BTD + (exact_BTD - unscaled_BTD).detach()

    return branch.end.register_forward_hook(_after(scaled))


def _in_place(tap: Tap, check: Callable[[], None]) -> Tap:
    """Write a tap's replacement into the tensor, which the block goes on with in two places."""

    def write(h_BTD: Tensor) -> None:
        # A gradient may need the values from before.
        replacement_BTD = tap(h_BTD.clone() if torch.is_grad_enabled() else h_BTD)
        if replacement_BTD is not None:
            check()
            h_BTD.copy_(replacement_BTD)

    return write


def _before(tap: Tap) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            replacement = tap(args[0])
            return None if replacement is None else ((replacement, *args[1:]), kwargs)
        # Modules are sometimes called with the hidden states as a keyword, of any name.
        key = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        replacement = tap(kwargs[key])
        return None if replacement is None else (args, {**kwargs, key: replacement})

    return before


def _after(tap: Tap) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        # Blocks return a tensor in transformers 5 and a tuple in older versions.
        is_tuple = isinstance(output, tuple)
        replacement = tap(output[0] if is_tuple else output)
        if replacement is None:
            return None
        return (replacement, *output[1:]) if is_tuple else replacement

    return after
