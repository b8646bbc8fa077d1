"""Families that nobody has seen before: found by shape without code, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close

from steering_service.adapters.hooks import hooked
from steering_service.adapters.sites import ModelSites
from steering_service.adapters.sums import check_sums
from steering_service.core.errors import InvalidInput
from steering_service.core.site import STREAMS, Site, Stream

IDS_BT = torch.arange(1, 23).view(2, 11)
SITES = [Site(stream, layer) for stream in STREAMS for layer in range(3)]


class NewConfig(transformers.PretrainedConfig):
    model_type = "steerage_new"

    def __init__(self, wiring: str = "scaled", **kwargs: Any) -> None:
        self.wiring = wiring
        self.vocab_size, self.hidden_size = 320, 64
        self.num_hidden_layers, self.num_attention_heads, self.head_dim = 3, 4, 24
        super().__init__(**kwargs)


class Mixing(torch.nn.Module):
    """Attention with one projection inward and one outward, and a tuple of three returned."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = torch.nn.Linear(64, 3 * 96)
        self.outward = torch.nn.Linear(96, 64)

    def forward(self, states: Tensor, causal: bool) -> tuple[Tensor, None, None]:
        q, k, v = (
            part.view(*states.shape[:2], 4, 24).transpose(1, 2)
            for part in self.inward(states).chunk(3, dim=-1)
        )
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.outward(mixed.transpose(1, 2).flatten(2)), None, None


class Thinking(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)

    def forward(self, states: Tensor) -> tuple[Tensor, str]:
        return self.down(self.up(states).tanh()), "router logits"


class Stage(torch.nn.Module):
    def __init__(self, wiring: str) -> None:
        super().__init__()
        self.wiring = wiring
        self.first, self.second, self.last = (torch.nn.LayerNorm(64) for _ in range(3))
        self.mixing, self.thinking = Mixing(), Thinking()

    def forward(self, x: Tensor, causal: bool) -> tuple[Tensor, None]:
        mixed, _, _ = self.mixing(self.first(x), causal=causal)
        if self.wiring == "flat":
            x = (x + mixed).reshape(-1, 64)
            return (x + self.thinking(self.second(x))[0]).view(mixed.shape), None
        if self.wiring == "thought twice":
            x = x + mixed
            return x + self.thinking(self.thinking(self.second(x))[0])[0], None
        if self.wiring == "after the norm":
            x = self.first(x + mixed)
            return self.last(x + self.thinking(x)[0]), None
        x = x + 0.5 * mixed
        # A copy: what is written into it does not reach the residual stream.
        read = x.clone() if self.wiring == "copied" else x
        return x + 0.5 * self.last(self.thinking(self.second(read))[0]), None


class NewModel(transformers.PreTrainedModel):
    config_class = NewConfig

    def __init__(self, config: NewConfig) -> None:
        super().__init__(config)
        self.words = torch.nn.Embedding(320, 64)
        self.stages = torch.nn.ModuleList([Stage(config.wiring) for _ in range(3)])
        self.post_init()

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = self.words(input_ids)
        for stage in self.stages:
            x, _ = stage(x, causal=True)
        return x


def new_model(folder: Path, wiring: str) -> Any:
    torch.manual_seed(0)
    NewModel(NewConfig(wiring)).save_pretrained(folder)
    return NewModel.from_pretrained(folder).eval().requires_grad_(False)


def test_a_new_family_needs_no_code(tmp_path: Path, read_streams: Any) -> None:
    model = new_model(tmp_path, "scaled")
    sites = ModelSites.of(model)
    assert list(sites.blocks) == list(model.stages)
    check_sums(sites, IDS_BT, SITES)
    seen = read_streams(model, IDS_BT, STREAMS)
    with torch.inference_mode():
        x = model.words(IDS_BT)
        for layer, stage in enumerate(model.stages):
            mixed = 0.5 * stage.mixing(stage.first(x), causal=True)[0]
            mid = x + mixed
            thought = 0.5 * stage.last(stage.thinking(stage.second(mid))[0])
            assert_close(seen[f"resid_pre.{layer}"], x)
            assert_close(seen[f"attn_out.{layer}"], mixed)
            assert_close(0.5 * stage.mixing.outward(seen[f"z.{layer}"]), mixed)
            assert_close(seen[f"resid_mid.{layer}"], mid)
            assert_close(seen[f"mlp_out.{layer}"], thought)
            x = mid + thought
            assert_close(seen[f"resid_post.{layer}"], x)


