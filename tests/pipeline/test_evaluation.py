"""Judges, suites, controls and the report."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import InvalidInput
from pipeline.evaluation.controls import random_twin
from pipeline.evaluation.generate import ChatPrompt, generate
from pipeline.evaluation.judges import choice, is_refusal
from pipeline.evaluation.suites import Point, choice_suite, refusal_suite, sweep
from pipeline.extraction.models import load_model, load_tokenizer
from pipeline.prompts.corpus import Example
from pipeline.reduction.results import Reduction
from pipeline.report.page import Answers, Behaviour, write_report
from steering_service.adapters.transformers import steered
from steering_service.core.artifact import ModelReference, Policy, build
from steering_service.core.controller import Controller
from steering_service.core.direction import Direction
from steering_service.core.intervention import Intervention
from steering_service.core.site import Site


def example(prompt, label=True, completion=None):
    return Example("f:1", "p", label, "test", prompt, completion, None)


def artifact_for(path, *, positions="generated", width=64, controller=None):
    vector = np.random.default_rng(99).standard_normal(width).astype(np.float32) * 4
    direction = Direction(Site.parse("resid_post.1"), vector, 0.5, 3.0, "difference_of_means")
    return build(
        [Intervention(direction, positions=positions)],
        name="test",
        model=ModelReference(name=path.name, fingerprint="0" * 64),
        policy=Policy(min_strength=-2.0, max_strength=2.0),
        controller=controller,
    )


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I can't help with that.", True),
        ("  i can\u2019t help", True),
        ("Sure. I can't help laughing.", False),
        ("", False),
    ],
)
def test_a_refusal_is_told_by_its_beginning(answer, expected):
    assert is_refusal(answer, ["i can't help"]) is expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("(A)", "A"),
        (" (B) No, because", "B"),
        ("(A) or (B)", "undefined"),
        ("A", "undefined"),
        ("", "undefined"),
        ("(A) since (A) is right", "A"),
    ],
)
def test_a_choice_that_names_both_or_neither_is_undefined(answer, expected):
    assert choice(answer) == expected


def test_a_choice_suite_expects_the_positive_letter_of_each_question():
    suite = choice_suite(
        "cooperates",
        [
            example("q1", True, " (A)"),
            example("q1", False, " (B)"),
            example("q2", True, " (B)"),
            example("q2", False, " (A)"),
        ],
    )
    assert [prompt.user for prompt in suite.prompts] == ["q1", "q2"]
    assert [suite.is_hit(0, "(A)"), suite.is_hit(1, "(A)"), suite.is_hit(1, "(B)")] == [1, 0, 1]


def test_a_choice_suite_refuses_completions_without_a_letter():
    with pytest.raises(InvalidInput, match="neither"):
        choice_suite("cooperates", [example("q1", True, "yes")])


def test_an_empty_suite_is_an_error():
    with pytest.raises(InvalidInput, match="no example"):
        refusal_suite("refuses", [], ["i won't"])


def test_answers_come_back_in_the_order_of_the_prompts(make_model):
    path = make_model()
    model, tokenizer = load_model(path, "float32"), load_tokenizer(path)
    prompts = [ChatPrompt("steer " * n, "be brief" if n % 2 else None) for n in (9, 1, 5, 3, 7)]
    together = generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=2)
    alone = [generate(model, tokenizer, [p], max_new_tokens=6)[0] for p in prompts]
    assert together == alone
    assert len(set(alone)) > 1


def test_a_sweep_asks_every_suite_at_every_strength_and_zero_is_the_plain_model(make_model):
    path = make_model()
    model, tokenizer = load_model(path, "float32"), load_tokenizer(path)
    suite = refusal_suite("refuses", [example("north"), example("south, captain")], ["zzz"])
    artifact = artifact_for(path)
    seen = []
    points = sweep(
        model,
        tokenizer,
        [suite],
        [-2.0, 0.0, 2.0],
        lambda strength: steered(model, artifact, strength),
        seen.append,
    )
    assert [p.strength for p in points] == [-2.0, 0.0, 2.0]
    assert points == seen
    plain = generate(model, tokenizer, suite.prompts, max_new_tokens=suite.max_new_tokens)
    assert points[1].answers == tuple(plain)
    assert points[0].answers != points[2].answers


def test_wilsons_interval_of_a_share():
    low, high = Point("s", 1.0, (1.0,) * 50 + (0.0,) * 50, ()).interval
    # Wilson 1927: (p + z2/2n ± z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n) with z = 1.96.
    assert (low, high) == pytest.approx((40.383, 59.617), abs=1e-3)


def test_a_random_twin_has_the_same_sites_norms_and_policy_but_another_direction(tmp_path):
    artifact = artifact_for(tmp_path)
    twin, again, other = (random_twin(artifact, seed) for seed in (0, 0, 1))
    [a], [b], [c] = (x.interventions for x in (artifact, twin, other))
    assert twin.digest == again.digest != other.digest
    assert b.site == a.site
    assert b.direction.norm == pytest.approx(a.direction.norm, rel=1e-6)
    assert twin.manifest.policy == artifact.manifest.policy
    assert twin.manifest.parents == [artifact.digest]
    for left, right in ((a, b), (b, c)):
        assert abs(left.direction.unit_D @ right.direction.unit_D) < 0.5


def test_a_random_twin_keeps_the_controller(tmp_path):
    arrays = [np.ones(shape, np.float32) for shape in ((64, 6), (6,), (6, 2), (2,))]
    controller = Controller((Site.parse("resid_post.0"),), *arrays)
    twin = random_twin(artifact_for(tmp_path, controller=controller), 0)
    assert twin.controller.reads == controller.reads
    assert twin.manifest.kind == "controller"


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources = []
        self.text = []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_data(self, data):
        self.text.append(data)


def test_a_report_holds_all_it_shows_and_escapes_what_models_say(tmp_path, root):
    artifact = artifact_for(tmp_path)
    sites = [f"resid_post.{i}" for i in range(2)] + [
        f"z.{i}.{h}" for i in range(2) for h in range(4)
    ]
    scores = pa.table(
        {"site": sites}
        | {
            name: [0.5 + 0.04 * i for i in range(len(sites))]
            for name in ("norm", "sigma", "activation_norm")
        }
        | {
            f"{name}_{split}": [0.5 + 0.04 * i for i in range(len(sites))]
            for name in ("auroc", "accuracy", "cohens_d")
            for split in ("validation", "test")
        }
    )
    reduction = Reduction(
        digest="1" * 64,
        capture={"layers": [0, 1]},
        capture_digest="2" * 64,
        method="difference_of_means",
        counts={"train_positive": 3},
        directions_LW={},
        shuffled_LW={},
        scores=scores,
        num_heads=4,
        root=root,
    )
    points = [
        Point("refuses <all>", s, (1.0,) * (10 + int(s)) + (0.0,) * (10 - int(s)), ("no",) * 20)
        for s in (-1.0, 0.0, 1.0)
    ]
    behaviour = Behaviour(
        title="Refusal",
        lead="It works.",
        artifact=artifact,
        reduction=reduction,
        points=points,
        control={0: points[:1]},
        up=1.0,
        down=-1.0,
        answers=[Answers("s", "<script>alert(1)</script>", "plain", "up", "down")],
    )
    path = tmp_path / "report.html"
    write_report(path, title="Test", behaviours=[behaviour], provenance={"model": "tiny"})
    page = path.read_text()
    links = _Links()
    links.feed(page)
    assert links.sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in links.sources)
    assert not re.search(r"https?://(?!www\.w3\.org)", re.sub(r"base64,[^\"]*", "", page))
    assert "<script>" not in page
    shown = "".join(links.text)
    for expected in ("Refusal", "It works.", "z.1.3", "0.860", artifact.digest, "+1"):
        assert expected in shown
