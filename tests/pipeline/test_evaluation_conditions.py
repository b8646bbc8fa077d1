"""Conditions, suite files, completions and the page of an evaluation."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.errors import GateRefused, InvalidInput, NotFound
from pipeline.evaluation.completions import COMPLETIONS_FILE, SUMMARY_FILE, write_completions
from pipeline.evaluation.conditions import num_points
from pipeline.evaluation.evaluate import default_strengths, evaluate
from pipeline.evaluation.generate import ChatPrompt, generate
from pipeline.evaluation.suite_file import build_suites, load_suite_file
from pipeline.evaluation.suites import Point, answer_suite, refusal_suite
from pipeline.extraction.models import load_model, load_tokenizer
from pipeline.prompts.corpus import Example
from pipeline.report.evaluation_page import best_strength, write_evaluation_report
from steering_service.core.artifact import ModelReference, Policy, build
from steering_service.core.direction import Direction
from steering_service.core.errors import Refused
from steering_service.core.intervention import Intervention
from steering_service.core.site import Site

ROWS = [
    {"prompt": f"{n}: <b>to the north</b>", "label": n % 2, "split": "test", "answer": str(n)}
    for n in range(6)
] + [{"prompt": "in training", "label": 1, "split": "train", "answer": "x"}]
CHOICES = [
    {
        "question": f"{n}: which way?",
        "answer_matching_behavior": " (A)",
        "answer_not_matching_behavior": " (B)",
        "split": "test",
    }
    for n in range(3)
]
HEAD = 'name = "test"\n[prompt_baseline]\nsystem = "be brief"\n'


def suite_text(name, kind, file="rows.jsonl", more=""):
    return f'[[suites]]\nname = "{name}"\nkind = "{kind}"\nfiles = ["{file}"]\n{more}\n'


ALL = (
    suite_text("refuses", "refusal", more='phrases = "phrases.json"\nrole = "target"')
    + suite_text("refuses odd", "refusal", more='phrases = "phrases.json"\nwhere = {label = 1}')
    + suite_text("chooses", "choice", "choices.jsonl", 'role = "harm"')
    + suite_text("knows", "answer", more='role = "skill"\nmax_new_tokens = 3')
    + suite_text("talks", "fluency", more='role = "skill"\nmax_new_tokens = 3\nlimit = 2')
)


@pytest.fixture
def folder(tmp_path):
    for name, rows in (("rows.jsonl", ROWS), ("choices.jsonl", CHOICES)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Any answer is a refusal that begins with an n in upper or lower case.
    (tmp_path / "phrases.json").write_text(json.dumps(["N"]))
    return tmp_path


@pytest.fixture
def write(folder):
    def write(text):
        (folder / "suites.toml").write_text(text)
        return folder / "suites.toml"

    return write


@pytest.fixture(scope="module")
def loaded(make_model):
    path = make_model()
    return load_model(path, "float32"), load_tokenizer(path)


def artifact_for(limits=(-2.0, 2.0)):
    vector = np.random.default_rng(99).standard_normal(64).astype(np.float32) * 4
    direction = Direction(Site.parse("resid_post.1"), vector, 0.5, 3.0, "difference_of_means")
    return build(
        [Intervention(direction)],
        name="test",
        model=ModelReference(name="tiny", fingerprint="0" * 64),
        policy=Policy(min_strength=limits[0], max_strength=limits[1]),
    )


def example(prompt, n=1):
    return Example(f"f:{n}", "p", True, "test", prompt, None, None)


def test_a_suite_file_gives_a_suite_a_measure(write, loaded):
    file = load_suite_file(write(HEAD + ALL))
    suites = build_suites(file, *loaded)
    assert [(s.name, s.kind, s.metric, s.role, len(s.prompts)) for s in suites] == [
        ("refuses", "refusal", "share", "target", 6),
        ("refuses odd", "refusal", "share", None, 3),
        ("chooses", "choice", "share", "harm", 3),
        ("chooses: probability", "choice", "probability", "harm", 3),
        ("knows", "answer", "share", "skill", 6),
        ("talks: perplexity", "fluency", "perplexity", "skill", 2),
        ("talks: KL to the plain model", "fluency", "kl", None, 2),
    ]
    assert [p.user[0] for p in suites[1].prompts] == ["1", "3", "5"]
    assert suites[0].is_hit(0, "No.")
    [only] = load_suite_file(write(HEAD + ALL), ["knows"]).suites
    assert only.name == "knows"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name = 'x'", ["prompt_baseline: Field required", "suites: Field required"]),
        (
            HEAD + suite_text("a", "refused", more="limit = 0\nspeed = 1"),
            ["suites.0.kind", "suites.0.limit", "suites.0.speed: Extra inputs", "3 problem(s)"],
        ),
        (HEAD + suite_text("a", "refusal"), ["suites.0: phrases belongs to"]),
        (HEAD + 2 * suite_text("a", "answer"), ["one name each; twice: a"]),
        (
            HEAD + suite_text("a", "answer", "no.jsonl") + suite_text("b", "answer", "nor.csv"),
            ["suite 'a': no file", "no.jsonl", "suite 'b': no file", "nor.csv"],
        ),
        ("name = ", ["is not TOML"]),
    ],
)
def test_all_that_is_wrong_with_a_suite_file_is_said_at_once(write, text, expected):
    with pytest.raises(InvalidInput) as caught:
        load_suite_file(write(text))
    for part in expected:
        assert part in str(caught.value)


def test_a_suite_of_another_name_is_named_with_those_there_are(write, folder):
    with pytest.raises(NotFound, match=r"no suite 'wit'; it has 'chooses', 'knows'"):
        load_suite_file(write(HEAD + ALL), ["wit"])
    with pytest.raises(InvalidInput, match=r"examples/suites\.toml"):
        load_suite_file(folder / "absent.toml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (suite_text("a", "answer", more="where = {seen = false}"), "'seen', and the rows have"),
        (suite_text("a", "answer", more="where = {label = 7}"), "none of 7 rows"),
        (suite_text("a", "answer", "choices.jsonl"), r"choices.jsonl:1: .* needs a field answer"),
        (suite_text("a", "choice"), r"rows.jsonl:1: field 'positive' is missing"),
        (suite_text("a", "answer", "bad.jsonl"), r"bad.jsonl:2: not JSON"),
        (suite_text("a", "refusal", more='phrases = "rows.jsonl"'), "is not JSON"),
    ],
)
def test_rows_that_do_not_suit_are_named(write, folder, loaded, text, expected):
    (folder / "bad.jsonl").write_text('{"prompt": "a", "answer": 1, "split": "test"}\n{"prom\n')
    with pytest.raises(InvalidInput, match=expected):
        build_suites(load_suite_file(write(HEAD + text)), *loaded)


def test_rows_without_a_split_are_split_as_a_run_splits_them(write, folder, loaded):
    rows = [{"prompt": f"question {n}", "answer": "x"} for n in range(50)]
    (folder / "free.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [suite] = build_suites(
        load_suite_file(write(HEAD + suite_text("a", "answer", "free.jsonl"))), *loaded
    )
    from pipeline.config import PromptsSection
    from pipeline.prompts.corpus import read_corpus

    labelled = [row | {"label": 0} for row in rows]
    (folder / "run.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    read = read_corpus(PromptsSection(files=[folder / "run.jsonl"])).examples
    assert [p.user for p in suite.prompts] == [e.prompt for e in read if e.split == "test"]


def test_every_condition_is_measured_and_each_is_what_it_says(loaded, write):
    model, tokenizer = loaded
    suites = build_suites(load_suite_file(write(HEAD + ALL)), model, tokenizer)
    artifact, seen = artifact_for(), []
    evaluation = evaluate(
        model,
        tokenizer,
        suites,
        artifact,
        name="test",
        system="be brief",
        strengths=[2.0, -1.0],
        seeds=(0, 1),
        on_point=seen.append,
    )
    assert tuple(seen) == evaluation.points
    assert len(seen) == num_points(artifact, len(suites), [2.0, -1.0], (0, 1)) == 7 * 9
    assert evaluation.strengths == [-1.0, 0.0, 2.0]
    found = {(p.condition, p.seed, p.strength): p for p in seen if p.suite == "refuses"}
    assert set(found) == {
        *(("none", None, 0.0), ("prompt", None, 0.0)),
        *(("steered", None, s) for s in (-1.0, 0.0, 2.0)),
        *(("random", seed, s) for seed in (0, 1) for s in (-1.0, 2.0)),
    }
    plain = found["none", None, 0.0]
    assert plain.answers == found["steered", None, 0.0].answers
    asked = [ChatPrompt(p.user, "be brief") for p in suites[0].prompts]
    told = generate(model, tokenizer, asked, max_new_tokens=suites[0].max_new_tokens)
    assert found["prompt", None, 0.0].answers == tuple(told)
    others = [found["steered", None, 2.0], found["random", 0, 2.0], found["random", 1, 2.0]]
    assert len({p.answers for p in (plain, *others)}) == 4
    kl = {(p.condition, p.strength): p.value for p in seen if p.suite.startswith("talks: KL")}
    assert kl["none", 0.0] == kl["steered", 0.0] == 0.0
    assert kl["prompt", 0.0] > 0
    assert kl["steered", 2.0] > 0


def test_a_plain_model_that_changes_by_itself_is_refused(make_model):
    """Other code's hook, which acts in every other pass."""
    path = make_model()
    model, tokenizer = load_model(path, "float32"), load_tokenizer(path)
    calls = []

    def disturb(_module, _args, output):
        calls.append(0)
        return output + torch.randn(64, generator=torch.Generator().manual_seed(len(calls)))

    model.model.norm.register_forward_hook(disturb)
    suite = refusal_suite("refuses", [example("north")], ["zzz"])
    with pytest.raises(GateRefused, match="bit for bit") as caught:
        evaluate(model, tokenizer, [suite], artifact_for(), name="t", system="s", strengths=[1.0])
    assert caught.value.kind == "zero_strength"


