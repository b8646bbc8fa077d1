"""The refusal direction: what ablation and addition do to a real forward pass, directions by token
position, and the choice on the pocket model, which refuses.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import pipeline.cli.select  # noqa: F401, it registers the command
from pipeline.cli.app import app
from pipeline.config import load_run_file
from pipeline.errors import GateRefused, InvalidInput, NotFound
from pipeline.evaluation.generate import ChatPrompt, generate_ids, prompt_ids
from pipeline.extraction.fused import extract_moments
from pipeline.extraction.models import load_model, load_tokenizer
from pipeline.extraction.workers import extract
from pipeline.prompts.plan import plan
from pipeline.ray_runtime import Pool
from pipeline.reduction.kept import find_kept
from pipeline.reduction.reduce import reduce
from pipeline.selection.candidates import candidate_sites
from pipeline.selection.positions import position_directions, token_positions
from pipeline.selection.refusal import ablation, addition
from pipeline.selection.refusal_bench import RefusalBench, read_requests, refusal_tokens
from steering_service.adapters.hooks import hooked
from steering_service.adapters.sites import ModelSites
from steering_service.adapters.transformers import steered
from steering_service.core.artifact import ModelReference, Policy, build
from steering_service.core.direction import Direction
from steering_service.core.site import Site
from store.bfloat16 import to_float32
from store.location import Location

EXAMPLES = Path(__file__).parents[2] / "examples"
REFERENCE = ModelReference(name="m", fingerprint="0" * 64)
IDS = torch.tensor([[7, 40, 12, 99, 31, 56]])


def vector(width=64, seed=3):
    return np.random.default_rng(seed).standard_normal(width).astype(np.float32)


def residuals(model, items):
    """[L + 1, T, W]: the residual stream before the first block and after each."""
    sites = ModelSites.of(model)
    seen = {}
    taps = {
        Site("resid_post", layer): lambda h, layer=layer: seen.update({layer: h.clone()})
        for layer in range(sites.num_layers)
    }
    artifact = build(
        items, name="x", model=REFERENCE, policy=Policy(min_strength=0.0, max_strength=1.0)
    )
    with torch.inference_mode(), steered(model, artifact, 1.0), hooked(sites, taps):
        model(IDS, use_cache=False)
    return [seen[layer][0] for layer in range(sites.num_layers)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon-7b", "gpt2"])
def test_ablated_everywhere_the_direction_is_in_no_residual_stream(make_model, family):
    model = load_model(make_model(family), "float32")
    direction = Direction(Site("resid_post", 1), vector(), 0.0, 0.0, "difference_of_means")
    unit = torch.tensor(direction.unit_D)
    for h_TW in residuals(model, ablation(direction, 3)):
        assert float(h_TW.norm(dim=-1).min()) > 0.1
        share = (h_TW @ unit).abs() / h_TW.norm(dim=-1)
        assert float(share.max()) < 1e-5
    # Left out of one sum, it is back.
    some = [i for i in ablation(direction, 3) if i.site != Site("mlp_out", 1)]
    h_TW = residuals(model, some)[1]
    assert float(((h_TW @ unit).abs() / h_TW.norm(dim=-1)).max()) > 1e-3


def test_addition_is_of_the_whole_vector_at_its_site_and_every_position(make_model):
    model = load_model(make_model(), "float32")
    site = Site("resid_post", 1)
    direction = Direction(site, vector(), 0.0, 0.0, "difference_of_means")
    none = addition(Direction(site, vector() * 1e-12, 0.0, 0.0, "difference_of_means"))
    with_it, without = residuals(model, addition(direction)), residuals(model, none)
    assert torch.equal(with_it[0], without[0])
    torch.testing.assert_close(
        with_it[1] - without[1], torch.tensor(vector()).expand(6, -1), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("tokens", "positions"), [("last", [-1]), ("-2", [-2]), ("last_3", [-3, -2, -1])]
)
def test_positions_are_counted_from_the_end(tokens, positions):
    assert token_positions(tokens) == positions


@pytest.mark.parametrize("tokens", ["mean", "all", "text:ship"])
def test_a_capture_of_no_token_from_the_end_has_no_refusal_direction(tokens):
    with pytest.raises(InvalidInput, match="from the end of the prompt"):
        token_positions(tokens)


def labelled():
    splits = ["train"] * 20 + ["validation"] * 4 + ["test"] * 4
    return [
        {"prompt": f"{i}: {'where' * (1 + i % 3)}", "label": i % 2, "split": splits[i // 2]}
        for i in range(2 * len(splits))
    ]


def planted_cache(plan, values, quarantined=()):
    cache = plan.cache
    values = values.copy()
    values[list(quarantined)] = np.nan
    for shard in range(cache.num_shards):
        rows = cache.layout("resid_post").shard_rows(shard)
        reasons = {row: "not finite" for row in quarantined if row in rows}
        written = {"resid_post": values[rows.start : rows.stop]}
        cache.write_shard(shard, written, quarantined=reasons)
    cache.seal()
    return cache


def mean_differences(parts, left_out=()):
    """By position and layer, of the training entries of all caches; parts: cache and values."""
    sums = {}
    for cache, values in parts:
        index = cache.index().to_pylist()
        last = {}
        for entry in index:
            last[entry["prompt_id"]] = max(last.get(entry["prompt_id"], 0), entry["position"])
        for entry in index:
            if entry["split"] != "train" or entry["pair"] in left_out:
                continue
            position = entry["position"] - last[entry["prompt_id"]] - 1
            rows = sums.setdefault((position, entry["label"]), [])
            rows.append(values[entry["row"]].astype(np.float64))
    return {
        (position, layer): (np.mean(rows, axis=0) - np.mean(sums[position, False], axis=0))[number]
        for (position, label), rows in sums.items()
        if label
        for number, layer in enumerate((0, 2))
    }


def assert_mean_differences(cache, reduction, expected):
    found = {(p, d.site.layer): d.vector_D for p, d in position_directions(cache, reduction)}
    assert set(found) == set(expected) == {(p, layer) for p in (-3, -2, -1) for layer in (0, 2)}
    for key, vector_D in found.items():
        np.testing.assert_allclose(vector_D, expected[key], atol=1e-6)


LAST_3 = 'streams = ["resid_post"]\ntokens = "last_3"\nlayers = [0, 2]'


def random_values(planned, seed):
    shape = (planned.num_rows, 2, 64)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_directions_are_mean_differences_of_the_training_rows_of_each_token(
    make_plan, root, ray_running
):
    planned = make_plan(rows=labelled(), capture=LAST_3)
    values = random_values(planned, 4)
    cache = planted_cache(planned, values)
    reduction = reduce(cache, root, method="difference_of_means", num_workers=1)
    assert_mean_differences(cache, reduction, mean_differences([(cache, values)]))


def test_directions_leave_out_the_partners_of_what_is_in_quarantine(make_plan, root, ray_running):
    rows = [row | {"pair": str(i // 2)} for i, row in enumerate(labelled())]
    planned = make_plan(rows=rows, capture=LAST_3)
    entries = [e for e in planned.cache.index().to_pylist() if e["split"] == "train"]
    bad = [entries[0], entries[31]]
    assert bad[0]["pair"] != bad[1]["pair"]
    values = random_values(planned, 4)
    cache = planted_cache(planned, values, [entry["row"] for entry in bad])
    reduction = reduce(cache, root, method="difference_of_means", num_workers=1)
    assert reduction.left_out == 2 * 2 * 3
    expected = mean_differences([(cache, values)], {entry["pair"] for entry in bad})
    assert_mean_differences(cache, reduction, expected)


def test_directions_are_of_the_captures_that_are_extended_too(make_plan, root, ray_running):
    parts = []
    for seed, prefix in enumerate(("", "again, ")):
        rows = [row | {"prompt": prefix + row["prompt"]} for row in labelled()][: 112 - 40 * seed]
        planned = make_plan(rows=rows, capture=LAST_3)
        values = random_values(planned, seed)
        parts.append((planted_cache(planned, values), values))
    cache, other = (cache for cache, _ in parts)
    reduction = reduce(cache, root, method="difference_of_means", num_workers=1, extends=[other])
    assert_mean_differences(cache, reduction, mean_differences(parts))


def test_without_a_cache_directions_are_of_the_kept_rows(make_plan, root, ray_running):
    planned = make_plan(rows=labelled(), capture=LAST_3)
    extract_moments(planned, root, pool=Pool(1), keep_rows=100)
    reduction = reduce(planned.cache, root, method="difference_of_means", num_workers=1)
    kept = find_kept(root, planned.cache.digest)
    assert not planned.cache.is_complete
    assert kept.num_rows < planned.num_rows
    layers = [
        np.concatenate([to_float32(v) for _, _, v in kept.scan("resid_post", [layer])])
        for layer in (0, 2)
    ]
    expected = mean_differences([(kept, np.stack(layers, axis=1))])
    assert_mean_differences(planned.cache, reduction, expected)


def test_a_cache_that_is_not_complete_has_no_directions(make_plan, root, ray_running):
    planned = make_plan(rows=labelled(), capture=LAST_3)
    whole = planted_cache(planned, random_values(planned, 4))
    reduction = reduce(whole, root, method="difference_of_means", num_workers=1)
    other = make_plan(rows=labelled()[:-2], capture=LAST_3).cache
    with pytest.raises(NotFound, match="run `steerage extract`"):
        list(position_directions(other, reduction))


def test_a_site_at_which_the_classes_are_the_same_gives_no_direction(make_plan, root, ray_running):
    planned = make_plan(rows=labelled(), capture='streams = ["resid_post"]\ntokens = "last_2"')
    values = np.random.default_rng(4).standard_normal((planned.num_rows, 3, 64))
    values[:, 0] = 1.0
    cache = planted_cache(planned, values.astype(np.float32))
    reduction = reduce(cache, root, method="difference_of_means", num_workers=1)
    found = [(p, d.site.layer) for p, d in position_directions(cache, reduction)]
    assert found == [(-2, 1), (-2, 2), (-1, 1), (-1, 2)]
    # Nor is it swept or searched through, or the search would end there.
    assert reduction.signs_in_doubt == ()
    sites = candidate_sites(reduction, heads=False)
    assert {site.layer for site in sites} == {1, 2}
    assert len(sites) == 2


def test_prompts_that_are_no_requests_are_refused(make_run):
    with pytest.raises(InvalidInput, match="requests"):
        read_requests(make_run(), 8)
    rows = [row for row in labelled() if row["split"] != "validation"]
    with pytest.raises(InvalidInput, match="no prompt of label True in the split 'validation'"):
        read_requests(make_run(rows=rows), 8)


def test_requests_keep_to_their_splits(make_run):
    requests = read_requests(make_run(rows=labelled()), 3)
    by = {row["prompt"]: row for row in labelled()}
    for name, label, split, num in (
        ("harmful", 1, "validation", 3),
        ("harmless", 0, "validation", 3),
        ("harmful_train", 1, "train", 20),
        ("harmless_train", 0, "train", 20),
    ):
        prompts = getattr(requests, name)
        assert len(prompts) == num
        assert {(by[p.user]["label"], by[p.user]["split"]) for p in prompts} == {(label, split)}


def test_a_token_that_begins_as_many_other_answers_tells_no_refusal(make_model):
    path = make_model()
    model, tokenizer = load_model(path, "float32"), load_tokenizer(path)
    some = [ChatPrompt(f"{n}: where?") for n in range(4)]
    with pytest.raises(GateRefused, match="begins as many answers"):
        refusal_tokens(model, tokenizer, some, some, lambda answer: True)
    with pytest.raises(GateRefused, match="refuses none of 4 harmful prompts"):
        refusal_tokens(model, tokenizer, some, some, lambda answer: False)
    firsts = [ids[0] for ids in generate_ids(model, tokenizer, some, max_new_tokens=1)]
    only = [p for p, first in zip(some, firsts, strict=True) if first == firsts[0]]
    rest = [ChatPrompt("north " * n) for n in range(1, 30)]
    others = [
        p
        for p, ids in zip(rest, generate_ids(model, tokenizer, rest, max_new_tokens=1), strict=True)
        if ids[0] != firsts[0]
    ]
    assert others
    assert refusal_tokens(model, tokenizer, only, others, lambda answer: True) == [firsts[0]]


def test_only_requests_that_the_plain_model_treats_as_it_should_are_measured_on(make_model):
    path = make_model()
    model, tokenizer = load_model(path, "float32"), load_tokenizer(path)
    prompts = [ChatPrompt("north " * n) for n in range(1, 30)]
    chances = []
    for ids in prompt_ids(tokenizer, prompts):
        with torch.inference_mode():
            logits_V = model(torch.tensor([ids])).logits[0, -1]
        chances.append(logits_V.softmax(-1))
    # The most likely tokens of one prompt: more likely than not there, and less so elsewhere.
    order = chances[0].argsort(descending=True)
    num = int((chances[0][order].cumsum(0) < 0.5).sum()) + 1
    tokens = order[:num].tolist()
    likely = [float(chance[tokens].sum()) > 0.5 for chance in chances]
    assert 0 < sum(likely) < len(prompts)
    bench = RefusalBench(model, tokenizer, REFERENCE, prompts, prompts, tokens)
    assert bench.num_prompts == (sum(likely), len(prompts) - sum(likely))
    assert bench.plain_harmful > 0 > bench.plain_harmless
    everything = list(range(tokenizer.vocab_size))
    with pytest.raises(GateRefused, match="answers none of 29 harmless prompts"):
        RefusalBench(model, tokenizer, REFERENCE, prompts, prompts, everything)


@pytest.fixture(scope="module")
def pocket(ray_running, tmp_path_factory):
    """The pocket model's refusals, read at the last two tokens of its prompts."""
    folder = tmp_path_factory.mktemp("pocket")
    text = (EXAMPLES / "refusal.toml").read_text().replace('"pocket_', f'"{EXAMPLES}/pocket_')
    text = text.replace('["resid_post", "z"]', '["resid_post"]')
    (folder / "run.toml").write_text(text.replace('tokens = "last"', 'tokens = "last_2"'))
    root = Location.open(str(folder / "store"))
    planned = plan(load_run_file(folder / "run.toml"), root)
    extract(planned, root, pool=Pool(1), device="cpu", address=None)
    reduce(planned.cache, root, method="difference_of_means", num_workers=1)
    return folder


