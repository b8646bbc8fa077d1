"""Engine: what is gathered from packs equals one plain forward of each prompt alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from pipeline.errors import GateRefused, InvalidInput
from pipeline.extraction.engine import ResidentEngine
from pipeline.extraction.models import load_body
from pipeline.extraction.parity import check_parity
from pipeline.extraction.passes import ShardWork
from pipeline.prompts.packing import Packing
from pipeline.prompts.plan import Plan
from pipeline.prompts.trie import PlannedPrompt
from pipeline.prompts.worklist import read_prompts, read_shard
from store.bfloat16 import to_float32

# Where the blocks of the decoder body are, and the attention output projection in each.
FAMILIES = {
    "llama": ("layers", "self_attn.o_proj"),
    "llama-wide-heads": ("layers", "self_attn.o_proj"),
    "mistral-window": ("layers", "self_attn.o_proj"),
    "qwen2": ("layers", "self_attn.o_proj"),
    "qwen3": ("layers", "self_attn.o_proj"),
    "gemma2": ("layers", "self_attn.o_proj"),
    "phi3": ("layers", "self_attn.o_proj"),
    "mixtral": ("layers", "self_attn.o_proj"),
    "gpt-neox": ("layers", "attention.dense"),
    "gpt2": ("h", "attn.c_proj"),
}
STREAMS = 'streams = ["resid_pre", "resid_post", "z"]\ntokens_per_pack = 300\n'


def reference(body: Any, prompt: PlannedPrompt, family: str) -> dict[str, Any]:
    """Float32 [L, T, W] by stream, from one forward of one prompt, with hooks of its own."""
    list_name, projection = FAMILIES[family]
    kept: dict[str, list[torch.Tensor]] = {"z": [], "last": []}
    blocks = body.get_submodule(list_name)
    handles = [
        block.get_submodule(projection).register_forward_pre_hook(
            lambda _m, args: kept["z"].append(args[0][0])
        )
        for block in blocks
    ]
    handles.append(
        blocks[-1].register_forward_hook(
            lambda _m, _a, out: kept["last"].append((out[0] if isinstance(out, tuple) else out)[0])
        )
    )
    with torch.inference_mode():
        ids = torch.tensor(prompt.token_ids)[None]
        hidden = body(ids, output_hidden_states=True, use_cache=False).hidden_states
    for handle in handles:
        handle.remove()
    states = [state[0] for state in hidden[:-1]]
    return {
        "resid_pre": torch.stack(states).float(),
        # The last of hidden_states is after the final norm.
        "resid_post": torch.stack([*states[1:], kept["last"][0]]).float(),
        "z": torch.stack(kept["z"]).float(),
    }


def load(planned: Plan, dtype: Any = "float32", **options: Any) -> ResidentEngine:
    cache = planned.cache
    packing = Packing.read(cache.capture)
    return ResidentEngine.load(planned.model.path, dtype, cache.streams, packing, "cpu", **options)


def compute(planned: Plan, dtype: Any = "float32") -> dict[str, np.ndarray[Any, Any]]:
    """Float32 [rows, L, W] by stream, shard by shard."""
    cache = planned.cache
    layout = next(iter(cache.streams.values()))
    work = [
        ShardWork(shard, layout.shard_rows(shard), read_shard(cache, shard))
        for shard in range(cache.num_shards)
    ]
    parts = [result.values for result in load(planned, dtype).run(work)]
    return {name: to_float32(np.concatenate([part[name] for part in parts])) for name in parts[0]}


def worst_error(planned: Plan, family: str, got: Any, dtype: Any = torch.float32) -> float:
    """Largest error of a row, relative to its norm."""
    body = transformers.AutoModel.from_pretrained(planned.model.path, dtype=dtype).eval()
    worst = 0.0
    for prompt in read_prompts(planned.cache)[::5]:
        wanted = reference(body, prompt, family)
        for name, layout in planned.cache.streams.items():
            for row, (start, stop) in enumerate(prompt.spans, start=prompt.first_row):
                want = wanted[name][list(layout.layers), start:stop].mean(dim=1).numpy()
                difference = np.linalg.norm(got[name][row] - want, axis=-1)
                worst = max(worst, float((difference / np.linalg.norm(want, axis=-1)).max()))
    return worst


@pytest.mark.parametrize("tokens", ["last", "-2", "mean", "all"])
@pytest.mark.parametrize("family", ["llama-wide-heads", "gpt2"])
def test_every_selection_equals_plain_forwards(
    make_model: Any, make_plan: Any, family: str, tokens: str
) -> None:
    planned = make_plan(make_model(family), capture=f'{STREAMS}tokens = "{tokens}"')
    got = compute(planned)
    assert got["z"].shape == (planned.num_rows, 3, 128 if family == "llama-wide-heads" else 64)
    assert worst_error(planned, family, got) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_plain_forwards(make_model: Any, make_plan: Any, family: str) -> None:
    planned = make_plan(make_model(family), capture=f'{STREAMS}tokens = "mean"')
    assert worst_error(planned, family, compute(planned)) < 1e-5
    parity = check_parity(load(planned), read_prompts(planned.cache), "float32")
    assert parity.worst < 1e-5
    assert parity.num_prompts >= 4


PARALLEL = {"gpt-neox", "falcon", "falcon-7b", "cohere", "cohere2", "phi", "stablelm-parallel"}
EVERY_FAMILY = [
    *("llama", "llama-mha", "llama-wide-heads", "qwen2", "qwen3", "qwen3-moe", "gemma", "gemma2"),
    *("gemma3", "mistral-window", "mixtral", "phi3", "phi", "gpt-neox", "gpt-neox-sequential"),
    *("gpt2", "olmo2", "falcon", "falcon-7b", "falcon-rw", "granite", "cohere", "cohere2"),
    *("stablelm", "stablelm-parallel"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_stream_of_every_family_equals_plain_forwards(
    make_model: Any, make_plan: Any, family: str, dtype: str, tolerance: float
) -> None:
    streams = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z"]
    if family in PARALLEL:
        streams.remove("resid_mid")
    capture = f'streams = {json.dumps(streams)}\ntokens = "last_3"\ntokens_per_pack = 70'
    system = "the ship steers to the north, and the crew answers the captain"
    planned = make_plan(
        make_model(family),
        capture=capture,
        rest=f'dtype = "{dtype}"',
        prompts=f'system = "{system}"',
    )
    # Every prompt is compared with its own plain forward, and every stream with its definition.
    prompts = read_prompts(planned.cache)
    parity = check_parity(load(planned, dtype), prompts, dtype, num_prompts=2 * len(prompts))
    assert parity.num_prompts == len(prompts)
    assert parity.worst < tolerance
    expected = "batches" if family in ("falcon-rw", "stablelm", "stablelm-parallel") else "trie"
    assert planned.packing.layout == ("masks" if family in ("falcon", "falcon-7b") else expected)


@pytest.mark.parametrize(("packing", "layout"), [("trie", "trie"), ("batches", "batches")])
@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", "gpt2"])
def test_prompts_under_one_long_system_prompt_equal_plain_forwards(
    make_model: Any, make_plan: Any, family: str, packing: str, layout: str
) -> None:
    capture = f'{STREAMS}tokens = "last_3"\npacking = "{packing}"'
    system = "the ship steers to the north, and the crew answers the captain; " * 3
    planned = make_plan(
        make_model(family),
        capture=capture.replace("300", "40"),
        prompts=f'system = "{system}"',
    )
    assert planned.packing.layout == layout
    # Longer than a pack: computed once a worker, and carried into the packs.
    assert layout == "batches" or planned.packing.prefix > 40
    assert worst_error(planned, family, compute(planned)) < 1e-5


@pytest.mark.parametrize(("words", "layout"), [(2, "trie"), (70, "batches")])
def test_prompts_that_change_the_rotary_embedding_are_computed_alone(
    make_model: Any, make_plan: Any, words: int, layout: str
) -> None:
    texts = [f"{i}: " + "north " * (words if i % 3 == 0 else 1) for i in range(24)]
    rows = [{"prompt": text, "positive": "a", "negative": "b"} for text in texts]
    planned = make_plan(make_model("phi3-longrope"), rows=rows, capture='tokens = "last_3"')
    lengths = [len(prompt.token_ids) for prompt in read_prompts(planned.cache)]
    assert (max(lengths) > 60) == (layout == "batches")
    assert min(lengths) < 40
    assert planned.packing.layout == layout
    assert ("longer than 60" in (planned.packing_reason or "")) == (layout == "batches")
    prompts = read_prompts(planned.cache)
    parity = check_parity(load(planned), prompts, "float32", num_prompts=2 * len(prompts))
    assert parity.worst < 1e-5


def test_shards_do_not_depend_on_what_was_computed_before(make_plan: Any) -> None:
    system = "the ship steers to the north, and the crew answers the captain"
    planned = make_plan(capture=STREAMS, prompts=f'system = "{system}"')
    layout = planned.cache.layout("z")
    work = [
        ShardWork(shard, layout.shard_rows(shard), read_shard(planned.cache, shard))
        for shard in range(planned.cache.num_shards)
    ]
    forwards = list(load(planned).run(work))
    backwards = [next(iter(load(planned).run([one]))) for one in reversed(work)][::-1]
    assert len(work) > 1
    for one, other in zip(forwards, backwards, strict=True):
        for name, values in one.values.items():
            assert values.tobytes() == other.values[name].tobytes()


def test_blocks_above_the_highest_wanted_layer_are_dropped(make_model: Any, make_plan: Any) -> None:
    planned = make_plan(make_model("qwen2"), capture=f"{STREAMS}layers = [1, 0]")
    assert len(load(planned).body.layers) == 2
    assert list(planned.cache.layout("z").layers) == [0, 1]
    assert worst_error(planned, "qwen2", compute(planned)) < 1e-5


def test_a_bfloat16_cache_holds_the_float32_values_rounded(make_model: Any, make_plan: Any) -> None:
    exact = compute(make_plan(capture=STREAMS))
    rounded = compute(make_plan(capture=f'{STREAMS}dtype = "bfloat16"'))
    for name, values in exact.items():
        expected = torch.tensor(values).bfloat16().float().numpy()
        assert np.array_equal(rounded[name], expected)


def test_a_bfloat16_model_is_within_the_tolerance_of_its_dtype(
    make_model: Any, make_plan: Any
) -> None:
    planned = make_plan(make_model("llama", dtype="bfloat16"), capture='tokens = "mean"')
    assert planned.cache.layout("z").dtype == "bfloat16"
    got = compute(planned, "bfloat16")
    assert 0 < worst_error(planned, "llama", got, torch.bfloat16) < 3e-2


def test_packs_do_not_change_the_result(make_plan: Any) -> None:
    many = compute(make_plan(capture="tokens_per_pack = 1"))
    few = compute(make_plan(capture="tokens_per_pack = 100000"))
    for name, values in many.items():
        np.testing.assert_allclose(few[name], values, rtol=1e-4, atol=1e-5)


def _poison(model: Any) -> None:
    # One token's embedding, so that only prompts with an "8" are spoiled.
    model.get_input_embeddings().weight[_TOKEN_OF_8] = float("nan")


_TOKEN_OF_8 = 28


@pytest.mark.parametrize("packing", ["trie", "batches"])
def test_a_poisoned_prompt_is_quarantined_alone(
    make_model: Any, make_plan: Any, packing: str
) -> None:
    capture = f'{STREAMS}packing = "{packing}"'
    planned = make_plan(make_model("llama", edit=_poison), capture=capture)
    sound = compute(make_plan(capture=capture))
    index = planned.cache.index().to_pylist()
    spoiled = {i for i, entry in enumerate(index) if "8" in _prompt_text(planned, entry)}
    assert 0 < len(spoiled) < len(index)
    layout = planned.cache.layout("z")
    work = [
        ShardWork(shard, layout.shard_rows(shard), read_shard(planned.cache, shard))
        for shard in range(planned.cache.num_shards)
    ]
    results = list(load(planned).run(work))
    quarantined = {row: why for result in results for row, why in result.quarantined.items()}
    assert set(quarantined) == spoiled
    assert all(
        why.startswith("activations are NaN or infinite at resid_post.0")
        for why in quarantined.values()
    )
    for name, wanted in sound.items():
        got = np.concatenate([result.values[name] for result in results])
        assert np.isnan(got[sorted(spoiled)]).all()
        others = sorted(set(range(len(index))) - spoiled)
        np.testing.assert_allclose(got[others], wanted[others], rtol=1e-4, atol=1e-5)
    # The gate compares engine and model, which agree.
    prompts = [p for p in read_prompts(planned.cache) if _TOKEN_OF_8 in p.token_ids]
    check_parity(load(planned), prompts, "float32")


def _prompt_text(planned: Plan, entry: dict[str, Any]) -> str:
    number = int(entry["prompt_id"].split(":")[1].rstrip("+-")) - 1
    return str(number)


def test_parity_refuses_a_model_that_attends_in_both_directions(
    make_model: Any, make_plan: Any
) -> None:
    # Gemma 3 can be saved as a text encoder that attends in both directions: then every token sees
    # what comes after it, and packs give something else than prompts alone.
    planned = make_plan(make_model("gemma3-bidirectional"), capture='streams = ["resid_post"]')
    prompts = read_prompts(planned.cache)
    with pytest.raises(GateRefused, match=r"parity gate: at resid_post\.\d the engine") as caught:
        check_parity(load(planned), prompts, "float32")
    assert caught.value.kind == "parity"


def test_parity_refuses_rows_of_another_layer(make_plan: Any) -> None:
    planned = make_plan(capture='streams = ["resid_post"]\nlayers = [0, 1]')
    layout = planned.cache.layout("resid_post")
    # What the cache calls layer 1 and 2 is 0 and 1 where the engine looks.
    shifted = {"resid_post": dataclasses.replace(layout, layers=(1, 2))}
    engine = ResidentEngine.load(
        planned.model.path, "float32", {**shifted}, Packing.read(planned.cache.capture), "cpu"
    )
    with pytest.raises(GateRefused, match="parity gate: at resid_post"):
        check_parity(engine, read_prompts(planned.cache), "float32", wanted=planned.cache.streams)


def test_a_model_folders_own_code_never_runs(make_model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    shutil.copytree(make_model(), folder)
    trace = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass EvilConfig: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    code = (
        "import pathlib, sys; from pipeline.extraction.models import ModelInfo; "
        "ModelInfo.read(pathlib.Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, input="y\ny\n", text=True, capture_output=True)
    assert done.returncode != 0
    assert not trace.exists()


def test_weights_that_are_missing_are_refused_not_random(make_model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "holey"
    shutil.copytree(make_model(), folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    removed = next(name for name in tensors if "o_proj" in name)
    del tensors[removed]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidInput, match="1 weights are not in its safetensors files"):
        load_body(folder, "float32")
