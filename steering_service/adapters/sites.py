"""Where the Sites of a transformers model are: modules found by shape, not by family name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from steering_service.core.errors import InvalidInput
from steering_service.core.site import Site, Stream

_OUTPUT_PROJECTIONS: Final = ("o_proj", "out_proj", "dense", "c_proj", "wo")


@dataclass(frozen=True, slots=True)
class ModelSites:
    """The modules of one loaded model at which activations are read and edited.

    Attributes:
        body: The decoder without a language-model head.
        blocks: Its blocks, in order.
        num_heads: Query heads.
        head_dim: Width of one head.
        d_model: Width of the residual stream.
    """

    body: nn.Module
    blocks: tuple[nn.Module, ...]
    num_heads: int
    head_dim: int
    d_model: int

    @classmethod
    def of(cls, model: nn.Module) -> ModelSites:
        """Find the blocks of a transformers model.

        Args:
            model: A causal language model, or its decoder body.

        Raises:
            InvalidInput: No list of as many blocks as the configuration names.
        """
        loaded: Any = model
        config = loaded.config.get_text_config()
        body: Any = loaded.get_decoder() if hasattr(loaded, "get_decoder") else model
        # A decoder body has no decoder of its own, and some versions do not know every family's.
        if body is None or body is model:
            body = getattr(loaded, "base_model", model)
        lists = [
            (name, module)
            for name, module in body.named_modules()
            if isinstance(module, nn.ModuleList) and 0 < len(module) <= config.num_hidden_layers
        ]
        full = [m for _, m in lists if len(m) == config.num_hidden_layers] or [
            m for name, m in lists if "." not in name
        ]
        if not full:
            raise InvalidInput(
                f"{type(model).__name__}: looked for a ModuleList of {config.num_hidden_layers} "
                f"blocks (config.num_hidden_layers) and found lists of "
                f"{[len(m) for _, m in lists]}",
                kind="model_blocks",
            )
        num_heads = int(config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        return cls(body, tuple(full[0]), num_heads, int(head_dim), int(config.hidden_size))

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def width(self, stream: Stream) -> int:
        """Width of a stream: d_model, or heads times head_dim for ``z``."""
        return self.num_heads * self.head_dim if stream == "z" else self.d_model

    def check(self, site: Site) -> None:
        """Refuse a Site that this model does not have.

        Raises:
            InvalidInput: Layer or head out of range, a stream that is not supported yet, or no
                attention output projection for ``z``.
        """
        if site.layer >= self.num_layers:
            raise InvalidInput(
                f"site {site}: the model has layers 0 to {self.num_layers - 1}", kind="site_layer"
            )
        if site.head is not None and site.head >= self.num_heads:
            raise InvalidInput(
                f"site {site}: the model has query heads 0 to {self.num_heads - 1}",
                kind="site_head",
            )
        if site.stream not in ("resid_pre", "resid_post", "z"):
            raise InvalidInput(
                f"site {site}: this version reads and edits resid_pre, resid_post and z",
                kind="site_unsupported",
            )
        if site.stream == "z":
            self.output_projection(site.layer)

    def output_projection(self, layer: int) -> nn.Module:
        """The attention output projection of a block; its input is the stream ``z``.

        Raises:
            InvalidInput: None of the names that families use, with the right width, was found.
        """
        block = self.blocks[layer]
        width = self.num_heads * self.head_dim
        found: list[nn.Module] = [
            module
            for name, module in block.named_modules()
            if name.rsplit(".", 1)[-1] in _OUTPUT_PROJECTIONS
            and any(word in name.lower() for word in ("attn", "attention"))
            and _in_features(module) == width
        ]
        if len(found) != 1:
            children = [name for name, module in block.named_modules() if _in_features(module)]
            raise InvalidInput(
                f"block {layer} ({type(block).__name__}): looked for one attention output "
                f"projection named {', '.join(_OUTPUT_PROJECTIONS)} with {width} inputs "
                f"({self.num_heads} heads of {self.head_dim}), found {len(found)} among {children}",
                kind="model_output_projection",
            )
        return found[0]


def _in_features(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.in_features
    # transformers' Conv1D (GPT-2) keeps its weight as [in, out].
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and weight is not None:
        return int(weight.shape[0])
    return None
