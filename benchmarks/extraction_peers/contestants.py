"""The peers, each called as its own documentation calls it.

This module runs in a peer's own environment: it may import nothing of ours, and each peer only
inside its own class. All of them take texts and hand back, in the order of the texts, the last
token's activations at every layer. Batches of 16 everywhere.

Shapes: N texts, B texts of a batch, T positions, L layers, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol

import numpy as np
import torch

BATCH: Final = 16
NORMED_LAST: Final = "resid_post_normed"
"""Like resid_post, but the last layer is behind the final norm, as in `hidden_states[-1]`."""

Rows = dict[str, np.ndarray[Any, Any]]


class Contestant(Protocol):
    """A way to get activations.

    Attributes:
        distribution: What it is called on PyPI.
        gives: The streams that it returns; one that lacks ``z`` does less work than ours.
    """

    distribution: ClassVar[str]
    gives: ClassVar[tuple[str, ...]]

    def load(self, model: Path, device: str, dtype: torch.dtype) -> None:
        """Get everything ready that does not depend on the texts."""

    def run(self, texts: Sequence[str]) -> Rows:
        """By stream, [N, L, W] float32."""


class _Transformers:
    """What those have in common that hold a plain transformers model."""

    def load(self, model: Path, device: str, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        self.model.to(device).eval()

    def batch(self, texts: Sequence[str]) -> tuple[Any, tuple[torch.Tensor, torch.Tensor]]:
        """Texts padded on the right, and the index of each one's last token."""
        batch = self.tokenizer(
            list(texts), padding=True, add_special_tokens=False, return_tensors="pt"
        ).to(self.model.device)
        last_B = batch["attention_mask"].sum(-1) - 1
        return batch, (torch.arange(len(texts), device=last_B.device), last_B)


class PlainUnsorted(_Transformers):
    """``output_hidden_states=True``, and hooks for z, which that does not give."""

    distribution: ClassVar[str] = "transformers"
    gives: ClassVar[tuple[str, ...]] = (NORMED_LAST, "z")

    def order(self, texts: Sequence[str]) -> list[int]:
        return list(range(len(texts)))

    @torch.no_grad()
    def run(self, texts: Sequence[str]) -> Rows:
        order = self.order(texts)
        hidden: list[torch.Tensor] = []
        z: list[torch.Tensor] = []
        for part in _batches(order):
            batch, last = self.batch([texts[i] for i in part])
            kept: list[torch.Tensor] = []
            handles = [
                layer.self_attn.o_proj.register_forward_pre_hook(
                    lambda _, args, kept=kept, last=last: kept.append(args[0][last])
                )
                for layer in self.model.model.layers
            ]
            states = self.model(**batch, output_hidden_states=True).hidden_states
            for handle in handles:
                handle.remove()
            hidden.append(torch.stack([h[last] for h in states[1:]], dim=1).cpu())
            z.append(torch.stack(kept, dim=1).cpu())
        back = np.argsort(order)
        return {NORMED_LAST: _rows(hidden)[back], "z": _rows(z)[back]}


class PlainSorted(PlainUnsorted):
    """The same, sorted by length, so that there is hardly any padding."""

    def order(self, texts: Sequence[str]) -> list[int]:
        ids = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return sorted(range(len(texts)), key=lambda i: len(ids[i]))


class TransformerLens:
    """`TransformerBridge.run_with_cache`; `HookedTransformer` is gone since version 4."""

    distribution: ClassVar[str] = "transformer-lens"
    gives: ClassVar[tuple[str, ...]] = ("resid_post", "z")

    def load(self, model: Path, device: str, dtype: torch.dtype) -> None:
        from transformer_lens.model_bridge import TransformerBridge  # type: ignore[import-not-found]

        self.model: Any = TransformerBridge.boot_transformers(
            str(model), device=device, dtype=dtype
        )

    @torch.no_grad()
    def run(self, texts: Sequence[str]) -> Rows:
        layers = range(self.model.cfg.n_layers)
        names = {
            "resid_post": [f"blocks.{i}.hook_resid_post" for i in layers],
            "z": [f"blocks.{i}.attn.hook_z" for i in layers],
        }
        kept: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for part in _batches(texts):
            # The template has written the first token already.
            tokens = self.model.to_tokens(list(part), prepend_bos=False, padding_side="right")
            mask = (tokens != self.model.tokenizer.pad_token_id).long()
            _, cache = self.model.run_with_cache(
                tokens, attention_mask=mask, names_filter=[*names["resid_post"], *names["z"]]
            )
            last = (torch.arange(len(part)), mask.sum(-1).cpu() - 1)
            for name, hooks in names.items():
                rows = [cache[hook][last].flatten(1) for hook in hooks]
                kept[name].append(torch.stack(rows, dim=1).cpu())
        return {name: _rows(parts) for name, parts in kept.items()}


