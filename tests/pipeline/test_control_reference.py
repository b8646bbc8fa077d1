"""`reference_compat` does what the released code does (METHODS 2), its defects included."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from pipeline.config import TrainSection, load_run_file
from pipeline.control.reference import (
    ANSWERS,
    REFUSALS,
    ReferenceTraining,
    embedding_direction,
    reference_loss,
)
from pipeline.control.results import TrainedController, trained_digest
from pipeline.control.rows import read_rows
from pipeline.control.training import Task
from pipeline.errors import InvalidInput, NotFound
from pipeline.extraction.models import load_model, load_tokenizer
from pipeline.extraction.shard_worker import ShardWorker
from pipeline.prompts.plan import plan
from pipeline.reduction.reduce import reduce
from store.activations import ActivationCache
from store.location import Location

LAYERS = 6
NUM = {True: 11, False: 16}
"""Training rows of each class: 11 make two batches of at most 8, and 16 two of 8."""
MakeTask = Callable[..., Task]


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Path:
    return make_model("llama-wide-heads", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def make_task(ray_running: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeTask:
    """A task over a cache of that model's."""
    folder = tmp_path_factory.mktemp("reference")
    root = Location.open(str(folder / "store"))

    def digests(layers: Any) -> tuple[str, str]:
        rows = [
            {"prompt": f"{n}: " + ("captain" if label else "ship") * 3, "label": label}
            | {"split": split}
            for label in (True, False)
            for split, num in (("train", NUM[label]), ("validation", 4), ("test", 4))
            for n in range(num)
        ]
        # A prompt has one split.
        rows = [row | {"prompt": f"{row['split']} {row['prompt']}"} for row in rows]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "run.toml").write_text(
            f'name = "reference"\n[model]\npath = "{model}"\n[prompts]\nfiles = ["rows.jsonl"]\n'
            f'[capture]\nstreams = ["resid_post"]\nlayers = {json.dumps(layers)}\n'
        )
        cache = plan(load_run_file(folder / "run.toml"), root).cache
        worker = ShardWorker(root.url, cache.digest, str(model), "float32", "cpu")
        for shard in cache.missing():
            worker({"shards": [shard]})
        cache.seal()
        return cache.digest, reduce(cache, root, method="difference_of_means", num_workers=1).digest

    every, some = digests("all"), digests([2, 3, 4])

    def make(edits: str = f"resid_post.{LAYERS - 1}", whole: bool = True) -> Task:
        section = TrainSection(
            mode="reference_compat",
            reads=[f"resid_post.{layer}" for layer in range(LAYERS - 4, LAYERS)],
            edits=[edits],
            target="no",
        )
        return Task(root.url, every[0], (every if whole else some)[1], str(model), section, "cpu")

    return make


@pytest.fixture(scope="module")
def trained(make_task: MakeTask) -> tuple[ReferenceTraining, TrainedController]:
    task = make_task()
    training = ReferenceTraining(task)
    training.advance(training.num_steps)
    training.finish()
    digest = trained_digest(task.cache, task.reduction, task.section)
    return training, TrainedController.open(Location.open(task.store_url), digest)


def cache_of(task: Task) -> ActivationCache:
    return ActivationCache.open(Location.open(task.store_url), task.cache)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


@pytest.mark.parametrize("label", [True, False])
def test_the_loss_by_hand(label: bool) -> None:
    random = np.random.default_rng(0)
    logit_B, weight_BI = random.standard_normal(5) * 3, random.standard_normal((5, 7)) * 2
    w = sigmoid(weight_BI)
    want = -np.log(sigmoid(logit_B) if label else 1 - sigmoid(logit_B)).mean()
    if label:
        want += 0.1 * (np.abs(w - 0.5).mean() + 0.01 * w.mean())
    scale, weight = (torch.tensor(a, requires_grad=True) for a in (logit_B, weight_BI))
    loss = reference_loss(scale, weight, label)
    assert loss.item() == pytest.approx(want)
    loss.backward()
    assert scale.grad is not None
    np.testing.assert_allclose(scale.grad.numpy(), (sigmoid(logit_B) - label) / 5, atol=1e-7)
    # Only the regulariser ever reaches the weights, and only on positive batches.
    if label:
        assert weight.grad is not None
        slope = 0.1 * (np.sign(w - 0.5) + 0.01) * w * (1 - w) / w.size
        np.testing.assert_allclose(weight.grad.numpy(), slope, atol=1e-9)
    else:
        assert weight.grad is None


