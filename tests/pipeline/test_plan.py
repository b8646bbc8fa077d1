"""Plan: the same inputs find the same cache, and packs cover a shard exactly."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InvalidInput
from pipeline.prompts.packing import Packing
from pipeline.prompts.plan import QUARANTINE_FILE, plan
from pipeline.prompts.trie import PlannedPrompt
from pipeline.prompts.worklist import read_prompts, read_shard
from store.activations import ActivationCache
from store.location import Location


def test_planning_again_finds_the_same_cache(make_run: Any, root: Location) -> None:
    run = make_run()
    first, second = plan(run, root), plan(run, root)
    assert first.cache.digest == second.cache.digest
    assert ActivationCache.list_digests(root) == [first.cache.digest]
    assert first.summary() == second.summary()
    assert (first.num_prompts, first.num_rows) == (80, 80)
    assert first.num_bytes == 80 * 3 * (64 + 64) * 4
    # The format, once it is known, is the same whether it was told or found; so is where bad rows
    # make the run stop.
    same = make_run(prompts='format = "pairs"\nmax_quarantined = 0.5')
    assert plan(same, root).cache.digest == first.cache.digest


@pytest.mark.parametrize(
    "changed",
    [
        {"prompts": "close_turn = true"},
        {"prompts": 'system = "Be brief."'},
        {"prompts": "test_share = 0.3"},
        {"capture": 'tokens = "-2"'},
        {"capture": "layers = [1]"},
        {"capture": 'dtype = "bfloat16"'},
        {"capture": 'streams = ["z"]'},
        {"capture": "tokens_per_pack = 100"},
        {"rest": 'dtype = "bfloat16"'},
        {"rows": [{"prompt": "x", "positive": "a", "negative": "b"}]},
    ],
)
def test_whatever_decides_the_bytes_changes_the_digest(make_plan: Any, changed: Any) -> None:
    assert make_plan().cache.digest != make_plan(**changed).cache.digest


def test_a_format_that_is_named_later_finds_the_cache_with_bad_rows(
    make_run: Any, root: Location
) -> None:
    rows = [
        {"text": "no pair"},
        *({"prompt": f"{i}", "positive": "a", "negative": "b"} for i in range(30)),
    ]
    found = plan(make_run(rows=rows), root)
    assert (
        plan(make_run(rows=rows, prompts='format = "pairs"'), root).cache.digest
        == found.cache.digest
    )
    assert len(found.quarantined) == 1


def test_rows_do_not_depend_on_the_order_of_the_files(
    make_run: Any, root: Location, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        rows = [
            {"prompt": f"{name}{i} {'word ' * (i % 5)}", "positive": "yes", "negative": "no"}
            for i in range(20)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = plan(make_run(files=("a.jsonl", "b.jsonl")), root)
    other = plan(make_run(files=("b.jsonl", "a.jsonl")), root)
    assert one.cache.index().equals(other.cache.index())
    assert one.cache.capture["token_ids"] == other.cache.capture["token_ids"]


@pytest.mark.parametrize("tokens", ["last", "-2", "mean", "all", "completion", "text:to the"])
def test_the_index_says_what_every_row_is(make_plan: Any, make_tokenizer: Any, tokens: str) -> None:
    planned = make_plan(capture=f'tokens = "{tokens}"')
    index = planned.cache.index().to_pylist()
    prompts = read_prompts(planned.cache)
    path = planned.cache.location.local_path() / "prompts.parquet"
    # A prompt with rows in two shards is listed for both.
    by_id = {entry["prompt_id"]: entry for entry in pq.read_table(path).to_pylist()}
    table = list(by_id.values())
    tokenizer = make_tokenizer()
    if tokens == "all":
        check_shared_rows(planned, index, table)
        return
    assert len(index) == planned.num_rows
    row = 0
    for prompt, stored in zip(prompts, table, strict=True):
        assert prompt.first_row == row
        assert list(prompt.spans) == list(zip(stored["starts"], stored["stops"], strict=True))
        if tokens in ("last", "-2", "mean", "all"):
            assert list(prompt.spans) == spans_of(tokens, len(stored["token_ids"]))
        for start, stop in prompt.spans:
            entry = index[row]
            assert entry["row"] == row
            text = stored["text"][entry["text_start"] : entry["text_stop"]]
            assert entry["prompt_id"] == stored["prompt_id"]
            assert (entry["first_position"], entry["position"]) == (start, stop - 1)
            assert entry["label"] == stored["prompt_id"].endswith("+")
            assert text == tokenizer.decode(stored["token_ids"][start:stop])
            single = stop == start + 1
            assert entry["token_id"] == (stored["token_ids"][start] if single else None)
            row += 1
    assert row == planned.num_rows


def check_shared_rows(planned: Any, index: list[Any], table: list[Any]) -> None:
    """Every token of every prompt has an entry; entries share a row if all before them is alike."""
    paths: dict[int, tuple[int, ...]] = {}
    entries = iter(index)
    for stored in table:
        for position in range(len(stored["token_ids"])):
            entry = next(entries)
            path = tuple(stored["token_ids"][: position + 1])
            assert entry["prompt_id"] == stored["prompt_id"]
            assert (entry["position"], entry["token_id"]) == (position, path[-1])
            assert paths.setdefault(entry["row"], path) == path
    assert next(entries, None) is None
    assert sorted(paths) == list(range(planned.num_rows))
    assert len(set(paths.values())) == planned.num_rows == planned.num_nodes
    assert planned.num_rows < 0.6 * len(index)


@pytest.mark.parametrize("tokens", ["last", "all", "last_3"])
def test_a_worker_reads_the_prompts_of_its_shard_alone(make_plan: Any, tokens: str) -> None:
    planned = make_plan(capture=f'tokens = "{tokens}"\nshard_mib = 0.01')
    layout = planned.cache.layout("z")
    everything = read_prompts(planned.cache)
    assert planned.cache.num_shards > 2
    for shard in range(planned.cache.num_shards):
        rows = set(layout.shard_rows(shard))
        wanted = [
            p for p in everything if rows & set(range(p.first_row, p.first_row + len(p.spans)))
        ]
        found = [p for p in read_shard(planned.cache, shard) if p.spans]
        assert [p.first_row for p in found] == [p.first_row for p in wanted]
        assert all(
            np.array_equal(a.token_ids, b.token_ids) and a.spans == b.spans
            for a, b in zip(found, wanted, strict=True)
        )


def test_bad_rows_are_counted_and_kept_beside_the_cache(make_run: Any, root: Location) -> None:
    good = [{"prompt": f"{i}", "positive": "a", "negative": "b"} for i in range(30)]
    bad = [
        {"prompt": "x", "positive": "a"},
        {"prompt": "x" * 400, "positive": "a", "negative": "b"},
    ]
    run = make_run(rows=[*good, *bad], prompts='template = "none"\nmax_quarantined = 0.07')
    planned = plan(run, root)
    reasons = {
        "pairs.jsonl:31: field 'negative' is missing",
        "pairs.jsonl:32: 401 tokens, longer than the model's context of 256",
    }
    assert {str(row) for row in planned.quarantined} == reasons
    stored = planned.cache.read_file(QUARANTINE_FILE).decode().splitlines()
    assert {f"{r['file']}:{r['line']}: {r['reason']}" for r in map(json.loads, stored)} == reasons
    with pytest.raises(InvalidInput, match="2 of 32 rows are bad, more than"):
        make_plan_of(run, root, max_quarantined=0.06)


def make_plan_of(run: Any, root: Location, **settings: Any) -> None:
    plan(run.model_copy(update={"prompts": run.prompts.model_copy(update=settings)}), root)


def test_a_pair_with_one_side_too_short_is_left_out_whole(make_plan: Any) -> None:
    rows = [{"prompt": "z", "positive": "abcdef", "negative": "y"}] + [
        {"prompt": f"zzz{i}", "positive": "zq", "negative": "zx"} for i in range(30)
    ]
    planned = make_plan(rows=rows, prompts='template = "none"', capture='tokens = "-4"')
    assert [str(row) for row in planned.quarantined] == [
        "pairs.jsonl:1: 2 tokens, too few for tokens = '-4'"
    ]
    assert planned.num_prompts == 60


def test_prompts_without_the_selected_tokens_are_quarantined_with_their_partner(
    make_plan: Any,
) -> None:
    rows = [{"prompt": "z", "positive": "(A)", "negative": "neither"}] + [
        {"prompt": f"z{i}", "positive": "(A)", "negative": "(B)"} for i in range(30)
    ]
    planned = make_plan(rows=rows, capture='tokens = "answer_letter"')
    (row,) = planned.quarantined
    assert str(row).startswith("pairs.jsonl:1: the completion 'neither' has no answer letter")
    assert planned.num_prompts == planned.num_rows == 60
    letters = [chr(ord("A") + (not label)) for label in planned.cache.index()["label"].to_pylist()]
    texts = pq.read_table(planned.cache.location.local_path() / "prompts.parquet")["text"]
    assert [
        text[entry["text_start"] : entry["text_stop"]]
        for text, entry in zip(texts.to_pylist(), planned.cache.index().to_pylist(), strict=True)
    ] == letters


def test_a_selection_of_completions_is_refused_for_labelled_prompts(make_plan: Any) -> None:
    rows = [{"prompt": f"{i}", "label": i % 2} for i in range(30)]
    with pytest.raises(InvalidInput, match="reads completions, and labelled prompts have none"):
        make_plan(rows=rows, capture='tokens = "completion"')
    assert make_plan(rows=rows, capture='tokens = "mean_prompt"').num_rows == 30


def test_the_digest_of_the_tokens_is_that_of_their_lengths_and_ids_as_int64(
    make_plan: Any,
) -> None:
    planned = make_plan()
    table = pq.read_table(planned.cache.location.local_path() / "prompts.parquet")
    listed = [n for ids in table["token_ids"].to_pylist() for n in (len(ids), *ids)]
    expected = hashlib.sha256(np.asarray(listed, "<i8").tobytes()).hexdigest()
    assert planned.cache.capture["token_ids"] == expected


@pytest.mark.parametrize("layers", ["[3]", "[-1]"])
def test_layers_that_the_model_lacks_are_refused(make_plan: Any, layers: str) -> None:
    with pytest.raises(InvalidInput, match="has layers 0 to 2"):
        make_plan(capture=f"layers = {layers}")


def spans_of(selection: str, num: int) -> list[tuple[int, int]]:
    """What the forms that depend on the number of tokens alone select."""
    return {
        "last": [(num - 1, num)],
        "-2": [(num - 2, num - 1)],
        "mean": [(0, num)],
        "all": [(i, i + 1) for i in range(num)],
    }[selection]


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60).map(sorted)


def prompts_of(lengths: list[int], selection: str) -> list[PlannedPrompt]:
    prompts, first_row = [], 0
    for length in lengths:
        spans = tuple(spans_of(selection, length))
        prompts.append(PlannedPrompt(np.zeros(length, np.int64), first_row, spans))
        first_row += len(spans)
    return prompts


@given(
    lengths=LENGTHS,
    selection=st.sampled_from(["last", "mean", "all"]),
    rows_per_shard=st.integers(1, 50),
    budget=st.integers(1, 200),
)
def test_packs_cover_each_prompt_of_a_shard_once_within_the_budget(
    lengths: list[int], selection: str, rows_per_shard: int, budget: int
) -> None:
    prompts = prompts_of(lengths, selection)
    num_rows = sum(len(prompt.spans) for prompt in prompts)
    seen_rows: list[int] = []
    for start in range(0, num_rows, rows_per_shard):
        rows = range(start, min(start + rows_per_shard, num_rows))
        packs = list(Packing("batches", budget).batches(prompts, rows))
        for pack in packs:
            longest = max(len(prompt.token_ids) for prompt in pack)
            assert longest * len(pack) <= budget or len(pack) == 1
        packed = [prompt for pack in packs for prompt in pack]
        assert len({prompt.first_row for prompt in packed}) == len(packed)
        of_prompt = [range(p.first_row, p.first_row + len(p.spans)) for p in packed]
        # No prompt is computed in vain.
        assert all(set(own) & set(rows) for own in of_prompt)
        seen_rows.extend(row for own in of_prompt for row in own if row in rows)
    assert seen_rows == list(range(num_rows))


def test_a_small_corpus_is_split_for_several_workers(make_plan: Any) -> None:
    rows = [{"prompt": f"{i}", "positive": "a", "negative": "b"} for i in range(512)]
    planned = make_plan(rows=rows)
    shards = [planned.cache.layout("z").shard_rows(i) for i in range(planned.cache.num_shards)]
    assert len(shards) == 32
    assert [row for rows in shards for row in rows] == list(range(planned.num_rows))
