"""Loading models: what a plan needs to know of one, its decoder body, and its tokenizer.

Nothing here reaches a hub or runs code that comes with a model: `trust_remote_code` stays off and
only local folders with safetensors weights are read.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import torch
import transformers
from torch import nn

from pipeline.errors import InvalidInput, NotFound
from pipeline.prompts.packing import Layout
from steering_service.core.fingerprint import model_fingerprint

DtypeName = Literal["float32", "bfloat16"]
DTYPES: Final[dict[DtypeName, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}

# Left out, transformers would ask on the terminal, and take a "y" from a pipe.
_SAFE: Final = {"trust_remote_code": False, "local_files_only": True}

_T = TypeVar("_T")

_TRIE_LAYERS: Final = frozenset({"full_attention", "sliding_attention"})
# Families outside the attention interface that were seen to honour a 4-D mask.
_TAKE_MASKS: Final = frozenset({"falcon"})

# The bar that transformers draws for reading weights would tear ours.
transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known of a model without loading its weights.

    Attributes:
        fingerprint: See `steering_service.core.fingerprint`.
        context: Longest input in tokens.
        dtype: Dtype of the checkpoint, as far as it is one that is computed in.
        stored_half: Whether its weights are stored in two bytes each.
        layout: How its prompts can be packed.
        layout_reason: Why not as a trie with attention of ours, or None.
        rope_limit: Longest prompt that may share a pass with others, where that is less than the
            context (LongRoPE picks its factors by the largest position of a pass); or None.
    """

    path: Path
    name: str
    fingerprint: str
    num_layers: int
    num_heads: int
    head_dim: int
    d_model: int
    context: int
    dtype: DtypeName
    stored_half: bool = False
    layout: Layout = "trie"
    layout_reason: str | None = None
    rope_limit: int | None = None

    @classmethod
    def read(cls, path: Path) -> ModelInfo:
        """Read a model folder's configuration and fingerprint.

        Raises:
            steering_service.core.errors.NotFound: No such folder, or no safetensors weights in it.
            InvalidInput: config.json cannot be read or lacks what a decoder has.
        """
        fingerprint = model_fingerprint(path)
        config: Any = _loaded(
            path, "configuration", lambda: transformers.AutoConfig.from_pretrained(path, **_SAFE)
        )
        text = config.get_text_config()
        try:
            num_heads, d_model = int(text.num_attention_heads), int(text.hidden_size)
            head_dim = int(getattr(text, "head_dim", None) or d_model // num_heads)
            num_layers = int(text.num_hidden_layers)
        except AttributeError as error:
            raise InvalidInput(
                f"model {str(path)!r} ({type(config).__name__}): {error}; expected a decoder with "
                "num_hidden_layers, num_attention_heads and hidden_size in its config.json",
                kind="model_config",
            ) from error
        layout, layout_reason = _layout(config)
        # A model of text and images may have its dtype at the top alone.
        named = (getattr(c, key, None) for c in (text, config) for key in ("dtype", "torch_dtype"))
        stored = str(next((dtype for dtype in named if dtype is not None), None))
        return cls(
            path=path,
            name=path.name,
            fingerprint=fingerprint,
            num_layers=num_layers,
            num_heads=num_heads,
            head_dim=head_dim,
            d_model=d_model,
            context=int(getattr(text, "max_position_embeddings", None) or 1 << 30),
            # float16 overflows on real activations, so it is never computed in.
            dtype="bfloat16" if "bfloat16" in stored else "float32",
            stored_half="16" in stored,
            layout=layout,
            layout_reason=layout_reason,
            rope_limit=_rope_limit(text),
        )

    def width(self, stream: str) -> int:
        """Width of a stream: d_model, or heads times head_dim for ``z``."""
        return self.num_heads * self.head_dim if stream == "z" else self.d_model


def load_body(
    path: Path, dtype: DtypeName, device: str = "cpu", *, sharded: bool = False
) -> nn.Module:
    """Load a decoder without its language-model head, which extraction never runs.

    Args:
        sharded: Whether it is spread over all devices that the process sees, block by block; the
            device is then not looked at.

    Raises:
        NotFound, InvalidInput: See `ModelInfo.read`.
    """
    return _load(transformers.AutoModel, path, dtype, None if sharded else device)


def load_model(path: Path, dtype: DtypeName, device: str = "cpu") -> nn.Module:
    """Load a causal language model, head included, to generate with.

    Raises:
        NotFound, InvalidInput: See `ModelInfo.read`.
    """
    return _load(transformers.AutoModelForCausalLM, path, dtype, device)


def load_tokenizer(path: Path) -> Any:
    """Load a model folder's tokenizer.

    Raises:
        NotFound, InvalidInput: No folder, or no tokenizer in it.
    """
    return _loaded(
        path, "tokenizer", lambda: transformers.AutoTokenizer.from_pretrained(path, **_SAFE)
    )


def _layout(config: Any) -> tuple[Layout, str | None]:
    """How a model's prompts can be packed, told from its configuration and class alone."""
    text = config.get_text_config()
    other = sorted(set(getattr(text, "layer_types", None) or ()) - _TRIE_LAYERS)
    if other:
        return "batches", f"its layers of {', '.join(other)} read their tokens in order"
    if getattr(text, "alibi", False):
        return "batches", "ALiBi counts positions along the input, not along the trie"
    kind: Any = transformers.MODEL_MAPPING.get(type(config), None)
    name = getattr(kind, "__name__", type(config).__name__)
    if getattr(kind, "_is_stateful", False):
        return "batches", f"{name} keeps a state from token to token"
    if getattr(kind, "_supports_attention_backend", False):
        return "trie", None
    if text.model_type in _TAKE_MASKS:
        return "masks", f"{name} takes no attention but transformers' own"
    return "batches", f"{name} takes no attention but transformers' own"


def _rope_limit(text: Any) -> int | None:
    """Tokens past which a prompt changes the rotary embedding of all that it is computed with."""
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for one in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if one.get("rope_type", one.get("type")) == "longrope":
            limit = one.get("original_max_position_embeddings")
            return int(limit or text.original_max_position_embeddings)
    return None


def _load(kind: Any, path: Path, dtype: DtypeName, device: str | None) -> nn.Module:
    # Its report would warn of the head that a body leaves out; what is missing is refused below.
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        model, report = _loaded(
            path,
            "model",
            lambda: kind.from_pretrained(
                path,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                output_loading_info=True,
                device_map="auto" if device is None else None,
                **_SAFE,
            ),
        )
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    if absent := sorted(report["missing_keys"]):
        raise InvalidInput(
            f"model {os.fspath(path)!r}: {len(absent)} weights are not in its safetensors files, "
            f"such as {absent[0]}; they would be random. Save the model again",
            kind="model_weights",
        )
    loaded: nn.Module = model if device is None else model.to(device)
    return loaded.eval().requires_grad_(False)


def _loaded(path: Path, what: str, load: Callable[[], _T]) -> _T:
    # A path that does not exist would be taken for a hub's repository name.
    if not Path(path).is_dir():
        raise NotFound(
            f"model folder {os.fspath(path)!r} does not exist; expected a folder as "
            "save_pretrained writes it",
            kind="model_folder",
        )
    try:
        return load()
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(
            f"{what} of {os.fspath(path)!r} cannot be loaded: {error}", kind="model_load"
        ) from error
