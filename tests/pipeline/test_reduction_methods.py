"""Methods of reduction over real caches with a real Ray: PCA of pairs and probes find what was
planted, whatever the order of rows, the shards and the number of workers.

Shapes: N rows, P pairs, D width, L layers, W width of a stream.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from pipeline.config import PublishSection, ReduceSection
from pipeline.errors import InvalidInput
from pipeline.extraction.models import ModelInfo
from pipeline.reduction.artifacts import build_artifact
from pipeline.reduction.components import pca_of_pairs
from pipeline.reduction.pairs import pair_order
from pipeline.reduction.probes import fit_probes
from pipeline.reduction.reduce import reduce, reduce_all
from pipeline.reduction.results import Reduction, reduction_digest
from steering_service.core.site import Site
from store.activations import ActivationCache
from store.digest import canonical_json, sha256_hex
from store.layout import StreamLayout
from store.location import Location

LAYERS, HEADS, HEAD_DIM, PAIRS = 2, 4, 8, 240
PLANTED = (Site("z", 1, 2), Site("resid_post", 1))


def cosine(a_D, b_D) -> float:
    return float(a_D @ b_D / np.linalg.norm(a_D) / np.linalg.norm(b_D))


def write_cache(root: Location, *, rows_per_shard: int = 32, drop: int | None = None):
    """A cache in random row order in which two sites tell the classes apart.

    Pairs share a nuisance; at the planted sites their difference has a mean and a varying part.
    """
    random = np.random.default_rng(0)
    pair_N = np.repeat(np.arange(PAIRS), 2)
    label_N = np.tile([True, False], PAIRS)
    split_P = random.choice(["train", "validation", "test"], PAIRS, p=[0.5, 0.25, 0.25])
    widths = {"z": (HEADS, HEAD_DIM), "resid_post": (1, 16)}
    values = {
        stream: 5
        + random.standard_normal((2 * PAIRS, LAYERS, *shape))
        + 3 * np.repeat(random.standard_normal((PAIRS, LAYERS, *shape)), 2, axis=0)
        for stream, shape in widths.items()
    }
    planted = {}
    for site in PLANTED:
        mean_D, nuisance_D = np.linalg.qr(random.standard_normal((widths[site.stream][1], 2)))[0].T
        differences_PD = 12 * mean_D + 8 * random.standard_normal((PAIRS, 1)) * nuisance_D
        values[site.stream][label_N, site.layer, site.head or 0] += differences_PD
        planted[site] = mean_D
    order = random.permutation(2 * PAIRS)
    if drop is not None:
        order = np.delete(order, drop)
    pair_N, label_N = pair_N[order], label_N[order]
    split_N = split_P[pair_N]
    values = {
        stream: array[order].reshape(len(order), LAYERS, -1).astype(np.float32)
        for stream, array in values.items()
    }
    layouts = [
        StreamLayout(
            stream=stream,
            num_rows=len(order),
            layers=tuple(range(LAYERS)),
            width=array.shape[2],
            dtype="float32",
            rows_per_shard=rows_per_shard,
            rows_per_chunk=32,
            num_heads=HEADS if stream == "z" else None,
        )
        for stream, array in values.items()
    ]
    index = pa.table({"pair": [f"p{n}" for n in pair_N], "label": label_N, "split": split_N})
    capture = {"layers": list(range(LAYERS)), "rows": rows_per_shard, "drop": drop}
    cache = ActivationCache.create(root, capture, layouts, index)
    for shard in range(cache.num_shards):
        rows = layouts[0].shard_rows(shard)
        cache.write_shard(shard, {name: a[rows.start : rows.stop] for name, a in values.items()})
    cache.seal()
    return cache, {**values, "pair": pair_N, "label": label_N, "split": split_N}, planted


def at_site(values, site: Site):
    """[N, D] of a site."""
    layer_NW = values[site.stream][:, site.layer]
    if site.head is None:
        return layer_NW
    return layer_NW[:, site.head * HEAD_DIM : (site.head + 1) * HEAD_DIM]


SITES = [
    *(Site("z", layer, head) for layer in range(LAYERS) for head in range(HEADS)),
    *(Site("resid_post", layer) for layer in range(LAYERS)),
]


METHODS = ("difference_of_means", "paired_difference", "pca", "probe", "lda")


@pytest.fixture(scope="module")
def reduced(ray_running, tmp_path_factory):
    root = Location.open(str(tmp_path_factory.mktemp("store")))
    cache, values, planted = write_cache(root)
    results = {
        reduction.method: reduction
        for reduction in reduce_all(cache, root, [(m, {}) for m in METHODS], num_workers=2)
    }
    return root, cache, values, planted, results


def test_pca_is_that_of_the_training_pairs(reduced):
    _, _, values, planted, results = reduced
    reduction = results["pca"]
    assert reduction.parameters == {"pair_order_seed": 0, "max_rows": 65536}
    train = np.flatnonzero(values["split"] == "train")
    rows = {(values["pair"][row], bool(values["label"][row])): row for row in train}
    pairs = sorted({pair for pair, _ in rows})
    signs_P = pair_order(tuple(f"p{pair}/0" for pair in pairs), 0)
    for site in SITES:
        activations_ND = at_site(values, site).astype(np.float64)
        positive_PD = activations_ND[[rows[pair, True] for pair in pairs]]
        negative_PD = activations_ND[[rows[pair, False] for pair in pairs]]
        want_D = pca_of_pairs(positive_PD - negative_PD, signs_P)
        direction = reduction.direction(site)
        assert direction.norm == pytest.approx(1, abs=1e-6)
        assert abs(cosine(direction.vector_D, want_D)) == pytest.approx(1, abs=1e-6)
        projected_P = (positive_PD - negative_PD) @ direction.unit_D
        assert (projected_P > 0).sum() >= (projected_P < 0).sum()
        all_N = activations_ND[values["split"] == "train"] @ direction.unit_D
        assert direction.sigma == pytest.approx(all_N.std(ddof=0), rel=1e-4)
    for site, mean_D in planted.items():
        direction = reduction.direction(site)
        assert cosine(direction.unit_D, mean_D) > 0.95
        assert direction.scores["pair_accuracy_test"] > 0.9
    assert reduction.best(heads=True) == PLANTED[0]
    assert reduction.best(heads=False) == PLANTED[1]


def test_probes_are_those_of_the_training_rows_and_are_scored_at_logit_zero(reduced):
    _, _, values, _, results = reduced
    reduction = results["probe"]
    assert reduction.parameters == {"l2": 1.0, "max_rows": 65536}
    train = values["split"] == "train"
    for site in SITES:
        activations_ND = at_site(values, site)
        probe = fit_probes(activations_ND[None, train], values["label"][train], l2=1.0)
        direction = reduction.direction(site)
        weights_D = probe.weights_SD[0]
        np.testing.assert_allclose(
            direction.vector_D, weights_D / np.linalg.norm(weights_D), atol=1e-6
        )
        for split in ("validation", "test"):
            chosen = values["split"] == split
            logits_N = activations_ND[chosen] @ weights_D + probe.intercept_S[0]
            want = ((logits_N > 0) == values["label"][chosen]).mean()
            assert direction.scores[f"accuracy_{split}"] == pytest.approx(want)
    assert {reduction.best(heads=True), reduction.best(heads=False)} == set(PLANTED)


def test_pair_accuracy_is_of_the_split_for_every_method(reduced):
    _, _, values, _, results = reduced
    for reduction in results.values():
        for site in SITES:
            direction = reduction.direction(site)
            projected_N = at_site(values, site) @ direction.unit_D
            for split in ("validation", "test"):
                right = [
                    projected_N[(values["pair"] == pair) & values["label"]][0]
                    > projected_N[(values["pair"] == pair) & ~values["label"]][0]
                    for pair in np.unique(values["pair"][values["split"] == split])
                ]
                want = pytest.approx(np.mean(right), abs=1e-9)
                assert direction.scores[f"pair_accuracy_{split}"] == want


@pytest.mark.parametrize("by", ["auroc", "accuracy", "pair_accuracy"])
def test_sites_are_ranked_by_the_score_asked_for(reduced, by):
    reduction = reduced[-1]["probe"]
    rows = reduction.ranked(heads=True, by=by)
    assert len(rows) == LAYERS * HEADS
    keys = [(-row[f"{by}_validation"], -row["cohens_d_validation"]) for row in rows]
    assert keys == sorted(keys)
    assert reduction.best(heads=True, by=by) == Site.parse(rows[0]["site"])


def test_another_sharding_gives_the_same_components(reduced, root):
    _, _, _, _, results = reduced
    # Other pairs lie in different shards.
    cache, _, _ = write_cache(root, rows_per_shard=256)
    other = reduce(cache, root, method="pca", num_workers=2)
    for stream, directions_LW in results["pca"].directions_LW.items():
        np.testing.assert_allclose(other.directions_LW[stream], directions_LW, atol=1e-6)
    assert other.best(heads=True) == PLANTED[0]


SCRIPT = """
import sys
from pipeline.ray_runtime import ray_session
from pipeline.reduction.reduce import reduce
from store.activations import ActivationCache
from store.location import Location
_, url, digest, num_workers = sys.argv
root = Location.open(url)
cache = ActivationCache.open(root, digest)
with ray_session(None, int(num_workers)):
    for method in ("difference_of_means", "paired_difference", "pca", "probe", "lda"):
        reduce(cache, root, method=method, num_workers=int(num_workers))
