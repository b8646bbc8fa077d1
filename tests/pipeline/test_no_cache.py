"""Extraction that writes Moments and some rows: they are those of the cache of all rows."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.errors import InvalidInput
from pipeline.extraction.finishing import SavedRows, count_apart
from pipeline.extraction.fused import FusedExtraction, extract_moments
from pipeline.extraction.fused_worker import FusedWorker, packed
from pipeline.extraction.gather import ShardResult
from pipeline.extraction.part_store import PartStore, parts_folder
from pipeline.extraction.parts import (
    MOST_APART,
    Part,
    PartCount,
    Parts,
    plan_parts,
    shards_per_part,
)
from pipeline.extraction.shard_worker import Receipt, ShardWorker
from pipeline.extraction.workers import extract
from pipeline.prompts.plan import Plan
from pipeline.prompts.worklist import read_prompts
from pipeline.ray_runtime import Pool
from pipeline.reduction.counting import Counted
from pipeline.reduction.kept import choose_entries, create_kept, find_kept, find_record
from pipeline.reduction.moment_store import StoredMoments, moments_digest, training_counting
from pipeline.reduction.moments import Moments
from pipeline.reduction.pairs import find_pairs
from pipeline.reduction.samples import read_samples
from store.activations import ActivationCache
from store.bfloat16 import to_float32
from store.errors import Corrupt
from store.layout import StreamLayout
from store.location import Location

POISON = "Ω"
POOL = Pool(1)

MakePlan = Callable[..., Plan]


def _worker(root: Location, planned: Plan, engine: str = "resident") -> tuple[Any, ...]:
    dtype = planned.cache.capture["model"]["dtype"]
    return (root.url, planned.cache.digest, str(planned.model.path), dtype, "cpu", engine)


def _full(root: Location, planned: Plan) -> ActivationCache:
    """The cache of all rows, in another store."""
    beside = root.child("full")
    index = planned.cache.index()
    files = {"prompts.parquet": planned.cache.read_file("prompts.parquet")}
    layouts = list(planned.cache.streams.values())
    cache = ActivationCache.create(beside, planned.cache.capture, layouts, index, files)
    worker = ShardWorker(beside.url, *_worker(root, planned)[1:])
    for shard in cache.missing():
        [outcome] = worker({"shards": [shard]})
        assert isinstance(pickle.loads(outcome["outcome"]), Receipt)
    cache.seal()
    return cache


def _compute(
    root: Location,
    planned: Plan,
    keep_rows: int,
    chosen: slice = slice(None),
    engine: str = "resident",
    most_apart: int = MOST_APART,
) -> list[Receipt]:
    """Have one worker compute some of the parts."""
    kept, parts = _parts(root, planned, keep_rows, most_apart)
    worker = FusedWorker(*_worker(root, planned, engine), 1.0, kept.digest)
    outcomes = [out for part in parts.parts[chosen] for out in worker(packed([part]))]
    receipts = [pickle.loads(out["outcome"]) for out in outcomes]
    assert all(isinstance(receipt, Receipt) for receipt in receipts), receipts
    return receipts


def _parts(
    root: Location, planned: Plan, keep_rows: int, most_apart: int = MOST_APART
) -> tuple[ActivationCache, Parts]:
    cache = planned.cache
    kept, rows_K = create_kept(cache, root, keep_rows)
    return kept, plan_parts(cache.index(), list(cache.streams.values()), rows_K, most_apart)


def _finish(
    root: Location, planned: Plan, keep_rows: int, most_apart: int = MOST_APART
) -> FusedExtraction:
    return extract_moments(planned, root, pool=POOL, keep_rows=keep_rows, most_apart=most_apart)


def _values(cache: ActivationCache, stream: str) -> NDArray[np.float32]:
    """All rows of a stream, [A, L, W]."""
    layers = cache.streams[stream].layers
    return np.stack(
        [
            np.concatenate(
                [to_float32(cache.read_layer(stream, n, s)) for s in range(cache.num_shards)]
            )
            for n in layers
        ],
        axis=1,
    )


def _assert_counted(counted: Counted, values: NDArray[Any], full: ActivationCache) -> None:
    """The Moments are those of the training rows, group by group."""
    samples = read_samples(full)
    counting = training_counting(samples, find_pairs(samples.index, samples.split_N == "train"))
    for number, counts_A in enumerate(counting.counts_GA):
        _assert_same(counted.groups.group(number), Moments.of_counted(values, counts_A))
    assert counted.pairs is not None
    differences = values[counting.positive_P].astype(np.float64) - values[counting.negative_P]
    assert len(differences) > 10
    for number in range(counting.num_pair_groups):
        expected = Moments.of(differences[counting.group_P == number])
        _assert_same(counted.pairs.group(number), expected)


def _assert_same(found: Moments, expected: Moments) -> None:
    assert found.count == expected.count
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.m2, expected.m2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("capture", "options", "engine", "keep_rows"),
    [
        ('tokens = "last"', {}, "resident", 40),
        ('tokens = "last"\nstreams = ["resid_mid", "z"]', {"dtype": "bfloat16"}, "streamed", 9),
        ('tokens = "all"\nlayers = [0, 2]', {}, "resident", 300),
        # Sides of pairs lie in different parts here, as prompts are sorted by their length.
        ('tokens = "last_3"\npacking = "batches"', {}, "resident", 60),
    ],
)
def test_moments_and_kept_rows_are_those_of_all_rows(
    make_plan: MakePlan,
    make_model: Callable[..., Path],
    root: Location,
    capture: str,
    options: dict[str, Any],
    engine: str,
    keep_rows: int,
) -> None:
    planned = make_plan(make_model(**options), capture=capture)
    cache = planned.cache
    receipts = _compute(root, planned, keep_rows, engine=engine)
    assert sorted(receipt.shard for receipt in receipts) == list(range(cache.num_shards))
    result = _finish(root, planned, keep_rows)
    assert (result.parts_computed, result.record.pairs_apart) == (0, 0)
    full = _full(root, planned)
    kept = find_kept(root, cache.digest)
    assert kept is not None
    rows_K = create_kept(cache, root, keep_rows)[1]
    assert 2 <= kept.num_rows == len(rows_K) <= keep_rows
    moments = StoredMoments.open(root, cache.digest)
    for stream in cache.streams:
        values = _values(full, stream)
        np.testing.assert_array_equal(_values(kept, stream), values[rows_K])
        _assert_counted(moments.counted[stream], values, full)
    # Nothing of the arrays was written, and nothing of the parts is left.
    assert cache.committed() == set()
    assert not [info.key for info in cache.location.list() if "/c/" in info.key]
    assert list(root.list(parts_folder(cache.digest))) == []
    _assert_index(cache, kept, rows_K)


def test_pairs_that_lie_too_far_apart_are_named(make_plan: MakePlan, root: Location) -> None:
    planned = make_plan(capture='tokens = "last_3"\npacking = "batches"')
    _compute(root, planned, 12, most_apart=12)
    record = _finish(root, planned, 12, 12).record
    assert record.pairs_apart > 10
    moments = StoredMoments.open(root, planned.cache.digest)
    assert moments.pairs("z").count == record.pairs_counted
    index = planned.cache.index()
    train_N = np.array(index["split"].to_pylist()) == "train"
    assert record.pairs_counted + record.pairs_apart == len(find_pairs(index, train_N))
    # The kept rows hold whole pairs all the same.
    kept = find_kept(root, planned.cache.digest)
    assert len(find_pairs(kept.index(), np.ones(len(kept.index()), np.bool_)).unpaired) == 0


@pytest.mark.parametrize(("most_apart", "is_exact"), [(12, False), (200, True)])
def test_when_all_rows_are_written_later_inexact_moments_give_way(
    make_plan: MakePlan, root: Location, most_apart: int, is_exact: bool
) -> None:
    planned = make_plan(capture='tokens = "last_3"\npacking = "batches"')
    _compute(root, planned, 20, most_apart=most_apart)
    _finish(root, planned, 20, most_apart)
    worker = ShardWorker(*_worker(root, planned))
    worker({"shards": planned.cache.missing()})
    extract(planned, root, pool=POOL)
    assert planned.cache.is_complete
    assert StoredMoments.exists(root, planned.cache.digest) == is_exact
    assert (find_record(root, planned.cache.digest) is not None) == is_exact


def _assert_index(cache: ActivationCache, kept: ActivationCache, rows_K: NDArray[Any]) -> None:
    """The kept entries are entries of all rows, renumbered, and of whole pairs."""
    columns = ["row", "prompt_id", "pair", "label", "split", "position"]
    whole = cache.index().select(columns).to_pylist()
    entries = [
        entry | {"row": int(rows_K[entry["row"]])}
        for entry in kept.index().select(columns).to_pylist()
    ]
    pairs = {entry["pair"] for entry in entries}
    assert entries == [entry for entry in whole if entry["pair"] in pairs]
    chosen_N = np.ones(len(entries), np.bool_)
    assert len(find_pairs(kept.index(), chosen_N).unpaired) == len(
        find_pairs(
            cache.index(), np.isin(cache.index()["pair"].to_numpy(False), list(pairs))
        ).unpaired
    )
    # Its work list says which tokens each row is.
    token_ids = {(e["row"], e["position"]): e["token_id"] for e in kept.index().to_pylist()}
    rows = []
    for prompt in read_prompts(kept):
        for number, (start, stop) in enumerate(prompt.spans):
            rows.append(prompt.first_row + number)
            assert token_ids[rows[-1], stop - 1] == prompt.token_ids[start]
    assert sorted(rows) == list(range(kept.num_rows))


def test_bytes_are_the_same_whoever_computes_the_parts(
    make_plan: MakePlan, root: Location, tmp_path: Path
) -> None:
    planned = make_plan(capture='tokens = "last_3"')
    stores = [root, Location.open(str(tmp_path / "again"))]
    plans = [planned, make_plan_in(planned, stores[1])]
    _compute(stores[0], plans[0], 32)
    # Another run is killed after a part, and another worker goes on, from the end.
    _compute(stores[1], plans[1], 32, slice(1, 2))
    [found, *_] = _compute(stores[1], plans[1], 32, slice(1, 2))
    assert found.tokens == 0
    _compute(stores[1], plans[1], 32, slice(None, None, -1))
    results = [_finish(store, plan, 32) for store, plan in zip(stores, plans, strict=True)]
    contents = [_contents(store, result) for store, result in zip(stores, results, strict=True)]
    assert contents[0] == contents[1]
    assert results[0].num_parts > 2


def make_plan_in(planned: Plan, root: Location) -> Plan:
    """The same plan in another store."""
    from dataclasses import replace

    cache = planned.cache
    files = {"prompts.parquet": cache.read_file("prompts.parquet")}
    layouts = list(cache.streams.values())
    other = ActivationCache.create(root, cache.capture, layouts, cache.index(), files)
    return replace(planned, cache=other)


def _contents(root: Location, result: FusedExtraction) -> dict[str, bytes]:
    """Moments and kept rows, without commit records, which hold timings."""
    assert result.kept is not None
    folders = [f"moments/{moments_digest(result.record.capture)}", f"caches/{result.kept.digest}"]
    keys = [info.key for folder in folders for info in root.list(folder)]
    return {key: root.get(key) for key in keys if "_commits" not in key}


def test_done_is_done(make_plan: MakePlan, root: Location) -> None:
    planned = make_plan(capture='tokens = "last"')
    _compute(root, planned, 16)
    first = _finish(root, planned, 16)
    before = _contents(root, first)
    # Neither asks for other rows.
    for keep_rows in (None, 16):
        again = extract_moments(planned, root, pool=POOL, keep_rows=keep_rows)
        assert (again.record, again.num_parts) == (first.record, 0)
    assert _contents(root, first) == before
    # Other rows are another run, which finds the Moments that are there.
    _compute(root, planned, 24)
    other = _finish(root, planned, 24)
    assert other.kept.num_rows == 24
    assert find_kept(root, planned.cache.digest).digest == other.kept.digest
    assert root.get(_moments_key(root, planned)) == before[_moments_key(root, planned)]


def _moments_key(root: Location, planned: Plan) -> str:
    keys = [info.key for info in root.list(f"moments/{moments_digest(planned.cache.digest)}")]
    return next(key for key in keys if key.endswith(".safetensors"))


def test_a_capture_of_which_all_rows_are_there_is_left_alone(
    make_plan: MakePlan, root: Location
) -> None:
    planned = make_plan(capture='tokens = "last"')
    worker = ShardWorker(*_worker(root, planned))
    worker({"shards": planned.cache.missing()})
    planned.cache.seal()
    result = _finish(root, planned, 16)
    assert (result.record, result.kept) == (None, None)
    assert find_kept(root, planned.cache.digest) is None
    assert list(root.list("moments")) == []


def test_a_damaged_part_is_named(make_plan: MakePlan, root: Location) -> None:
    planned = make_plan(capture='tokens = "last"')
    _compute(root, planned, 16)
    folder = root.child(parts_folder(planned.cache.digest))
    key = next(info.key for info in folder.list() if info.key.endswith(".z.safetensors"))
    folder.replace(key, folder.get(key)[:-1] + b"?")
    with pytest.raises(Corrupt, match=key) as caught:
        _finish(root, planned, 16)
    assert caught.value.kind == "blob_checksum"
    assert find_record(root, planned.cache.digest) is None
    # As the message says.
    for info in list(folder.list()):
        if info.key.rpartition("/")[2][:8] == key.rpartition("/")[2][:8]:
            folder.delete(info.key)
    _compute(root, planned, 16)
    assert _finish(root, planned, 16).record is not None


def test_workers_of_a_pool_write_the_same(
    make_plan: MakePlan, root: Location, tmp_path: Path, ray_running: None
) -> None:
    planned = make_plan(capture='tokens = "last"')
    receipts: list[Receipt] = []
    done: list[int] = []
    result = extract_moments(
        planned, root, pool=POOL, keep_rows=16, on_start=done.append, on_receipt=receipts.append
    )
    assert done == [0]
    assert result.run.shards_computed == len(receipts) == planned.cache.num_shards
    assert result.run.parity.worst < 1e-4
    assert result.run.engine.name == "resident"
    other = Location.open(str(tmp_path / "other"))
    again = make_plan_in(planned, other)
    _compute(other, again, 16)
    assert _contents(other, _finish(other, again, 16)) == _contents(root, result)


@pytest.fixture
def poisoned(make_poisoned: Callable[[str], Path]) -> Path:
    return make_poisoned(POISON)


def _rows(num_poisoned: int) -> list[dict[str, str]]:
    return [
        {
            "prompt": f"{number}: which way?",
            "positive": "to the north" + POISON * (number < num_poisoned),
            "negative": "to the south",
        }
        for number in range(40)
    ]


def test_poisoned_rows_are_in_no_moments_and_their_partners_neither(
    make_plan: MakePlan, root: Location, poisoned: Path
) -> None:
    prompts = "test_share = 0.0\nvalidation_share = 0.0\nmax_quarantined = 0.1"
    planned = make_plan(poisoned, _rows(2), prompts=prompts, capture='tokens = "last"')
    _compute(root, planned, 100)
    result = _finish(root, planned, 100)
    record = result.record
    assert len(record.quarantined) == 2
    assert (record.left_out, record.partners_counted, record.pairs_counted) == (4, 0, 38)
    assert result.run.quarantined == {item.row: item.reason for item in record.quarantined}
    # All rows are kept, so the two caches say the same.
    full = _full(root, planned)
    assert result.kept.quarantined() == full.quarantined() == result.run.quarantined
    moments = StoredMoments.open(root, planned.cache.digest)
    samples = read_samples(full)
    for stream in full.streams:
        values = _values(full, stream)
        for label in (False, True):
            found = moments.of(stream, label=label)
            # Halves follow from all samples here, and there from those that count.
            expected = Moments.of(values[samples.row_N[samples.label_N == label]])
            _assert_same(found, expected)


def test_too_much_poison_stops_the_run(make_plan: MakePlan, root: Location, poisoned: Path) -> None:
    prompts = "max_quarantined = 0.02"
    planned = make_plan(poisoned, _rows(5), prompts=prompts, capture='tokens = "last"')
    _compute(root, planned, 100)
    with pytest.raises(InvalidInput, match="5 of 80 rows") as caught:
        _finish(root, planned, 100)
    assert caught.value.kind == "prompt_quarantine"
    assert find_record(root, planned.cache.digest) is None


# Without a model: any corpus, any shards, any pairs.

WIDTH = 3


@st.composite
def corpora(draw: st.DrawFn) -> tuple[pa.Table, StreamLayout, set[int]]:
    """An index, its layout, and which rows are not finite."""
    num_rows = draw(st.integers(1, 12)) * 8 + draw(st.integers(0, 7))
    num_entries = num_rows + draw(st.integers(0, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = np.concatenate([np.arange(num_rows), rng.integers(0, num_rows, num_entries - num_rows)])
    pair = rng.integers(0, max(1, num_entries // 3), num_entries)
    index = pa.table(
        {
            "row": pa.array(rows, pa.int64()),
            "prompt_id": pa.array([f"p{i}" for i in range(num_entries)]),
            "pair": pa.array([None if p % 7 == 6 else f"q{p}" for p in pair.tolist()], pa.string()),
            "label": pa.array(rng.integers(0, 2, num_entries) == 1),
            "split": pa.array([("train", "test")[p % 5 == 4] for p in pair.tolist()]),
        }
    )
    layout = StreamLayout("resid_post", num_rows, (0, 4), WIDTH, "float32", 8, 8)
    bad = draw(st.sets(st.integers(0, num_rows - 1), max_size=3))
    return index, layout, bad


def _count_parts(
    parts: Sequence[Part], layout: StreamLayout, values: NDArray[np.float32], bad: set[int]
) -> Iterator[Any]:
    for part in parts:
        count = PartCount(part)
        for shard in part.shards:
            rows = layout.shard_rows(shard)
            here = {row: "NaN" for row in bad if row in rows}
            result = ShardResult(shard, {"resid_post": values[rows.start : rows.stop]}, here, 0)
            count.add(result, rows)
        yield count.finish()


@settings(max_examples=60)
@given(corpora(), st.integers(1, 4), st.sampled_from([0, 10**6]))
def test_parts_of_any_corpus_come_to_its_moments(
    corpus: tuple[pa.Table, StreamLayout, set[int]], per_part: int, most_apart: int
) -> None:
    index, layout, bad = corpus
    rng = np.random.default_rng(0)
    values = rng.normal(300, 1, (layout.num_rows, 2, WIDTH)).astype(np.float32)
    values[sorted(bad)] = np.nan
    kept = np.unique(rng.integers(0, layout.num_rows, 9))
    parts = plan_parts(index, [layout], kept, most_apart, per_part)
    assert [shard for part in parts.parts for shard in part.shards] == list(
        range(layout.num_shards)
    )
    results = list(_count_parts(parts.parts, layout, values, bad))
    merged = results[0].counted["resid_post"]
    for one in results[1:]:
        merged = merged.merge(one.counted["resid_post"])
    root = Location.open("memory://")
    store = PartStore(root, "c" * 64, "d" * 64)
    records = [store.write(part, one, {}) for part, one in zip(parts.parts, results, strict=True)]
    saved = SavedRows(root, "c" * 64, "d" * 64, parts.saved_rows, records)
    np.testing.assert_array_equal(saved.of(kept)["resid_post"], values[kept])
    apart = parts.apart_without(sorted(bad))
    pair_moments = merged.pairs
    if len(apart):
        pair_moments = pair_moments.merge(count_apart(saved, apart)["resid_post"])

    train_N = np.array([split == "train" for split in index["split"].to_pylist()])
    row_N = index["row"].to_numpy()
    left_out = sum(one.left_out for one in results)
    total = merged.groups.group(*range(len(merged.groups.count_G)))
    assert total.count == train_N.sum() - left_out
    in_bad_rows = (train_N & np.isin(row_N, sorted(bad))).sum()
    assert in_bad_rows <= left_out <= parts.in_blocks_of(sorted(bad))
    assert np.isfinite(total.mean).all()
    pairs = find_pairs(index, train_N)
    positive_P, negative_P = row_N[pairs.positive_P], row_N[pairs.negative_P]
    size = per_part * layout.rows_per_shard
    if most_apart:
        inside_P = np.ones(len(pairs), np.bool_)
    else:
        inside_P = positive_P // size == negative_P // size
    assert parts.pairs_apart == (~inside_P).sum()
    counted = sum(one.pairs_counted for one in results) + len(apart)
    all_pairs = pair_moments.group(0, 1)
    assert counted == all_pairs.count
    assert np.isfinite(all_pairs.mean).all()
    if not bad:
        _assert_same(total, Moments.of(values[row_N[train_N]]))
        differences = values[positive_P[inside_P]].astype(np.float64) - values[negative_P[inside_P]]
        _assert_same(all_pairs, Moments.of(differences))


@given(
    st.integers(1, 10**7),
    st.sampled_from([32, 64, 96, 512, 4096]),
    st.sampled_from(["bfloat16", "float32"]),
)
def test_moments_of_a_part_are_few_bytes_and_parts_are_many(
    num_rows: int, rows_per_shard: int, dtype: Any
) -> None:
    layout = StreamLayout("resid_post", num_rows, (0,), 8, dtype, rows_per_shard)
    per_part = shards_per_part([layout], 10)
    num_parts = -(-layout.num_shards // per_part)
    row_bytes = 8 * layout.itemsize
    moments = 10 * 2 * 8 * 8
    if num_parts > 32:
        assert moments <= 0.05 * per_part * rows_per_shard * row_bytes
    else:
        # Then all of them together are few.
        assert num_parts * moments <= 32 * 10 * 2 * 8 * 8
    assert num_parts >= min(layout.num_shards, 17)


def test_kept_entries_are_a_sample_of_whole_blocks() -> None:
    names = [f"q{i // 2}" if i < 1000 else None for i in range(1200)]
    index = pa.table(
        {
            "row": pa.array(np.arange(1200), pa.int64()),
            "prompt_id": pa.array([f"p{i}" for i in range(1200)]),
            "pair": pa.array(names, pa.string()),
        }
    )
    chosen_N = choose_entries(index, 301)
    assert 300 <= chosen_N.sum() <= 301
    assert (chosen_N[:1000:2] == chosen_N[1:1000:2]).all()
    # From everywhere, and more are those and others.
    thirds = chosen_N.reshape(3, 400).mean(axis=1)
    assert (abs(thirds - 0.25) < 0.08).all()
    assert choose_entries(index, 600)[chosen_N].all()
    assert choose_entries(index, 5000).all()
    assert choose_entries(index, 1).sum() in (1, 2)


def test_a_part_that_comes_out_otherwise_is_refused(make_plan: MakePlan, root: Location) -> None:
    from store.errors import Conflict

    planned = make_plan(capture='tokens = "last"')
    _compute(root, planned, 16, slice(0, 1))
    kept, parts = _parts(root, planned, 16)
    part = parts.parts[0]
    layout = planned.cache.streams["z"]
    count = PartCount(part)
    for shard in part.shards:
        rows = layout.shard_rows(shard)
        values = {
            name: np.ones((len(rows), len(one.layers), one.width), np.float32)
            for name, one in planned.cache.streams.items()
        }
        count.add(ShardResult(shard, values, {}, 0), rows)
    store = PartStore(root, planned.cache.digest, kept.digest)
    with pytest.raises(Conflict, match="not deterministic"):
        store.write(part, count.finish(), {})


def test_json_of_the_record_is_read_back(make_plan: MakePlan, root: Location) -> None:
    planned = make_plan(capture='tokens = "last"')
    _compute(root, planned, 16)
    record = _finish(root, planned, 16).record
    key = f"moments/{moments_digest(planned.cache.digest)}/no_cache.json"
    assert find_record(root, planned.cache.digest) == record
    root.replace(key, json.dumps({"capture": "?"}).encode())
    with pytest.raises(Corrupt, match="no_cache.json"):
        find_record(root, planned.cache.digest)
