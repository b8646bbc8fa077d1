"""Training of a `gated` controller on a slice of the pocket data, with the pocket model."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import PublishSection, load_run_file
from pipeline.control.gated import GatedTraining
from pipeline.control.network import best_threshold
from pipeline.control.results import TrainedController, trained_digest
from pipeline.control.rows import read_rows
from pipeline.control.train import train
from pipeline.control.training import Task
from pipeline.errors import InvalidInput, NotFound
from pipeline.extraction.models import load_model, load_tokenizer
from pipeline.extraction.shard_worker import ShardWorker
from pipeline.prompts.plan import Plan, plan
from pipeline.reduction.reduce import reduce
from pipeline.reduction.results import Reduction
from pipeline.reduction.scores import auroc
from steering_service.adapters.transformers import steered
from store.activations import ActivationCache
from store.location import Location

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES / "pocket_model" / "model"
SECTION = """
[train]
reads = ["resid_post.3", "z.4.1"]
edits = ["resid_post.4", "resid_post.5"]
directions = "plain.toml"
target = "I can't help with that."
batch = 16
gate_steps = 40
outcome_steps = 20
"""
EACH = {"train": 24, "validation": 10, "test": 8}
"""Prompts taken of every file and class."""


@dataclass(frozen=True)
class Bench:
    """A store with a finished cache and directions."""

    folder: Path
    reduction: Reduction
    planned: Plan
    section: Any

    @property
    def root(self) -> Location:
        return Location.open(str(self.folder / "store"))

    @property
    def cache(self) -> ActivationCache:
        return self.planned.cache

    def task(self, **settings: Any) -> Task:
        section = self.section.model_copy(update=settings)
        return Task(
            self.root.url, self.cache.digest, self.reduction.digest, str(MODEL), section, "cpu"
        )

    def trained(self, task: Task) -> TrainedController:
        """Train in this process, without Ray."""
        training = GatedTraining(task)
        training.advance(training.num_steps)
        training.finish()
        return TrainedController.open(self.root, trained_digest(*self.key(task)))

    def key(self, task: Task) -> tuple[str, str, Any]:
        return task.cache, task.reduction, task.section

    def losses(self, trained: TrainedController) -> list[dict[str, float]]:
        lines = trained.location.get("losses.jsonl").decode().splitlines()
        return [json.loads(line) for line in lines]


def pocket(*names: str, split: Any = lambda row: row["split"]) -> list[dict[str, Any]]:
    """The first prompts of every class and split of some files."""
    rows = []
    for name in names:
        taken: Counter[Any] = Counter()
        for line in (EXAMPLES / "pocket_data" / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            taken[row["split"], row["label"]] += 1
            if taken[row["split"], row["label"]] <= EACH.get(row["split"], 0):
                rows.append(row | {"split": split(row)})
    return rows


def write_run(folder: Path, name: str, rows: list[dict[str, Any]], section: str) -> Path:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / f"{name}.toml"
    path.write_text(
        f'name = "{name}"\n[model]\npath = "{MODEL}"\ndtype = "float32"\n'
        f'[prompts]\nfiles = ["{name}.jsonl"]\n[capture]\nstreams = ["resid_post", "z"]\n{section}'
    )
    return path


def extracted(run: Path, root: Location) -> Plan:
    planned = plan(load_run_file(run), root)
    worker = ShardWorker(root.url, planned.cache.digest, str(MODEL), "float32", "cpu")
    for shard in planned.cache.missing():
        worker({"shards": [shard]})
    planned.cache.seal()
    return planned


@pytest.fixture(scope="module")
def bench(ray_running: None, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("control")
    root = Location.open(str(folder / "store"))
    plain = extracted(write_run(folder, "plain", pocket("refusal"), ""), root)
    reduction = reduce(plain.cache, root, method="difference_of_means", num_workers=1)
    mixed = pocket("refusal", "jailbreaks", "lookalikes")
    run = write_run(folder, "mixed", mixed, SECTION)
    return Bench(folder, reduction, extracted(run, root), load_run_file(run).train)


@pytest.fixture(scope="module")
def outcome(bench: Bench) -> TrainedController:
    """Trained through Ray, as a user's is."""
    steps: list[int] = []
    trained = train(
        bench.cache,
        bench.reduction,
        bench.root,
        bench.section,
        model_path=MODEL,
        on_progress=lambda progress: steps.append(progress.step),
    )
    assert steps == [10, 20, 30, 40, 50, 60]
    return trained


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that would start an actor."""
    monkeypatch.setattr("ray.remote", lambda *_, **__: pytest.fail("Ray was used"))


def test_the_gates_loss_falls_and_alone_it_leaves_the_weights_at_one_half(bench: Bench) -> None:
    trained = bench.trained(bench.task(outcome_steps=0))
    gate = [row["gate"] for row in bench.losses(trained)]
    assert len(gate) == 40
    assert gate[0] > 0.3
    assert max(gate[-5:]) < 0.1
    reads = read_rows(bench.cache, trained.controller.reads).reads_NR
    assert (trained.controller.decide(reads).weight_BI == 0.5).all()
    assert trained.scores["weight_resid_post.4"] == trained.scores["weight_resid_post.5"] == 0.5


def test_outcomes_move_the_weights(bench: Bench, outcome: TrainedController) -> None:
    losses = bench.losses(outcome)
    assert [row["step"] for row in losses] == list(range(1, 61))
    assert set(losses[39]) == {"gate", "step"}
    assert set(losses[40]) == {"target", "keep", "cost", "step"}
    weights = [outcome.scores[f"weight_resid_post.{layer}"] for layer in (4, 5)]
    assert max(abs(weight - 0.5) for weight in weights) > 0.1
    assert np.mean([row["target"] for row in losses[-5:]]) < losses[40]["target"] - 0.05


def test_outcomes_leave_the_gate_as_it_is(bench: Bench, outcome: TrainedController) -> None:
    alone = bench.trained(bench.task(outcome_steps=0))
    before, after = alone.controller.tensors(), outcome.controller.tensors()
    for name in ("hidden_weight", "hidden_bias"):
        np.testing.assert_array_equal(before[name], after[name])
    np.testing.assert_array_equal(before["output_weight"][:, 0], after["output_weight"][:, 0])
    assert before["output_bias"][0] == after["output_bias"][0]
    assert (after["output_weight"][:, 1:] != 0).any()
    assert alone.controller.threshold == outcome.controller.threshold


def test_gradients_are_clipped_by_what_trains(bench: Bench) -> None:
    """What the gate's last step has left must not count once the gate stays as it is."""
    training = GatedTraining(bench.task(gate_steps=2, outcome_steps=1))
    training.advance(2)
    training.network.hidden.weight.grad = torch.full_like(training.network.hidden.weight, 1e6)
    training.advance(1)
    assert training.network.hidden.weight.grad is None
    found = training.network.output.weight.grad
    assert found is not None
    assert found[1:].norm() > 1e-3
    assert not found[0].any()


