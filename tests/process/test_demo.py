"""The demo, as `make demo` runs it, keeps what the README promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


@pytest.mark.faults
def test_the_demo_shows_steering_that_random_directions_do_not(tmp_path):
    def run():
        done = subprocess.run(
            [sys.executable, str(DEMO), "--out", str(tmp_path / "out"), "--json"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    first = run()
    assert first["refusal_up_shift"] >= 30
    assert first["refusal_down_shift"] <= -30
    assert first["coordination_up_shift"] >= 40
    assert max(first["refusal_random_shift"], first["coordination_random_shift"]) < 5
    report = Path(first["report"]).read_text()
    assert report.count("data:image/svg+xml") == 2 * 3 * 2
    # Over the store of the first run: nothing is computed again, and the figures are the same.
    second = run()
    measured = [key for key in first if key not in ("seconds", "environment", "report")]
    assert {key: second[key] for key in measured} == {key: first[key] for key in measured}