class NNsight:
    """`LanguageModel.trace` over a batch, saving the last token of every layer."""

    distribution: ClassVar[str] = "nnsight"
    gives: ClassVar[tuple[str, ...]] = ("resid_post", "z")

    def load(self, model: Path, device: str, dtype: torch.dtype) -> None:
        from nnsight import LanguageModel  # type: ignore[import-not-found]

        self.model: Any = LanguageModel(str(model), dtype=dtype, dispatch=True)
        self.model.to(device)
        # With padding on the left, the last position is the last token.
        self.model.tokenizer.padding_side = "left"

    @torch.no_grad()
    def run(self, texts: Sequence[str]) -> Rows:
        import nnsight

        model = self.model
        resid_post: list[torch.Tensor] = []
        zs: list[torch.Tensor] = []
        for part in _batches(texts):
            with model.trace(list(part)):
                z = nnsight.save([])
                outputs = nnsight.save([])
                for layer in model.model.layers:
                    z.append(layer.self_attn.o_proj.input[:, -1])
                    outputs.append(layer.output[:, -1])
            resid_post.append(torch.stack(list(outputs), dim=1).cpu())
            zs.append(torch.stack(list(z), dim=1).cpu())
        return {"resid_post": _rows(resid_post), "z": _rows(zs)}


class SteeringVectors(_Transformers):
    """`record_activations` around a batch; it has no way to z."""

    distribution: ClassVar[str] = "steering-vectors"
    gives: ClassVar[tuple[str, ...]] = ("resid_post",)

    @torch.no_grad()
    def run(self, texts: Sequence[str]) -> Rows:
        from steering_vectors import record_activations  # type: ignore[import-not-found]

        rows: list[torch.Tensor] = []
        for part in _batches(texts):
            batch, last = self.batch(part)
            with record_activations(self.model, layer_type="decoder_block") as recorded:
                self.model(**batch)
            layers = [recorded[i][-1][last] for i in sorted(recorded)]
            rows.append(torch.stack(layers, dim=1).cpu())
        return {"resid_post": _rows(rows)}


class InterpEngine:
    """`capture` on the eager backend, with that backend's own choice of attention."""

    distribution: ClassVar[str] = "interp-engine"
    gives: ClassVar[tuple[str, ...]] = ("resid_post", "z")

    def load(self, model: Path, device: str, dtype: torch.dtype) -> None:
        from interp_engine import load_model  # type: ignore[import-not-found]

        self.model: Any = load_model(
            str(model), backend="eager", device=device, dtype=str(dtype).removeprefix("torch.")
        )
        self.tokenizer: Any = self.model.tokenizer

    def run(self, texts: Sequence[str]) -> Rows:
        from interp_engine import Address, capture

        points = {
            name: [Address(name, i) for i in range(self.model.n_layers)] for name in self.gives
        }
        kept: dict[str, list[torch.Tensor]] = {name: [] for name in points}
        for part in _batches(texts):
            batch = self.tokenizer(
                list(part), padding=True, add_special_tokens=False, return_tensors="pt"
            )
            mask = batch["attention_mask"]
            cache = capture(
                self.model,
                batch["input_ids"],
                [*points["resid_post"], *points["z"]],
                attention_mask=mask,
            )
            last = (torch.arange(len(part)), mask.sum(-1).cpu() - 1)
            for name, addresses in points.items():
                rows = [cache[address][last].flatten(1) for address in addresses]
                kept[name].append(torch.stack(rows, dim=1).cpu())
        return {name: _rows(parts) for name, parts in kept.items()}


