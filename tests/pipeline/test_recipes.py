"""Recipes: what is tried, what is chosen, and that nothing but the test split is reported."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import GateRefused, InvalidInput
from pipeline.evaluation.suites import Point
from pipeline.extraction.models import ModelInfo
from pipeline.recipes.antidote import layer_sets
from pipeline.recipes.published import published_for
from pipeline.recipes.requests import RequestFiles, read_suites
from pipeline.recipes.trials import Candidate, choose
from pipeline.recipes.weighted import balanced_strength, choose_strength
from steering_service.core.site import Site

SITES = (Site("z", 1, 2),)

candidates = st.lists(
    st.builds(
        Candidate,
        st.just(SITES),
        st.floats(0.1, 100),
        st.floats(0, 100),
        st.floats(0, 100),
        st.floats(0.9, 5),
    ),
    min_size=1,
    max_size=12,
)


@given(candidates, st.floats(1, 3))
def test_the_furthest_candidate_within_the_cap_is_taken(found, cap):
    allowed = [c for c in found if c.ratio <= cap and c.undefined <= 50]
    if not allowed:
        with pytest.raises(GateRefused, match="keeps the perplexity within"):
            choose(found, cap)
        return
    chosen = choose(found, cap)
    assert chosen in allowed
    assert chosen.share >= max(c.share for c in allowed) - 1.0
    # Nothing that does as well costs less.
    most = max(c.share for c in allowed)
    assert not [c for c in allowed if c.share >= most - 1.0 and c.ratio < chosen.ratio]


def test_a_strength_at_which_answers_fall_apart_is_never_taken():
    broken = Candidate(SITES, 64.0, 90.0, 60.0, 1.0)
    whole = Candidate(SITES, 8.0, 40.0, 2.0, 1.05)
    assert choose([broken, whole], 1.1) == whole
    assert choose([replace(broken, undefined=5.0), whole], 1.1).share == 90.0


def test_the_papers_layers_are_among_those_tried():
    """METHODS 3: int(0.375 (L - 1)) layers by pairwise accuracy, block 0 left out."""
    accuracy = {n: 0.5 + 0.01 * n for n in range(17)} | {0: 1.0}
    sets = layer_sets(accuracy)
    assert sets[0] == (11, 12, 13, 14, 15, 16)
    assert (16,) in sets
    assert (1, 2) in sets
    assert not [layers for layers in sets if 0 in layers]
    assert len(set(sets)) == len(sets)


def info(name, layers=32, heads=32, width=4096):
    return ModelInfo(None, name, "0" * 64, layers, heads, width // heads, width, 4096, "bfloat16")


def test_published_settings_are_for_the_published_model_only():
    """METHODS 1: zero-based (layer, head) pairs, and alpha 35."""
    found = published_for(info("Llama-2-7b-chat-hf"))
    assert found is not None
    assert [str(site) for site in found.hsi_heads] == ["z.12.11", "z.13.18", "z.14.27", "z.15.2"]
    assert (found.hsi_strength, found.iti_heads, found.iti_strength) == (35.0, 48, 15.0)
    assert found.caa_layer == 13
    assert published_for(info("Llama-2-7b-hf")) is None
    assert published_for(info("Llama-2-7b-chat-hf", layers=40)) is None


@pytest.fixture
def files(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    splits = ("train", "validation", "test")
    return RequestFiles(
        pairs=write(
            "pairs.jsonl",
            [
                {"prompt": f"{kind} {n} {split}", "label": label, "pair": f"{split}{n}"}
                | {"split": split}
                for split in splits
                for n in range(3)
                for kind, label in (("harm", 1), ("help", 0))
            ],
        ),
        attacks=write(
            "attacks.jsonl",
            [
                {"prompt": f"attack {n} {split}", "label": 1, "seen": n < 2, "split": split}
                for split in splits
                for n in range(2 if split != "test" else 5)
            ],
        ),
        lookalikes=write(
            "lookalikes.jsonl",
            [
                {"prompt": f"alike {n} {s}", "label": 0, "split": s}
                for s in splits
                for n in range(4)
            ],
        ),
        skill=write(
            "skill.jsonl",
            [
                {"prompt": f"sum {n} {s}", "answer": str(n), "split": s}
                for s in splits
                for n in range(4)
            ],
        ),
    )


def prompts(suite):
    return {prompt.user for prompt in suite.prompts}


def test_the_test_split_reports_wrappers_that_no_other_split_has(files):
    suites = read_suites(files, "test")
    assert prompts(suites.attacks) == {"attack 2 test", "attack 3 test", "attack 4 test"}
    assert suites.seen_attacks is not None
    assert prompts(suites.seen_attacks) == {"attack 0 test", "attack 1 test"}
    assert prompts(suites.harmful) == {f"harm {n} test" for n in range(3)}
    assert prompts(suites.benign) == {f"help {n} test" for n in range(3)}


def test_splits_that_choose_never_hold_a_test_row(files):
    suites = read_suites(replace(files, most=6), "train", "validation")
    for suite in (suites.attacks, suites.lookalikes, suites.skill, suites.harmful, suites.benign):
        assert not [text for text in prompts(suite) if text.endswith("test")]
    # Both splits are there, though the first rows of the file are all of one.
    assert {text.split()[-1] for text in prompts(suites.skill)} == {"train", "validation"}
    assert len(suites.skill.prompts) == 6
    assert suites.seen_attacks is None


def test_answers_stay_with_their_questions(files):
    suite = read_suites(files, "test").skill
    for i, prompt in enumerate(suite.prompts):
        number = prompt.user.split()[1]
        assert suite.is_hit(i, f"It is {number}.")
        assert not suite.is_hit(i, f"It is {int(number) + 1}.")


def test_a_file_that_is_missing_is_named(files, tmp_path):
    with pytest.raises(InvalidInput, match=r"nowhere\.jsonl"):
        read_suites(replace(files, attacks=tmp_path / "nowhere.jsonl"), "test")
    (tmp_path / "sums.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n')
    with pytest.raises(InvalidInput, match=r"line 1: .* split is missing"):
        read_suites(replace(files, skill=tmp_path / "sums.jsonl"), "test")
    (tmp_path / "phrases.json").write_text("[")
    with pytest.raises(InvalidInput, match="JSON list of beginnings of refusals"):
        read_suites(replace(files, phrases=tmp_path / "phrases.json"), "test")


def measured(shares):
    return [
        Point(name, 0.0, tuple(np.repeat([1.0, 0.0], [share, 100 - share])), ("",) * 100)
        for name, share in zip(("attacks", "harmful", "benign", "alike"), shares, strict=True)
    ]


def test_a_controllers_strength_is_the_most_that_costs_little():
    tried = {
        0.0: measured((0, 90, 3, 6)),
        0.5: measured((60, 95, 3, 6)),
        1.0: measured((90, 95, 4, 8)),
        1.5: measured((95, 95, 4, 12)),
    }
    assert choose_strength(tried, 2.0) == 1.0
    assert choose_strength(tried, None) == 1.5
    assert choose_strength({0.0: tried[0.0], 1.5: tried[1.5]}, 2.0) == 1.5
    # 77.5 - 0, 92.5 - 2, 95 - 6: the mean of both harmful kinds, less the dearest benign kind.
    assert balanced_strength(tried) == 1.0
