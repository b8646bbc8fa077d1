"""Samples: entries of the index that share rows count as often as they are there, and those in
quarantine not at all, for every method.

Shapes: N samples, A array rows, S sites, D width of a site, L layers, W width of a stream.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.control.rows import read_rows
from pipeline.errors import InvalidInput
from pipeline.reduction.directions import difference_of_means
from pipeline.reduction.moment_store import StoredMoments
from pipeline.reduction.moments import Moments
from pipeline.reduction.probes import fit_counted_probes, fit_probes
from pipeline.reduction.reduce import reduce, reduce_all
from pipeline.reduction.results import Reduction
from pipeline.reduction.samples import read_samples
from steering_service.core.site import Site
from store.activations import ActivationCache
from store.layout import StreamLayout
from store.location import Location

METHODS = ("difference_of_means", "paired_difference", "pca", "probe", "lda")
LAYERS, HEADS, HEAD_DIM, PAIRS = 2, 2, 8, 160
SEEDS = st.integers(0, 2**32 - 1)


@given(seed=SEEDS, counts=st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_counted_moments_are_those_of_the_repeated_rows(seed, counts):
    values_NW = np.random.default_rng(seed).standard_normal((len(counts), 3)) + 300
    counts_N = np.array(counts)
    values_NW[counts_N == 0] = np.nan
    got = Moments.of_counted(values_NW, counts_N)
    want = Moments.of(np.repeat(values_NW, counts_N, axis=0))
    assert got.count == want.count
    np.testing.assert_allclose(got.mean, want.mean, rtol=1e-12)
    np.testing.assert_allclose(got.m2, want.m2, rtol=1e-9, atol=1e-9)
    if max(counts) == 1:
        assert np.array_equal(got.mean, want.mean)
        assert np.array_equal(got.m2, want.m2)


@pytest.mark.parametrize("num_rows", [12, 60])
def test_counted_probes_are_those_of_the_repeated_rows(num_rows):
    """With fewer rows than width as well, where the problem is solved in the span of the rows."""
    random = np.random.default_rng(num_rows)
    features_SND = random.standard_normal((3, num_rows, 20)) + 5
    positive_N, negative_N = random.integers(0, 4, (2, num_rows))
    negative_N[positive_N + negative_N == 0] = 1
    got = fit_counted_probes(features_SND, positive_N, negative_N, l2=0.7)
    repeated = np.concatenate(
        [np.repeat(features_SND, counts_N, axis=1) for counts_N in (positive_N, negative_N)], axis=1
    )
    label_N = np.repeat([True, False], [positive_N.sum(), negative_N.sum()])
    want = fit_probes(repeated, label_N, l2=0.7)
    np.testing.assert_allclose(got.weights_SD, want.weights_SD, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(got.intercept_S, want.intercept_S, rtol=1e-6, atol=1e-9)
    positive_N[0] = negative_N[0] = 0
    with pytest.raises(InvalidInput, match="every row must stand for a sample"):
        fit_counted_probes(features_SND, positive_N, negative_N, l2=0.7)


def shared_samples():
    """Index columns and values of a capture of every token: `row` names rows several times.

    A pair is two prompts of three tokens: one that four pairs have in common, one of this pair and
    one of each side, in the order of a trie.
    """
    random = np.random.default_rng(0)
    split_P = random.choice(["train", "validation", "test"], PAIRS, p=[0.6, 0.2, 0.2])
    columns = {"pair": [], "label": [], "split": [], "row": []}
    num_rows = 0
    for pair in range(PAIRS):
        if pair % 4 == 0:
            common, num_rows = num_rows, num_rows + 1
        own = {True: num_rows + 1, False: num_rows + 2}
        for label in (True, False):
            columns["pair"] += [f"p{pair}"] * 3
            columns["label"] += [label] * 3
            columns["split"] += [str(split_P[pair])] * 3
            columns["row"] += [common, num_rows, own[label]]
        num_rows += 3
    order = random.permutation(num_rows)  # so that pairs lie in different shards
    columns["row"] = order[columns["row"]]
    values = {}
    for stream, shape in (("z", (HEADS, HEAD_DIM)), ("resid_post", (1, 16))):
        array = 5 + random.standard_normal((num_rows, LAYERS, *shape))
        labels_A = np.zeros(num_rows)
        for label, row, place in zip(
            columns["label"], columns["row"], range(6 * PAIRS), strict=True
        ):
            if place % 3 == 2:
                labels_A[row] = 1 if label else -1
        axis = np.linalg.qr(random.standard_normal((shape[1], 1)))[0][:, 0]
        size_A = labels_A * (3 + random.standard_normal(num_rows))
        array[:, 1, 0] += size_A[:, None] * axis
        values[stream] = array.reshape(num_rows, LAYERS, -1).astype(np.float32)
    return columns, values


def write_cache(root, columns, values, name, quarantined=(), seal=True):
    num_rows = len(values["z"])
    layouts = [
        StreamLayout(
            stream=stream,
            num_rows=num_rows,
            layers=tuple(range(LAYERS)),
            width=array.shape[2],
            dtype="float32",
            rows_per_shard=32,
            num_heads=HEADS if stream == "z" else None,
        )
        for stream, array in values.items()
    ]
    capture = {"layers": list(range(LAYERS)), "name": name}
    cache = ActivationCache.create(root, capture, layouts, pa.table(columns))
    for shard in range(cache.num_shards):
        rows = layouts[0].shard_rows(shard)
        part = {stream: array[rows.start : rows.stop].copy() for stream, array in values.items()}
        reasons = {row: "poison" for row in quarantined if row in rows}
        for row in reasons:
            for array in part.values():
                array[row - rows.start] = np.nan
        cache.write_shard(shard, part, quarantined=reasons)
    cache.seal()
    return cache


def chosen(columns, keep_N):
    return {name: np.asarray(column)[keep_N] for name, column in columns.items()}


def expanded(columns, values):
    """The same samples, each with a row of its own, in their order."""
    rows = np.asarray(columns["row"])
    alone = {name: column for name, column in columns.items() if name != "row"}
    return alone, {stream: array[rows] for stream, array in values.items()}


@pytest.fixture(scope="module")
def root(ray_running, tmp_path_factory):
    return Location.open(str(tmp_path_factory.mktemp("store")))


def reduced(root, cache):
    found = reduce_all(cache, root, [(method, {}) for method in METHODS], num_workers=2)
    return dict(zip(METHODS, found, strict=True))


def assert_close(got: Reduction, want: Reduction) -> None:
    assert got.counts == want.counts
    for stream, vectors_LW in want.directions_LW.items():
        np.testing.assert_allclose(got.directions_LW[stream], vectors_LW, rtol=1e-4, atol=1e-5)
    for one, other in zip(got.scores.to_pylist(), want.scores.to_pylist(), strict=True):
        assert one.pop("site") == other.pop("site")
        for name in ("histogram_positive", "histogram_negative"):
            # A value at the edge of a bin may fall to either side of it.
            assert np.abs(np.array(one.pop(name)) - other.pop(name)).sum() <= 2
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6, nan_ok=True)


def assert_same(got: Reduction, want: Reduction) -> None:
    assert str(got.scores.to_pylist()) == str(want.scores.to_pylist())
    for stream, vectors_LW in want.directions_LW.items():
        assert np.array_equal(got.directions_LW[stream], vectors_LW)
    assert (got.counts, got.signs_in_doubt) == (want.counts, want.signs_in_doubt)


def test_shared_rows_count_once_for_each_sample(root):
    columns, values = shared_samples()
    assert len(columns["row"]) > len(values["z"])
    shared = reduced(root, write_cache(root, columns, values, "shared"))
    alone = reduced(root, write_cache(root, *expanded(columns, values), "alone"))
    for method in METHODS:
        assert_close(shared[method], alone[method])
        assert shared[method].left_out == 0


def test_rows_named_in_order_change_no_bit(root):
    columns, values = expanded(*shared_samples())
    plain = reduced(root, write_cache(root, columns, values, "without rows"))
    named = columns | {"row": np.arange(len(values["z"]))}
    with_rows = reduced(root, write_cache(root, named, values, "with rows"))
    for method in METHODS:
        assert_same(with_rows[method], plain[method])
        record = plain[method].location.get("reduction.json")
        assert b"left_out" not in record


def test_means_are_those_of_the_training_rows(root):
    columns, values = expanded(*shared_samples())
    cache = write_cache(root, columns, values, "means")
    got = reduce(cache, root, method="difference_of_means", num_workers=2)
    train_A = np.asarray(columns["split"]) == "train"
    label_A = np.asarray(columns["label"])
    for stream, array in values.items():
        positive, negative = (
            Moments.of(array[train_A & (label_A == label)]) for label in (True, False)
        )
        want_LW = difference_of_means(positive, negative)
        np.testing.assert_allclose(got.directions_LW[stream], want_LW, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", ["shared", "alone"])
def test_quarantined_samples_and_their_partners_are_left_out(root, form):
    columns, values = shared_samples()
    if form == "alone":
        columns, values = expanded(columns, values)
        columns["row"] = np.arange(len(values["z"]))
    rows_N, pair_N = np.asarray(columns["row"]), np.asarray(columns["pair"])
    poison = rows_N[[2, 301, 500, 959]].tolist()
    bad_N = np.isin(pair_N, pair_N[np.isin(rows_N, poison)])
    assert 4 * 6 <= bad_N.sum() < 100
    cache = write_cache(root, columns, values, f"poison {form}", quarantined=poison)
    clean = write_cache(root, *expanded(chosen(columns, ~bad_N), values), f"without poison {form}")
    samples = read_samples(cache)
    assert (len(samples), samples.left_out) == ((~bad_N).sum(), bad_N.sum())
    got, want = reduced(root, cache), reduced(root, clean)
    for method in METHODS:
        assert_close(got[method], want[method])
        assert got[method].left_out == bad_N.sum()
        assert Reduction.open(root, got[method].digest).left_out == bad_N.sum()


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_lost_quarantine_gives_no_direction(root, split):
    columns, values = expanded(*shared_samples())
    at = next(n for n, of_row in enumerate(columns["split"]) if of_row == split)
    cache = write_cache(root, columns, values, f"lost {split}", quarantined=[at])
    cache.location.delete(f"_quarantine/{at // 32:08d}.json")
    for method in ("difference_of_means", "pca"):
        with pytest.raises(InvalidInput, match="run `steerage verify`") as caught:
            reduce(cache, root, method=method, num_workers=2)
        assert caught.value.kind == "not_finite"
    if split == "train":
        # Found again, they would stay wrong after the rows were put right.
        assert not StoredMoments.exists(root, cache.digest)
    assert {problem.kind for problem in cache.verify()} == {"quarantine"}


def test_samples_without_a_pair_are_left_out_alone(root):
    columns, values = expanded(*shared_samples())
    for name, pairs in (("null", [None] * len(columns["pair"])), ("no column", None)):
        index = {"label": columns["label"], "split": columns["split"]}
        if pairs is not None:
            index["pair"] = pa.array(pairs, pa.string())
        cache = write_cache(root, index, values, f"unpaired {name}", quarantined=[7, 40])
        assert read_samples(cache).left_out == 2
        got = reduce(cache, root, method="difference_of_means", num_workers=2)
        assert sum(got.counts.values()) == len(values["z"]) - 2


def test_controllers_are_trained_without_quarantined_rows(make_plan):
    rows = [
        {"prompt": f"{n}: which way" + " to the north" * (n % 5), "label": n % 3 == 0}
        for n in range(50)
    ]
    cache = make_plan(rows=rows, capture='streams = ["resid_post"]\ndtype = "float32"\n').cache
    layout = cache.layout("resid_post")
    random = np.random.default_rng(0)
    values = random.standard_normal(layout.shape).astype(np.float32)
    values[[4, 33]] = np.nan
    for shard in range(cache.num_shards):
        at = layout.shard_rows(shard)
        reasons = {row: "poison" for row in (4, 33) if row in at}
        part = {"resid_post": values[at.start : at.stop]}
        cache.write_shard(shard, part, quarantined=reasons)
    cache.seal()
    index = cache.index().to_pylist()
    pairs = {index[row]["pair"] for row in (4, 33)} - {None}
    kept = [e for e in index if e["row"] not in (4, 33) and e["pair"] not in pairs]
    found = read_rows(cache, [Site("resid_post", 1)])
    assert 0 < len(kept) == len(found.label_N) < len(index)
    assert found.label_N.tolist() == [entry["label"] for entry in kept]
    assert found.split_N.tolist() == [entry["split"] for entry in kept]
    np.testing.assert_array_equal(found.reads_NR, values[[entry["row"] for entry in kept], 1])
    assert [len(ids) - 1 for ids in found.token_ids] == [entry["position"] for entry in kept]
    assert [int(ids[-1]) for ids in found.token_ids] == [entry["token_id"] for entry in kept]
