"""Preflight: what it counts is what a run then does, and engines are chosen by memory."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.errors import InvalidInput
from pipeline.extraction.engine import ResidentEngine
from pipeline.extraction.engines import choose_engine, weight_bytes
from pipeline.extraction.models import load_body
from pipeline.extraction.passes import ShardWork
from pipeline.extraction.preflight import HARDWARE, preflight
from pipeline.prompts.packing import Packing
from pipeline.prompts.worklist import read_shard

SYSTEM = 'system = "the ship steers to the north, and the crew answers the captain"'


@pytest.mark.parametrize("packing", ["trie", "batches"])
def test_what_is_counted_is_what_a_run_does(make_plan: Any, packing: str) -> None:
    planned = make_plan(
        capture=f'tokens_per_pack = 90\npacking = "{packing}"\nlayers = [0, 1]', prompts=SYSTEM
    )
    costs = preflight(planned, workers=2, hardware="h100")
    cache = planned.cache
    layout = cache.layout("z")
    engine = ResidentEngine.load(
        planned.model.path, "float32", cache.streams, Packing.read(cache.capture), "cpu"
    )
    work = [
        ShardWork(shard, layout.shard_rows(shard), read_shard(cache, shard))
        for shard in range(cache.num_shards)
    ]
    tokens = 0
    for result in engine.run(work):
        tokens += result.tokens
        cache.write_shard(result.shard, result.values)
    cache.seal()
    # Engines do not count padding, which costs all the same.
    assert costs.tokens_computed == tokens or (
        packing == "batches" and tokens < costs.tokens_computed < 1.2 * tokens
    )
    assert costs.tokens == planned.num_tokens
    files = [path for path in cache.location.local_path().rglob("*") if path.is_file()]
    assert costs.objects == len(files)
    assert costs.num_bytes == planned.num_bytes
    assert costs.shard_bytes == sum(s.shard_nbytes(0) for s in cache.streams.values())
    # Two of three blocks, and no embedding: two FLOPs a weight and token, and attention.
    body = load_body(planned.model.path, "float32")
    weights = sum(p.numel() for block in body.layers[:2] for p in block.parameters())
    assert 2 * weights * tokens < costs.tflop * 1e12 < 2.7 * weights * tokens
    assert costs.hours == pytest.approx(costs.tflop / (67 * 0.5 * 2) / 3600)
    # Four workers on quarters of one GPU are one GPU.
    shared = preflight(planned, workers=4, hardware="h100", gpus=0.25)
    assert shared.hours == pytest.approx(2 * costs.hours)
    assert costs.readable()["engine"].startswith("resident (")


def test_experts_count_by_the_share_that_a_token_meets(make_model: Any, make_plan: Any) -> None:
    planned = make_plan(make_model("mixtral"))
    costs = preflight(planned, workers=1, hardware="h100")
    body = load_body(planned.model.path, "float32")
    per_token = sum(
        p.numel() * (2 / 3 if ".experts." in name else 1)
        for name, p in body.layers.named_parameters()
    )
    assert 2 * per_token < costs.tflop * 1e12 / costs.tokens_computed < 2.5 * per_token


def test_weights_are_counted_in_the_dtype_of_the_computation(
    make_model: Any, make_plan: Any
) -> None:
    planned = make_plan(make_model("llama"))
    full = weight_bytes(planned.model, "float32")
    assert weight_bytes(planned.model, "bfloat16") == full // 2
    half = make_plan(make_model("llama", dtype="bfloat16"))
    assert weight_bytes(half.model, "bfloat16") == pytest.approx(full // 2, rel=0.05)


@pytest.mark.parametrize(
    ("asked", "weights", "memory", "device", "gpus", "expected"),
    [
        (None, 70, 100, "cpu", 0, "resident"),
        (None, 90, 100, "cpu", 0, "streamed"),
        (None, 90, 100, "cuda", 1, "streamed"),
        (None, 90, 100, "cuda", 2, "sharded"),
        (None, 900, 100, "cuda", 8, "streamed"),
        ("streamed", 1, 100, "cuda", 1, "streamed"),
        ("resident", 900, 100, "cpu", 0, "resident"),
        ("sharded", 1, 100, "cuda", 2, "sharded"),
    ],
)
def test_engines_are_chosen_by_memory(
    asked: Any, weights: int, memory: int, device: str, gpus: float, expected: str
) -> None:
    assert choose_engine(asked, weights, memory, device, gpus).name == expected


@pytest.mark.parametrize(("device", "gpus"), [("cpu", 0), ("cuda", 1)])
def test_one_device_is_not_several(device: str, gpus: float) -> None:
    with pytest.raises(InvalidInput, match="spreads a model over the GPUs of a worker"):
        choose_engine("sharded", 1, 100, device, gpus)


def test_hardware_is_named_or_measured(make_plan: Any) -> None:
    planned = make_plan()
    with pytest.raises(InvalidInput, match="is not known; expected one of .*h100") as caught:
        preflight(planned, workers=1, hardware="abacus")
    assert caught.value.kind == "hardware"
    here = preflight(planned, workers=1)
    assert here.hardware.startswith("this machine")
    assert here.hours > preflight(planned, workers=1, hardware="h100").hours
    assert set(HARDWARE) >= {"h100", "h200", "a100-80gb", "l4"}
