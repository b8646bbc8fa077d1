"""Workers without Ray: what they write, what they find, and what they leave out."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import load_run_file
from pipeline.errors import InvalidInput
from pipeline.extraction.devices import _room_in_container
from pipeline.extraction.shard_worker import Receipt, ShardWorker
from pipeline.extraction.workers import check_quarantined, extract
from pipeline.prompts.plan import Plan, plan
from pipeline.ray_runtime import Pool
from store.location import Location

SIDES = ("to the north", "to the south")
POISON = "Ω"


@pytest.fixture
def planned(tmp_path: Path, make_model: Callable[..., Path]) -> Plan:
    return _plan(tmp_path, make_model())


def _plan(folder: Path, model: Path, max_quarantined: float = 0.05) -> Plan:
    rows = [
        {"prompt": f"{name}: which way?", "positive": SIDES[0], "negative": SIDES[1]}
        for name in [POISON, *map(str, range(39))]
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.toml").write_text(
        f'name = "t"\n[model]\npath = "{model}"\n[prompts]\nfiles = ["pairs.jsonl"]\n'
        f"max_quarantined = {max_quarantined}\n[capture]\ntokens = 'last'\n"
    )
    return plan(load_run_file(folder / "run.toml"), Location.open(str(folder / "store")))


def _worker(folder: Path, planned: Plan) -> ShardWorker:
    where = (Location.open(str(folder / "store")).url, planned.cache.digest)
    return ShardWorker(*where, str(planned.model.path), "float32", "cpu")


def _outcomes(worker: ShardWorker, **row: Any) -> list[Any]:
    return [pickle.loads(found["outcome"]) for found in worker(row)]


def test_only_the_first_shard_of_a_worker_passes_the_gate(tmp_path: Path, planned: Plan) -> None:
    worker = _worker(tmp_path, planned)
    first, second = _outcomes(worker, shards=[0, 1])
    assert first.parity is not None
    assert first.parity.worst < 1e-4
    assert second.parity is None
    assert (first.num_rows, first.shard, second.shard) == (32, 0, 1)
    assert set(planned.cache.missing()).isdisjoint({0, 1})


def test_a_shard_that_is_there_is_not_computed_again(tmp_path: Path, planned: Plan) -> None:
    _outcomes(_worker(tmp_path, planned), shards=[0])
    [found] = _outcomes(_worker(tmp_path, planned), shards=[0])
    assert found == Receipt(0, 32)


def test_a_damaged_shard_is_put_right_and_its_twin_left_alone(
    tmp_path: Path, planned: Plan
) -> None:
    cache = planned.cache
    worker = _worker(tmp_path, planned)
    shards = cache.missing()
    _outcomes(worker, shards=shards)
    cache.seal()
    folder = cache.location.local_path()
    assert folder is not None
    path = folder / "z/c/1/0/0"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    before = {p: p.stat().st_ino for p in folder.rglob("*") if p.is_file() and p != path}
    assert cache.damaged() == {1}
    [receipt] = _outcomes(worker, shards=[1], repair=True)
    assert receipt.repaired
    assert path.read_bytes() == whole
    assert {p: p.stat().st_ino for p in before} == before
    assert cache.damaged() == set()


def test_a_worker_without_its_model_says_so(tmp_path: Path, planned: Plan) -> None:
    url = Location.open(str(tmp_path / "store")).url
    worker = ShardWorker(url, planned.cache.digest, str(tmp_path / "no"), "float32", "cpu")
    [error] = _outcomes(worker, shards=[0])
    assert "model folder" in str(error)
    assert 0 in planned.cache.missing()


@pytest.fixture
def poisoned(make_poisoned: Callable[[str], Path]) -> Path:
    return make_poisoned(POISON)


def test_poison_is_left_out_and_its_neighbours_are_not(tmp_path: Path, poisoned: Path) -> None:
    planned = _plan(tmp_path, poisoned)
    cache = planned.cache
    receipts = _outcomes(_worker(tmp_path, planned), shards=cache.missing())
    bad = {row: why for receipt in receipts for row, why in receipt.quarantined.items()}
    assert len(bad) == len(SIDES)
    assert cache.quarantined() == bad
    for row in bad:
        assert np.isnan(cache.read_rows("resid_post", 0, [row])).all()
    good = [row for row in range(planned.num_rows) if row not in bad]
    assert np.isfinite(cache.read_rows("resid_post", 0, good)).all()


def test_too_much_poison_stops_the_run_with_reasons(planned: Plan) -> None:
    few = {row: "resid_post.0: activations are NaN or infinite" for row in range(4)}
    check_quarantined(planned, few)
    with pytest.raises(InvalidInput) as caught:
        check_quarantined(planned, {row: f"reason {row}" for row in range(12)})
    text = str(caught.value)
    assert caught.value.kind == "prompt_quarantine"
    assert "12 of 80 rows" in text
    assert text.count("reason ") == 10
    assert "and 2 more" in text
    assert "pairs.jsonl:" in text


@pytest.mark.parametrize(
    ("pool", "device", "expected"),
    [
        (Pool(2), "cpu", {"num_cpus": 1, "num_gpus": 0}),
        (Pool(2), "cuda", {"num_cpus": 1, "num_gpus": 1}),
        (Pool(2, gpus=0.5, cpus=2), "cuda", {"num_cpus": 2, "num_gpus": 0.5}),
    ],
)
def test_what_a_worker_reserves(pool: Pool, device: str, expected: dict[str, float]) -> None:
    assert pool.resources(device) == expected


def test_workers_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(InvalidInput, match="--min-workers 3"):
        Pool(2, 3)
    with pytest.raises(InvalidInput, match="whole number"):
        Pool(2, gpus=1.5)
    with pytest.raises(InvalidInput, match="would see no GPU"):
        Pool(2, gpus=0).resources("cuda")


@pytest.mark.parametrize("engine", ["resident", "streamed"])
def test_a_shard_with_one_stream_damaged_and_one_not_written_is_put_right(
    tmp_path: Path, planned: Plan, ray_running: None, engine: Any
) -> None:
    cache = planned.cache
    _outcomes(_worker(tmp_path, planned), shards=[0, 1])
    cut = cache.location.local_path("resid_post/c/0/0/0")
    cut.write_bytes(cut.read_bytes()[:-100])
    for key in ("z/c/0/0/0", "_commits/z/00000000.json"):
        cache.location.delete(key)
    root = Location.open(str(tmp_path / "store"))
    result = extract(planned, root, pool=Pool(1), engine=engine)
    assert result.engine.name == engine
    assert result.shards_repaired == 1
    assert result.shards_computed == cache.num_shards - 1
    assert list(cache.verify()) == []
    # Done once more, there is nothing to do.
    assert extract(planned, root, pool=Pool(1), engine=engine).shards_computed == 0
    # Nor is there more to do than to repair.
    cut.write_bytes(cut.read_bytes()[:-100])
    result = extract(planned, root, pool=Pool(1), engine=engine)
    assert result.shards_repaired == result.shards_computed == 1
    assert list(cache.verify()) == []


@pytest.mark.parametrize(
    ("limit", "expected"), [("max", float("inf")), ("1000", 1000 - 700 + 50), ("100", 0)]
)
def test_a_containers_limit_counts(tmp_path: Path, limit: str, expected: float) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 50\n")
    assert _room_in_container(tmp_path) == expected
    assert _room_in_container(tmp_path / "none") == float("inf")
