"""Streamed weights and recorded calls: bit for bit what from_pretrained and one forward give."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

from pipeline.errors import InvalidInput, NotFound
from pipeline.extraction.checkpoint import Checkpoint
from pipeline.extraction.loading import Loader
from pipeline.extraction.models import DTYPES
from pipeline.extraction.recording import record_calls
from pipeline.extraction.weights import StreamedBody, block_list
from tests.conftest import build_config

SHARED = (
    "llama",
    "llama-wide-heads",
    "mistral-window",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3-bidirectional",
    "phi3",
    "mixtral",
    "gpt-neox",
    "gpt2",
)
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 4,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
GROUPED = SIZES | {"num_key_value_heads": 4}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA = GROUPED | {"head_dim": 16, "sliding_window": 5}
MORE: dict[str, Callable[[], Any]] = {
    # The first block is dense, the others have experts.
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **GROUPED, **EXPERTS, head_dim=16, mlp_only_layers=[0]
    ),
    "olmo2": lambda: transformers.Olmo2Config(**GROUPED),
    "falcon": lambda: transformers.FalconConfig(**SIZES),
    "falcon-alibi": lambda: transformers.FalconConfig(**SIZES, alibi=True),
    "granite": lambda: transformers.GraniteConfig(**GROUPED, residual_multiplier=0.5),
    "cohere": lambda: transformers.CohereConfig(**GROUPED, use_qk_norm=True),
    "cohere2": lambda: transformers.Cohere2Config(
        **GROUPED, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    # Local and global rotary embeddings and masks differ by layer.
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **GEMMA, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
}
FAMILIES = (*SHARED, *MORE)
IDS = torch.tensor([[5, 9, 40, 7, 7, 211, 30, 2, 18], [6, 9, 41, 7, 300, 21, 3, 5, 1]])


def config_of(family: str) -> Any:
    return MORE[family]() if family in MORE else build_config(family)


def save(folder: Path, family: str, stored: str, *, head: bool = True, **options: Any) -> Path:
    """A random model in which no weight has the value it is built with."""
    kind = transformers.AutoModelForCausalLM if head else transformers.AutoModel
    torch.manual_seed(7)
    model = kind.from_config(config_of(family))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    model.to(DTYPES[stored]).save_pretrained(folder, **options)  # type: ignore[index]
    return folder


def whole(folder: Path, dtype: str, **options: Any) -> Any:
    return transformers.AutoModel.from_pretrained(
        folder,
        dtype=DTYPES[dtype],
        local_files_only=True,
        **options,  # type: ignore[index]
    ).eval()


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].device == tensor.device, name
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("head", [True, False], ids=["causal-lm", "base"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_buffers_are_those_of_from_pretrained(
    tmp_path: Path, family: str, stored: str, head: bool
) -> None:
    folders = [
        save(tmp_path / "single", family, stored, head=head),
        save(tmp_path / "sharded", family, stored, head=head, max_shard_size="50KB"),
    ]
    assert len(list(folders[1].glob("*.safetensors"))) > 3
    for dtype in ("float32", "bfloat16"):
        expected = tensors(whole(folders[0], dtype))
        for folder in folders:
            with StreamedBody.open(folder, dtype) as streamed:
                check_all(streamed, expected)


def check_all(streamed: StreamedBody, expected: dict[str, torch.Tensor]) -> None:
    prefix = next(n for n, m in streamed.body.named_modules() if m is streamed.block_list) + "."
    outside = {name: t for name, t in expected.items() if not name.startswith(prefix)}
    assert outside
    got = tensors(streamed.body)
    assert_same({n: t for n, t in got.items() if not n.startswith(prefix)}, outside)
    seen = []
    for layer, block in streamed.blocks():
        start = f"{prefix}{layer}."
        of_block = {n.removeprefix(start): t for n, t in expected.items() if n.startswith(start)}
        assert of_block
        assert_same(tensors(block), of_block)
        assert not any(weight.requires_grad for weight in block.parameters())
        assert not any(part.training for part in block.modules())
        seen.append(layer)
    assert seen == list(range(len(streamed.block_list)))
    assert all(weight.is_meta for weight in streamed.block_list.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", [None, "eager"], ids=["default", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_calls_of_streamed_blocks_give_the_whole_models_hidden_states(
    tmp_path: Path, family: str, attention: str | None, dtype: str
) -> None:
    folder = save(tmp_path / "model", family, "float32")
    options = {"attn_implementation": attention} if attention else {}
    body = whole(folder, dtype, **options)
    expected: list[torch.Tensor] = []
    for block in block_list(body):
        block.register_forward_hook(
            lambda _m, _args, out: expected.append(out[0] if isinstance(out, tuple) else out)
        )
    padded = torch.ones_like(IDS)
    padded[1, 6:] = 0
    with StreamedBody.open(folder, dtype, attn_implementation=attention) as streamed:
        assert streamed.body.config._attn_implementation == body.config._attn_implementation
        for inputs in (
            {"input_ids": IDS},
            {"input_ids": IDS[:1], "position_ids": torch.tensor([[0, 1, 2, 3, 4, 2, 3, 4, 5]])},
            {"input_ids": IDS, "attention_mask": padded},
        ):
            expected.clear()
            with torch.inference_mode():
                body(**inputs, use_cache=False)
                recording = record_calls(streamed.body, streamed.block_list, **inputs)
                hidden = recording.hidden
                for layer, block in streamed.blocks():
                    hidden = recording.call(block, hidden, layer)
                    assert torch.equal(hidden, expected[layer]), layer
            assert len(expected) == 3


def held(value: Any) -> set[int]:
    """The storages of every tensor in a nest of containers."""
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage().data_ptr()}
    if isinstance(value, dict):
        return held(tuple(value.values()))
    if isinstance(value, list | tuple):
        return set().union(*map(held, value))
    return set()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recording_of_more_layers_holds_no_more_tensors(tmp_path: Path, family: str) -> None:
    folder = save(tmp_path / "model", family, "float32")
    with torch.inference_mode(), StreamedBody.open(folder, "float32") as streamed:
        recording = record_calls(streamed.body, streamed.block_list, input_ids=IDS)
    assert len(recording.calls) == 3
    # The third layer is of the first's kind or the second's.
    assert held(list(recording.calls)) == held(list(recording.calls[:2]))


def test_recording_leaves_the_blocks_as_they_were(tmp_path: Path) -> None:
    body = whole(save(tmp_path / "model", "llama", "float32"), "float32")
    with torch.inference_mode():
        before = body(input_ids=IDS).last_hidden_state
        record_calls(body, body.layers, input_ids=IDS)
        with pytest.raises(ValueError, match="exactly one of input_ids"):
            record_calls(body, body.layers)
        assert torch.equal(body(input_ids=IDS).last_hidden_state, before)


class Between(transformers.LlamaModel):
    """A body that is not a chain of blocks."""

    change: Callable[[Any], Any]

    def forward(self, input_ids: Any, use_cache: bool = False) -> Any:
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = self.change(layer(hidden))
        return hidden


class Beside(transformers.LlamaModel):
    """A body whose blocks all start from the embeddings."""

    def forward(self, input_ids: Any, use_cache: bool = False) -> Any:
        hidden = self.embed_tokens(input_ids)
        return sum(layer(hidden)[0] for layer in self.layers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: out[0] * 2, "changes hidden states before block 1"),
        (lambda out: out.mul(2), "does more than pass on what block 0 returns"),
    ],
)
def test_bodies_that_are_not_a_chain_of_blocks_are_refused(
    change: Callable[[Any], Any], message: str
) -> None:
    body = Between(build_config("llama"))
    body.change = change
    with pytest.raises(InvalidInput, match=f"Between cannot run block by block: it {message}"):
        record_calls(body, body.layers, input_ids=IDS)


def test_a_body_whose_blocks_do_not_follow_each_other_is_refused() -> None:
    body = Beside(build_config("llama"))
    with pytest.raises(InvalidInput, match="changes hidden states before block 1"):
        record_calls(body, body.layers, input_ids=IDS)


def test_a_body_that_calls_fewer_blocks_is_refused() -> None:
    body = Between(build_config("llama"))
    body.change = lambda out: out
    more = nn.ModuleList([*body.layers, body.layers[0]])
    with pytest.raises(InvalidInput, match="it called 3 blocks of 4"):
        record_calls(body, more, input_ids=IDS)


def test_a_cache_is_refused() -> None:
    body = transformers.LlamaModel(build_config("llama"))
    with pytest.raises(InvalidInput, match="block 0 is given a cache"):
        record_calls(body, body.layers, input_ids=IDS, past_key_values=transformers.DynamicCache())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("weights") / "llama", "llama", "float32")


def loaded(streamed: StreamedBody) -> list[int]:
    """The layers that have their weights."""
    return [
        layer
        for layer, block in enumerate(streamed.block_list)
        if any(not weight.is_meta for weight in block.parameters())
    ]


def test_no_more_than_two_blocks_are_loaded_at_once(llama: Path) -> None:
    with StreamedBody.open(llama, "bfloat16") as streamed:
        assert loaded(streamed) == []
        for layer, _ in streamed.blocks():
            streamed.prefetch(min(layer + 1, 2))
            assert set(loaded(streamed)) <= {layer, layer + 1}
            assert layer in loaded(streamed)
        assert loaded(streamed) == []


def test_blocks_go_over_the_layers_that_are_asked_for_and_again(llama: Path) -> None:
    with StreamedBody.open(llama, "float32") as streamed:
        for _ in range(2):
            assert [layer for layer, _ in streamed.blocks(range(2))] == [0, 1]
        assert [layer for layer, _ in streamed.blocks(range(2, 3))] == [2]


def test_leaving_the_loop_early_drops_every_block(llama: Path) -> None:
    with StreamedBody.open(llama, "bfloat16") as streamed:
        blocks = streamed.blocks()
        next(blocks)
        blocks.close()
        assert loaded(streamed) == []
        assert [layer for layer, _ in streamed.blocks()] == [0, 1, 2]


def test_a_prefetch_that_is_not_used_is_given_up(llama: Path) -> None:
    with StreamedBody.open(llama, "bfloat16") as streamed:
        streamed.prefetch(2)
        streamed.load_block(0)
        assert loaded(streamed) == [0]
        assert streamed.load_block(0) is streamed.block_list[0]
        streamed.drop_block(0)
        assert loaded(streamed) == []


def test_weights_stored_in_the_dtype_computed_in_are_not_copied(llama: Path) -> None:
    with StreamedBody.open(llama, "float32") as streamed:
        block = streamed.load_block(1)
        assert all(streamed._checkpoint.is_view(weight) for weight in block.parameters())
        assert streamed.block_bytes(1) == sum(w.nbytes for w in block.parameters())


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    stored = safetensors.torch.load_file(path)
    edit(stored)
    safetensors.torch.save_file(stored, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_missing_weights_are_refused_by_name_when_opened(
    llama: Path, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    rewrite(folder, lambda stored: stored.pop(name))
    short = name.removeprefix("model.")
    with pytest.raises(
        InvalidInput, match=rf"1 weights are not in its safetensors files, such as {short}"
    ):
        StreamedBody.open(folder, "float32")


def test_a_missing_expert_is_refused_when_opened(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "mixtral", "float32")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    rewrite(folder, lambda stored: stored.pop(name))
    with pytest.raises(
        InvalidInput, match=r"do not go.*such as layers\.1\.mlp\.experts\.gate_up_proj: Sizes of"
    ):
        StreamedBody.open(folder, "float32")


def test_weights_of_another_shape_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda stored: stored.update({name: torch.zeros(8, 64)}))
    with pytest.raises(
        InvalidInput, match=r"layers\.1\.mlp\.up_proj\.weight \[8, 64\], expected \[96, 64\]"
    ):
        StreamedBody.open(folder, "float32")


def test_tensors_that_the_file_does_not_align_are_read(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    path = folder / "model.safetensors"
    contents = path.read_bytes()
    end = 8 + int.from_bytes(contents[:8], "little")
    header = contents[8:end] + b" " * 3
    path.write_bytes(len(header).to_bytes(8, "little") + header + contents[end:])
    with StreamedBody.open(folder, "float32") as streamed:
        check_all(streamed, tensors(whole(llama, "float32")))


def test_folders_that_are_absent_or_without_safetensors_are_refused(
    llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(NotFound, match="model folder '.*absent' does not exist"):
        StreamedBody.open(tmp_path / "absent", "float32")
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(NotFound, match="has no model.safetensors"):
        StreamedBody.open(folder, "float32")


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama", "float32", max_shard_size="50KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(NotFound, match=f"not there, such as {shard.name}"):
        StreamedBody.open(folder, "float32")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda contents: contents[:-1], "is said to be at bytes"),
        (lambda contents: contents[:100], "its header ends at byte"),
        (lambda contents: b"", "its header ends at byte 8 of 0"),
        (lambda contents: contents[:8] + b"x" + contents[9:], "not a JSON object"),
        (lambda contents: contents.replace(b'"F32"', b'"X32"', 1), "KeyError.'X32'"),
    ],
)
def test_damaged_files_are_refused(
    llama: Path, tmp_path: Path, edit: Callable[[bytes], bytes], message: str
) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(InvalidInput, match=f"is not a whole safetensors file: .*{message}"):
        StreamedBody.open(folder, "float32")


def test_quantised_models_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match="is quantised"):
        StreamedBody.open(folder, "float32")


def test_blocks_that_are_one_module_are_refused(llama: Path) -> None:
    with torch.device("meta"):
        body = transformers.LlamaModel(build_config("llama"))
    body.layers[2] = body.layers[0]
    with pytest.raises(InvalidInput, match="blocks that share weights cannot be streamed"):
        StreamedBody(
            body,
            Checkpoint.open(llama),
            Loader(body, torch.float32, "llama"),
            torch.device("cpu"),
        )


def test_a_transformers_that_loads_otherwise_is_refused_by_what_it_lacks() -> None:
    with pytest.raises(InvalidInput, match="Linear has no _get_dtype_plan.*; expected 5.23"):
        Loader(nn.Linear(1, 1), torch.float32, "model")


LIMITED = """
import json, resource, sys
from pathlib import Path
import torch
from pipeline.extraction.models import DTYPES, load_body
from pipeline.extraction.recording import record_calls
from pipeline.extraction.weights import StreamedBody

