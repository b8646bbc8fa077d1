"""`steerage select` on a model in which one head, and no other, can make answers begin with an n.

The rows of the cache are planted too, so that every direction is known; what is tested is what the
model does with it.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import typer

import pipeline.cli.select  # noqa: F401, it registers the command
from pipeline.cli.app import app
from pipeline.config import PublishSection, load_run_file
from pipeline.errors import GateRefused, InvalidInput, NotFound
from pipeline.extraction.models import load_model, load_tokenizer
from pipeline.prompts.plan import plan
from pipeline.reduction.artifacts import build_artifact
from pipeline.reduction.reduce import reduce
from pipeline.selection.candidates import candidate_sites
from pipeline.selection.journal import Journal
from pipeline.selection.results import SiteSelection, selected_sites
from pipeline.selection.select import measurement_request
from pipeline.selection.validation import ValidationFile
from steering_service.core.site import Site
from store.location import Location

STEERAGE = str(Path(sys.executable).with_name("steerage"))
PLANTED = Site("z", 1, 5)
SPLITS = ["train"] * 16 + ["validation"] * 6 + ["test"] * 4
HEAD = 'name = "letters"\n[prompt_baseline]\nsystem = "be brief"\n'
BEGINS = """[[suites]]
name = "begins with an n"
kind = "refusal"
role = "target"
files = ["rows.jsonl"]
phrases = "phrases.json"
max_new_tokens = 2
"""
TALKS = """[[suites]]
name = "talks"
kind = "fluency"
role = "skill"
files = ["rows.jsonl"]
max_new_tokens = 2
limit = 2
"""


def directions(layers=3, heads=8, width=8):
    """[L, H, D] the planted direction of every head, norm 10."""
    vectors = np.random.default_rng(5).standard_normal((layers, heads, width))
    return 10 * vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@dataclass
class Place:
    folder: Path

    @property
    def store(self):
        return self.folder / "store"

    @property
    def root(self):
        return Location.open(str(self.store))

    @property
    def measured(self):
        """Names of the measurements in the store."""
        found = self.store.glob("measurements/*/*.json")
        return sorted(path.name for path in found if path.name != "request.json")

    def copy(self, to):
        shutil.copytree(self.folder, to)
        return Place(to)

    def command(self, *flags, by="sweep", suites="suites.toml"):
        more = [] if suites is None else ["--suites", str(self.folder / suites)]
        run = ["select", str(self.folder / "run.toml"), "--store", str(self.store), "--by", by]
        return [STEERAGE, *run, *more, *flags]

    def select(self, *flags, **options):
        """Run the command in this process, which spares the seconds of its imports."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            app(self.command(*flags, **options)[1:], standalone_mode=False)
        if "--json" in flags:
            return json.loads(out.getvalue().splitlines()[-1])
        return " ".join(out.getvalue().split())


@pytest.fixture(scope="module")
def place(ray_running, tmp_path_factory, make_model, make_tokenizer):
    folder = tmp_path_factory.mktemp("select")
    letter = make_tokenizer().convert_tokens_to_ids("n")
    towards = directions()[PLANTED.layer, PLANTED.head] / 10

    def plant(model):
        import torch

        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
        weight = model.model.layers[PLANTED.layer].self_attn.o_proj.weight
        row = model.lm_head.weight[letter]
        columns = slice(PLANTED.head * 8, (PLANTED.head + 1) * 8)
        weight[:, columns] = 3.0 * torch.outer(row / row.norm(), torch.tensor(towards).float())

    model = make_model("llama", edit=plant)
    rows = [
        {"prompt": f"{i}: {word} does the ship steer?", "label": label, "pair": i, "split": split}
        for i, split in enumerate(SPLITS)
        for label, word in ((1, "where"), (0, "how"))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "phrases.json").write_text('["n"]')
    (folder / "suites.toml").write_text(HEAD + BEGINS + TALKS)
    (folder / "run.toml").write_text(
        f'name = "letters"\n[model]\npath = "{model}"\n[prompts]\nfiles = ["rows.jsonl"]\n'
        '[capture]\nstreams = ["z"]\ntokens = "last"\n'
    )
    root = Location.open(str(folder / "store"))
    cache = plan(load_run_file(folder / "run.toml"), root).cache
    index = cache.index()
    noise = np.random.default_rng(1).standard_normal((cache.num_rows, 3, 64))
    label_N = index["label"].to_numpy()
    values = (noise + label_N[:, None, None] * directions().reshape(3, 64)).astype(np.float32)
    for shard in range(cache.num_shards):
        rows_of = cache.layout("z").shard_rows(shard)
        cache.write_shard(shard, {"z": values[rows_of.start : rows_of.stop]})
    cache.seal()
    reduce(cache, root, method="difference_of_means", num_workers=1)
    return Place(folder)


