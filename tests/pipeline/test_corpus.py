"""Prompt files: three formats in three containers, and a quarantine that loses nothing unseen."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from pipeline.config import PromptsSection
from pipeline.errors import InvalidInput
from pipeline.prompts.corpus import Corpus, check_quarantine, read_corpus

ROWS = {
    "pairs": [
        {"prompt": "Where to?", "positive": "North, »captain«", "negative": "South"},
        {"prompt": "And then?\nSay.", "positive": "On, on", "negative": "Back"},
    ],
    "caa": [
        {
            "question": "Help the other AI?",
            "answer_matching_behavior": " (A)",
            "answer_not_matching_behavior": " (B)",
        }
    ],
    "labelled": [{"prompt": "Bake bread", "label": "0"}, {"prompt": "Sink it", "label": "1"}],
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def read(*files: Path, **settings: Any) -> Corpus:
    return read_corpus(PromptsSection(files=list(files), **settings))


@pytest.mark.parametrize("detected", [True, False])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("name", ROWS)
def test_every_format_in_every_container(
    tmp_path: Path, name: Any, suffix: str, detected: bool
) -> None:
    path = write(tmp_path / f"data{suffix}", ROWS[name])
    corpus = read(path, format="auto" if detected else name)
    assert (corpus.format, corpus.quarantined) == (name, [])
    assert corpus.num_rows == len(ROWS[name])
    found = [(e.prompt, e.completion, e.label) for e in corpus.examples]
    expected = {
        "pairs": [
            ("Where to?", "North, »captain«", True),
            ("Where to?", "South", False),
            ("And then?\nSay.", "On, on", True),
            ("And then?\nSay.", "Back", False),
        ],
        "caa": [("Help the other AI?", " (A)", True), ("Help the other AI?", " (B)", False)],
        "labelled": [("Bake bread", None, False), ("Sink it", None, True)],
    }
    assert found == expected[name]


def test_a_pair_shares_its_name_and_split(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "positive": "a", "negative": "b"} for i in range(50)]
    corpus = read(write(tmp_path / "a.jsonl", rows))
    for positive, negative in zip(corpus.examples[::2], corpus.examples[1::2], strict=True):
        assert (positive.pair, positive.split) == (negative.pair, negative.split)
        assert positive.prompt_id[:-1] == negative.prompt_id[:-1] == positive.pair
        assert (positive.prompt_id[-1], negative.prompt_id[-1]) == ("+", "-")
    assert corpus.examples[4].source == ("a.jsonl", 3)


def test_rows_may_name_pair_split_and_system(tmp_path: Path) -> None:
    rows = [
        {"prompt": "x", "label": 1, "pair": "p1", "split": "test", "system": "Be brief."},
        {"prompt": "y", "label": 0, "pair": "p1", "split": None, "system": None},
        {"prompt": "z", "label": 0, "pair": 7},
    ]
    first, second, third = read(write(tmp_path / "a.jsonl", rows), system="Default.").examples
    assert (first.pair, first.split, first.system) == ("p1", "test", "Be brief.")
    assert (second.pair, second.system) == ("p1", "Default.")
    assert third.pair == "7"


def test_splits_are_stable_and_follow_the_wording(tmp_path: Path) -> None:
    rows = [{"prompt": f"prompt {i}", "positive": "a", "negative": "b"} for i in range(400)]
    by_prompt = {e.prompt: e.split for e in read(write(tmp_path / "a.jsonl", rows)).examples}
    moved = {
        e.prompt: e.split for e in read(write(tmp_path / "b.jsonl", rows[::-1][:200])).examples
    }
    assert moved == {prompt: by_prompt[prompt] for prompt in moved}
    counts = Counter(by_prompt.values())
    assert 0.5 < counts["train"] / 400 < 0.7
    assert 0.14 < counts["validation"] / 400 < 0.26
    assert 0.14 < counts["test"] / 400 < 0.26
    # Pinned: another version of the code must not move rows from one split to another.
    assert [by_prompt[f"prompt {i}"] for i in range(6)] == PINNED
    everything = read(tmp_path / "a.jsonl", validation_share=0.0, test_share=0.0)
    assert {e.split for e in everything.examples} == {"train"}


PINNED = ["validation", "train", "test", "train", "train", "train"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((value, True) for value in (1, True, "positive", " TRUE ", 1.0)),
        *((value, False) for value in (0, False, "negative", "False", 0.0)),
    ],
)
def test_labels_that_need_no_name(tmp_path: Path, value: Any, expected: bool) -> None:
    (example,) = read(write(tmp_path / "a.jsonl", [{"prompt": "x", "label": value}])).examples
    assert example.label is expected


def test_the_positive_label_may_be_named(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "label": "Harmful"}, {"prompt": "y", "label": "benign"}]
    rows.append({"prompt": "z", "label": ""})
    path = write(tmp_path / "a.csv", rows)
    named = read(path, positive_label="harmful ")
    assert [e.label for e in named.examples] == [True, False]
    assert [str(q) for q in named.quarantined] == ["a.csv:4: field 'label' is empty"]
    unnamed = read(path)
    assert len(unnamed.quarantined) == 3
    assert "prompts.positive_label" in unnamed.quarantined[0].reason


GOOD = b'{"prompt": "p", "positive": "a", "negative": "b"}'
BAD_LINES = {
    "missing": (b'{"prompt": "p", "positive": "a"}', "field 'negative' is missing"),
    "null": (b'{"prompt": null, "positive": "a", "negative": "b"}', "field 'prompt' is missing"),
    "not-utf-8": (b'{"prompt": "\xff", "positive": "a", "negative": "b"}', "not UTF-8"),
    "empty": (b'{"prompt": " \\n", "positive": "a", "negative": "b"}', "field 'prompt' is empty"),
    "type": (b'{"prompt": 3, "positive": "a", "negative": "b"}', "is int, expected text"),
    "not-json": (b"{prompt: p}", "not JSON"),
    "not-object": (b'["p", "a", "b"]', "not a JSON object but list"),
    "surrogate": (b'{"prompt": "\\ud800", "positive": "a", "negative": "b"}', "lone surrogate"),
    "surrogate-pair": (GOOD[:-1] + b', "pair": "\\ud800"}', "lone surrogate"),
    "surrogate-system": (GOOD[:-1] + b', "system": "\\udfff"}', "lone surrogate"),
    "pair-type": (GOOD[:-1] + b', "pair": ["p"]}', "is list, expected text"),
    "split": (GOOD[:-1] + b', "split": "dev"}', "split 'dev' is none of train, validation, test"),
    "nested": (b"[" * 5000 + b"]" * 5000, ""),
    "nested-field": (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", ""),
    "nested-pair": (GOOD[:-1] + b', "pair": ' + b"[" * 900 + b"]" * 900 + b"}", "list"),
    "long-number": (b'{"prompt": ' + b"1" * 5000 + b"}", "not JSON"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_quarantined_and_the_rest_is_read(tmp_path: Path, case: str) -> None:
    line, reason = BAD_LINES[case]
    path = tmp_path / "data.jsonl"
    # First, so that it cannot tell the format either; and after a blank line.
    path.write_bytes(b"\n".join([line, GOOD, b"", line, GOOD]))
    corpus = read(path)
    assert [(q.file, q.line) for q in corpus.quarantined] == [("data.jsonl", 1), ("data.jsonl", 4)]
    assert reason in corpus.quarantined[0].reason
    assert str(corpus.quarantined[0]).startswith("data.jsonl:1: ")
    assert len(corpus.quarantined[0].reason) < 300
    assert [e.prompt_id for e in corpus.examples] == [
        f"data.jsonl:{i}{sign}" for i in (2, 5) for sign in "+-"
    ]
    assert corpus.num_rows == 4
    # The reasons do not depend on whether the format was told or found.
    assert read(path, format="pairs").quarantined == corpus.quarantined


def test_bad_rows_of_a_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(
        b'\xef\xbb\xbfprompt,label\nfine,1\n"two\nlines",0\n'
        b"bad \xff,1\nshort\n,1\nlast,maybe\nok,0\n"
    )
    corpus = read(path)
    assert [(e.prompt, e.label) for e in corpus.examples] == [
        ("fine", True),
        ("two\nlines", False),
        ("ok", False),
    ]
    found = [(q.line, q.reason) for q in corpus.quarantined]
    assert found[:3] == [
        (5, "not UTF-8"),
        (6, "field 'label' is missing"),
        (7, "field 'prompt' is empty"),
    ]
    assert found[3][0] == 8
    assert "'maybe'" in found[3][1]


def test_a_csv_quote_that_never_closes_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('prompt,label\nfine,1\n"open,0\nlost,1\n')
    corpus = read(path)
    assert [e.prompt for e in corpus.examples] == ["fine"]
    assert [q.line for q in corpus.quarantined] == [3]
    assert "not CSV" in corpus.quarantined[0].reason


def test_bad_rows_of_a_parquet_file(tmp_path: Path) -> None:
    prompts = pa.array([b"fine", b"bad \xff", b"", None, b"ok"]).cast(pa.binary())
    not_utf8 = pa.Array.from_buffers(pa.string(), 5, prompts.buffers())
    path = tmp_path / "data.parquet"
    pq.write_table(
        pa.table({"prompt": not_utf8, "label": [1.0, 0.0, 1.0, 1.0, float("nan")]}), path
    )
    corpus = read(path)
    assert [e.prompt for e in corpus.examples] == ["fine"]
    assert [(q.line, q.reason.split(":")[0]) for q in corpus.quarantined] == [
        (2, "not UTF-8"),
        (3, "field 'prompt' is empty"),
        (4, "field 'prompt' is missing"),
        (5, "field 'label' is float, expected text, 0/1 or a boolean"),
    ]


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD)
    assert read(path).quarantined == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.parquet", b"PAR1 but no more", "is not Parquet"),
        ("data.txt", GOOD, r"expected .jsonl, .csv or .parquet"),
        ("data.jsonl", b"", "there are no rows"),
        ("data.jsonl", b'{"text": "x"}', "data.jsonl:1: fields text. Expected one of"),
        ("data.jsonl", b"oops", "data.jsonl:1: not JSON"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        read(tmp_path / name)


def test_a_missing_file_and_two_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"absent\.jsonl' cannot be read: No such file"):
        read(tmp_path / "absent.jsonl")
    (tmp_path / "sub").mkdir()
    paths = [tmp_path / "a.jsonl", tmp_path / "sub" / "a.jsonl"]
    for path in paths:
        path.write_bytes(GOOD)
    with pytest.raises(InvalidInput, match="same name"):
        read(*paths)


@given(num_bad=st.integers(0, 30), num_good=st.integers(0, 30), share=st.floats(0, 1))
@example(num_bad=3, num_good=0, share=1.0)
def test_the_run_stops_past_the_stated_share_only(
    tmp_path_factory: pytest.TempPathFactory, num_bad: int, num_good: int, share: float
) -> None:
    assume(num_bad + num_good)
    path = tmp_path_factory.mktemp("corpus") / "data.jsonl"
    path.write_bytes(b"\n".join([b"oops"] * num_bad + [GOOD] * num_good))
    section = PromptsSection(files=[path], format="pairs", max_quarantined=share)
    corpus = read_corpus(section)
    assert len(corpus.quarantined) == num_bad
    assert len(corpus.examples) == 2 * num_good

    def check() -> None:
        check_quarantine(corpus.quarantined, corpus.num_rows, len(corpus.examples), section)

    if num_good and num_bad <= share * (num_bad + num_good):
        check()
        return
    with pytest.raises(InvalidInput) as caught:
        check()
    assert caught.value.kind == "prompt_quarantine"
    assert f"{num_bad} of {num_bad + num_good} rows are bad" in str(caught.value)
    assert ("data.jsonl:1: not JSON" in str(caught.value)) == (num_bad > 0)


def test_the_digest_is_of_names_and_bytes(tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_bytes(GOOD)
    b.write_bytes(GOOD)
    digests = {read(a).digest, read(b).digest, read(a, b).digest}
    a.write_bytes(GOOD + b"\n")
    digests.add(read(a).digest)
    assert len(digests) == 4


def test_a_csv_row_is_named_by_the_line_it_begins_on(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('prompt,label\nfine,1\n\n,1\n"two\nlines",maybe\nok,0\n')
    corpus = read(path)
    assert [q.line for q in corpus.quarantined] == [4, 5]


def test_a_file_without_rows_is_said_to_have_none(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("prompt,label\n")
    section = PromptsSection(files=[path], format="labelled")
    with pytest.raises(InvalidInput, match="hold no rows"):
        check_quarantine([], 0, 0, section)