tiny, folder, dtype, engine, room = sys.argv[1:]
torch.set_num_threads(1)  # As the test itself: the number of threads decides the last bits.

def run(folder):
    ids = torch.arange(16)[None]
    with torch.inference_mode():
        if engine == "whole":
            return load_body(Path(folder), dtype)(input_ids=ids).last_hidden_state
        with StreamedBody.open(Path(folder), dtype) as streamed:
            recording = record_calls(streamed.body, streamed.block_list, input_ids=ids)
            hidden = recording.hidden
            for layer, block in streamed.blocks():
                hidden = recording.call(block, hidden, layer)
        return streamed.body.norm(hidden)

run(tiny)  # What is loaded lazily, thread stacks and arenas do not count.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
held = int(status["VmData"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + int(room), held + int(room)))
print(json.dumps(run(folder).float().sum().item()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 210 MB of bfloat16 weights, in blocks of 8.4 MB."""
    folder = tmp_path_factory.mktemp("weights") / "large"
    config = build_config("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=25)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="60MB")
    return folder


def limited(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux only")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_larger_than_the_memory_limit_goes_through(
    llama: Path, large: Path, dtype: str
) -> None:
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    room = size // 2
    whole_model = limited(llama, large, dtype, "whole", room)
    assert whole_model.returncode != 0
    assert "memory" in whole_model.stderr
    streamed = limited(llama, large, dtype, "streamed", room)
    assert streamed.returncode == 0, streamed.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            expected = whole(large, dtype)(input_ids=torch.arange(16)[None]).last_hidden_state
            total = expected.float().sum().item()
    finally:
        torch.set_num_threads(threads)
    assert json.loads(streamed.stdout) == total