WIDE = ("--max-perplexity", "1e300", "--strengths", "-8,8")
"""Beginning every answer with an n is what no model does of itself."""


@pytest.fixture(scope="module")
def swept(place, tmp_path_factory):
    """The store after an undisturbed sweep, and what that printed."""
    there = place.copy(tmp_path_factory.mktemp("swept") / "place")
    return there, there.select("--json", *WIDE)


def test_a_sweep_finds_the_head_that_was_planted(swept):
    there, found = swept
    assert found["sites"] == [str(PLANTED)]
    assert found["strength"] == 8.0
    assert found["plain"]["share"] < 20
    by = {(row["sites"][0], row["strength"]): row["share"] for row in found["tried"]}
    assert len(by) == 3 * 8 * 2
    assert by[str(PLANTED), 8.0] == 100.0
    others = [share for (site, _), share in by.items() if site != str(PLANTED)]
    # No other head writes anything, so the model stays the plain one.
    assert set(others) == {found["plain"]["share"]}
    assert selected_sites(there.root, found["selection"]) == [PLANTED]
    stored = SiteSelection.open(there.root, found["selection"])
    run_file = (there.folder / "run.toml").read_text()
    (there.folder / "chosen.toml").write_text("\n".join([run_file, *stored.run_file_lines]))
    section = load_run_file(there.folder / "chosen.toml").publish
    assert (section.sites, section.strength_unit, section.positions) == (
        [str(PLANTED)],
        "sigma",
        "last",
    )
    assert section.min_strength <= 0.0 < section.max_strength == 8.0


def test_a_second_run_finds_the_selection_and_a_forward_search_the_measurements(swept):
    there, found = swept
    before = there.measured
    assert len(before) == 48
    assert there.select("--json", *WIDE) == found
    forward = there.select("--json", *WIDE, "--most-heads", "3", by="forward")
    assert forward["sites"] == [str(PLANTED)]
    # At 100 %, no further head can help, and none is tried.
    assert len(forward["steps"]) == 1
    assert there.measured == before


def test_a_sweep_that_is_killed_goes_on_where_it_was_and_ends_the_same(place, swept, tmp_path):
    there = place.copy(tmp_path / "place")
    process = subprocess.Popen(
        there.command(*WIDE), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(there.measured) < 5 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=20) == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in there.store.glob("measurements/*/*.json")}
    assert 5 <= len(there.measured) < 48
    assert not list(there.store.glob("selections/*/*"))
    found = there.select("--json", *WIDE)
    # What had been measured was not measured again.
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    undisturbed, expected = swept
    assert found | {"path": ""} == expected | {"path": ""}
    assert there.measured == undisturbed.measured
    name = f"selections/{found['selection']}/selection.json"
    assert (there.store / name).read_bytes() == (undisturbed.store / name).read_bytes()


def test_no_candidate_within_the_cap_is_a_refusal_with_the_figures(swept):
    there, _ = swept
    before = there.measured
    with pytest.raises(
        GateRefused, match=r"none of 48 candidates keeps the perplexity within 0\.5.*of 48 was"
    ):
        there.select("--max-perplexity", "0.5", "--strengths", "-8,8")
    # Another cap asks nothing anew.
    assert there.measured == before


def test_the_cost_is_said_before_and_a_dry_run_stops_there(place, tmp_path):
    there = place.copy(tmp_path / "place")
    said = there.select("--dry-run", "--most-heads", "2", "--top", "4", by="forward")
    # 24 heads and, from four, a second one among three others; five strengths, twelve prompts.
    assert f"at most {5 * (24 + 3)} candidates, each 12 answers generated" in said
    assert f"up to {5 * (24 + 3) * 12:,} generations" in said
    assert there.measured == []
    said = there.select(
        "--dry-run", "--from", "score", "--top", "4", "--prompts", "3", by="forward"
    )
    assert f"at most {5 * (4 + 3 + 2 + 1)} candidates, each 3 answers" in said


def open_rows(place):
    return (place.folder / "rows.jsonl").read_text().splitlines()


def test_only_validation_prompts_are_asked(place):
    """Whatever split the suite file names: what is reported on is not chosen on."""
    file = ValidationFile.load(place.folder / "suites.toml", most=100)
    splits = {row["prompt"]: row["split"] for row in map(json.loads, open_rows(place))}
    path = load_run_file(place.folder / "run.toml").model.path
    model, tokenizer = load_model(path, "float32"), load_tokenizer(path)
    suites = file.build([*file.targets, file.fluency], model, tokenizer)
    assert [len(suite.prompts) for suite in suites] == [12, 2, 2]
    for suite in suites:
        assert {splits[prompt.user] for prompt in suite.prompts} == {"validation"}
    assert ValidationFile.load(place.folder / "suites.toml", most=1).targets[0].limit == 1


