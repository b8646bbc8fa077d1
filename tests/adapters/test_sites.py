"""Sites resolve to the same modules in every family, and taps read and write there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.extraction.models import ModelInfo
from steering_service.adapters.hooks import hooked
from steering_service.adapters.sites import ModelSites
from steering_service.core.errors import InvalidInput
from steering_service.core.site import STREAMS, Site

# Where the blocks and the attention output projection are, by hand.
FAMILIES = {
    "llama": ("model.layers", "self_attn.o_proj"),
    "llama-wide-heads": ("model.layers", "self_attn.o_proj"),
    "mistral-window": ("model.layers", "self_attn.o_proj"),
    "qwen2": ("model.layers", "self_attn.o_proj"),
    "qwen3": ("model.layers", "self_attn.o_proj"),
    "gemma2": ("model.layers", "self_attn.o_proj"),
    "phi3": ("model.layers", "self_attn.o_proj"),
    "mixtral": ("model.layers", "self_attn.o_proj"),
    "gpt-neox": ("gpt_neox.layers", "attention.dense"),
    "gpt2": ("transformer.h", "attn.c_proj"),
    "llama-mha": ("model.layers", "self_attn.o_proj"),
    "qwen3-moe": ("model.layers", "self_attn.o_proj"),
    "gemma": ("model.layers", "self_attn.o_proj"),
    "gemma3": ("model.layers", "self_attn.o_proj"),
    "gpt-neox-sequential": ("gpt_neox.layers", "attention.dense"),
    "olmo2": ("model.layers", "self_attn.o_proj"),
    "falcon": ("transformer.h", "self_attention.dense"),
    "falcon-7b": ("transformer.h", "self_attention.dense"),
    "falcon-rw": ("transformer.h", "self_attention.dense"),
    "granite": ("model.layers", "self_attn.o_proj"),
    "cohere": ("model.layers", "self_attn.o_proj"),
    "cohere2": ("model.layers", "self_attn.o_proj"),
    "phi": ("model.layers", "self_attn.dense"),
    "stablelm": ("model.layers", "self_attn.o_proj"),
    "stablelm-parallel": ("model.layers", "self_attn.o_proj"),
}
IDS_1T = torch.arange(7)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_are_those_of_the_family(load_model: Any, family: str) -> None:
    model = load_model(family)
    blocks, projection = FAMILIES[family]
    sites = ModelSites.of(model)
    assert list(sites.blocks) == list(model.get_submodule(blocks))
    for layer in range(sites.num_layers):
        expected = model.get_submodule(f"{blocks}.{layer}.{projection}")
        assert sites.output_projection(layer) is expected
    assert (sites.num_heads, sites.d_model) == (8, 64)
    wide = ("llama-wide-heads", "qwen3", "qwen3-moe", "gemma", "gemma2", "gemma3", "cohere2")
    assert sites.head_dim == (16 if family in wide else 8)
    assert ModelSites.of(sites.body).blocks == sites.blocks


@pytest.mark.parametrize("family", FAMILIES)
def test_widths_are_known_without_the_weights(
    load_model: Any, make_model: Any, family: str
) -> None:
    info, sites = ModelInfo.read(make_model(family)), ModelSites.of(load_model(family))
    for stream in STREAMS:
        assert info.width(stream) == sites.width(stream)
    assert (info.num_layers, info.num_heads) == (sites.num_layers, sites.num_heads)


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_taps_read_what_the_model_reports(load_model: Any, family: str) -> None:
    model = load_model(family)
    sites = ModelSites.of(model)
    seen: dict[Site, torch.Tensor] = {}
    wanted = [Site(stream, layer) for stream in ("resid_pre", "resid_post") for layer in range(3)]
    taps = {site: lambda h, site=site: seen.__setitem__(site, h.clone()) for site in wanted}
    with torch.inference_mode(), hooked(sites, taps):
        hidden = model(IDS_1T, output_hidden_states=True, use_cache=False).hidden_states
    for layer in range(3):
        assert torch.equal(seen[Site("resid_pre", layer)], hidden[layer])
    for layer in range(2):
        assert torch.equal(seen[Site("resid_post", layer)], hidden[layer + 1])
    # hidden_states[-1] is after the final norm, which resid_post is not.
    assert not torch.allclose(seen[Site("resid_post", 2)], hidden[3])


def ramp(h_BTW: torch.Tensor) -> torch.Tensor:
    """Not a constant, which a layer norm would take away."""
    return torch.linspace(-1, 1, h_BTW.shape[-1])


@pytest.mark.parametrize(
    "stream", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_tap_returns_is_what_the_model_goes_on_with(
    load_model: Any, family: str, stream: Any
) -> None:
    model = load_model(family)
    sites = ModelSites.of(model)
    if stream == "resid_mid" and sites.wiring(1).mid is None:
        pytest.skip("a parallel block has no resid_mid")
    with torch.inference_mode():
        plain = model(IDS_1T, use_cache=False).logits
        with hooked(sites, {Site(stream, 1): lambda h: h.clone()}):
            same = model(IDS_1T, use_cache=False).logits
        with hooked(sites, {Site(stream, 1): lambda h: h * 1.5 + ramp(h)}):
            other = model(IDS_1T, use_cache=False).logits
        after = model(IDS_1T, use_cache=False).logits
    assert torch.equal(same, plain)
    assert not torch.allclose(other, plain, atol=1e-3)
    assert torch.equal(after, plain)


class OlderBlock(torch.nn.Module):
    """A block that returns a tuple, as those of transformers 4 do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, str]:
        return self.linear(hidden_states), "attention weights"


def test_tuple_outputs_keep_what_follows_the_hidden_states(model: Any) -> None:
    block = OlderBlock()
    sites = ModelSites(model, (block,), 8, 1, 8)
    h_BTD = torch.randn(2, 3, 8)
    with torch.inference_mode():
        plain, _ = block(h_BTD)
        with hooked(sites, {Site("resid_post", 0): lambda h: h + 1.0}):
            steered, rest = block(h_BTD)
        with hooked(sites, {Site("resid_pre", 0): lambda h: h * 0.0}):
            emptied, _ = block(hidden_states=h_BTD)
    # The whole batch is edited: output[0] of a tuple is not the first sequence.
    assert torch.equal(steered, plain + 1.0)
    assert rest == "attention weights"
    assert torch.allclose(emptied, block.linear.bias.expand(2, 3, 8))


@pytest.mark.parametrize(
    ("site", "kind"),
    [
        ("resid_post.3", "site_layer"),
        ("z.0.8", "site_head"),
        ("mlp_out.3", "site_layer"),
    ],
)
def test_sites_that_the_model_lacks_are_refused(model: Any, site: str, kind: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        ModelSites.of(model).check(Site.parse(site))
    assert caught.value.kind == kind


def test_a_block_without_output_projection_is_refused_by_name() -> None:
    class Config:
        num_hidden_layers, num_attention_heads, hidden_size = 1, 2, 8

        def get_text_config(self) -> Config:
            return self

    class Body(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = Config()
            self.layers = torch.nn.ModuleList([OlderBlock()])

    with pytest.raises(InvalidInput, match="looked for one attention output") as caught:
        ModelSites.of(Body()).check(Site("z", 0))
    assert caught.value.kind == "model_output_projection"


def test_a_model_without_blocks_is_refused(model: Any) -> None:
    head = torch.nn.Linear(2, 2)
    head.config = model.config
    with pytest.raises(InvalidInput) as caught:
        ModelSites.of(head)
    assert caught.value.kind == "model_blocks"
