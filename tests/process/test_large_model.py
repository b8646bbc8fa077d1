"""A model of more than 6 GB through a worker that may hold 2 GiB, with the resident engine's bytes.

The limit is the kernel's (RLIMIT_DATA: everything a process may write to, not files that it maps
for reading), and counts Python and PyTorch too.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.faults

LIMIT = 2 << 30
NUM_LAYERS = 15
WORKER = """
import json, pickle, resource, sys
url, digest, model, engine, limit = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
from pipeline.extraction.shard_worker import ShardWorker
from store.activations import ActivationCache
from store.location import Location
cache = ActivationCache.open(Location.open(url), digest)
worker = ShardWorker(url, digest, model, "bfloat16", "cpu", engine)
outcomes = [pickle.loads(o["outcome"]) for o in worker({"shards": cache.missing()})]
for outcome in outcomes:
    if isinstance(outcome, BaseException):
        raise outcome
cache.seal()
peak = [line for line in open("/proc/self/status") if line.startswith("VmData")]
print(json.dumps({"shards": len(outcomes), "VmData": peak[0].split()[1]}))
"""


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Llama of 3 billion random weights in bfloat16, a file for each block."""
    import torch
    import transformers
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("large")
    if shutil.disk_usage(folder).free < 10 << 30:
        pytest.skip("needs 10 GiB of disk")
    if psutil.virtual_memory().available < 10 << 30:
        pytest.skip("needs 10 GiB of memory, for the resident engine")
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=256,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(50_000_017, generator=generator) * 0.02).bfloat16()
    weight_map, start = {}, 0
    files: dict[str, dict[str, Any]] = {}
    for name, shape in shapes.items():
        layer = name.split("layers.")[1].split(".")[0] if "layers." in name else "rest"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = shape
    for file, tensors in files.items():
        filled = {}
        for name, shape in tensors.items():
            if len(shape) == 1:
                filled[name] = torch.ones(shape, dtype=torch.bfloat16)
                continue
            size = shape[0] * shape[1]
            start = (start + 7_919_993) % len(pool)
            # Each matrix is another stretch of the same noise.
            repeats = -(-(start + size) // len(pool))
            filled[name] = pool.repeat(repeats)[start : start + size].reshape(shape).clone()
        save_file(filled, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert total > 6e9
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)


def run_worker(planned: Any, engine: str, limit: int) -> subprocess.CompletedProcess[str]:
    root = planned.cache.location.url.rsplit("/caches/", 1)[0]
    command = [sys.executable, "-c", WORKER, root, planned.cache.digest]
    command += [str(planned.model.path), engine, str(limit)]
    return subprocess.run(command, text=True, capture_output=True, timeout=1000)


def contents(planned: Any) -> dict[str, str]:
    folder = planned.cache.location.local_path()
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "_commits" not in path.parts
    }


@pytest.mark.timeout(2400)
def test_a_model_of_6_gb_is_extracted_within_2_gib(
    large_model: Path, make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    from pipeline.config import load_run_file
    from pipeline.prompts.plan import plan
    from store.location import Location

    make_tokenizer().save_pretrained(large_model)
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for number in range(24):
            prompt = f"question {number}: which way does the ship steer?"
            file.write(json.dumps({"prompt": prompt, "positive": "north", "negative": "south"}))
            file.write("\n")
    run_file = tmp_path / "run.toml"
    run_file.write_text(
        f'name = "large"\n[model]\npath = "{large_model}"\n[prompts]\nfiles = ["pairs.jsonl"]\n'
        '[capture]\nstreams = ["resid_post", "z"]\n'
    )
    streamed, resident, refused = (
        plan(load_run_file(run_file), Location.open(str(tmp_path / name)))
        for name in ("streamed", "resident", "refused")
    )
    done = run_worker(streamed, "streamed", LIMIT)
    assert done.returncode == 0, done.stderr
    print("streamed:", done.stdout)
    # The limit is one that the whole model does not keep.
    failed = run_worker(refused, "resident", LIMIT)
    assert failed.returncode != 0
    assert "memory" in failed.stderr.lower(), failed.stderr
    done = run_worker(resident, "resident", 0)
    assert done.returncode == 0, done.stderr
    assert contents(streamed) == contents(resident)
    assert sum("/c/" in name for name in contents(streamed)) == 2 * streamed.cache.num_shards
