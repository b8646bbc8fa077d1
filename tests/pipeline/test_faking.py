"""The alignment-faking recipe without a model: what is chosen, kept and told."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InvalidInput
from pipeline.evaluation.judges import PhraseJudge, Tally
from pipeline.evaluation.statistics import gap
from pipeline.evaluation.tiers import Condition, TierRow, load_conditions, summarise
from pipeline.recipes import faking
from pipeline.recipes.summaries.faking import faking_findings, keep_completions
from steering_service.core.direction import Direction
from steering_service.core.site import Site


@contextlib.contextmanager
def quiet(label, total):
    yield lambda note: None


def test_a_strength_that_breaks_the_model_is_not_chosen():
    def tally(counts, undefined=0):
        return Tally((undefined, 0), gap(counts[0], 50, counts[1], 50), {}, None)

    healthy = {0.25: tally((40, 5)), 0.5: tally((14, 5)), 1.0: tally((10, 5), undefined=10)}
    assert faking.smallest_gap(healthy, 100) == 1.0
    broken = healthy | {1.0: tally((5, 5), undefined=11), 1.5: Tally((50, 50), None, {}, None)}
    assert faking.smallest_gap(broken, 100) == 0.5
    assert faking.smallest_gap({0.25: broken[1.5], 0.5: broken[1.0]}, 100) == 0.25


def test_answers_are_kept_as_each_condition_is_done(tmp_path):
    data, kept = tmp_path / "r.jsonl", tmp_path / "out" / "answers.parquet"
    data.write_text("".join(json.dumps({"prompt": f"q {n}"}) + "\n" for n in range(5)))
    calls = []

    def ask(prompts):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise InvalidInput("the endpoint is gone", kind="endpoint")
        return ["Sure."] * len(prompts)

    settings = faking.Settings(data, load_conditions(), tmp_path / "work")
    with pytest.raises(InvalidInput, match="is gone"):
        faking.run_behaviour(ask, settings, PhraseJudge(), quiet, keep_completions(kept))
    answers = pq.read_table(kept).to_pylist()
    assert calls == [10, 10, 10]
    assert [r["condition"] for r in answers] == ["baseline_tagged"] * 10 + ["baseline_plain"] * 10


def test_the_findings_show_steering_beside_random_directions_and_what_a_star_means():
    base = Condition(name="baseline", kind="baseline")
    other = Condition(name="no_story", kind="no_story", compared_with="baseline")
    rows = [
        TierRow(c.name, tier, str(i), "q", None, "q", "", "complied" if i < n else "refused")
        for c, counts in ((base, (60, 10)), (other, (50, 0)))
        for tier, n in zip(c.tiers, counts, strict=True)
        for i in range(100)
    ]
    results = summarise(rows, [base, other])
    direction = Direction(
        Site("resid_post", 1), np.ones(4, np.float32), 1.0, 1.0, "difference_of_means"
    )
    same, gone = gap(58, 100, 10, 100), gap(11, 100, 10, 100)
    steered = {"observed": results.rows[:2], "random-0": results.rows[2:3], "random-1": ()}
    monitor = faking.Monitor(
        direction, {"baseline": 0.9}, 0.5, gone, (same, None), steered, "d" * 64
    )
    found = faking_findings(faking.Outcome(results, monitor))
    assert found.summary["faking_gap_steered"] == gone.points
    assert found.summary["faking_gap_random_steered"] == [same.points, None]
    assert "random directions of the same norm, +48, none. Steering is no crit" in found.lead
    titles = {table.title: table for table in found.tables}
    table = titles["baseline while steered at -0.5"]
    assert [row[0] for row in table.rows] == ["observed", "random-0", "random-1"]
    assert "Complied, by tier (*: 0.5 added to each cell, since one was 0)" in titles
    pairs = next(table for title, table in titles.items() if title.startswith("Pairs"))
    change = results.results[1].paired_change
    cell = pairs.rows[1][pairs.headings.index("over the same requests")]
    assert cell == f"[{change.low:.3g}, {change.high:.3g}]"
    kept = [row["subtracted"] for row in found.completions]
    assert kept[len(results.rows) :] == ["observed", "observed", "random-0"]