"""


def test_the_bits_do_not_depend_on_the_number_of_workers(reduced, tmp_path: Path):
    _, cache, _, _, results = reduced
    root = Location.open(str(tmp_path / "store"))
    again, _, _ = write_cache(root)
    assert again.digest == cache.digest
    # A process of its own, for a Ray of its own with fewer workers.
    subprocess.run([sys.executable, "-c", SCRIPT, root.url, cache.digest, "1"], check=True)
    for reduction in results.values():
        other = Reduction.open(root, reduction.digest)
        assert other.scores.equals(reduction.scores)
        for stream, directions_LW in reduction.directions_LW.items():
            assert np.array_equal(other.directions_LW[stream], directions_LW)


def test_training_rows_without_a_partner_are_named(ray_running, root):
    _, whole, _ = write_cache(root)
    first = int(np.flatnonzero(whole["split"] == "train")[0])
    cache, values, _ = write_cache(root, drop=first)
    pair = whole["pair"][first]
    with pytest.raises(InvalidInput) as caught:
        reduce(cache, root, method="pca", num_workers=1)
    assert caught.value.kind == "pair_missing"
    missing = "positive" if whole["label"][first] else "negative"
    assert f"pair 'p{pair}' lacks a {missing} row" in str(caught.value)
    assert f"1 of {(values['split'] == 'train').sum()} rows" in str(caught.value)
    # The other methods need no pairs.
    reduction = reduce(cache, root, method="probe", num_workers=1)
    assert reduction.best(heads=True) == PLANTED[0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [({}, "no column 'pair'"), ({"pair": ["a", "a", "b", "b"]}, "at least 2 training pairs")],
)
def test_too_few_pairs_are_refused_and_have_no_score(ray_running, root, columns, message):
    index = pa.table(
        {
            "label": [True, False, True, False],
            "split": ["train", "train", "validation", "validation"],
            **columns,
        }
    )
    layout = StreamLayout("resid_post", 4, (0,), 3, "float32", 32)
    cache = ActivationCache.create(root, {"layers": [0]}, [layout], index)
    values = np.random.default_rng(0).standard_normal((4, 1, 3)).astype(np.float32)
    cache.write_shard(0, {"resid_post": values})
    cache.seal()
    with pytest.raises(InvalidInput, match=message) as caught:
        reduce(cache, root, method="pca", num_workers=1)
    assert caught.value.kind == "pair_missing"
    reduction = reduce(cache, root, method="difference_of_means", num_workers=1)
    row = reduction.scores.to_pylist()[0]
    assert np.isnan(row["pair_accuracy_test"])
    assert np.isnan(row["pair_accuracy_validation"]) == (not columns)
    assert "pair_accuracy_test" not in reduction.direction(Site("resid_post", 0)).scores
    if not columns:
        with pytest.raises(InvalidInput, match="validation split lacks pairs"):
            reduction.best(heads=False, by="pair_accuracy")


def test_a_digest_says_all_that_changes_a_result():
    capture, other = "0" * 64, "1" * 64
    plain = {"schema_version": 2, "capture": capture, "method": "difference_of_means"}
    digests = [
        reduction_digest(capture, "difference_of_means"),
        reduction_digest(capture, "difference_of_means", extends=[other]),
        reduction_digest(other, "difference_of_means"),
        reduction_digest(capture, "paired_difference"),
        reduction_digest(capture, "pca"),
        reduction_digest(capture, "pca", {"pair_order_seed": 1}),
        reduction_digest(capture, "probe"),
        reduction_digest(capture, "probe", {"l2": 2.0}),
        reduction_digest(capture, "lda"),
        reduction_digest(capture, "lda", {"shrinkage": 0.5}),
    ]
    assert digests[0] == sha256_hex(canonical_json(plain))
    assert len(set(digests)) == len(digests)
    assert reduction_digest(capture, "pca", {"pair_order_seed": 0}) == digests[4]
    assert reduction_digest(capture, "probe", {"l2": 1}) == digests[6]
    with pytest.raises(
        InvalidInput, match="pca has the parameters pair_order_seed, max_rows, got l2"
    ):
        reduction_digest(capture, "pca", {"l2": 1.0})
    with pytest.raises(InvalidInput, match="method must be one of"):
        reduction_digest(capture, "magic")


def test_a_run_file_gives_a_method_its_own_parameters_only():
    assert ReduceSection().parameters("difference_of_means") == {}
    assert ReduceSection(method="pca").parameters("pca") == {
        "pair_order_seed": 0,
        "max_rows": 65536,
    }
    both = ReduceSection(method="pca", compare=["probe"], l2=0.1)
    assert both.methods == ["pca", "probe"]
    assert both.parameters("probe") == {"l2": 0.1, "max_rows": 65536}
    assert both.parameters("pca") == {"pair_order_seed": 0, "max_rows": 65536}
    for fields, message in (
        ({"l2": 1.0}, "l2 is a parameter of probe, which is not computed"),
        ({"method": "pca", "l2": 1.0}, "expected probe as method or under compare"),
        ({"method": "probe", "pair_order_seed": 1}, "a parameter of pca"),
        ({"method": "probe", "shrinkage": 0.5}, "a parameter of lda"),
        ({"method": "probe", "compare": ["probe"]}, "a method is named twice"),
        ({"max_rows": 10}, "max_rows is a parameter of pca and probe and lda"),
        ({"method": "probe", "l2": 0}, "l2"),
        ({"method": "magic"}, "method"),
    ):
        with pytest.raises(ValidationError, match=message):
            ReduceSection(**fields)


def test_an_artifact_of_sparse_components_says_so(reduced, tmp_path):
    _, _, _, _, results = reduced
    model = ModelInfo(tmp_path, "test", "0" * 64, LAYERS, HEADS, HEAD_DIM, 16, 64, "float32")
    section = PublishSection(sites="best_head", keep_fraction=0.5)
    artifact = build_artifact(results["pca"], section, name="test", model=model)
    (item,), whole = artifact.interventions, results["pca"].direction(PLANTED[0])
    kept_D = item.direction.vector_D != 0
    assert kept_D.sum() == HEAD_DIM // 2
    assert np.array_equal(item.direction.vector_D[kept_D], whole.vector_D[kept_D])
    assert item.direction.method == "pca+top_fraction"
    lineage = artifact.manifest.lineage
    assert lineage["parameters"] == {"pair_order_seed": 0, "max_rows": 65536}
    assert lineage["masks"][str(PLANTED[0])][0]["num_kept"] == HEAD_DIM // 2
    whole_section = PublishSection(sites="best_head")
    dense = build_artifact(results["pca"], whole_section, name="test", model=model)
    assert "masks" not in dense.manifest.lineage


def test_a_sign_that_pairs_and_means_disagree_about_is_not_published(ray_running, root, tmp_path):
    differences_PL = np.array([[1, 1], [2, 1], [1, 2], [2, 2], [-100, -1]], np.float32)
    num = len(differences_PL)
    values_NLW = np.zeros((2 * num, 2, 3), np.float32)
    values_NLW[:num, :, 1] = differences_PL
    index = pa.table(
        {
            "pair": [str(pair) for pair in range(num)] * 2,
            "label": [True] * num + [False] * num,
            "split": ["train"] * 2 * num,
        }
    )
    layout = StreamLayout("resid_post", 2 * num, (0, 1), 3, "float32", 32)
    cache = ActivationCache.create(root, {"layers": [0, 1]}, [layout], index)
    cache.write_shard(0, {"resid_post": values_NLW})
    cache.seal()
    reduction = reduce(cache, root, method="pca", num_workers=1)
    # METHODS 3: + is where most pairs are, and not where their mean is.
    np.testing.assert_allclose(reduction.directions_LW["resid_post"], [[0, 1, 0]] * 2, atol=1e-6)
    assert reduction.signs_in_doubt == ("resid_post.0",)
    model = ModelInfo(tmp_path, "test", "0" * 64, 2, 1, 3, 3, 64, "float32")
    build_artifact(reduction, PublishSection(sites=["resid_post.1"]), name="test", model=model)
    section = PublishSection(sites=["resid_post.0", "resid_post.1"])
    with pytest.raises(InvalidInput, match=r"at resid_post\.0 most training pairs") as caught:
        build_artifact(reduction, section, name="test", model=model)
    assert caught.value.kind == "sign_in_doubt"


def test_the_table_never_cuts_a_site_off():
    row = {
        "site": "resid_post.100",
        "norm": 123456.789,
        "auroc_validation": 0.5,
        "auroc_test": 0.5,
        "q_test": 1e-300,
        "accuracy_test": 0.5,
        "cohens_d_test": -12.345,
        "pair_accuracy_test": float("nan"),
    }
    summary = {"method": "pca", "best_layers": [row], "path": "somewhere"}
    summary |= {"best_heads": [], "signs_in_doubt": []}
    code = (
        "import json, sys; from pipeline.cli.batch import print_reduction; "
        "print_reduction(json.loads(sys.argv[1]))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, json.dumps(summary)],
        check=True,
        capture_output=True,
        text=True,
        env={"COLUMNS": "80", "PATH": "/usr/bin:/bin"},
    ).stdout
    assert "resid_post.100" in shown
    assert "1.235e+05" in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