def test_the_name_of_measurements_is_what_they_depend_on(place, tmp_path):
    def record(text, most=8, rows="rows.jsonl"):
        there = place.copy(tmp_path / f"{len(list(tmp_path.iterdir()))}")
        (there.folder / "suites.toml").write_text(HEAD + text)
        with (there.folder / "rows.jsonl").open("a") as file:
            file.write(rows if rows != "rows.jsonl" else "")
        return ValidationFile.load(there.folder / "suites.toml", most=most).record()

    plain = record(BEGINS + TALKS)
    assert record(BEGINS.replace("begins with", "starts with") + TALKS) == plain
    for other in (
        record(BEGINS + TALKS, most=7),
        record(BEGINS + TALKS, rows='{"prompt": "x", "label": 1}\n'),
        record(BEGINS.replace("= 2", "= 3") + TALKS),
        record(BEGINS),
    ):
        assert other != plain


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        (BEGINS.replace("target", "harm") + TALKS, (), 'no suite has role = "target"'),
        (BEGINS, (), 'no suite of kind = "fluency"'),
        (BEGINS + TALKS, ("--target", "talks"), "perplexity is what is capped"),
        (BEGINS + TALKS, ("--among", "layers"), "has no layers; add the stream 'resid_post'"),
    ],
)
def test_a_suite_file_that_cannot_choose_says_what_it_lacks(place, tmp_path, text, flags, message):
    there = place.copy(tmp_path / "place")
    (there.folder / "suites.toml").write_text(HEAD + text)
    with pytest.raises(InvalidInput, match=message):
        there.select(*flags)


def test_what_is_missing_is_named(place, tmp_path):
    there = place.copy(tmp_path / "place")
    with pytest.raises(typer.BadParameter, match="--suites"):
        there.select(suites=None)
    with pytest.raises(typer.BadParameter, match="other than 0"):
        there.select("--strengths", "1,0")
    with pytest.raises(NotFound, match="has no suite 'ends'; it has 'begins with an n'"):
        there.select("--target", "ends")
    shutil.rmtree(there.store / "reductions")
    with pytest.raises(NotFound, match="run `steerage reduce` on the same run file first"):
        there.select()
    with pytest.raises(NotFound, match="steerage select"):
        selected_sites(there.root, "0" * 64)


def test_by_score_nothing_is_run(place, tmp_path):
    there = place.copy(tmp_path / "place")
    found = there.select("--json", "--most-heads", "3", by="score", suites=None)
    assert len(found["sites"]) == 3
    assert there.measured == []
    assert found["strength"] is None
    aurocs = [row["auroc_validation"] for row in found["tried"]]
    assert aurocs == sorted(aurocs, reverse=True)
    assert [row["site"] for row in found["tried"][:3]] == found["sites"]


def planted_figures(found):
    (row,) = (row for row in found["tried"] if row["sites"] == [str(PLANTED)])
    return row["ratio"]


def test_what_is_measured_has_the_norm_that_is_published(place, tmp_path):
    """publish.norm_of: the same as another strength, at which the norms of two runs meet."""
    there = place.copy(tmp_path / "place")
    run = (there.folder / "run.toml").read_text()
    (there.folder / "other.toml").write_text(run + '[reduce]\nmethod = "pca"\n')
    cache = plan(load_run_file(there.folder / "run.toml"), there.root).cache
    mine, other = (
        reduce(cache, there.root, method=method, num_workers=1)
        for method in ("difference_of_means", "pca")
    )
    norms = [reduction.direction(PLANTED).norm for reduction in (mine, other)]
    one = ("--json", "--from", "score", "--top", "24", "--most-heads", "1", "--prompts", "1")
    flags = ("--max-perplexity", "1e300", *one)
    applied = '[publish]\nstrength_unit = "direction"\n'

    def select(section, strength):
        (there.folder / "run.toml").write_text(run + section)
        return there.select(*flags, "--strengths", f"{strength!r}", by="forward")

    matched = select(applied + 'norm_of = ["other.toml"]\n', 0.5)
    plain = select(applied, 0.5)
    same = select(applied, 0.5 * float(np.mean(norms)) / norms[0])
    assert planted_figures(matched) == pytest.approx(planted_figures(same), rel=1e-4)
    assert planted_figures(matched) != pytest.approx(planted_figures(plain), rel=1e-2)
    requests = [json.loads(p.read_text()) for p in there.store.glob("measurements/*/request.json")]
    assert [r["norm_of"] for r in requests if "norm_of" in r] == [[other.digest]]


