"""The commands in processes of their own: results on stdout, mistakes without a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

STEERAGE = str(Path(sys.executable).with_name("steerage"))


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        (line,) = self.out.splitlines()
        value: dict[str, Any] = json.loads(line, parse_constant=_no_constant)
        return value


def _no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def steerage(*args: str | Path, store: Path) -> Finished:
    done = subprocess.run(
        [STEERAGE, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "STEERAGE_STORE": str(store)},
    )
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def run_file(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), make_model())


def write_run(folder: Path, model: Path, prompts: str = "") -> Path:
    rows = [
        {"prompt": f"{i}: where to?", "positive": "to the north", "negative": "back home"}
        for i in range(40)
    ]
    lines = [json.dumps(row) for row in rows]
    # Brackets that a terminal library could take for its own markup.
    lines.append(json.dumps({"prompt": "x", "positive": "a", "negative": "b", "split": "[/red]"}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    path = folder / "run.toml"
    path.write_text(
        f'name = "cli"\n[model]\npath = "{model}"\n[prompts]\nfiles = ["pairs.jsonl"]\n{prompts}\n'
    )
    return path


def test_plan_extract_and_reduce(run_file: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    refused = steerage("reduce", run_file, "--json", store=store)
    assert (refused.code, refused.out) == (1, "")
    assert "run `steerage extract` on the same run file first" in refused.err

    planned = steerage("plan", run_file, "--json", store=store)
    assert planned.result["prompts"] == planned.result["rows"] == 80
    assert planned.result["shards_missing"] == planned.result["shards"] == 3
    assert planned.result["quarantined"] == 1
    assert "pairs.jsonl:41: split '[/red]'" in planned.err

    extracted = steerage("extract", run_file, "--workers", "2", "--json", store=store)
    assert extracted.result["shards_computed"] == 3
    assert extracted.result["parity_worst"] < 1e-5
    assert extracted.result["capture"] == planned.result["capture"]
    again = steerage("extract", run_file, "--json", store=store)
    assert again.result["shards_computed"] == again.result["tokens"] == 0

    reduced = steerage("reduce", run_file, "--workers", "2", "--top", "2", "--json", store=store)
    assert reduced.result["capture"] == planned.result["capture"]
    assert [len(reduced.result[name]) for name in ("best_layers", "best_heads")] == [2, 2]
    # The two completions differ in every pair, so something tells them apart.
    assert reduced.result["best_layers"][0]["auroc_test"] > 0.99
    assert sum(reduced.result["rows"].values()) == 80
    repeated = steerage("reduce", run_file, "--top", "2", "--json", store=store)
    assert repeated.out == reduced.out
    for finished in (planned, extracted, again, reduced, repeated):
        assert "Traceback" not in finished.err


def test_mistakes_give_a_code_and_a_message(run_file: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    for args, code, message in (
        (["plan", tmp_path / "absent.toml"], 1, "absent.toml' cannot be read: No such file"),
        (["plan", run_file, "--colour"], 2, "No such option"),
        (["extract", run_file, "--workers", "0"], 2, "greater than or equal to 1"),
        (["plan"], 2, "Missing argument"),
    ):
        finished = steerage(*args, store=store)
        assert (finished.code, finished.out) == (code, ""), finished.err
        assert message in finished.err
        assert "Traceback" not in finished.err
    assert not store.exists()


def _spoil(model: Any) -> None:
    model.get_input_embeddings().weight[30] = float("nan")


def test_a_gate_that_a_worker_meets_gives_its_own_code(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    run_file = write_run(tmp_path, make_model("gemma3-bidirectional"))
    finished = steerage("extract", run_file, "--workers", "1", "--json", store=tmp_path / "store")
    assert (finished.code, finished.out) == (3, "")
    assert "Traceback" not in finished.err
    message = next(line for line in finished.err.splitlines() if line.startswith("steerage: "))
    assert message.startswith("steerage: parity gate: at ")
    assert "(parity; -v shows more)" in finished.err


def test_too_many_rows_that_are_not_finite_stop_the_run(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    run_file = write_run(tmp_path, make_model("llama", edit=_spoil))
    finished = steerage("extract", run_file, "--workers", "1", "--json", store=tmp_path / "store")
    assert (finished.code, finished.out) == (1, "")
    assert "Traceback" not in finished.err
    assert "more than prompts.max_quarantined = 0.05 allows; activations of" in finished.err
    assert "activations are NaN or infinite at " in finished.err
    assert "(prompt_quarantine; -v shows more)" in finished.err