class FpwapPreloaded:
    """`Sweep` over a model in memory, in buckets of like length; it has no way to z."""

    distribution: ClassVar[str] = "fpwap"
    gives: ClassVar[tuple[str, ...]] = ("resid_post",)

    def load(self, model: Path, device: str, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.path, self.device, self.dtype = model, device, dtype
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model, padding_side="left")
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()

    def settings(self) -> dict[str, Any]:
        return {"model": self.model}

    def run(self, texts: Sequence[str]) -> Rows:
        from fpwap import Emit, Sweep  # type: ignore[import-not-found]
        from fpwap.callbacks.common import RawActivations  # type: ignore[import-not-found]

        class InOrder(RawActivations):  # type: ignore[misc]
            """Rows as ragged ones of length one.

            Version 0.1.8 sorts plain rows by the first of each microbatch, which is not the order
            of the texts as soon as there are several buckets; ragged rows it sorts one by one.
            """

            def on_batch(self, *args: Any) -> Any:
                emit = super().on_batch(*args)
                ones = torch.ones(len(emit.tensor), dtype=torch.int64)
                return Emit(emit.tensor, dtype=emit.dtype, sample_lengths=ones)

        # It takes items of one length, and cuts them to buckets of 64, 128, 256, … by itself.
        batch = self.tokenizer(
            list(texts), padding=True, add_special_tokens=False, return_tensors="pt"
        )
        items = [
            {"input_ids": ids, "attention_mask": mask}
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        result = Sweep(
            dataset=items,
            seq_len=int(batch["input_ids"].shape[1]),
            callbacks=[InOrder(layers="all", out_dtype=torch.float32)],
            transport_dtype=self.dtype,
            microbatch_size=BATCH,
            execution_device=self.device,
            buffer_device="cpu",
            apply_final_norm=False,
            padding="bucketed",
            progress=False,
            **self.settings(),
        ).run()
        layers = [
            result.activations(layer=i, hook="residual_post").flat for i in range(self.num_layers())
        ]
        return {"resid_post": torch.stack(layers, dim=1).float().numpy()}

    def num_layers(self) -> int:
        from transformers import AutoConfig

        return int(AutoConfig.from_pretrained(self.path).num_hidden_layers)


class FpwapStreaming(FpwapPreloaded):
    """The same from a folder of safetensors: a layer is loaded, used for all texts, and dropped."""

    def load(self, model: Path, device: str, dtype: torch.dtype) -> None:
        from transformers import AutoTokenizer

        self.path, self.device, self.dtype = model, device, dtype
        self.tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")

    def settings(self) -> dict[str, Any]:
        return {"model": str(self.path), "snapshot_dir": str(self.path)}


class BareForward:
    """No peer but a bound: the decoder body alone, on all tokens of the texts with no padding.

    The tokens are cut into rows of the texts' mean length, so that every batch is full.
    """

    distribution: ClassVar[str] = "transformers"
    gives: ClassVar[tuple[str, ...]] = ()

    def load(self, model: Path, device: str, dtype: torch.dtype) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.model: Any = AutoModel.from_pretrained(model, dtype=dtype).to(device).eval()

    @torch.inference_mode()
    def run(self, texts: Sequence[str]) -> Rows:
        ids = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([token for row in ids for token in row])
        width = len(tokens) // len(ids)
        # The fewer than `width` tokens that are left over are not run: to the bound's advantage.
        for rows_BT in tokens[: len(tokens) // width * width].view(-1, width).split(BATCH):
            states = self.model(input_ids=rows_BT.to(self.model.device), use_cache=False)
            # Waits for a GPU.
            states.last_hidden_state[0, 0, 0].item()
        return {}


CONTESTANTS: Final[dict[str, type[Contestant]]] = {
    "transformers_sorted": PlainSorted,
    "transformers_unsorted": PlainUnsorted,
    "transformer_lens": TransformerLens,
    "nnsight": NNsight,
    "steering_vectors": SteeringVectors,
    "interp_engine": InterpEngine,
    "fpwap_preloaded": FpwapPreloaded,
    "fpwap_streaming": FpwapStreaming,
    "bare_forward": BareForward,
}
PEERS: Final = tuple(name for name in CONTESTANTS if name != "bare_forward")
TYPICAL: Final = ("transformers_unsorted", "transformer_lens", "nnsight", "steering_vectors")
"""The peers that most people use; see `pairs_vs_typical_peer`."""


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    yield from (items[i : i + BATCH] for i in range(0, len(items), BATCH))


def _rows(parts: Sequence[torch.Tensor]) -> np.ndarray[Any, Any]:
    return torch.cat(list(parts)).float().numpy()
