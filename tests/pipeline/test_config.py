"""Run files: every mistake is named at once, and paths are taken from the run file's folder."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from pipeline.config import load_run_file
from pipeline.errors import InvalidInput

GOOD = """
name = "refusal"
[model]
path = "models/tiny"
[prompts]
files = ["pairs.jsonl", "/data/more.csv"]
"""


def _problems(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InvalidInput) as caught:
        load_run_file(path)
    assert caught.value.kind == "run_file"
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_paths_are_relative_to_the_run_file(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run.toml").write_text(GOOD)
    with contextlib.chdir(tmp_path):
        run = load_run_file(Path("runs/run.toml"))
    assert run.model.path == tmp_path / "runs" / "models" / "tiny"
    assert run.prompts.files == [tmp_path / "runs" / "pairs.jsonl", Path("/data/more.csv")]
    assert (run.name, run.capture.tokens, run.publish.sites) == ("refusal", "last", "best_layer")


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    text = (
        GOOD.replace('"refusal"', '"Not A Name"')
        + 'max_quarantined = "many"\n'
        + '[capture]\ntokens = "first"\nstreams = ["z", "z"]\ncolour = 1\n'
        + '[publish]\nsites = ["resid_post.x"]\n'
    )
    message = _problems(tmp_path / "run.toml", text.replace('path = "models/tiny"', ""))
    assert "has 7 problem(s)" in message
    for problem in (
        "name: ",
        "model.path: Field required",
        "prompts.max_quarantined: ",
        "got 'many'",
        "capture.tokens: ",
        "capture.streams: a stream is named twice",
        "capture.colour: Extra inputs are not permitted",
        "'resid_post.x' is not a site",
    ):
        assert problem in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name = ", "is not TOML"),
        (b'name = "\xff"', "is not TOML"),
        (GOOD + "validation_share = 0.5\ntest_share = 0.5\n", "leave nothing to train on"),
        (GOOD + "[capture]\nlayers = []\n", "capture.layers"),
        (GOOD + '[capture]\ntokens = "-0"\n', "capture.tokens"),
        (GOOD + '[capture]\nstreams = ["mlp_in"]\n', "capture.streams"),
        (GOOD + '[reduce]\nmethod = "magic"\n', "reduce.method"),
        (GOOD + "[control]\n", "control: Extra inputs"),
    ],
)
def test_a_mistake_is_refused(tmp_path: Path, text: str | bytes, problem: str) -> None:
    assert problem in _problems(tmp_path / "run.toml", text)


def test_a_missing_run_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(InvalidInput, match="cannot be read") as caught:
            load_run_file(path)
        assert caught.value.kind == "run_file"