def test_a_strength_outside_the_policy_is_refused_before_anything_is_asked(loaded):
    suite, seen = refusal_suite("refuses", [example("north")], ["zzz"]), []
    with pytest.raises(Refused, match="policy"):
        evaluate(
            *(*loaded, [suite], artifact_for()),
            name="t",
            system="s",
            strengths=[1.0, 3.0],
            on_point=seen.append,
        )
    assert seen == []
    with pytest.raises(InvalidInput, match="one of each name"):
        evaluate(*loaded, [suite, suite], artifact_for(), name="t", system="s")


def test_default_strengths_stay_within_the_policy_and_hold_zero():
    grid = default_strengths(Policy(min_strength=-1.0, max_strength=1.0))
    assert grid == [-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0]
    third = default_strengths(Policy(min_strength=-1 / 3, max_strength=2 / 3))
    assert (third[0], third[-1]) == pytest.approx((-1 / 3, 2 / 3), abs=1e-6)
    assert third[0] >= -1 / 3
    assert third[-1] <= 2 / 3
    assert 0.0 in third
    assert default_strengths(Policy(min_strength=1.0, max_strength=1.0)) == [1.0]


def test_an_expected_answer_counts_as_a_number_of_its_own():
    suite = answer_suite("adds", [ChatPrompt("3 + 4?")], ["7"])
    hits = [suite.is_hit(0, text) for text in ("3 + 4 = 7.", "17", "70", "seven", "It is 7")]
    assert hits == [True, False, False, False, True]