def test_a_stored_controller_is_what_was_asked_for(
    bench: Bench, outcome: TrainedController
) -> None:
    assert outcome.digest == trained_digest(
        bench.cache.digest, bench.reduction.digest, bench.section
    )
    controller = outcome.controller
    assert [str(site) for site in controller.reads] == ["resid_post.3", "z.4.1"]
    assert (controller.mode, controller.read_width) == ("gated", 256 + 32)
    for direction, site in zip(outcome.directions, bench.section.edits, strict=True):
        assert str(direction.site) == site
        fitted = bench.reduction.direction(direction.site)
        np.testing.assert_array_equal(direction.vector_D, fitted.vector_D)
        assert direction.activation_norm == fitted.activation_norm
    artifact = outcome.artifact(
        PublishSection(min_strength=0, max_strength=1), name="gated", model=bench.planned.model
    )
    assert artifact.manifest.parents == [bench.cache.digest, bench.reduction.digest]
    assert artifact.manifest.lineage["controller"] == outcome.digest


def test_scores_and_threshold_are_of_held_out_rows(
    bench: Bench, outcome: TrainedController
) -> None:
    rows = read_rows(bench.cache, outcome.controller.reads)
    decision = outcome.controller.decide(rows.reads_NR)
    for split in ("validation", "test"):
        chosen = rows.split_N == split
        area = auroc(decision.logit_B[chosen][:, None], rows.label_N[chosen])[0]
        assert outcome.scores[f"gate_auroc_{split}"] == pytest.approx(area, abs=0.01)
        assert area > 0.9
    validation = rows.split_N == "validation"
    right = (decision.scale_B > 0) == rows.label_N
    assert right[validation].mean() > 0.9
    steered_N = (rows.split_N == "train") & rows.label_N
    for number, layer in enumerate((4, 5)):
        want = decision.weight_BI[steered_N, number].mean()
        assert outcome.scores[f"weight_resid_post.{layer}"] == pytest.approx(want, abs=1e-4)


