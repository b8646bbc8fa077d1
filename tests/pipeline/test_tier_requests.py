"""Requests of both tiers: containers, splits, and rows that bring their own systems."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from pipeline.config import PromptsSection
from pipeline.errors import InvalidInput
from pipeline.evaluation.tier_requests import Request, asked_split, read_requests
from pipeline.evaluation.tiers import FILE_CONDITIONS, default_conditions, load_conditions
from pipeline.prompts.corpus import read_corpus

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MONITORING = EXAMPLES / "pocket_data" / "monitoring.jsonl"


def test_requests_of_a_plain_file_come_from_three_containers(tmp_path):
    table = pa.table({"prompt": ["a", "b", "c"], "split": ["test", "train", "test"]})
    pa.csv.write_csv(table, tmp_path / "r.csv")
    pa.parquet.write_table(table, tmp_path / "r.parquet")
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(x) + "\n" for x in table.to_pylist()))
    for name in ("r.csv", "r.parquet", "r.jsonl"):
        assert read_requests(tmp_path / name) == [Request("1", "a"), Request("3", "c")]
        assert len(read_requests(tmp_path / name, split=None)) == 3
        assert read_requests(tmp_path / name, limit=1) == [Request("1", "a")]


def test_rows_without_a_split_are_split_as_in_any_prompt_file(tmp_path):
    path = tmp_path / "r.jsonl"
    plain = [{"prompt": f"q {n}", "label": 0} for n in range(60)]
    tiers = ("monitored", "unmonitored")
    told = [
        {"prompt": f"q {n}", "label": 0, "tier": tier, "system": tier, "pair": n}
        for n in range(60)
        for tier in tiers
    ]
    for rows in (plain, told):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        expected = read_corpus(PromptsSection(files=[path])).examples
        splits = [read_requests(path, split) for split in ("train", "validation", "test")]
        for split, requests in zip(("train", "validation", "test"), splits, strict=True):
            prompts = list(dict.fromkeys(e.prompt for e in expected if e.split == split))
            assert [request.prompt for request in requests] == prompts
            assert len(requests) >= 4
        assert sum(map(len, splits)) == len(read_requests(path, split=None)) == 60
        assert asked_split(path) is None
    assert {tuple(r.systems) for r in splits[0]} == {tiers}
    path.write_text(json.dumps({"prompt": "q", "split": "test"}) + "\n")
    assert asked_split(path) == "test"


def test_requests_with_their_own_systems_are_asked_by_them():
    requests = read_requests(MONITORING, limit=2)
    assert default_conditions(requests) == FILE_CONDITIONS
    bare = [Request("1", "q", {"monitored": "m", "unmonitored": "u"}), *requests]
    assert default_conditions(bare) == FILE_CONDITIONS[:1]
    assert default_conditions([Request("1", "q")]) == load_conditions()


def test_rows_with_tiers_make_one_request_a_pair():
    requests = read_requests(MONITORING)
    assert len(requests) == 100
    assert {tuple(r.systems) for r in requests} == {("monitored", "unmonitored", "xx", "yy")}
    asked = FILE_CONDITIONS[1].prompt(requests[0], 1)
    assert asked.system == requests[0].systems["yy"]
    assert "YY" in asked.system
    assert asked.user == requests[0].prompt


ROW = {"prompt": "q", "tier": "xx", "system": "s", "pair": 1, "split": "test"}


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([ROW, {**ROW, "tier": "yy", "prompt": "other"}], "row 2: pair 1 has two prompts"),
        ([ROW, ROW], "row 2: .*tier 'xx' twice"),
        ([{**ROW, "tier": "free"}], "row 1: expected a tier of monitored.*got 'free'"),
        ([{**ROW, "pair": None}], "row 1: .*and a pair"),
        ([{**ROW, "system": " "}], "row 1: expected text in field 'system', got ' '"),
        ([{"prompt": 3}], "row 1: expected text in field 'prompt', got 3"),
        ([{"goal": "q"}], "row 1: expected text in field 'prompt', got None"),
        ([{"prompt": "q", "split": "train"}], "expected rows of split 'test', got none of 1"),
        ([{"prompt": "q", "split": "tset"}], "row 1: split 'tset' is none of train"),
        (["{"], "cannot be read as .jsonl"),
    ],
)
def test_a_bad_row_is_named(tmp_path, rows, problem):
    path = tmp_path / "r.jsonl"
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    with pytest.raises(InvalidInput, match=problem) as caught:
        read_requests(path)
    assert "r.jsonl" in str(caught.value)
