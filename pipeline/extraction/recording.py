"""Recording: what a decoder body calls its blocks with, learned by running it without them.

Masks, rotary embeddings and positions are made by each family's own forward. Rather than make
them again, the body runs once with blocks that only note their arguments; the real blocks are then
called with those, in any order of prompts and one block at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

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
    name = type(body).__name__

    def note(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        given = kwargs.pop(_HIDDEN) if _HIDDEN in kwargs else args[0]
        args = args[1:]
        layer = len(calls)
        if layer == 0:
            first.append(given)
            passed.append((given,))
        elif given is not passed[0] and given is not first[0]:
            _refuse(name, f"changes hidden states between blocks {layer - 1} and {layer}")
        ...
        return passed[0]

    return Recording(first[0], tuple(calls))
