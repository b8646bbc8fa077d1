"""The README quotes what `make repro` measured, and nothing else."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results" / "repro.json"


@pytest.fixture(scope="module")
def repro_table():
    path = REPOSITORY / "examples" / "repro_table.py"
    spec = importlib.util.spec_from_file_location("repro_table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readmes_table_is_made_from_the_results(repro_table):
    page = (REPOSITORY / "README.md").read_text()
    found = json.loads(RESULTS.read_text())
    assert repro_table.replaced(page, found) == page
    assert repro_table.replaced(page, found | {"hsi_shift": -1.0}) != page


def test_the_results_say_what_they_were_measured_with():
    found = json.loads(RESULTS.read_text())
    assert {"device", "torch", "transformers", "ray", "steerage"} <= set(found["environment"])
    assert 0 < found["seconds"] < 25 * 60
