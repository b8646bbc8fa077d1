"""[train] in a run file: what cannot be trained is refused when the file is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import load_run_file
from pipeline.errors import InvalidInput

SECTION = """
[train]
reads = ["resid_post.3", "z.4.1"]
edits = ["resid_post.4", "resid_post.5"]
target = "I can't help with that."
"""


def write_run(folder: Path, section: str) -> Path:
    path = folder / "run.toml"
    path.write_text(
        f'name = "run"\n[model]\npath = "model"\n[prompts]\nfiles = ["rows.jsonl"]\n{section}'
    )
    return path


@pytest.mark.parametrize(
    ("line", "by", "message"),
    [
        ("edits =", '"resid_post.2"', "edit at resid_post.2; read earlier layers or edit later"),
        ("edits =", '"z.4.2"', ""),
        ("edits =", '"resid_pre.4", "resid_post.5"', "edit at resid_pre.4; read earlier layers"),
        ("edits =", '"resid_post.5", "resid_post.5"', "train.edits: a site is named twice"),
        ("reads =", '"z.3.1", "z.3.1"', "train.reads: a site is named twice"),
        ("reads =", '"resid_post.one"', "train.reads"),
    ],
)
def test_a_run_file_that_cannot_be_trained_is_refused_when_it_is_read(
    tmp_path: Path, line: str, by: str, message: str
) -> None:
    lines = [f"{line} [{by}]" if old.startswith(line) else old for old in SECTION.splitlines()]
    path = write_run(tmp_path, "\n".join(lines))
    if not message:
        assert load_run_file(path).train is not None
        return
    with pytest.raises(InvalidInput, match=message.replace(".", r"\.")) as raised:
        load_run_file(path)
    assert raised.value.kind == "run_file"


@pytest.mark.parametrize("setting", ['target = ""', "strength = inf", "seed = -1", "batch = 1"])
def test_a_setting_out_of_range_is_named(tmp_path: Path, setting: str) -> None:
    name = setting.split()[0]
    kept = [line for line in SECTION.splitlines() if not line.startswith(name)]
    path = write_run(tmp_path, "\n".join([*kept, setting]))
    with pytest.raises(InvalidInput, match=rf"train\.{name}"):
        load_run_file(path)


def test_what_a_controller_would_ignore_is_refused(tmp_path: Path) -> None:
    for line in ('sites = ["resid_post.1"]', 'positions = "all"', "keep_fraction = 0.05"):
        path = write_run(tmp_path, f"{SECTION}[publish]\n{line}\n")
        name = line.split()[0]
        with pytest.raises(InvalidInput, match=rf"publish\.{name}: a controller is published"):
            load_run_file(path)
    load_run_file(write_run(tmp_path, f"{SECTION}[publish]\nmax_strength = 0.5\n"))