def test_a_second_call_finds_it_without_ray(
    bench: Bench, outcome: TrainedController, no_ray: None
) -> None:
    again = train(bench.cache, bench.reduction, bench.root, bench.section, model_path=MODEL)
    assert again.digest == outcome.digest
    for name, tensor in again.controller.tensors().items():
        np.testing.assert_array_equal(tensor, outcome.controller.tensors()[name])


def test_trained_again_in_another_store_it_has_the_same_bytes(
    bench: Bench, outcome: TrainedController, tmp_path: Path
) -> None:
    """One by Ray, one in this process."""
    shutil.copytree(
        bench.folder / "store",
        tmp_path / "store",
        ignore=shutil.ignore_patterns("controllers"),
    )
    other = replace(bench, folder=tmp_path)
    again = other.trained(other.task())
    assert again.digest == outcome.digest
    for name in ("controller.safetensors", "controller.json", "losses.jsonl"):
        assert again.location.get(name) == outcome.location.get(name), name


def test_each_score_is_of_its_own_split(bench: Bench) -> None:
    """A gate that has learnt nothing yet, so that the splits' scores lie apart."""
    trained = bench.trained(bench.task(gate_steps=1, outcome_steps=0, learning_rate=1e-9))
    rows = read_rows(bench.cache, trained.controller.reads)
    logit_N = trained.controller.decide(rows.reads_NR).logit_B
    areas = {}
    for split in ("train", "validation", "test"):
        chosen = rows.split_N == split
        areas[split] = auroc(logit_N[chosen][:, None], rows.label_N[chosen])[0]
    assert min(abs(areas["train"] - areas[split]) for split in ("validation", "test")) > 0.01
    assert abs(areas["validation"] - areas["test"]) > 0.01
    for split in ("validation", "test"):
        assert trained.scores[f"gate_auroc_{split}"] == pytest.approx(areas[split], abs=2e-3)
    chosen = rows.split_N == "validation"
    want = best_threshold(logit_N[chosen], rows.label_N[chosen])
    assert trained.controller.threshold == pytest.approx(want, abs=1e-4)
    train_N = rows.split_N == "train"
    other = best_threshold(logit_N[train_N], rows.label_N[train_N])
    assert other != pytest.approx(want, abs=1e-4)


def test_settings_change_the_name_and_the_directions_file_does_not(bench: Bench) -> None:
    name = trained_digest(*bench.key(bench.task()))
    assert trained_digest(*bench.key(bench.task(directions=Path("other.toml")))) == name
    for changed in ({"seed": 1}, {"strength": 0.5}, {"cost_weight": 0.0}, {"target": "No."}):
        assert trained_digest(*bench.key(bench.task(**changed))) != name


