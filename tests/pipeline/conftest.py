"""Run files, prompt files and planned caches in a folder of a test's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import RunFile, load_run_file
from pipeline.prompts.plan import Plan, plan
from store.location import Location

PAIRS = [
    {
        "prompt": f"{number}: which way does the ship steer?" + " The crew asks." * (number % 7),
        "positive": "to the north",
        "negative": "to the south, captain",
    }
    for number in range(40)
]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_run(
    folder: Path,
    model: Path,
    *,
    files: tuple[str, ...] = ("pairs.jsonl",),
    prompts: str = "",
    capture: str = "",
    rest: str = "",
) -> Path:
    """A run file; the strings are lines of its sections."""
    path = folder / "run.toml"
    path.write_text(
        f'name = "test"\n[model]\npath = "{model}"\n{rest}\n'
        f"[prompts]\nfiles = {json.dumps(list(files))}\n{prompts}\n[capture]\n{capture}\n"
    )
    return path


MakeRun = Callable[..., RunFile]
MakePlan = Callable[..., Plan]


@pytest.fixture
def make_run(tmp_path: Path, make_model: Callable[..., Path]) -> MakeRun:
    """A run over `PAIRS`, or over `rows`, read back from its run file."""

    def make(model: Path | None = None, rows: Any = PAIRS, **sections: Any) -> RunFile:
        if "files" not in sections:
            write_jsonl(tmp_path / "pairs.jsonl", rows)
        return load_run_file(write_run(tmp_path, model or make_model(), **sections))

    return make


@pytest.fixture
def root(tmp_path: Path) -> Location:
    return Location.open(str(tmp_path / "store"))


@pytest.fixture
def make_plan(make_run: MakeRun, root: Location) -> MakePlan:
    def make(*args: Any, **options: Any) -> Plan:
        return plan(make_run(*args, **options), root)

    return make


@pytest.fixture
def make_poisoned(tmp_path: Path, make_model: Callable[..., Path]) -> Callable[[str], Path]:
    """A model in which one word, and only that, makes the activations NaN."""

    def make(word: str) -> Path:
        from transformers import AutoTokenizer

        source = make_model()
        folder = tmp_path / "poisoned"
        folder.mkdir()
        for path in source.iterdir():
            if path.suffix != ".safetensors":
                (folder / path.name).write_bytes(path.read_bytes())
        weights = load_file(source / "model.safetensors")
        token = AutoTokenizer.from_pretrained(source)(word)["input_ids"][-1]
        [name] = [name for name in weights if name.endswith("embed_tokens.weight")]
        weights[name][token] = torch.nan
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make