def test_an_epoch_is_every_positive_batch_and_then_every_negative_one(
    make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = ReferenceTraining(make_task())
    seen: list[Any] = []
    inputs = training.inputs
    monkeypatch.setattr(training, "inputs", lambda rows: (seen.append(rows), inputs(rows))[1])
    training.advance(training.num_steps)
    assert len(seen) == training.num_steps == len(training.history) == 10 * (2 + 2)
    assert max(map(len, seen)) <= 8
    label_N, split_N = training.rows.label_N, training.rows.split_N
    for epoch in range(10):
        batches = seen[epoch * 4 : epoch * 4 + 4]
        classes = [set(label_N[rows].tolist()) for rows in batches]
        assert classes == [{True}, {True}, {False}, {False}]
        rows = np.concatenate(batches)
        assert sorted(rows) == sorted(np.flatnonzero(split_N == "train"))
    assert not np.array_equal(seen[0], seen[4])


def test_the_network_is_theirs(trained: Any) -> None:
    training, stored = trained
    assert stored.controller.tensors()["hidden_weight"].shape == (4 * 64, 1024)
    assert not training.network.mean_R.any()
    assert (training.network.std_R == 1).all()
    assert training.network.output.out_features == 1 + LAYERS
    assert [group["lr"] for group in training.optimizer.param_groups] == [5e-5]


def test_only_the_last_layer_is_edited_with_its_own_output(trained: Any) -> None:
    training, stored = trained
    assert [str(direction.site) for direction in stored.directions] == [f"resid_post.{LAYERS - 1}"]
    tensors = stored.controller.tensors()
    want = training.network.output.weight.detach().numpy()[[0, LAYERS]].T
    np.testing.assert_array_equal(tensors["output_weight"], want)


def test_the_scale_is_the_raw_logit(trained: Any, make_task: MakeTask) -> None:
    training, stored = trained
    assert (stored.controller.mode, stored.controller.threshold) == ("reference_compat", 0.0)
    reads = read_rows(cache_of(make_task()), stored.controller.reads).reads_NR
    with torch.no_grad():
        logit_N, weight_NI = training.network(torch.tensor(reads))
    decision = stored.controller.decide(reads)
    np.testing.assert_allclose(decision.scale_B, logit_N.numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        decision.weight_BI[:, 0], sigmoid(weight_NI.numpy()[:, -1]), atol=1e-4
    )
    # No sigmoid: requests to leave alone are pushed the other way.
    label_N = training.rows.label_N
    assert decision.scale_B[~label_N].mean() < 0 < decision.scale_B[label_N].mean()


def test_losses_fall(trained: Any) -> None:
    training, _ = trained
    losses = [row["reference"] for row in training.history]
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])


def test_the_direction_is_a_unit_vector_between_embeddings_of_phrases(
    trained: Any, model: Path
) -> None:
    table = safetensors.numpy.load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    tokenizer = load_tokenizer(model)

    def mean(phrases: tuple[str, ...]) -> Any:
        ids = [
            i for phrase in phrases for i in tokenizer(phrase, add_special_tokens=False).input_ids
        ]
        assert tokenizer.bos_token_id not in ids
        return table[ids].astype(np.float64).mean(axis=0)

    want = mean(REFUSALS) - mean(ANSWERS)
    got = embedding_direction(load_model(model, "float32"), tokenizer)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want / np.linalg.norm(want), atol=1e-5)
    _, stored = trained
    np.testing.assert_array_equal(stored.directions[0].vector_D, got)
    assert stored.directions[0].method == "embedding_difference"
    # A model in bfloat16 has nearly the same.
    half = embedding_direction(load_model(model, "bfloat16"), tokenizer)
    assert float(half @ got) > 0.999


def test_other_edits_are_refused(make_task: MakeTask) -> None:
    with pytest.raises(InvalidInput, match=r"only ever edits the last layer, here 'resid_post\.5'"):
        ReferenceTraining(make_task(edits=f"z.{LAYERS}.0"))


def test_directions_without_the_last_layer_are_refused_before_any_step(make_task: MakeTask) -> None:
    with pytest.raises(NotFound, match=r"no site resid_post\.5"):
        ReferenceTraining(make_task(whole=False))
