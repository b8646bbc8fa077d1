"""The notebook API, end to end on a tiny model: open, fit, look, measure, steer.

Shapes: N samples, B batch, T positions.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from pipeline.cli.batch import reduction_of
from pipeline.errors import InvalidInput, NotFound
from pipeline.notebook import (
    OpenCache,
    extract,
    fit,
    load_model,
    measure,
    open_cache,
    open_run,
    steer,
)
from pipeline.prompts.plan import plan
from pipeline.reduction.samples import read_samples
from pipeline.reduction.tables import as_html, as_text
from steering_service.core.direction import Direction
from steering_service.core.errors import InvalidInput as CoreInvalidInput
from steering_service.core.site import Site
from store.bfloat16 import to_float32
from store.errors import NotFound as StoreNotFound

LAYER, HEAD = Site("resid_post", 1), Site("z", 2, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_model):
    """Run files and prompts of one model."""
    folder = tmp_path_factory.mktemp("notebook")
    rows = [
        {
            "prompt": f"{number}: which way does the ship steer?"
            + " The crew asks." * (number % 7),
            "positive": "to the north",
            "negative": "to the south, captain",
        }
        for number in range(60)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, tokens in (("run", "-1"), ("other", "-2")):
        (folder / f"{name}.toml").write_text(
            f'name = "test"\n[model]\npath = "{make_model()}"\n[prompts]\n'
            f'files = ["pairs.jsonl"]\n[capture]\ntokens = "{tokens}"\n'
        )
    return folder


@pytest.fixture(scope="module")
def opened(ray_running, folder) -> OpenCache:
    return extract(folder / "run.toml", str(folder / "store"), num_workers=1)


@pytest.fixture(scope="module")
def found(opened):
    return fit(opened, num_workers=1)


def at_site(opened: OpenCache, site: Site):
    """[N, D] of a site, and which samples are of the training split."""
    samples = read_samples(opened.cache)
    parts = [to_float32(v) for _, _, v in opened.cache.scan(site.stream, [site.layer])]
    values_NW = np.concatenate(parts)[samples.row_N]
    if site.head is not None:
        values_NW = values_NW[:, site.head * 8 : (site.head + 1) * 8]
    return values_NW.astype(np.float64), samples.split_N == "train"


def test_what_was_extracted_is_opened(opened, folder):
    store = str(folder / "store")
    assert extract(folder / "run.toml", store, num_workers=1).cache.digest == opened.cache.digest
    assert open_run(str(folder / "run.toml"), store).cache.digest == opened.cache.digest
    for digest in (opened.cache.digest, opened.cache.digest[:8], ""):
        assert open_cache(store, digest).cache.digest == opened.cache.digest
    assert "120 samples (60 positive; test " in repr(opened)
    assert "z [120, 3, 64]" in repr(opened)


def test_what_cannot_be_opened_is_said(opened, folder, tmp_path):
    empty = str(tmp_path / "store")
    with pytest.raises(NotFound, match="lacks 4 of 4 shards") as caught:
        open_run(folder / "other.toml", empty)
    assert caught.value.kind == "cache_incomplete"
    assert "4 shards missing" in repr(open_cache(empty))
    with pytest.raises(NotFound, match="begins with 'xyz'; it has") as caught:
        open_cache(str(folder / "store"), "xyz")
    assert caught.value.kind == "cache"
    with pytest.raises(NotFound, match="run"):
        open_run(folder / "run.toml", empty)
    with pytest.raises(InvalidInput, match="2 caches in") as caught:
        open_cache(empty)
    assert caught.value.kind == "cache_ambiguous"
    with pytest.raises(InvalidInput, match="was opened by its digest") as caught:
        load_model(open_cache(str(folder / "store")))
    assert caught.value.kind == "run_missing"


def test_a_fit_is_found_again_and_shows_its_best_sites(opened, found):
    assert fit(opened, num_workers=1).digest == found.digest
    probe = fit(opened, "probe", num_workers=1, l2=2.0)
    assert probe.parameters["l2"] == 2.0
    with pytest.raises(InvalidInput, match="got shrinkage"):
        fit(opened, "probe", shrinkage=0.5)
    for reduction in (found, probe):
        shown = as_text(reduction)
        assert shown.startswith(f"{reduction.method} of capture {opened.cache.digest[:12]}")
        for heads in (True, False):
            rows = reduction.ranked(heads=heads)
            at = [shown.index(f"\n{row['site']} ") for row in rows[: 3 if not heads else 5]]
            assert at == sorted(at)
            assert f"{rows[0]['auroc_test']:.3f}" in shown


def test_a_fit_by_a_run_file_is_what_the_commands_compute(opened, folder, tmp_path):
    store = str(tmp_path / "store")
    shutil.copytree(folder / "store", store)
    lines = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(line.replace("ship", "boat") for line in lines[:20]))
    run = (folder / "run.toml").read_text()
    (folder / "few.toml").write_text(run.replace("pairs.jsonl", "few.jsonl"))
    section = '[reduce]\nmethod = "probe"\nl2 = 3.0\nextends = ["few.toml"]\n'
    (folder / "extended.toml").write_text(run + section)
    few = extract(folder / "few.toml", store, num_workers=1)
    extended = open_run(folder / "extended.toml", store)
    assert extended.cache.digest == opened.cache.digest
    found = fit(extended, "probe", num_workers=1)
    assert found.parameters["l2"] == 3.0
    assert found.extends == (few.cache.digest,)
    planned = plan(extended.run, extended.root)
    assert reduction_of(extended.run, planned, store).digest == found.digest
    # What is named wins, and of a method that the run file does not name, there are the defaults.
    assert fit(extended, "probe", num_workers=1, l2=2.0).parameters["l2"] == 2.0
    assert fit(extended, num_workers=1).extends == (few.cache.digest,)
    with pytest.raises(InvalidInput, match="method must be one of"):
        fit(extended, "guess")
    with pytest.raises(InvalidInput, match="got shrinkage"):
        fit(extended, "probe", shrinkage=0.5)


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.tags.pop() == tag

    def handle_data(self, data):
        if self.tags[-1] in ("td", "th"):
            self.cells.append(data)


def test_html_is_of_the_same_cells_and_nothing_in_it_is_taken_for_markup(found):
    scores = found.scores.set_column(
        found.scores.column_names.index("q_test"), "q_test", [[float("nan")] * len(found.scores)]
    )
    certain = found.scores.set_column(
        found.scores.column_names.index("q_test"), "q_test", [[0.0] * len(found.scores)]
    )
    assert as_text(replace(found, scores=certain)).count(" 1e-09 ") == 8
    doubtful = replace(found, scores=scores, signs_in_doubt=("<b>",), left_out=4)
    parser = _Cells()
    parser.feed(as_html(doubtful, top=2))
    assert parser.tags == []
    rows = [*found.ranked(heads=False)[:2], *found.ranked(heads=True)[:2]]
    assert [cell for cell in parser.cells if cell in {row["site"] for row in rows}] == [
        row["site"] for row in rows
    ]
    assert parser.cells.count("–") >= 4
    assert "disagree: &lt;b&gt;." in as_html(doubtful)
    assert "left out as quarantined, with their pairs: 4" in as_text(doubtful).lower()


@pytest.mark.parametrize("site", [LAYER, HEAD])
def test_measuring_a_fitted_direction_gives_what_the_fit_says(opened, found, site):
    fitted = found.direction(site)
    measured = measure(opened, replace(fitted, sigma=None, activation_norm=0.0, scores={}))
    assert measured.sigma == pytest.approx(fitted.sigma, rel=1e-4)
    assert measured.activation_norm == pytest.approx(fitted.activation_norm, rel=1e-4)
    assert len(measured.scores) > 8
    for name, value in measured.scores.items():
        assert value == pytest.approx(fitted.scores[name], abs=1e-3), name
    assert measured.lineage["steps"][-1]["capture"] == opened.cache.digest


def test_what_is_made_of_directions_is_measured(opened, found):
    mixed = found.direction(LAYER) - 0.5 * found.control(LAYER, "random")
    measured = measure(opened, mixed)
    values_ND, train_N = at_site(opened, LAYER)
    assert measured.sigma == pytest.approx((values_ND[train_N] @ mixed.unit_D).std(), rel=1e-4)
    norms_N = np.linalg.norm(values_ND[train_N], axis=1)
    assert measured.activation_norm == pytest.approx(norms_N.mean(), rel=1e-5)
    operations = [step["operation"] for step in measured.lineage["steps"]]
    assert operations == ["scale", "compose", "measure"]
    assert np.array_equal(measured.vector_D, mixed.vector_D)


def test_what_cannot_be_measured_is_said(opened, found):
    d = found.direction(LAYER)
    for site, error in (
        (Site("mlp_out", 1), StoreNotFound),
        (Site("resid_post", 7), StoreNotFound),
    ):
        with pytest.raises(error):
            measure(opened, replace(d, site=site))
    with pytest.raises(InvalidInput, match="heads 0 to 7"):
        measure(opened, replace(d, site=Site("z", 1, 8)))
    with pytest.raises(CoreInvalidInput, match="got activations of width 64"):
        measure(opened, replace(d, vector_D=np.ones(5, np.float32)))


@pytest.fixture(scope="module")
def model(opened):
    return load_model(opened)[0]


def logits(model, **steering):
    ids_BT = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(ids_BT, use_cache=False, **steering).logits


def test_steering_is_the_edit_that_was_asked_for(model, found):
    plain = logits(model)
    direction = found.direction(LAYER)
    seen = []
    handle = model.model.layers[LAYER.layer + 1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or (kwargs["hidden_states"],))[0]),
        with_kwargs=True,
    )
    logits(model)
    for positions in ("last", "all"):
        with steer(model, direction, 2.0, positions=positions):
            logits(model)
    handle.remove()
    last_BTD, all_BTD = ((steered - seen[0]).numpy() for steered in seen[1:])
    np.testing.assert_allclose(last_BTD[:, -1], [2 * direction.vector_D] * 2, atol=1e-4)
    assert not last_BTD[:, :-1].any()
    np.testing.assert_allclose(all_BTD, [[2 * direction.vector_D] * 9] * 2, atol=1e-4)
    assert torch.equal(logits(model), plain)
    with steer(model, direction, 0.0):
        assert torch.equal(logits(model), plain)


def test_units_and_operations_of_steering(model, found):
    layer, head = found.direction(LAYER), found.direction(HEAD)
    out = {"operation": "project_out"}
    same = [
        ((layer, 3.0, {"unit": "sigma"}), (layer, 3.0 * layer.sigma, {"unit": "unit"})),
        ((layer, 2.0, {}), (2 * layer, 1.0, {})),
        (([layer, head], 2.0, {}), ([2 * layer, 2 * head], 1.0, {})),
        ((layer, 1.0, out), (-5 * layer, 1.0, out)),
    ]
    for pair in same:
        results = []
        for directions, strength, options in pair:
            with steer(model, directions, strength, positions="all", **options):
                results.append(logits(model))
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
        assert (results[0] - logits(model)).abs().max() > 1e-2


def test_directions_that_were_not_measured_steer_but_not_by_sigma(model, found):
    plain = logits(model)
    mixed = found.direction(LAYER) + found.control(LAYER, "shuffled")
    with steer(model, mixed, -1.0):
        assert not torch.equal(logits(model), plain)
    with pytest.raises(CoreInvalidInput, match="measure it"), steer(model, mixed, unit="sigma"):
        pass
    with pytest.raises(CoreInvalidInput, match="two interventions"), steer(model, [mixed, mixed]):
        pass
    with (
        pytest.raises(CoreInvalidInput, match="width"),
        steer(model, Direction(LAYER, np.ones(5, np.float32), None, 0.0, "made")),
    ):
        pass


SCRIPT = """
import sys
import ray
from pipeline.notebook import fit, open_cache
found = fit(open_cache(sys.argv[1]), "paired_difference", num_workers=1)
assert not ray.is_initialized()
print(found.digest)
"""


def test_a_local_ray_is_started_and_ends_with_the_fit(opened, folder):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder / "store")],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == fit(opened, "paired_difference").digest
