"""The streamed engine gives the resident engine's bytes, whatever the waves."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from pipeline.extraction.engine import ResidentEngine
from pipeline.extraction.parity import check_parity
from pipeline.extraction.passes import ShardWork
from pipeline.extraction.streaming import StreamedEngine
from pipeline.prompts.packing import Packing
from pipeline.prompts.plan import Plan
from pipeline.prompts.worklist import read_prompts, read_shard

SYSTEM = "the ship steers to the north, and the crew answers the captain"
TOKEN_OF_8 = 28


def make_work(planned: Plan) -> list[ShardWork]:
    layout = next(iter(planned.cache.streams.values()))
    return [
        ShardWork(shard, layout.shard_rows(shard), read_shard(planned.cache, shard))
        for shard in range(planned.cache.num_shards)
    ]


def streamed(planned: Plan, dtype: Any, **options: Any) -> StreamedEngine:
    packing = Packing.read(planned.cache.capture)
    return StreamedEngine.load(
        planned.model.path, dtype, planned.cache.streams, packing, "cpu", **options
    )


def resident(planned: Plan, dtype: Any) -> ResidentEngine:
    packing = Packing.read(planned.cache.capture)
    return ResidentEngine.load(planned.model.path, dtype, planned.cache.streams, packing, "cpu")


def assert_equal(planned: Plan, dtype: Any = "float32", wave_bytes: int | None = None) -> None:
    work = make_work(planned)
    assert len(work) > 2
    wanted = list(resident(planned, dtype).run(work))
    got = list(streamed(planned, dtype, wave_bytes=wave_bytes).run(work))
    assert [result.shard for result in got] == list(range(len(work)))
    for one, other in zip(got, wanted, strict=True):
        assert one.quarantined == other.quarantined
        for name, values in other.values.items():
            assert one.values[name].tobytes() == values.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "family",
    [
        *("llama", "qwen2", "qwen3", "qwen3-moe", "gemma2", "gemma3", "mistral-window", "mixtral"),
        *("phi3", "gpt-neox", "gpt2", "olmo2", "falcon", "granite", "cohere2", "stablelm"),
    ],
)
def test_streamed_bytes_are_resident_bytes(
    make_model: Any, make_plan: Any, family: str, dtype: str
) -> None:
    streams = ["resid_pre", "resid_post", "attn_out", "mlp_out", "z"]
    planned = make_plan(
        make_model(family),
        capture=f'streams = {json.dumps(streams)}\ntokens = "last_3"\ntokens_per_pack = 70',
        rest=f'dtype = "{dtype}"',
        prompts=f'system = "{SYSTEM}"',
    )
    assert_equal(planned, dtype)


def test_waves_do_not_change_bytes(make_plan: Any) -> None:
    planned = make_plan(
        capture='tokens = "all"\nlayers = [0, 1]\ntokens_per_pack = 70',
        prompts=f'system = "{SYSTEM}"',
    )
    for wave_bytes in (1, 500_000, None):
        assert_equal(planned, wave_bytes=wave_bytes)


def test_a_poisoned_prompt_is_quarantined_alone(make_model: Any, make_plan: Any) -> None:
    def poison(model: Any) -> None:
        model.get_input_embeddings().weight[TOKEN_OF_8] = float("nan")

    planned = make_plan(make_model("llama", edit=poison), capture="tokens_per_pack = 300")
    assert_equal(planned)
    results = list(streamed(planned, "float32").run(make_work(planned)))
    spoiled = {
        row
        for prompt in read_prompts(planned.cache)
        for row in range(prompt.first_row, prompt.first_row + len(prompt.spans))
        if TOKEN_OF_8 in prompt.token_ids
    }
    assert {row for result in results for row in result.quarantined} == spoiled
    values = np.concatenate([result.values["z"] for result in results])
    assert set(np.flatnonzero(np.isnan(values).any(axis=(1, 2)))) == spoiled


def test_the_gate_checks_the_first_blocks_where_the_whole_does_not_fit(make_plan: Any) -> None:
    planned = make_plan(capture='streams = ["resid_post", "mlp_out"]')
    engine = streamed(planned, "float32")
    assert len(engine.for_parity()[1].body.layers) == 2
    assert check_parity(engine, read_prompts(planned.cache), "float32").worst < 1e-5
    only_above = make_plan(capture='streams = ["resid_post"]\nlayers = [2]')
    parity = check_parity(
        streamed(only_above, "float32"), read_prompts(only_above.cache), "float32"
    )
    assert parity.worst_site != "none"


def test_a_sharded_model_gives_the_same_bytes(make_plan: Any) -> None:
    # Here all devices are one CPU, but the model goes through accelerate's hooks.
    planned = make_plan(prompts=f'system = "{SYSTEM}"')
    packing = Packing.read(planned.cache.capture)
    engine = ResidentEngine.load(
        planned.model.path, "float32", planned.cache.streams, packing, "cpu", sharded=True
    )
    work = make_work(planned)
    for one, other in zip(engine.run(work), resident(planned, "float32").run(work), strict=True):
        for name, values in other.values.items():
            assert one.values[name].tobytes() == values.tobytes()
    assert check_parity(engine, read_prompts(planned.cache), "float32").worst < 1e-5