def test_a_candidate_is_named_by_all_its_sites_where_nothing_is_kept_of_one(place, tmp_path):
    there = place.copy(tmp_path / "place")
    with (there.folder / "run.toml").open("a") as file:
        file.write(
            '[publish]\nstrength_unit = "direction"\nkeep_fraction = 0.125\nkeep_over = "all"\n'
        )
    flags = ("--from", "score", "--top", "8", "--most-heads", "2", "--prompts", "1", "--json")
    # So weak that no head alone does all there is to do, and a second one is tried.
    weak = ("--max-perplexity", "1e300", "--strengths", "0.001")
    found = there.select(*flags, *weak, by="forward")
    pairs = [row["sites"] for row in found["tried"] if len(row["sites"]) == 2]
    assert len(pairs) == 7
    run = load_run_file(there.folder / "run.toml")
    planned = plan(run, there.root)
    reduction = reduce(planned.cache, there.root, method="difference_of_means", num_workers=1)
    sizes = [
        len(
            build_artifact(
                reduction,
                run.publish.model_copy(update={"sites": sites}),
                name="x",
                model=planned.model,
            ).interventions
        )
        for sites in pairs
    ]
    assert min(sizes) == 1
    for path in there.store.glob("measurements/*/*.json"):
        record = json.loads(path.read_text())
        assert "key" not in record or record["key"]["sites"] == record["figures"]["sites"]


def test_measurements_are_of_all_that_is_published(place):
    """Every field of [publish] but those that each candidate says itself."""
    planned = plan(load_run_file(place.folder / "run.toml"), place.root)
    reduction = reduce(planned.cache, place.root, method="difference_of_means", num_workers=1)

    def request(behaviours=(), **fields):
        section = PublishSection().model_copy(update=fields)
        found = measurement_request(reduction, section, {}, has_kl=False, behaviours=behaviours)
        return json.dumps(found)

    changed = {
        "operation": "project_out",
        "strength_unit": "unit",
        "positions": "all",
        "keep_fraction": 0.5,
        "match_norm": True,
        "keep_by": "t",
        "keep_over": "all",
    }
    said = {"sites": ["z.0.1"], "min_strength": -9.0, "max_strength": 9.0}
    assert set(PublishSection.model_fields) == {*changed, *said, "norm_of"}
    requests = [request(**{name: value}) for name, value in changed.items()]
    requests += [request(), request(behaviours=[reduction])]
    assert len(set(requests)) == len(changed) + 2
    assert request(**said) == request()


def test_sites_that_may_not_be_published_are_no_candidates(place):
    planned = plan(load_run_file(place.folder / "run.toml"), place.root)
    reduction = reduce(planned.cache, place.root, method="difference_of_means", num_workers=1)
    names = reduction.scores["site"].to_pylist()

    def without(*gone):
        """The reduction with no direction there."""
        norms = [0.0 if name in gone else 1.0 for name in names]
        number = reduction.scores.column_names.index("norm")
        return replace(reduction, scores=reduction.scores.set_column(number, "norm", [norms]))

    def left(one, *behaviours):
        sites = candidate_sites(one, heads=True, behaviours=behaviours)
        return {str(site) for site in sites}

    assert left(reduction) == set(names)
    assert left(without(names[3])) == set(names) - {names[3]}
    assert left(without(names[3]), without(names[5])) == set(names) - {names[3], names[5]}
    assert left(replace(reduction, signs_in_doubt=(names[1],))) == set(names) - {names[1]}
    with pytest.raises(InvalidInput, match="none of the 24 heads") as caught:
        left(reduction, without(*names))
    assert caught.value.kind == "select_sites"


# The journal


def test_a_measurement_is_made_once(root):
    calls = []

    def measure():
        calls.append(1)
        return {"share": 12.5, "kl": None}

    key = {"sites": ["z.0.1"], "strength": 8.0}
    first = Journal(root, {"prompts": "a"})
    assert len(first) == 0
    assert first.measured(key, measure) == first.measured(key, measure)
    again = Journal(root, {"prompts": "a"})
    assert len(again) == 1
    assert again.measured(key, measure) == {"share": 12.5, "kl": None}
    assert len(calls) == 1
    other = Journal(root, {"prompts": "b"})
    assert other.digest != first.digest
    assert len(other) == 0


def test_of_two_searches_that_measure_the_same_the_first_figures_stay(root):
    key = {"sites": ["z.0.1"], "strength": 8.0}
    slow, fast = Journal(root, {}), Journal(root, {})
    assert fast.measured(key, lambda: {"share": 1.0}) == {"share": 1.0}
    assert slow.measured(key, lambda: {"share": 2.0}) == {"share": 1.0}


def test_an_object_that_is_no_measurement_is_named(root):
    journal = Journal(root, {})
    journal.measured({"a": 1}, lambda: {"share": 1.0})
    (path,) = (
        p for p in root.local_path().glob("measurements/*/*.json") if p.name != "request.json"
    )
    path.write_text("[")
    with pytest.raises(InvalidInput, match=f"{path.name} is no measurement"):
        Journal(root, {})