def test_a_perplexity_weighs_tokens_and_its_interval_resamples_prompts():
    point = Point("s", 1.0, (1.0, 3.0), ("", ""), weights=(30, 10), metric="perplexity")
    assert point.value == pytest.approx(np.exp(1.5))
    low, high = point.interval
    assert (low, high) == pytest.approx((np.exp(1.0), np.exp(3.0)))
    assert point.interval == point.interval
    share = Point("s", 1.0, (1.0,) * 50 + (0.0,) * 50, ("",) * 100)
    assert share.bootstrap() == pytest.approx((40.0, 60.0), abs=1.5)
    assert Point("s", 1.0, (0.25, 0.75), ("", ""), metric="probability").value == 50.0


@pytest.fixture(scope="module")
def evaluation(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("suites")
    for name, rows in (("rows.jsonl", ROWS), ("choices.jsonl", CHOICES)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "phrases.json").write_text('["n"]')
    (folder / "suites.toml").write_text(HEAD + ALL)
    model, tokenizer = load_model(make_model(), "float32"), load_tokenizer(make_model())
    asked = ["refuses", "chooses", "talks"]
    suites = build_suites(load_suite_file(folder / "suites.toml", asked), model, tokenizer)
    return evaluate(
        *(model, tokenizer, suites, artifact_for()),
        name="test",
        system="be brief",
        strengths=[-1.0, 2.0],
        seeds=(4,),
    )


def test_every_completion_is_kept_and_a_second_run_replaces_the_first(evaluation, tmp_path):
    write_completions(tmp_path / "out", evaluation, {})
    summary = write_completions(tmp_path / "out", evaluation, {"device": "here"})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [COMPLETIONS_FILE, SUMMARY_FILE]
    assert json.loads((tmp_path / "out" / SUMMARY_FILE).read_text()) == summary
    assert summary["environment"] == {"device": "here"}
    rows = pq.read_table(tmp_path / "out" / COMPLETIONS_FILE).to_pylist()
    assert len(rows) == sum(p.num for p in evaluation.points)
    told = [r for r in rows if r["condition"] == "prompt" and r["suite"] == "refuses"]
    assert {r["system"] for r in told} == {"be brief"}
    assert [r["prompt_index"] for r in told] == list(range(6))
    assert {r["verdict"] for r in rows if r["suite"] == "chooses"} == {"undefined"}
    assert {r["seed"] for r in rows} == {None, 4}
    assert all(r["tokens"] == 3 and r["verdict"] is None for r in rows if r["kind"] == "fluency")
    [refuses] = [
        p for p in summary["points"] if (p["suite"], p["condition"]) == ("refuses", "none")
    ]
    assert refuses["low"] <= refuses["value"] <= refuses["high"]
    assert refuses["interval"] == "wilson"


def test_a_folder_that_cannot_be_written_is_named(evaluation, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="--out"):
        write_completions(tmp_path / "file", evaluation, {})


def test_the_page_holds_all_it_shows(evaluation, tmp_path):
    path = tmp_path / "report.html"
    write_evaluation_report(path, evaluation, {"torch": "0"})
    page = path.read_text()
    assert not re.search(r"https?://(?!www\.w3\.org)", re.sub(r"base64,[^\"]*", "", page))
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    # Trade-offs against choices (by both measures) and perplexity; a curve a suite.
    assert len(sources) == 2 * (3 + 5)
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "<b>" not in page
    best = best_strength(evaluation)
    for expected in ("be brief", evaluation.artifact.digest, f"steered {best:+g}", "KL to the"):
        assert expected in page


def test_without_a_target_there_is_no_best_strength_and_still_a_page(loaded, tmp_path):
    suite = refusal_suite("refuses", [example("north")], ["zzz"])
    evaluation = evaluate(
        *(*loaded, [suite], artifact_for()), name="t", system="s", strengths=[1.0], seeds=(0,)
    )
    assert best_strength(evaluation) is None
    write_evaluation_report(tmp_path / "report.html", evaluation, {})
    assert "No suite of this evaluation is a target" in (tmp_path / "report.html").read_text()
