"""The page of a reduction: its figures are those of the table, and what is missing is said."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.reduction.directions import split_heads
from pipeline.reduction.methods import complete_parameters
from pipeline.reduction.results import Reduction
from pipeline.reduction.scores import (
    accuracy,
    auroc,
    benjamini_hochberg,
    bootstrap_auroc,
    cohens_d,
    histograms,
    permutation_p,
)
from pipeline.report.charts import round_ticks
from pipeline.report.reduction_lead import doubts, lead
from pipeline.report.reduction_page import FIGURES, REPORT_FILE, write_reduction_report
from pipeline.report.reduction_sections import Subject, heads_section
from pipeline.report.separability_figures import _runs
from pipeline.report.site_scores import Histogram, SiteScores
from steering_service.core.site import Site
from store.activations import ActivationCache
from store.layout import StreamLayout
from store.location import Location

LAYERS, HEADS, HEAD_DIM, WIDTH, ROWS = 3, 4, 8, 40, 320
PLANTED = (Site("resid_post", 1), Site("z", 2, 3))
OF_TEST = ("auroc_test", "accuracy_test", "cohens_d_test", "pair_accuracy_test")
ADDED = (
    *("auroc_low_test", "auroc_high_test", "p_test", "q_test", "split_half_cosine"),
    *("auroc_random_test", "auroc_shuffled_test"),
    *(f"histogram_{part}" for part in ("start", "stop", "positive", "negative")),
)


def write_cache(
    root: Location,
    *,
    streams: tuple[str, ...] = ("resid_post", "z"),
    splits: tuple[str, ...] = ("train", "validation", "test"),
    num_layers: int = LAYERS,
    rows_per_shard: int = 32,
    num_rows: int = ROWS,
) -> ActivationCache:
    """A cache of noise in which one layer and one head tell the classes apart, but not quite."""
    random = np.random.default_rng(0)
    label_N = np.arange(num_rows) % 2 == 0
    split_N = np.array(splits)[np.arange(num_rows) // 2 % len(splits)]
    values = {}
    for stream in streams:
        width = HEADS * HEAD_DIM if stream == "z" else WIDTH
        values[stream] = 20 + random.standard_normal((num_rows, num_layers, width))
    for site in PLANTED:
        if site.stream in streams and site.layer < num_layers:
            at = site.head or 0
            values[site.stream][label_N, site.layer, at * HEAD_DIM : at * HEAD_DIM + 3] += 1.2
    layouts = [
        StreamLayout(
            stream=stream,
            num_rows=num_rows,
            layers=tuple(range(num_layers)),
            width=array.shape[2],
            dtype="float32",
            rows_per_shard=rows_per_shard,
            rows_per_chunk=32,
            num_heads=HEADS if stream == "z" else None,
        )
        for stream, array in values.items()
    ]
    capture = {
        "model": {"name": "tiny", "fingerprint": "f" * 64, "dtype": "float32"},
        "corpus": "c" * 64,
        "streams": sorted(streams),
        "layers": list(range(num_layers)),
        "tokens": "last",
        "splits": list(splits),
    }
    index = pa.table({"label": label_N, "split": split_N})
    cache = ActivationCache.create(root, capture, layouts, index)
    for shard in range(cache.num_shards):
        rows = layouts[0].shard_rows(shard)
        part = {s: a[rows.start : rows.stop].astype(np.float32) for s, a in values.items()}
        cache.write_shard(shard, part)
    cache.seal()
    return cache


def reduce_by_hand(root: Location, cache: ActivationCache, method: str, **saved: Any) -> Reduction:
    """A difference of means with every column, stored under the name of a method."""
    index = cache.index()
    label_N = index["label"].to_numpy()
    split_N = index["split"].to_numpy(zero_copy_only=False)
    train_N = split_N == "train"
    directions_LW, shuffled_LW, projections, names = {}, {}, [], []
    random = np.random.default_rng(1)
    for stream, layout in cache.streams.items():
        values_NLW = np.stack(
            [
                np.concatenate([v for _, _, v in cache.scan(stream, layers=[layer])])
                for layer in layout.layers
            ],
            axis=1,
        ).astype(np.float64)
        vectors_LW = values_NLW[train_N & label_N].mean(0) - values_NLW[train_N & ~label_N].mean(0)
        if method != "difference_of_means":
            vectors_LW = vectors_LW + 0.1 * random.standard_normal(vectors_LW.shape)
        directions_LW[stream] = vectors_LW.astype(np.float32)
        shuffled_LW[stream] = random.standard_normal(vectors_LW.shape).astype(np.float32)
        unit = split_heads(directions_LW[stream], layout)
        unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
        h = split_heads(values_NLW, layout)
        projections.append(np.einsum("nlhd,lhd->nlh", h, unit).reshape(len(label_N), -1))
        names += [f"{stream}.{layer}" for layer in layout.layers] if stream != "z" else []
        if stream == "z":
            names += [f"z.{layer}.{head}" for layer in layout.layers for head in range(HEADS)]
    values_NS = np.concatenate(projections, axis=1)
    columns: dict[str, Any] = {
        "site": names,
        "norm": np.full(len(names), 2.5),
        "sigma": values_NS[train_N].std(axis=0),
        "activation_norm": np.full(len(names), 130.0),
    }
    threshold_S = values_NS[train_N].mean(axis=0)
    for split in ("validation", "test"):
        held_N = split_N == split
        held_NS, held_label_N = values_NS[held_N], label_N[held_N]
        columns[f"auroc_{split}"] = auroc(held_NS, held_label_N)
        columns[f"accuracy_{split}"] = accuracy(held_NS, held_label_N, threshold_S)
        columns[f"cohens_d_{split}"] = cohens_d(held_NS, held_label_N)
        columns[f"pair_accuracy_{split}"] = np.full(len(names), np.nan)
    test_N = split_N == "test" if (split_N == "test").any() else split_N == "validation"
    test_NS, test_label_N, block_N = values_NS[test_N], label_N[test_N], np.flatnonzero(test_N)
    nothing_S = np.full(len(names), np.nan)
    has_test = bool((split_N == "test").any())
    low_S, high_S = (
        bootstrap_auroc(test_NS, test_label_N, block_N, num=50)
        if has_test
        else (nothing_S, nothing_S)
    )
    p_S = permutation_p(test_NS, test_label_N, block_N) if has_test else nothing_S
    bins = histograms(test_NS, test_label_N)
    columns |= {
        "auroc_low_test": low_S,
        "auroc_high_test": high_S,
        "p_test": p_S,
        "q_test": benjamini_hochberg(p_S),
        "split_half_cosine": np.full(len(names), 0.9),
        "auroc_random_test": np.full(len(names), 0.45) if has_test else nothing_S,
        "auroc_shuffled_test": np.full(len(names), 0.52) if has_test else nothing_S,
        "histogram_start": bins.start_S,
        "histogram_stop": bins.stop_S,
        "histogram_positive": bins.positive_SB.tolist(),
        "histogram_negative": bins.negative_SB.tolist(),
    }
    return Reduction.write(
        root,
        cache=cache,
        method=method,
        parameters=complete_parameters(method),
        directions_LW=directions_LW,
        shuffled_LW=shuffled_LW,
        scores=pa.table(columns),
        counts={
            f"{split}_{name}": int(((split_N == split) & (label_N == label)).sum())
            for split in ("train", "validation", "test")
            for name, label in (("positive", True), ("negative", False))
        },
        **saved,
    )


def subject(reduction: Reduction, **changes: Any) -> Subject:
    fields: dict[str, Any] = {
        "name": "planted",
        "reduction": reduction,
        "others": [],
        "caches": [],
        "corpus_files": ["planted.jsonl"],
        "environment": {"python": "3"},
    }
    return Subject(**fields | changes)


def with_column(reduction: Reduction, **columns: Any) -> Reduction:
    table = reduction.scores
    for name, values in columns.items():
        table = table.set_column(
            table.column_names.index(name), name, pa.array(np.broadcast_to(values, len(table)))
        )
    return dataclasses.replace(reduction, scores=table)


def row_of(reduction: Reduction, site: Site) -> dict[str, Any]:
    return next(row for row in reduction.scores.to_pylist() if row["site"] == str(site))


def text_of(page: str) -> str:
    """What a reader sees."""
    body = page[page.index("<main>") :]
    return re.sub(r"[ \n]+", " ", html.unescape(re.sub(r"<[^>]*>", " ", body)))


@pytest.fixture(scope="module")
def reduced(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Location, ActivationCache, Reduction]:
    root = Location.open(str(tmp_path_factory.mktemp("store")))
    cache = write_cache(root)
    return root, cache, reduce_by_hand(root, cache, "difference_of_means")


@pytest.fixture(scope="module")
def page(reduced: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root, cache, reduction = reduced
    folder = tmp_path_factory.mktemp("page")
    others = [reduce_by_hand(root, cache, "pca"), reduce_by_hand(root, cache, "lda")]
    return folder, write_reduction_report(folder, subject(reduction, others=others, caches=[cache]))


def test_the_lead_has_the_figures_of_the_table(reduced: Any, page: Any) -> None:
    reduction = reduced[2]
    folder, summary = page
    shown = text_of((folder / REPORT_FILE).read_text())
    for key, site in zip(("best_layer", "best_head"), PLANTED, strict=True):
        row = row_of(reduction, site)
        assert summary[key]["site"] == str(site)
        assert summary[key]["auroc"] == row["auroc_test"]
        assert 0.6 < row["auroc_low_test"] < row["auroc_test"] < 1
        assert (
            f"{site} with AUROC {row['auroc_test']:.3f} (95\u00a0% interval "
            f"{row['auroc_low_test']:.3f}–{row['auroc_high_test']:.3f})" in shown
        )
    surviving = sum(
        row["q_test"] < 0.05 for row in reduction.scores.to_pylist() if "z." in row["site"]
    )
    assert summary["heads_surviving"] == surviving < summary["heads"] == LAYERS * HEADS
    assert f"{surviving} of {LAYERS * HEADS} heads" in shown
    # 0.45 tells the classes apart as well as 0.55.
    assert "a random direction reaches 0.55 and one fitted on shuffled labels 0.52" in shown
    assert "have a cosine of 0.90" in shown
    assert f"{sum(reduction.counts[f'train_{c}'] for c in ('positive', 'negative'))} rows" in shown


def test_the_page_needs_nothing_beside_it(page: Any) -> None:
    folder, summary = page
    text = (folder / REPORT_FILE).read_text()
    links = re.findall(r"(?:src|srcset|href|url)\s*=?\s*[\"(]([^\")]*)", text)
    assert len(links) == 4 * len(FIGURES)
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links)
    assert "@import" not in text
    assert "<script" not in text
    alts = re.findall(r'alt="([^"]*)"', text)
    assert len(alts) == len(FIGURES)
    assert all(len(alt) > 40 and "nan" not in alt for alt in alts)
    assert sorted(summary["figures"]) == sorted(str(folder / f"{name}.png") for name in FIGURES)


def test_pictures_lie_beside_the_page_at_twice_the_size(page: Any) -> None:
    folder, _ = page
    for name in FIGURES:
        content = (folder / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        width, _ = struct.unpack(">II", content[16:24])
        assert width == round((4.6 if "cosines" in name else 7.2) * 192)


def test_every_picture_has_its_table(page: Any) -> None:
    text = (page[0] / REPORT_FILE).read_text()
    assert text.count("<details>") == len(FIGURES)
    assert all(text.count(f"<{tag}") == text.count(f"</{tag}>") for tag in ("table", "tr", "td"))


def test_heads_that_do_not_stand_out_are_marked(reduced: Any) -> None:
    reduction = reduced[2]
    q_S = np.where(np.arange(len(reduction.scores)) % 3 == 0, 0.04, 0.05)
    marked = with_column(reduction, q_test=q_S)
    section = heads_section(SiteScores.of(marked))
    assert section.table is not None
    cells = np.array([row[1:] for row in section.table[1]])
    q_LH = q_S[[str(s).startswith("z") for s in SiteScores.of(marked).sites]].reshape(LAYERS, HEADS)
    np.testing.assert_array_equal(np.char.endswith(cells, "*"), q_LH >= 0.05)
    assert f"{int((q_LH >= 0.05).sum())} of {LAYERS * HEADS}" in section.reading


MISSING = {
    "heads, validation": (
        {"streams": ("resid_post",), "splits": ("train", "test")},
        [
            "No heads were captured",
            "The validation split lacks rows of a class, so the best sites were chosen and are "
            "reported on the same test rows",
        ],
        {"heads"},
    ),
    "layers, test": (
        {"streams": ("z",), "splits": ("train", "validation")},
        [
            "No stream with whole layers was captured",
            "there is no cosine between them",
            "reported on the same validation rows",
        ],
        {"layers", "cosines_layers"},
    ),
    "all held-out rows": (
        {"splits": ("train",), "num_layers": 1},
        [
            "Nothing was held out that has rows of both classes",
            "Only one layer was captured",
            "The AUROC is not known, as no rows of both classes were held out",
        ],
        {"layers", "heads", "histograms", "cosines_layers"},
    ),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_said_and_an_earlier_report_replaced(name: str, tmp_path: Path) -> None:
    changes, sentences, not_drawn = MISSING[name]
    root = Location.open(str(tmp_path / "store"))
    cache = write_cache(root, **changes)
    reduction = reduce_by_hand(root, cache, "difference_of_means")
    folder = tmp_path / "page"
    folder.mkdir()
    for file in ("notes.txt", REPORT_FILE, *(f"{figure}.png" for figure in FIGURES)):
        (folder / file).write_text("of an earlier report")
    write_reduction_report(folder, subject(reduction, caches=[cache]))
    shown = text_of((folder / REPORT_FILE).read_text())
    for sentence in [
        *sentences,
        "Only one method, the difference of means, has been computed",
    ]:
        assert sentence in shown
    assert "earlier" not in shown
    assert not re.search(r"\bnan\b|\bNone\b", shown)
    assert {path.name for path in folder.iterdir()} == {
        "notes.txt",
        REPORT_FILE,
        *(f"{figure}.png" for figure in set(FIGURES) - not_drawn - {"cosines_methods"}),
    }


def test_scores_that_were_not_computed_are_said_to_be_missing(reduced: Any, tmp_path: Path) -> None:
    reduction = reduced[2]
    bare = dataclasses.replace(reduction, scores=reduction.scores.drop_columns(list(ADDED)))
    summary = write_reduction_report(tmp_path, subject(bare))
    shown = text_of((tmp_path / REPORT_FILE).read_text())
    for sentence in (
        "Intervals were not computed",
        "Controls were not computed",
        "Which of them stand out from chance was not computed",
        "There are no projections to show",
        "the activations are not in the store",
    ):
        assert sentence in shown
    assert summary["heads_surviving"] is None
    assert not re.search(r"\bnan\b|\bNone\b", shown)


@pytest.mark.parametrize(
    ("columns", "fields", "sentence"),
    [
        ({}, {"left_out": 7}, "7 rows were left out"),
        ({}, {"signs_in_doubt": ("z.0.1",)}, "The sign is in doubt at z.0.1:"),
        (
            {"auroc_low_test": 0.7, "auroc_high_test": 0.9},
            {},
            "Wide interval at resid_post.1: the AUROC may be anything in 0.700–0.900.",
        ),
        ({"auroc_low_test": 1.0, "auroc_high_test": 1.0}, {}, "its interval has no width"),
        ({"q_test": 0.2}, {}, "z.2.3 does not survive the permutation control (q = 0.20)"),
        ({"split_half_cosine": 0.3}, {}, "a cosine of only 0.30"),
        (
            {"auroc_low_test": 0.9, "auroc_random_test": 0.08},
            {},
            "a random direction (0.92) comes about as far as the fitted direction: the "
            "classes differ",
        ),
        (
            {"auroc_low_test": 0.5, "auroc_shuffled_test": 0.6},
            {},
            "one fitted on shuffled labels (0.60) come about as far as the fitted direction: its "
            "AUROC is hardly above chance",
        ),
        ({}, {"counts": {"test_positive": 49}}, "Few test rows: 49 positive and 500 negative."),
        ({}, {"counts": {"train_negative": 9}}, "Few train rows: 500 positive and 9 negative."),
    ],
)
def test_what_is_doubtful_is_said(reduced: Any, columns: Any, fields: Any, sentence: str) -> None:
    sure = {"auroc_low_test": 0.85, "auroc_high_test": 0.93, "q_test": 0.001}
    counts = dict.fromkeys(reduced[2].counts, 500)
    good = dataclasses.replace(with_column(reduced[2], **sure), counts=counts)
    assert doubts(good, SiteScores.of(good)) == []
    changed = with_column(good, **columns)
    changed = dataclasses.replace(changed, **fields | {"counts": counts | fields.get("counts", {})})
    assert any(sentence in doubt for doubt in doubts(changed, SiteScores.of(changed)))


def test_of_many_rows_the_lead_says_how_many_were_scored(reduced: Any) -> None:
    many = dataclasses.replace(reduced[2], counts=dict.fromkeys(reduced[2].counts, 15_000))
    assert "20,000 of 30,000 test rows" in lead(many, SiteScores.of(many))[0]


def test_sites_are_ranked_as_the_reduction_ranks_them(reduced: Any) -> None:
    reduction = reduced[2]
    scores = SiteScores.of(reduction)
    for heads in (False, True):
        want = [row["site"] for row in reduction.ranked(heads=heads)]
        assert [str(scores.sites[n]) for n in scores.ranked(heads=heads)] == want


def test_the_midpoint_is_half_way_between_the_means() -> None:
    edges = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    histogram = Histogram(edges, np.array([0, 0, 1, 1]), np.array([3, 1, 0, 0]))
    # Means 3.0 and 0.75.
    assert histogram.midpoint == pytest.approx(1.875)
    assert np.isnan(Histogram(edges, np.zeros(4, int), np.ones(4, int)).midpoint)


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 9)),
    share=st.floats(0, 1),
)
def test_the_outline_holds_the_chosen_cells_and_no_others(
    seed: int, shape: tuple[int, int], share: float
) -> None:
    chosen_LH = np.random.default_rng(seed).random(shape) < share
    if not chosen_LH.any():
        return
    rows, columns = np.indices(shape)
    centres = np.stack([columns.ravel(), rows.ravel()], axis=1)
    inside = np.zeros(len(centres), bool)
    for part in _runs(chosen_LH).to_polygons():
        from matplotlib.path import Path as Outline

        inside |= Outline(part).contains_points(centres)
    np.testing.assert_array_equal(inside.reshape(shape), chosen_LH)


@given(first=st.integers(0, 90), num=st.integers(1, 130), most=st.integers(2, 26))
def test_ticks_are_few_and_of_the_axis(first: int, num: int, most: int) -> None:
    numbers = list(range(first, first + num))
    ticks = round_ticks(numbers, most)
    assert 1 <= len(ticks) <= most
    assert set(ticks) <= set(numbers)
    assert len(set(np.diff(ticks))) <= 1


STEERAGE = str(Path(sys.executable).with_name("steerage"))


def test_the_command(make_run: Any, tmp_path: Path) -> None:
    """Planning, activations by hand instead of a model's, and two runs of the command."""
    from pipeline.prompts.plan import plan

    make_run(capture='streams = ["resid_post"]')
    from pipeline.config import load_run_file

    run_path, store = tmp_path / "run.toml", tmp_path / "store"
    root = Location.open(str(store))
    cache = plan(load_run_file(run_path), root).cache

    def command() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [STEERAGE, "report", str(run_path), "--out", str(tmp_path / "out"), "--json"],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "STEERAGE_STORE": str(store)},
        )

    refused = command()
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "run `steerage reduce` on the same run file first" in refused.stderr
    assert not (tmp_path / "out").exists()

    random = np.random.default_rng(0)
    label_N = cache.index()["label"].to_numpy()
    (layout,) = cache.streams.values()
    for shard in range(cache.num_shards):
        rows = layout.shard_rows(shard)
        values = random.standard_normal((len(rows), len(layout.layers), layout.width))
        values += label_N[rows.start : rows.stop, None, None]
        cache.write_shard(shard, {"resid_post": values.astype(np.float32)})
    cache.seal()
    reduce_by_hand(root, cache, "difference_of_means")
    reduce_by_hand(root, cache, "probe")
    done = command()
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["compared_with"] == ["probe"]
    assert summary["heads"] == 0
    assert summary["best_head"] is None
    shown = text_of(Path(summary["report"]).read_text())
    assert "pairs.jsonl" in shown
    assert "5\u00a0% of them" in shown
    assert "of the norm and an AUROC of" in shown
