"""One mechanism to read and to write hidden states, so that extraction and steering cannot disagree
about what a Site means.

Shapes: B batch, T positions, W width of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steering_service.adapters.sites import ModelSites
from steering_service.core.site import Site

Tap = Callable[[Tensor], Tensor | None]
"""Takes the [B, T, W] values at a site; returns their replacement, or None to leave them."""


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


def attach(sites: ModelSites, site: Site, tap: Tap) -> RemovableHandle:
    """Attach one tap and return the handle that removes it."""
    sites.check(site)
    if site.stream == "z":
        return sites.output_projection(site.layer).register_forward_pre_hook(
            _before(tap), with_kwargs=True
        )
    block = sites.blocks[site.layer]
    if site.stream == "resid_pre":
        return block.register_forward_pre_hook(_before(tap), with_kwargs=True)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        # Blocks return a tensor in transformers 5 and a tuple in older versions.
        is_tuple = isinstance(output, tuple)
        replacement = tap(output[0] if is_tuple else output)
        if replacement is None:
            return None
        return (replacement, *output[1:]) if is_tuple else replacement

    return block.register_forward_hook(after)


def _before(tap: Tap) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            replacement = tap(args[0])
            return None if replacement is None else ((replacement, *args[1:]), kwargs)
        # Blocks are sometimes called with the hidden states as a keyword.
        replacement = tap(kwargs["hidden_states"])
        return None if replacement is None else (args, {**kwargs, "hidden_states": replacement})

    return before