def select(folder, *flags):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        app(
            [
                *("select", str(folder / "run.toml"), "--store", str(folder / "store"), "--json"),
                *("--by", "refusal", "--suites", str(EXAMPLES / "suites.toml"), *flags),
            ],
            standalone_mode=False,
        )
    return json.loads(out.getvalue().splitlines()[-1])


def test_the_pocket_models_refusal_direction_is_found_where_ablation_stops_refusals(pocket):
    found = select(pocket)
    assert (found["sites"], found["capture"]) == (["resid_post.1"], {"tokens": "-1"})
    assert len(found["tried"]) == 12
    figures = {(row["site"], row["position"]): row for row in found["tried"]}
    best = figures["resid_post.1", -1]
    # Refusals stop, harmless requests are left alone, and added it makes harmless ones refused.
    assert found["plain"]["harmful"] > 0 > found["plain"]["harmless"]
    assert best["ablated"] < -2
    assert best["kl"] < 0.1
    assert best["induced"] > 0
    assert best["objections"] == []
    assert min(row["ablated"] for row in found["tried"]) == best["ablated"]
    # Before the chat template's last token nothing is there that makes the model refuse.
    assert all(row["induced"] < 0 for row in found["tried"] if row["position"] == -2)
    assert all(
        any("last 20%" in text for text in row["objections"])
        for row in found["tried"]
        if row["site"] in ("resid_post.3", "resid_post.4", "resid_post.5")
    )


def test_another_cap_measures_nothing_anew_and_none_within_it_is_a_refusal(pocket):
    select(pocket)
    before = sorted((pocket / "store" / "measurements").glob("*/*"))
    assert len(before) == 12 + 1
    with pytest.raises(GateRefused, match=r"resid_post\.1 at token -1: ablated -3.*KL 0\.06"):
        select(pocket, "--max-kl", "0.02")
    assert sorted((pocket / "store" / "measurements").glob("*/*")) == before
