"""Where the Sites of a transformers model are: modules found by shape, not by family name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from torch import nn

from steering_service.adapters.wiring import Wiring, trace
from steering_service.core.errors import InvalidInput
from steering_service.core.site import Site, Stream

_OUTPUT_PROJECTIONS: Final = ("o_proj", "out_proj", "dense", "c_proj", "wo")


@dataclass(frozen=True, slots=True)
class ModelSites:
    """The modules of one loaded model at which activations are read and edited.

    Attributes:
        body: The decoder without a language-model head.
        blocks: Its blocks, in order; a tied block stands at several places.
        num_heads: Query heads.
        head_dim: Width of one head.
        d_model: Width of the residual stream.
    """

    body: nn.Module
    blocks: tuple[nn.Module, ...]
    num_heads: int
    head_dim: int
    d_model: int
    _wirings: dict[int, Wiring] = field(default_factory=dict, init=False, repr=False, compare=False)
    _projections: dict[int, nn.Module] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

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

    def check(self, site: Site, *, edit: bool = False) -> None:
        """Refuse a Site that this model does not have.

        Args:
            edit: Whether the site is to be edited as well.

        Raises:
            InvalidInput: Layer or head out of range, no attention output projection for ``z``, a
                block inside which the stream cannot be found, ``resid_mid`` of a parallel block, or
                of one in which it can only be read.
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
        if site.stream == "z":
            self.output_projection(site.layer)
        elif site.stream in ("attn_out", "mlp_out"):
            self.wiring(site.layer)
        elif site.stream == "resid_mid":
            self._check_mid(site, edit)

    def _check_mid(self, site: Site, edit: bool) -> None:
        wiring = self.wiring(site.layer)
        block = f"block {site.layer} ({type(self.blocks[site.layer]).__name__})"
        if wiring.mid is None:
            raise InvalidInput(
                f"site {site}: {block} is parallel: attention and MLP both read resid_pre, so "
                "there is no stream between them; use resid_pre, resid_post, attn_out or mlp_out",
                kind="site_parallel",
            )
        if edit and not wiring.mid_is_shared:
            raise InvalidInput(
                f"site {site}: {block} hands its MLP another tensor than the one that it adds to, "
                "so resid_mid can be read but not edited here; edit attn_out or resid_post",
                kind="site_read_only",
            )

    def is_tied(self, layer: int) -> bool:
        """Whether the block stands at other places too, so that its calls must be counted."""
        return sum(block is self.blocks[layer] for block in self.blocks) > 1

    def wiring(self, layer: int) -> Wiring:
        """What a block adds to the residual stream, and where.

        Raises:
            InvalidInput: See `steering_service.adapters.wiring.trace`.
        """
        if layer not in self._wirings:
            self._wirings[layer] = trace(self.blocks[layer], self.d_model, f"block {layer}")
        return self._wirings[layer]

    def output_projection(self, layer: int) -> nn.Module:
        """The attention output projection of a block; its input is the stream ``z``.

        It is known by its name, or else by being the only one of its shape in the attention.

        Raises:
            InvalidInput: None or several were found.
        """
        if layer not in self._projections:
            self._projections[layer] = self._find_projection(layer)
        return self._projections[layer]

    def _find_projection(self, layer: int) -> nn.Module:
        block = self.blocks[layer]
        width = self.num_heads * self.head_dim
        named: list[nn.Module] = [
            module
            for name, module in block.named_modules()
            if name.rsplit(".", 1)[-1] in _OUTPUT_PROJECTIONS
            and any(word in name.lower() for word in ("attn", "attention"))
            and (_features(module) or (0,))[0] == width
        ]
        if len(named) == 1:
            return named[0]
        try:
            inside = self.wiring(layer).attention
        except InvalidInput as error:
            why = f"; by shape: {error}"
        else:
            shaped = [m for m in inside.modules() if _features(m) == (width, self.d_model)]
            if len(shaped) == 1:
                return shaped[0]
            why = f", and {len(shaped)} projections of {width} to {self.d_model} in the attention"
        children = [name for name, module in block.named_modules() if _features(module)]
        raise InvalidInput(
            f"block {layer} ({type(block).__name__}): looked for one attention output projection "
            f"named {', '.join(_OUTPUT_PROJECTIONS)} with {width} inputs ({self.num_heads} heads "
            f"of {self.head_dim}), found {len(named)} among {children}{why}",
            kind="model_output_projection",
        )


def _features(module: nn.Module) -> tuple[int, int] | None:
    """How many inputs and outputs a projection has; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    # transformers' Conv1D (GPT-2) keeps its weight as [in, out].
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and weight is not None:
        return int(weight.shape[0]), int(weight.shape[1])
    return None
