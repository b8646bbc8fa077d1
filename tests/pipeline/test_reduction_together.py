"""Reductions of several methods and of several caches: what belongs to one is found in the other.

Shapes: N rows, P pairs, L layers, W width, D width of a site.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import PublishSection
from pipeline.errors import InvalidInput
from pipeline.extraction.models import ModelInfo
from pipeline.reduction.artifacts import build_artifact
from pipeline.reduction.methods import DEFAULT_PARAMETERS
from pipeline.reduction.reduce import reduce, reduce_all
from pipeline.reduction.results import Reduction
from pipeline.reduction.scores import auroc
from steering_service.core.site import Site
from store.activations import ActivationCache
from store.layout import StreamLayout
from store.location import Location

METHODS = tuple(DEFAULT_PARAMETERS)
LAYERS, HEADS, HEAD_DIM, WIDTH, PAIRS = 3, 2, 8, 16, 240
PLANTED = (Site("z", 1, 1), Site("resid_post", 2))


def make_rows(seed: int, num_pairs: int):
    """Index columns and values: the sides of a pair differ at the planted sites, along one axis."""
    axes = {
        site: np.random.default_rng(layer).standard_normal(HEAD_DIM if site.head else WIDTH)
        for layer, site in enumerate(PLANTED)
    }
    random = np.random.default_rng(seed)
    label_N = np.tile([True, False], num_pairs)
    columns = {
        "pair": [f"{seed}/{n // 2}" for n in range(2 * num_pairs)],
        "label": label_N,
        "split": np.repeat(random.choice(["train", "validation", "test"], num_pairs), 2),
    }
    values = {}
    for stream, shape in (("z", (HEADS, HEAD_DIM)), ("resid_post", (1, WIDTH))):
        array = 20 + random.standard_normal((2 * num_pairs, LAYERS, *shape))
        for site, axis_D in axes.items():
            if site.stream == stream:
                array[label_N, site.layer, site.head or 0] += 3 * axis_D / np.linalg.norm(axis_D)
        values[stream] = array.reshape(2 * num_pairs, LAYERS, -1).astype(np.float32)
    return columns, values


def write_cache(root, name, columns, values, **capture):
    layouts = [
        StreamLayout(
            stream=stream,
            num_rows=len(array),
            layers=tuple(range(LAYERS)),
            width=array.shape[2],
            dtype="float32",
            rows_per_shard=64,
            num_heads=HEADS if stream == "z" else None,
        )
        for stream, array in values.items()
    ]
    capture = {"layers": list(range(LAYERS)), "name": name, "model": {"name": "m"}} | capture
    cache = ActivationCache.create(root, capture, layouts, pa.table(columns))
    for shard in range(cache.num_shards):
        rows = layouts[0].shard_rows(shard)
        cache.write_shard(shard, {k: a[rows.start : rows.stop] for k, a in values.items()})
    cache.seal()
    return cache


def joined(*parts):
    columns = {name: np.concatenate([c[name] for c, _ in parts]) for name in parts[0][0]}
    values = {name: np.concatenate([v[name] for _, v in parts]) for name in parts[0][1]}
    return columns, values


@pytest.fixture(scope="module")
def root(ray_running, tmp_path_factory):
    return Location.open(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def together(root):
    columns, values = make_rows(0, PAIRS)
    cache = write_cache(root, "together", columns, values)
    found = reduce_all(cache, root, [(method, {}) for method in METHODS], num_workers=2)
    return cache, columns, values, dict(zip(METHODS, found, strict=True))


def test_methods_together_give_the_bits_that_each_gives_alone(together, tmp_path):
    _, columns, values, found = together
    alone_root = Location.open(str(tmp_path / "store"))
    cache = write_cache(alone_root, "together", columns, values)
    for method in METHODS:
        alone = reduce(cache, alone_root, method=method, num_workers=2)
        assert alone.digest == found[method].digest
        assert str(alone.scores.to_pylist()) == str(found[method].scores.to_pylist())
        for stream, vectors_LW in alone.directions_LW.items():
            assert np.array_equal(vectors_LW, found[method].directions_LW[stream])


def test_methods_agree_where_the_classes_differ_along_one_axis(together):
    """METHODS 3: a difference of means and the component of shuffled pairs are one direction; with
    noise that is the same in every dimension, so are those that weigh it."""
    *_, found = together
    for site in PLANTED:
        units = {method: found[method].direction(site).unit_D for method in METHODS}
        for method, unit_D in units.items():
            assert unit_D @ units["difference_of_means"] > 0.9, (site, method)
        np.testing.assert_allclose(
            found["paired_difference"].direction(site).vector_D,
            found["difference_of_means"].direction(site).vector_D,
            rtol=1e-5,
            atol=1e-6,
        )
        for method in ("pca", "probe", "lda"):
            assert found[method].direction(site).norm == pytest.approx(1, abs=1e-6)


def test_what_is_planted_survives_the_controls_and_nothing_else_does(together):
    *_, found = together
    for method, reduction in found.items():
        for row in reduction.scores.to_pylist():
            planted = Site.parse(row["site"]) in PLANTED
            assert (row["q_test"] < 0.001) == planted, (method, row)
            assert row["auroc_low_test"] <= row["auroc_test"] <= row["auroc_high_test"]
            assert (row["auroc_low_test"] > 0.9) == planted
            if planted:
                least = 0.8 if method == "difference_of_means" else 0.5
                assert row["split_half_cosine"] > least, method
            # Controls know nothing of the classes; the shuffled one is along what varies most.
            assert row["auroc_random_test"] < 0.97 * row["auroc_test"] or not planted
            num_test = reduction.counts["test_positive"], reduction.counts["test_negative"]
            assert (sum(row["histogram_positive"]), sum(row["histogram_negative"])) == num_test


def test_controls_have_the_norm_of_the_direction_and_their_scores(together):
    _, columns, values, found = together
    test_N = columns["split"] == "test"
    for reduction in found.values():
        rows = {row["site"]: row for row in reduction.scores.to_pylist()}
        for site in PLANTED:
            direction = reduction.direction(site)
            activations_ND = values[site.stream][test_N, site.layer]
            if site.head is not None:
                activations_ND = activations_ND[:, site.head * HEAD_DIM :][:, :HEAD_DIM]
            for kind in ("random", "shuffled"):
                control = reduction.control(site, kind)
                assert control.norm == pytest.approx(direction.norm, rel=1e-5)
                want = auroc((activations_ND @ control.unit_D)[:, None], columns["label"][test_N])
                assert rows[str(site)][f"auroc_{kind}_test"] == pytest.approx(want[0], abs=1e-3)
            other = reduction.control(site, "random", seed=1)
            assert abs(other.unit_D @ reduction.control(site, "random").unit_D) < 0.95
            assert other.lineage["control"] == "random"


def test_a_cache_that_extends_another_gives_what_one_of_all_rows_gives(root):
    old, new = make_rows(1, 150), make_rows(2, 90)
    before, after = write_cache(root, "before", *old), write_cache(root, "after", *new)
    whole = write_cache(root, "whole", *joined(old, new))
    methods = ("difference_of_means", "paired_difference", "probe", "lda")
    requests = [(method, {}) for method in methods]
    got = reduce_all(after, root, requests, num_workers=2, extends=[before])
    want = reduce_all(whole, root, requests, num_workers=2)
    for one, other in zip(got, want, strict=True):
        assert one.counts == other.counts
        assert (one.capture_digest, one.extends) == (after.digest, (before.digest,))
        for stream, vectors_LW in other.directions_LW.items():
            np.testing.assert_allclose(one.directions_LW[stream], vectors_LW, rtol=1e-4, atol=1e-5)
        for name in ("sigma", "activation_norm", "auroc_test", "accuracy_test", "cohens_d_test"):
            np.testing.assert_allclose(one.scores[name], other.scores[name], rtol=1e-4, atol=1e-6)
    alone = reduce(after, root, method="difference_of_means", num_workers=2)
    assert alone.digest != got[0].digest


def test_what_was_counted_before_is_not_read_again_for_moments(root):
    old, new = make_rows(3, 100), make_rows(4, 100)
    # Training rows alone: nothing is held out that scores would read.
    for columns, _ in (old, new):
        columns["split"] = np.full(200, "train")
    before, after = write_cache(root, "counted", *old), write_cache(root, "appended", *new)
    reduce(before, root, method="difference_of_means", num_workers=2)
    steps = []
    reduce(
        after,
        root,
        method="difference_of_means",
        num_workers=2,
        extends=[before],
        on_progress=lambda done, total: steps.append((done, total)),
    )
    fresh = []
    reduce(
        after,
        root,
        method="paired_difference",
        num_workers=2,
        on_progress=lambda done, total: fresh.append((done, total)),
    )
    num_layers = 2 * LAYERS
    # By then the Moments of both are in the store.
    assert fresh[-1] == (num_layers, num_layers)
    assert steps[-1][0] == steps[-1][1] > num_layers


def test_caches_of_different_models_do_not_extend_each_other(root):
    rows = make_rows(5, 20)
    one = write_cache(root, "one", *rows)
    other = write_cache(root, "other", *rows, model={"name": "another"})
    with pytest.raises(InvalidInput, match="model differs, .*'m'.* got .*another") as caught:
        reduce(one, root, method="difference_of_means", num_workers=2, extends=[other])
    assert caught.value.kind == "sources_differ"


def test_no_row_counts_twice(root):
    rows = make_rows(7, 20)
    one, other = write_cache(root, "seven", *rows), write_cache(root, "eight", *make_rows(8, 20))
    for extends in ([one], [other, other]):
        with pytest.raises(InvalidInput, match="would count twice") as caught:
            reduce(one, root, method="difference_of_means", num_workers=2, extends=extends)
        assert caught.value.kind == "sources_repeated"
    with pytest.raises(InvalidInput, match="a method is named twice"):
        reduce_all(one, root, [("probe", {"l2": 1.0}), ("probe", {"l2": 2.0})], num_workers=2)


def test_a_stream_more_is_a_difference(root):
    columns, values = make_rows(9, 20)
    less = write_cache(root, "less", columns, {"z": values["z"]})
    more = write_cache(root, "more", columns, values)
    for one, other in ((less, more), (more, less)):
        with pytest.raises(InvalidInput, match="the shape of resid_post differs"):
            reduce(one, root, method="difference_of_means", num_workers=2, extends=[other])


def test_a_pair_may_be_all_that_is_added(root):
    """Pairs are enough if there are enough of all captures."""
    before = write_cache(root, "many pairs", *make_rows(10, 60))
    columns, values = make_rows(11, 2)
    columns["split"] = np.array(["train", "train", "test", "test"])
    after = write_cache(root, "one pair more", columns, values)
    found = reduce(after, root, method="pca", num_workers=2, extends=[before])
    assert found.counts["train_positive"] > 1
    with pytest.raises(InvalidInput, match="needs at least 2 training pairs, got 1"):
        reduce(after, root, method="pca", num_workers=2)


def test_halves_that_cannot_be_fitted_do_not_stop_the_whole(root):
    """Nine rows a half cannot tell a covariance of width 16; eighteen can."""
    columns, values = make_rows(12, 9)
    columns["split"] = np.full(18, "train")
    cache = write_cache(root, "few", columns, {"resid_post": values["resid_post"]})
    found = reduce(cache, root, method="lda", parameters={"shrinkage": 0.0}, num_workers=2)
    assert np.isnan(found.scores["split_half_cosine"].to_numpy()).all()
    assert found.direction(Site("resid_post", 2)).norm == pytest.approx(1, abs=1e-6)


def test_a_probe_of_fewer_rows_is_of_whole_pairs(together, root):
    cache, _, _, found = together
    some = reduce(cache, root, method="probe", parameters={"max_rows": 60}, num_workers=2)
    assert some.digest != found["probe"].digest
    assert some.best(heads=True) == PLANTED[0]
    all_of_them = reduce(cache, root, method="probe", parameters={"max_rows": 480}, num_workers=2)
    for stream, vectors_LW in found["probe"].directions_LW.items():
        assert np.array_equal(all_of_them.directions_LW[stream], vectors_LW)
        assert not np.allclose(some.directions_LW[stream], vectors_LW, atol=1e-3)


MODEL = ("test", "0" * 64, LAYERS, HEADS, HEAD_DIM, WIDTH, 64, "float32")
SITES = [str(site) for site in PLANTED]


def published(reduction: Reduction, tmp_path, behaviours=(), **section):
    return build_artifact(
        reduction,
        PublishSection(sites=SITES, **section),
        name="test",
        model=ModelInfo(tmp_path, *MODEL),
        behaviours=behaviours,
    )


@pytest.mark.parametrize("keep_over", ["site", "all"])
@pytest.mark.parametrize("keep_by", ["magnitude", "t"])
def test_an_artifact_keeps_the_entries_that_it_is_asked_to(together, tmp_path, keep_by, keep_over):
    _, columns, values, found = together
    reduction = found["difference_of_means"]
    artifact = published(
        reduction, tmp_path, keep_fraction=0.25, keep_by=keep_by, keep_over=keep_over
    )
    kept = {item.site: np.flatnonzero(item.direction.vector_D) for item in artifact.interventions}
    if keep_over == "all":
        assert sum(map(len, kept.values())) == int(0.25 * (HEAD_DIM + WIDTH))
        return
    assert [len(kept[site]) for site in PLANTED] == [HEAD_DIM // 4, WIDTH // 4]
    train_N = columns["split"] == "train"
    for site in PLANTED:
        size_D = np.abs(reduction.direction(site).vector_D.astype(np.float64))
        if keep_by == "t":
            layer_ND = values[site.stream][train_N, site.layer].astype(np.float64)
            if site.head is not None:
                layer_ND = layer_ND[:, site.head * HEAD_DIM :][:, :HEAD_DIM]
            sides = [layer_ND[columns["label"][train_N] == side] for side in (True, False)]
            size_D = size_D / np.sqrt(sum(side.var(axis=0, ddof=1) / len(side) for side in sides))
        assert set(kept[site]) == set(np.argsort(-size_D)[: len(kept[site])])


def test_norms_are_matched_over_behaviours(together, root, tmp_path):
    """CAA's normalisation: the mean norm of all behaviours at the site."""
    *_, found = together
    columns, values = make_rows(6, PAIRS)
    larger = {stream: 20 + 4 * (array - 20) for stream, array in values.items()}
    other = reduce(
        write_cache(root, "larger", columns, larger),
        root,
        method="difference_of_means",
        num_workers=2,
    )
    reduction = found["difference_of_means"]
    artifact = published(reduction, tmp_path, behaviours=[other])
    for item in artifact.interventions:
        norms = [one.direction(item.site).norm for one in (reduction, other)]
        assert norms[1] > 3 * norms[0]
        assert item.direction.norm == pytest.approx(np.mean(norms), rel=1e-5)
    assert artifact.manifest.lineage["norm_of"] == [other.digest]
