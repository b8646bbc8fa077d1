"""Every stream of every family against references that know the family by hand.

The references use PyTorch hooks of their own on modules named here, `output_hidden_states`, and
arithmetic; they share no code with `steering_service.adapters`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from steering_service.adapters.hooks import hooked
from steering_service.adapters.sites import ModelSites
from steering_service.adapters.sums import check_sums
from steering_service.core.errors import InvalidInput
from steering_service.core.site import STREAMS, Site, Stream

# Not 0: the embedding of the padding token is zero, which has no relative error.
IDS_BT = torch.arange(1, 23).view(2, 11)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class ByHand:
    """Names of a family's modules: what adds attention's and the MLP's output, and how often."""

    blocks: str
    projection: str
    attn_end: str
    mlp_end: str
    parallel: bool = False
    scale: float = 1.0


LLAMA = ByHand("model.layers", "self_attn.o_proj", "self_attn", "mlp")
POST_NORMS = ByHand(
    "model.layers",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "post_feedforward_layernorm",
)
# transformers 4 calls it otherwise; what is found by shape does not mind.
MIXTRAL_MLP = "block_sparse_moe" if transformers.__version__.startswith("4.") else "mlp"
NEOX = ByHand("gpt_neox.layers", "attention.dense", "attention", "mlp")
FALCON = ByHand("transformer.h", "self_attention.dense", "self_attention", "mlp", parallel=True)
PARALLEL = ByHand("model.layers", "self_attn.o_proj", "self_attn", "mlp", parallel=True)
FAMILIES = {
    "llama": LLAMA,
    "llama-mha": LLAMA,
    "llama-wide-heads": LLAMA,
    "mistral-window": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "qwen3-moe": LLAMA,
    "gemma": LLAMA,
    "gemma2": POST_NORMS,
    "gemma3": POST_NORMS,
    "phi3": LLAMA,
    "mixtral": ByHand(LLAMA.blocks, LLAMA.projection, LLAMA.attn_end, MIXTRAL_MLP),
    "gpt-neox": ByHand(NEOX.blocks, NEOX.projection, "attention", "mlp", parallel=True),
    "gpt-neox-sequential": NEOX,
    "gpt2": ByHand("transformer.h", "attn.c_proj", "attn", "mlp"),
    "olmo2": POST_NORMS,
    "falcon": FALCON,
    "falcon-7b": FALCON,
    "falcon-rw": ByHand(FALCON.blocks, FALCON.projection, "self_attention", "mlp"),
    "granite": ByHand("model.layers", "self_attn.o_proj", "self_attn", "mlp", scale=0.22),
    "cohere": PARALLEL,
    "cohere2": PARALLEL,
    "phi": ByHand("model.layers", "self_attn.dense", "self_attn", "mlp", parallel=True),
    "stablelm": LLAMA,
    "stablelm-parallel": PARALLEL,
}

Load = Callable[..., Any]


