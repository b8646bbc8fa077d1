"""Recording: what a decoder body calls its blocks with, learned by running it without them.

Masks, rotary embeddings and positions are made by each family's own forward. Rather than make
them again, the body runs once with blocks that only note their arguments; the real blocks are then
called with those, in any order of prompts and one block at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor, nn

from pipeline.errors import InvalidInput

_HIDDEN = "hidden_states"


@dataclass(frozen=True, slots=True)
class Recording:
    """One run of a body up to its last block.

    What the body gives to several blocks (masks, rotary embeddings) is kept once, not copied.

    Attributes:
        hidden: What the first block is given, [B, T, d_model].
        calls: By layer, the other arguments, by position and by name.
    """

    hidden: Tensor
    calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]

    def call(self, block: nn.Module, hidden: Tensor, layer: int) -> Tensor:
        """What a block makes of hidden states, whether it gives them alone or first in a tuple."""
        args, kwargs = self.calls[layer]
        output = block(hidden, *args, **kwargs)
        hidden_out: Tensor = output[0] if isinstance(output, (tuple, list)) else output
        return hidden_out


def record_calls(body: nn.Module, blocks: nn.ModuleList, **inputs: Any) -> Recording:
    """Run a body on inputs with blocks that return what they are given.

    The blocks themselves stay in their place, only their forward is exchanged for the time: a body
    that reads attributes of its blocks finds them, and the weights may be on the meta device.

    Args:
        blocks: The body's blocks (`pipeline.extraction.weights.block_list`).
        inputs: The body's arguments: input_ids, position_ids, attention_mask, ...; use_cache is
            False.

    Raises:
        InvalidInput: The body does something to hidden states between its blocks, gives them a
            cache, or does not call each block once.
    """
    calls: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []
    first: list[Tensor] = []
    returned: list[tuple[Tensor]] = []

    def note(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        if _HIDDEN in kwargs:
            given = kwargs.pop(_HIDDEN)
        else:
            given, *rest = args
            args = tuple(rest)
        layer = len(calls)
        if not first:
            first.append(given)
        elif given is not returned[-1] and given is not returned[-1][0]:
            raise _refusal(body, f"it changes hidden states before block {layer}")
        if any(isinstance(value, transformers.Cache) for value in (*args, *kwargs.values())):
            raise _refusal(body, f"block {layer} is given a cache, which each call would add to")
        calls.append((args, kwargs))
        if len(calls) == len(blocks):
            raise _AllNoted
        # Some families take a block's output as it is, others its first item; a tuple goes through
        # both, and comes back as itself or as its item: each time another one, to know it by.
        returned.append((first[0].detach(),))
        return returned[-1]

    try:
        for block in blocks:
            # Not by setattr, which would ask nn.Module what a function is.
            block.__dict__["forward"] = note
        body(**inputs | {"use_cache": False})
    except _AllNoted:
        return Recording(first[0], tuple(calls))
    except (AttributeError, TypeError, IndexError) as error:
        if not calls:
            raise
        raise _refusal(
            body, f"it does more than pass on what block {len(calls) - 1} returns ({error})"
        ) from error
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
    raise _refusal(body, f"it called {len(calls)} blocks of {len(blocks)}")


class _AllNoted(Exception):
    pass


def _refusal(body: nn.Module, what: str) -> InvalidInput:
    return InvalidInput(
        f"{type(body).__name__} cannot run block by block: {what}; expected blocks that are called "
        "once each, in order, on the output of the one before. Use the resident engine",
        kind="model_block_calls",
    )
