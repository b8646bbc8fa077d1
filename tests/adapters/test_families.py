"""Every stream of every family against references that know the family by hand.

The references use PyTorch hooks of their own on modules named here, `output_hidden_states`, and
arithmetic; they share no code with `steering_service.adapters`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pipeline.extraction.models import ModelInfo
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


def streams_of(family: str) -> list[Stream]:
    return [s for s in STREAMS if not (s == "resid_mid" and FAMILIES[family].parallel)]


def everywhere(streams: Sequence[Stream]) -> list[Site]:
    return [Site(stream, layer) for stream in streams for layer in range(3)]


def read(model: Any, streams: list[Stream]) -> dict[str, Tensor]:
    """Every stream at every layer, by our taps."""
    sites = ModelSites.of(model)
    seen: dict[str, Tensor] = {}
    wanted = [Site(stream, layer) for stream in streams for layer in range(sites.num_layers)]
    taps = {site: lambda h, site=site: seen.__setitem__(str(site), h.clone()) for site in wanted}
    with torch.inference_mode(), hooked(sites, taps):
        sites.body(IDS_BT, use_cache=False)
    return seen


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
def test_every_stream_is_that_of_the_family(load: Load, family: str, dtype: torch.dtype) -> None:
    model = load(family, dtype)
    got, want = read(model, streams_of(family)), by_hand(model, family)
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
    check_sums(ModelSites.of(load(family, dtype)), IDS_BT, everywhere(streams_of(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_widths_are_known_without_the_weights(
    load: Load, make_model: Callable[..., Path], family: str
) -> None:
    info, sites = ModelInfo.read(make_model(family)), ModelSites.of(load(family))
    for stream in STREAMS:
        assert info.width(stream) == sites.width(stream)
    assert (info.num_layers, info.num_heads) == (sites.num_layers, sites.num_heads)


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


def test_tied_blocks_are_told_apart(tied: Any) -> None:
    seen = read(tied, list(STREAMS))
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
    check_sums(ModelSites.of(tied), IDS_BT, everywhere(STREAMS))


@pytest.mark.parametrize("stream", STREAMS)
def test_an_edit_of_a_tied_block_is_at_its_layer_only(tied: Any, stream: Stream) -> None:
    sites = ModelSites.of(tied)
    plain, edited = read(tied, ["resid_pre", "resid_post"]), {}
    interrupt = [True]

    def stop(h: Tensor) -> None:
        if interrupt[0]:
            raise RuntimeError("stopped")

    with hooked(sites, {Site(stream, 2): lambda h: h + 1.0, Site("resid_pre", 1): stop}):
        # A forward pass that was cut short does not shift the count of the next one.
        with pytest.raises(RuntimeError, match="stopped"):
            read(tied, ["resid_post"])
        interrupt[0] = False
        edited = read(tied, ["resid_pre", "resid_post"])
    for layer in range(2):
        assert torch.equal(edited[f"resid_post.{layer}"], plain[f"resid_post.{layer}"])
    assert error(edited["resid_post.2"], plain["resid_post.2"]) > 1e-2


# Families that nobody has seen before.


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


def test_a_new_family_needs_no_code(tmp_path: Path) -> None:
    model = new_model(tmp_path, "scaled")
    sites = ModelSites.of(model)
    assert list(sites.blocks) == list(model.stages)
    check_sums(sites, IDS_BT, everywhere(STREAMS))
    seen = read(model, list(STREAMS))
    with torch.inference_mode():
        x = model.words(IDS_BT)
        for layer, stage in enumerate(model.stages):
            mixed = 0.5 * stage.mixing(stage.first(x), causal=True)[0]
            mid = x + mixed
            thought = 0.5 * stage.last(stage.thinking(stage.second(mid))[0])
            assert error(seen[f"resid_pre.{layer}"], x) <= 1e-5
            assert error(seen[f"attn_out.{layer}"], mixed) <= 1e-5
            assert error(0.5 * stage.mixing.outward(seen[f"z.{layer}"]), mixed) <= 1e-5
            assert error(seen[f"resid_mid.{layer}"], mid) <= 1e-5
            assert error(seen[f"mlp_out.{layer}"], thought) <= 1e-5
            x = mid + thought
            assert error(seen[f"resid_post.{layer}"], x) <= 1e-5


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
    check_sums(sites, IDS_BT, everywhere(STREAMS))
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


def test_the_model_is_as_it_was_after_it_was_looked_at(load: Load) -> None:
    block = load("gemma2").model.layers[0]
    before = dict(block.__dict__), dict(block._modules)
    ModelSites.of(load("gemma2")).wiring(0)
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
def test_wrong_sums_are_refused(load: Load, module: str, streams: Any, name: str) -> None:
    """Something that no child shows is done to what a block or its attention returns."""
    model = load("llama")
    sites = ModelSites.of(model)
    changed = sites.blocks[1].get_submodule(module)

    def disturb(_m: Any, _a: Any, output: Any) -> Any:
        first(output).mul_(1.001)

    with raw_hooks([(changed, disturb, False)]):
        with pytest.raises(InvalidInput, match=f"{name} is not") as caught:
            check_sums(sites, IDS_BT, everywhere(streams))
        assert caught.value.kind == "model_sums"
        # Nothing to check for the streams between the blocks.
        check_sums(sites, IDS_BT, everywhere(["resid_pre", "resid_post"]))
        # Nor at the layers that are not wanted.
        check_sums(sites, IDS_BT, [Site(stream, 0) for stream in STREAMS])