@pytest.mark.parametrize("stream", ["resid_mid", "attn_out", "mlp_out"])
def test_a_family_that_cannot_be_found_says_what_was_looked_for(
    tmp_path: Path, stream: Stream
) -> None:
    sites = ModelSites.of(new_model(tmp_path, "after the norm"))
    with pytest.raises(InvalidInput) as caught:
        sites.check(Site(stream, 1))
    assert caught.value.kind == "model_wiring"
    message = str(caught.value)
    assert "block 1 (Stage)" in message
    assert "looked for resid_post = resid_pre + attn_out + mlp_out" in message
    assert "found resid_post = last" in message
    assert "mixing (Mixing)" in message
    # Streams between the blocks need none of that.
    sites.check(Site("resid_post", 1))


@pytest.mark.parametrize(
    ("wiring", "why"),
    [
        ("flat", "'thinking' works on positions without sequences"),
        ("thought twice", "'thinking' is called more than once"),
    ],
)
def test_what_hooks_would_get_wrong_is_refused(tmp_path: Path, wiring: str, why: str) -> None:
    sites = ModelSites.of(new_model(tmp_path, wiring))
    with pytest.raises(InvalidInput, match=why) as caught:
        sites.check(Site("mlp_out", 0))
    assert caught.value.kind == "model_wiring"


def test_resid_mid_that_is_handed_on_as_a_copy_is_read_only(tmp_path: Path) -> None:
    model = new_model(tmp_path, "copied")
    sites, site = ModelSites.of(model), Site("resid_mid", 1)
    check_sums(sites, IDS_BT, SITES)
    with pytest.raises(InvalidInput, match="can be read but not edited") as caught:
        sites.check(site, edit=True)
    assert caught.value.kind == "site_read_only"
    with hooked(sites, {site: lambda h: h + 1.0}), pytest.raises(InvalidInput, match="not edited"):
        model(IDS_BT)


def test_a_model_without_weights_is_read_as_well() -> None:
    """Layer streaming asks for the sites of a model whose blocks are on the meta device."""
    config = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=8)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    wiring = ModelSites.of(model).wiring(1)
    block = model.model.layers[1]
    assert wiring.attn_out.end is block.self_attn
    assert wiring.mid is block.post_attention_layernorm


def test_the_model_is_as_it_was_after_it_was_looked_at(load_model: Any) -> None:
    block = load_model("gemma2").model.layers[0]
    before = dict(block.__dict__), dict(block._modules)
    ModelSites.of(load_model("gemma2")).wiring(0)
    assert (block.__dict__, block._modules) == before


@pytest.mark.parametrize(
    ("module", "streams", "name"),
    [
        ("", ["mlp_out"], "resid_post.1"),
        ("", ["attn_out"], "resid_post.1"),
        ("", ["resid_mid"], "resid_post.1"),
        ("self_attn", ["z"], "the output of the attention of block 1"),
    ],
)
def test_wrong_sums_are_refused(load_model: Any, module: str, streams: Any, name: str) -> None:
    """Something that no child shows is done to what a block or its attention returns."""
    model = load_model("llama")
    sites = ModelSites.of(model)
    changed = sites.blocks[1].get_submodule(module)

    def disturb(_m: Any, _a: Any, output: Any) -> Any:
        (output[0] if isinstance(output, tuple) else output).mul_(1.001)

    handle = changed.register_forward_hook(disturb)
    try:
        with pytest.raises(InvalidInput, match=f"{name} is not") as caught:
            check_sums(sites, IDS_BT, [Site(s, i) for s in streams for i in range(3)])
        assert caught.value.kind == "model_sums"
        # Nothing to check for the streams between the blocks, nor at layers that are not wanted.
        check_sums(sites, IDS_BT, [Site("resid_pre", 1), Site("resid_post", 1)])
        check_sums(sites, IDS_BT, [Site(stream, 0) for stream in STREAMS])
    finally:
        handle.remove()
