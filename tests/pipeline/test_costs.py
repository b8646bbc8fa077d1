"""Costs: what is told of each step is what a run then writes, in as many tasks and objects."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.costs import RunCosts, SampleCounts, run_costs
from pipeline.extraction.engine import ResidentEngine
from pipeline.extraction.passes import ShardWork
from pipeline.extraction.preflight import layouts_of, preflight
from pipeline.prompts.packing import Packing
from pipeline.prompts.plan import Plan
from pipeline.prompts.worklist import read_shard
from pipeline.ray_runtime import LOCAL_STORE_NBYTES
from pipeline.reduction.held_out import scored_rows
from pipeline.reduction.methods import DEFAULT_PARAMETERS
from pipeline.reduction.reduce import reduce_all
from pipeline.reduction.sources import Source, TrainingRows
from store.location import Location

METHODS = {name: dict(given) for name, given in DEFAULT_PARAMETERS.items()}
SMALL_SHARDS = "layers = [0, 2]\nshard_mib = 0.02"


def pairs(number: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"{i}: where to?", "positive": "to the north", "negative": "back home, captain"}
        for i in range(number)
    ]


def costs_of(planned: Plan, prompts: int | None = None, shard_mib: float = 128) -> RunCosts:
    factor = 1 if prompts is None else prompts / planned.num_prompts
    counts = SampleCounts.of(planned.cache).times(factor)
    return run_costs(layouts_of(planned, prompts, shard_mib), counts, METHODS)


def extract(planned: Plan) -> None:
    cache, layout = planned.cache, planned.cache.layout("z")
    engine = ResidentEngine.load(
        planned.model.path, "float32", cache.streams, Packing.read(cache.capture), "cpu"
    )
    work = [
        ShardWork(shard, layout.shard_rows(shard), read_shard(cache, shard))
        for shard in range(cache.num_shards)
    ]
    for result in engine.run(work):
        cache.write_shard(result.shard, result.values)
    cache.seal()


def test_what_is_told_of_each_step_is_what_it_does(
    make_plan: Any, root: Location, ray_running: None
) -> None:
    planned = make_plan(rows=pairs(90), capture=SMALL_SHARDS)
    costs = costs_of(planned)
    steps = {step.name: step for step in costs.steps}
    cache, folder = planned.cache, planned.cache.location.local_path()
    assert cache.num_shards > 2

    def files(pattern: str) -> list[Path]:
        return [path for path in folder.glob(pattern) if path.is_file()]

    assert steps["plan"].puts == len(files("**/*"))
    extract(planned)
    assert steps["plan"].puts + steps["extract"].puts == len(files("**/*"))
    arrays = sum(path.stat().st_size for path in files("*/c/*/0/0"))
    assert steps["extract"].write_bytes == arrays
    assert {steps[name].read_bytes for name in steps if name[:6] in ("verify", "reduce")} == {
        arrays
    }
    assert costs.reduce_bytes == 3 * arrays

    totals = set()
    reduce_all(
        cache,
        root,
        list(METHODS.items()),
        num_workers=1,
        on_progress=lambda done, total: totals.add(total),
    )
    reduce_steps = [step for name, step in steps.items() if name.startswith("reduce")]
    assert totals == {sum(step.tasks for step in reduce_steps)}
    store = root.local_path()
    written = {
        name: [path for path in (store / name).rglob("*") if path.is_file()]
        for name in ("moments", "reductions")
    }
    assert steps["reduce: count"].puts == len(written["moments"])
    assert steps["reduce: score"].puts == len(written["reductions"])
    (moments,) = (store / "moments").rglob("*.safetensors")
    assert 0 <= moments.stat().st_size - steps["reduce: count"].write_bytes < 2048
    directions = sum(path.stat().st_size for path in (store / "reductions").rglob("*.safetensors"))
    assert 0 <= directions - steps["reduce: score"].write_bytes < 1024 * len(METHODS)

    source = Source.open(root, cache)
    for step, shared in (
        ("reduce: fit", TrainingRows.of(source, pair_order_seed=0, max_rows=1000)),
        ("reduce: score", scored_rows([source])[0]),
    ):
        extra = len(pickle.dumps(shared)) - steps[step].ray_bytes
        # What pickle says of them, and splits that are not alike.
        assert -2048 < extra < 4096, step


@pytest.mark.parametrize("capture", [SMALL_SHARDS, ""])
def test_as_if_there_were_more_prompts_is_as_with_more_prompts(
    make_plan: Any, capture: str
) -> None:
    shard_mib = 0.02 if capture else 128
    few = make_plan(rows=pairs(60), capture=capture)
    told = layouts_of(few, 600, shard_mib)
    asked = preflight(few, workers=1, hardware="h100", prompts=600, shard_mib=shard_mib)
    many = make_plan(rows=pairs(300), capture=capture)
    assert told == many.cache.streams != few.cache.streams
    found = preflight(many, workers=1, hardware="h100")
    for name in ("prompts", "num_bytes", "objects", "shard_bytes", "weight_bytes"):
        assert getattr(asked, name) == getattr(found, name), name
    assert asked.tokens == pytest.approx(found.tokens, rel=0.05)
    assert asked.hours == pytest.approx(found.hours, rel=0.2)
    of_few, of_many = costs_of(few, 600, shard_mib), costs_of(many)
    for told_step, step in zip(of_few.steps, of_many.steps, strict=True):
        assert (told_step.gets, told_step.puts, told_step.tasks) == (
            step.gets,
            step.puts,
            step.tasks,
        )
        assert told_step.read_bytes == step.read_bytes


def test_a_model_is_told_of_by_its_index_without_its_files(
    make_model: Any, make_plan: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(make_model(), tmp_path / "large")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00007.safetensors")
    names = {f"weight.{i}": f"model-{i:05}-of-00007.safetensors" for i in range(1, 8)}
    index = {"metadata": {"total_size": 123_456_000}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    costs = preflight(make_plan(folder), workers=1, hardware="h100")
    assert costs.weight_bytes == 123_456_000


def test_what_will_not_go_well_is_said(make_plan: Any) -> None:
    planned = make_plan(rows=pairs(60))
    assert costs_of(planned).warnings == ()
    costs = costs_of(planned, 8_000_000)
    fit = next(step for step in costs.steps if step.name == "reduce: fit")
    assert fit.ray_bytes > LOCAL_STORE_NBYTES
    assert any("reduce: fit: an object of" in warning for warning in costs.warnings)
    for warning in costs.warnings:
        assert "use a cluster" in warning
        assert warning in costs.readable().values()


def test_a_fit_costs_what_its_matrices_do(make_plan: Any) -> None:
    planned = make_plan(rows=pairs(60))
    streams = {"z": planned.cache.streams["z"]}
    counts = SampleCounts(1200, 1000, 500, 100, 0)

    def tflop(*methods: str) -> float:
        named = {name: METHODS[name] for name in methods}
        return sum(step.tflop for step in run_costs(streams, counts, named).steps)

    assert tflop("difference_of_means") == 0
    # Three layers of four heads of eight dims; the [D, D] matrices of 500 differences.
    (layout,) = streams.values()
    width = layout.width // layout.num_heads
    sites = len(layout.layers) * layout.num_heads
    assert tflop("pca") == pytest.approx(sites * 2 * 500 * width**2 / 1e12, rel=0.1)
    assert tflop("pca", "lda") == pytest.approx(3 * tflop("pca"), rel=0.1)
    fewer = dict(METHODS["probe"]) | {"max_rows": 100}
    probe = run_costs(streams, counts, {"probe": fewer}).steps
    assert sum(step.tflop for step in probe) < 0.2 * tflop("probe")