def test_it_restores_refusals_and_leaves_the_rest_alone(
    bench: Bench, outcome: TrainedController
) -> None:
    rows = read_rows(bench.cache, outcome.controller.reads)
    model: Any = load_model(MODEL, "float32")
    target = load_tokenizer(MODEL)(bench.section.target, add_special_tokens=False)["input_ids"]
    artifact = outcome.artifact(
        PublishSection(min_strength=0, max_strength=1), name="gated", model=bench.planned.model
    )

    def answer(row: int) -> list[int]:
        prompt = torch.from_numpy(rows.token_ids[row])[None]
        ids = model.generate(prompt, max_new_tokens=len(target), do_sample=False, pad_token_id=0)
        return list(ids[0, prompt.shape[1] :].tolist())

    harmful, benign = (rows.chosen("test", label)[:8] for label in (True, False))
    plain = {int(row): answer(row) for row in (*harmful, *benign)}
    with steered(model, artifact, 1.0) as steering:
        guarded = {}
        for row in plain:
            guarded[row] = answer(row)
            assert steering.decision is not None
            if steering.decision.scale_B[0] == 0:
                assert guarded[row] == plain[row]
    refused = [sum(answers[int(row)] == target for row in harmful) for answers in (plain, guarded)]
    assert refused[1] > refused[0]
    assert sum(guarded[int(row)] == plain[int(row)] for row in benign) >= 7


def test_a_class_without_training_rows_is_said_through_ray(bench: Bench) -> None:
    rows = pocket("refusal", split=lambda row: "train" if row["label"] else "validation")
    run = write_run(bench.folder, "one-class", rows, SECTION)
    cache = extracted(run, bench.root).cache
    with pytest.raises(InvalidInput, match="no negative row in the training split") as raised:
        train(cache, bench.reduction, bench.root, bench.section, model_path=MODEL)
    assert raised.value.kind == "class_empty"


def test_without_validation_rows_scores_are_left_out(bench: Bench) -> None:
    run = write_run(bench.folder, "all-train", pocket("refusal", split=lambda _: "train"), SECTION)
    other = replace(bench, planned=extracted(run, bench.root))
    trained = other.trained(other.task(gate_steps=3, outcome_steps=0))
    assert set(trained.scores) == {"threshold", "weight_resid_post.4", "weight_resid_post.5"}
    assert trained.controller.threshold == 0.5
    assert "NaN" not in trained.location.get("controller.json").decode()


def test_losses_that_diverge_stop_it(bench: Bench) -> None:
    training = GatedTraining(bench.task(learning_rate=1e30))
    with pytest.raises(InvalidInput, match=r"lower\s+train.learning_rate") as raised:
        training.advance(40)
    assert raised.value.kind == "train_diverged"


def test_a_direction_that_is_missing_or_of_doubtful_sign_is_refused_before_any_step(
    bench: Bench, tmp_path: Path
) -> None:
    with pytest.raises(NotFound, match=r"no site resid_post\.9"):
        GatedTraining(bench.task(edits=["resid_post.9"]))
    shutil.copytree(bench.folder / "store", tmp_path / "store")
    record = tmp_path / "store" / "reductions" / bench.reduction.digest / "reduction.json"
    values = json.loads(record.read_text()) | {"signs_in_doubt": ["resid_post.5", "z.0.0"]}
    record.write_text(json.dumps(values))
    with pytest.raises(InvalidInput, match=r"sign .* at resid_post\.5;") as raised:
        GatedTraining(replace(bench, folder=tmp_path).task())
    assert raised.value.kind == "sign_in_doubt"


def test_directions_of_another_model_are_refused_at_once(bench: Bench, no_ray: None) -> None:
    model = dict(bench.reduction.capture["model"]) | {"fingerprint": "f" * 64}
    stranger = replace(
        bench.reduction, digest="e" * 64, capture=dict(bench.reduction.capture) | {"model": model}
    )
    with pytest.raises(InvalidInput, match="the directions are of ffffffffffff") as raised:
        train(bench.cache, stranger, bench.root, bench.section, model_path=MODEL)
    assert raised.value.kind == "train_model"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said_before_ray_waits_for_one(bench: Bench, no_ray: None) -> None:
    section = bench.section.model_copy(update={"seed": 77})
    with pytest.raises(InvalidInput, match="sees no GPU"):
        train(bench.cache, bench.reduction, bench.root, section, model_path=MODEL, device="cuda")