def stir(model: Any) -> None:
    """No norm and no bias is left at its initial value, where it would hide."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.3)


@pytest.fixture(scope="module")
def load(make_model: Callable[..., Path]) -> Load:
    loaded: dict[Any, Any] = {}

    def load(family: str, dtype: torch.dtype = torch.float32) -> Any:
        if (family, dtype) not in loaded:
            path = make_model(family, edit=stir)
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
            loaded[family, dtype] = model.eval().requires_grad_(False)
        return loaded[family, dtype]

    return load


def sites_of(family: str) -> list[Site]:
    return [Site(stream, layer) for stream in streams_of(family) for layer in range(3)]


def streams_of(family: str) -> list[Stream]:
    return [s for s in STREAMS if not (s == "resid_mid" and FAMILIES[family].parallel)]


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def raw_hooks(hooks: list[tuple[Any, Callable[..., Any], bool]]) -> Iterator[None]:
    """(module, hook, before) by PyTorch alone."""
    handles = [
        m.register_forward_pre_hook(h) if before else m.register_forward_hook(h)
        for m, h, before in hooks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_hand(model: Any, family: str) -> dict[str, Tensor]:
    """Every stream at every layer, by modules named above and by arithmetic."""
    names = FAMILIES[family]
    want: dict[str, Tensor] = {}

    def keep(key: str) -> Callable[..., None]:
        return lambda _m, args, output: want.__setitem__(key, first(output).clone())

    def keep_input(key: str) -> Callable[..., None]:
        return lambda _m, args: want.__setitem__(key, args[0].clone())

    hooks: list[Any] = []
    for layer in range(3):
        block = model.get_submodule(f"{names.blocks}.{layer}")
        hooks += [
            (block.get_submodule(names.attn_end), keep(f"attn_out.{layer}"), False),
            (block.get_submodule(names.mlp_end), keep(f"mlp_out.{layer}"), False),
            (block.get_submodule(names.projection), keep_input(f"z.{layer}"), True),
            (block, keep(f"resid_post.{layer}"), False),
        ]
    with torch.inference_mode(), raw_hooks(hooks):
        hidden = model(IDS_BT, output_hidden_states=True, use_cache=False).hidden_states
    for layer in range(3):
        want[f"resid_pre.{layer}"] = hidden[layer]
        for branch in ("attn_out", "mlp_out"):
            want[f"{branch}.{layer}"] = want[f"{branch}.{layer}"] * names.scale
        if not names.parallel:
            want[f"resid_mid.{layer}"] = hidden[layer] + want[f"attn_out.{layer}"]
    return want


def error(got: Tensor, want: Tensor) -> float:
    """Largest error of a row, relative to its norm."""
    got, want = got.double(), want.double()
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_stream_is_that_of_the_family(
    load: Load, read_streams: Any, family: str, dtype: torch.dtype
) -> None:
    model = load(family, dtype)
    got, want = read_streams(model, IDS_BT, streams_of(family)), by_hand(model, family)
    assert got.keys() == want.keys()
    for site, value in want.items():
        assert got[site].dtype == dtype
        assert got[site].shape == value.shape
        assert error(got[site], value) <= TOLERANCES[dtype], site
    for layer in range(3):
        pre, attn, mlp, post = (
            got[f"{stream}.{layer}"]
            for stream in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        )
        assert error(pre + attn + mlp, post) <= TOLERANCES[dtype]
        # Both branches count: neither is lost in the tolerance.
        assert error(pre + attn, post) > 0.05
        assert error(pre + mlp, post) > 0.05


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sums_hold_on_real_tokens(load: Load, family: str, dtype: torch.dtype) -> None:
    check_sums(ModelSites.of(load(family, dtype)), IDS_BT, sites_of(family))


def add(width: int) -> Tensor:
    """Not a constant, which a layer norm would take away; a short binary fraction."""
    return (torch.arange(width) % 7 - 3) / 8


@pytest.mark.parametrize("stream", ["resid_mid", "attn_out", "mlp_out", "z"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_is_the_edit_of_the_family(load: Load, family: str, stream: Stream) -> None:
    model, names = load(family), FAMILIES[family]
    sites = ModelSites.of(model)
    site = Site(stream, 1)
    if stream == "resid_mid" and names.parallel:
        with pytest.raises(InvalidInput, match="is parallel") as caught:
            sites.check(site)
        assert caught.value.kind == "site_parallel"
        return
    delta = add(sites.width(stream))
    block = model.get_submodule(f"{names.blocks}.1")

    def add_to_output(module: Any, args: Any, output: Any) -> Any:
        edited = first(output) + delta / names.scale
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    if stream == "z":
        projection = block.get_submodule(names.projection)
        hook = (projection, lambda _m, args: (args[0] + delta,), True)
    else:
        # What is added to what attention adds is added to the stream after it.
        end = names.mlp_end if stream == "mlp_out" else names.attn_end
        hook = (block.get_submodule(end), add_to_output, False)
    with torch.inference_mode():
        plain = model(IDS_BT, use_cache=False).logits
        with raw_hooks([hook]):
            want = model(IDS_BT, use_cache=False).logits
        with hooked(sites, {site: lambda h: h + delta}):
            got = model(IDS_BT, use_cache=False).logits
    assert error(got, want) <= 1e-5
    assert error(plain, want) > 1e-2


def test_an_edit_of_resid_mid_reaches_norm_and_residual(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("llama")
    sites = ModelSites.of(model)
    block, delta = sites.blocks[1], add(64)
    with torch.inference_mode(), hooked(sites, {Site("resid_mid", 1): lambda h: h + delta}):
        got = model(IDS_BT, use_cache=False).logits

    def by_formula(hidden: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = block.self_attn(hidden_states=block.input_layernorm(hidden), **kwargs)
        mid = hidden + attended + delta
        return mid + block.mlp(block.post_attention_layernorm(mid))

    monkeypatch.setattr(block, "forward", by_formula)
    with torch.inference_mode():
        want = model(IDS_BT, use_cache=False).logits
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", ["llama", "granite", "olmo2"])
@pytest.mark.parametrize("stream", ["resid_mid", "attn_out", "mlp_out"])
def test_gradients_flow_through_an_edit(load: Load, family: str, stream: Stream) -> None:
    model = load(family)
    sites, names = ModelSites.of(model), FAMILIES[family]
    end = names.mlp_end if stream == "mlp_out" else names.attn_end
    module = sites.blocks[1].get_submodule(end)

    def add_to_output(module: Any, args: Any, output: Any) -> Any:
        edited = first(output) + delta / names.scale
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    gradients = []
    for ours in (True, False):
        delta = add(64).requires_grad_()
        # The product needs the values from before the edit for its gradient.
        taps = {Site(stream, 1): lambda h, delta=delta: h + delta + 0 * (delta * h)}
        context = hooked(sites, taps) if ours else raw_hooks([(module, add_to_output, False)])
        with context:
            model(IDS_BT, use_cache=False).logits.square().sum().backward()
        assert delta.grad is not None
        gradients.append(delta.grad)
    assert error(gradients[0], gradients[1]) <= 1e-4


def test_what_a_tap_leaves_keeps_its_bits_where_the_family_scales(load: Load) -> None:
    model = load("granite", torch.bfloat16)
    sites = ModelSites.of(model)

    def edit_last(h: Tensor) -> Tensor:
        edited = h.clone()
        edited[:, -1] += 1.0
        return edited

    with torch.inference_mode():
        plain = model(IDS_BT, use_cache=False).logits
        for stream in ("attn_out", "mlp_out"):
            with hooked(sites, {Site(stream, 1): edit_last}):
                edited = model(IDS_BT, use_cache=False).logits
            assert torch.equal(edited[:, :-1], plain[:, :-1])
            assert not torch.equal(edited[:, -1], plain[:, -1])


def test_edits_come_in_the_order_of_the_block(load: Load) -> None:
    """A tap sees what the taps before it have edited."""
    model = load("gemma2")
    seen: dict[str, Tensor] = {}
    order = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")

    def tap(stream: str) -> Callable[[Tensor], Tensor]:
        def edit(h: Tensor) -> Tensor:
            seen[stream] = h + 0.25
            return seen[stream].clone()

        return edit

    sites = ModelSites.of(model)
    with torch.inference_mode(), hooked(sites, {Site(s, 1): tap(s) for s in order}):
        model(IDS_BT, use_cache=False)
    assert list(seen) == list(order)
    assert error(seen["resid_mid"], seen["resid_pre"] + seen["attn_out"] + 0.25) <= 1e-5
    assert error(seen["resid_post"], seen["resid_mid"] + seen["mlp_out"] + 0.25) <= 1e-5


# Tied blocks: one module at several places.


@pytest.fixture(scope="module")
def tied(make_model: Callable[..., Path]) -> Any:
    path = make_model("llama-wide-heads", edit=stir)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([layers[0], layers[1], layers[0]])
    return model.requires_grad_(False)


def test_tied_blocks_are_told_apart(tied: Any, read_streams: Any) -> None:
    seen = read_streams(tied, IDS_BT, STREAMS)
    with torch.inference_mode():
        hidden = [tied.model.embed_tokens(IDS_BT)]
        positions = torch.arange(11)[None]
        rotary = tied.model.rotary_emb(hidden[0], positions)
        for layer in range(3):
            block = tied.model.layers[layer]
            normed = block.input_layernorm(hidden[-1])
            attended, _ = block.self_attn(normed, position_embeddings=rotary, attention_mask=None)
            mid = hidden[-1] + attended
            hidden.append(mid + block.mlp(block.post_attention_layernorm(mid)))
            assert error(seen[f"resid_pre.{layer}"], hidden[layer]) <= 1e-5
            assert error(seen[f"attn_out.{layer}"], attended) <= 1e-5
            assert error(seen[f"resid_mid.{layer}"], mid) <= 1e-5
            assert error(seen[f"resid_post.{layer}"], hidden[-1]) <= 1e-5
    assert error(seen["z.0"], seen["z.2"]) > 1e-2
    check_sums(ModelSites.of(tied), IDS_BT, [Site(s, i) for s in STREAMS for i in range(3)])


@pytest.mark.parametrize("stream", STREAMS)
def test_an_edit_of_a_tied_block_is_at_its_layer_only(
    tied: Any, read_streams: Any, stream: Stream
) -> None:
    sites = ModelSites.of(tied)
    plain, edited = read_streams(tied, IDS_BT, ["resid_pre", "resid_post"]), {}
    interrupt = [True]

    def stop(h: Tensor) -> None:
        if interrupt[0]:
            raise RuntimeError("stopped")

    with hooked(sites, {Site(stream, 2): lambda h: h + 1.0, Site("resid_pre", 1): stop}):
        # A forward pass that was cut short does not shift the count of the next one.
        with pytest.raises(RuntimeError, match="stopped"):
            read_streams(tied, IDS_BT, ["resid_post"])
        interrupt[0] = False
        edited = read_streams(tied, IDS_BT, ["resid_pre", "resid_post"])
    for layer in range(2):
        assert torch.equal(edited[f"resid_post.{layer}"], plain[f"resid_post.{layer}"])
    assert error(edited["resid_post.2"], plain["resid_post.2"]) > 1e-2
