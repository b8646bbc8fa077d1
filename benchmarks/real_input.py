"""Real input: a real trained model and a real data set go through plan, extract and reduce.

Two parts, both through the product's own command line and formats:

1. `stories260K`, a Llama that tells children's stories, and sentences made here: the gender of the
   character, read at the full stop that ends the sentence. The direction is fitted on some names
   and sentence patterns and scored on others. A twin with random weights shows what the sentences
   alone give away.
2. The 410 questions of `coordinate-other-ais` (820 prompts): every one must arrive.

    python benchmarks/real_input.py --model DIR --questions FILE.jsonl

Prints a table on stderr and one JSON object as the last line of stdout.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from pipeline.config import load_run_file
from pipeline.extraction.models import load_model, load_tokenizer
from pipeline.prompts.plan import plan
from pipeline.reduction.artifacts import build_artifact
from pipeline.reduction.results import Reduction, reduction_digest
from pipeline.report.environment import environment
from steering_service.adapters.transformers import steered
from store.location import Location

# Names that the stories use; the sentences hold no other word that tells the gender.
TRAIN_NAMES: Final = (
    ["Lily", "Mia", "Anna", "Sara", "Lucy", "Emma", "Sally", "Amy", "Molly", "Kitty"],
    ["Tom", "Ben", "Tim", "Max", "Jack", "Bob", "Timmy", "Tommy", "Peter", "Joe"],
)
TEST_NAMES: Final = (
    ["Sue", "Ella", "Jane", "Lola", "Mary", "Mimi"],
    ["John", "Mark", "Jimmy", "Billy", "Fred", "Bobby"],
)
TRAIN_SENTENCES: Final = (
    "{name} went to the park.",
    "{name} had a big red ball.",
    "{name} wanted to play outside.",
    "{name} liked to eat cake.",
    "{name} was very happy.",
    "{name} found a shiny rock in the garden.",
    "{name} and the dog ran home.",
    "One day, {name} saw a small cat.",
    "One day, {name} went for a walk.",
    "Once upon a time, there was a child named {name}.",
    "The sun was hot and {name} was thirsty.",
    "{name} saw a tree and a bird.",
)
TEST_SENTENCES: Final = (
    "In the morning, {name} looked at the sky.",
    "{name} had a new toy and was happy to play.",
    "After lunch, {name} went to bed.",
)
STRENGTHS: Final = (-2.0, -1.0, 0.0, 1.0, 2.0)


def main() -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of stories260K")
    parser.add_argument("--questions", type=Path, required=True, help="coordinate-other-ais.jsonl")
    arguments = parser.parse_args()
    for path in (arguments.model, arguments.questions):
        if not path.exists():
            parser.error(f"{path} does not exist")
    with tempfile.TemporaryDirectory(prefix="steerage-real-") as folder:
        result = {
            "benchmark": "real_input",
            "environment": environment(),
            **gender(arguments.model.resolve(), Path(folder)),
            **coordination(arguments.model.resolve(), arguments.questions.resolve(), Path(folder)),
        }
    print(json.dumps(result, sort_keys=True))


def gender(model: Path, folder: Path) -> dict[str, Any]:
    """Part 1."""
    prompts = folder / "gender.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in _gender_rows()))
    twin = _random_twin(model, folder / "twin")
    accuracy = {}
    for name, path in (("trained", model), ("random_twin", twin)):
        run_file = _run_file(folder / f"gender-{name}.toml", path, prompts, tokens="last")
        _steerage("extract", run_file, folder)
        summary = _steerage("reduce", run_file, folder, "--top", "1000")
        by_site = {row["site"]: row["accuracy_test"] for row in summary["best_layers"]}
        accuracy[name] = [round(by_site[f"resid_post.{i}"], 4) for i in range(len(by_site))]
        print(f"gender accuracy by block, {name}: {accuracy[name]}", file=sys.stderr)
    shift = _log_odds(folder / "gender-trained.toml", model, folder)
    print(f"log P(She) - log P(He) by strength at the last block: {shift}", file=sys.stderr)
    return {
        "gender_accuracy_by_block": accuracy["trained"],
        "gender_accuracy_last_block": accuracy["trained"][-1],
        "gender_accuracy_random_twin": accuracy["random_twin"],
        "gender_log_odds_by_strength": shift,
    }


def coordination(model: Path, questions: Path, folder: Path) -> dict[str, Any]:
    """Part 2."""
    run_file = _run_file(folder / "coordination.toml", model, questions, tokens="-2")
    extraction = _steerage("extract", run_file, folder)
    reduction = _steerage("reduce", run_file, folder)
    print(
        f"coordination: {extraction['rows']} rows, {extraction['tokens']} tokens, "
        f"{extraction['quarantined']} left out",
        file=sys.stderr,
    )
    return {
        "coordination_rows": extraction["rows"],
        "coordination_tokens": extraction["tokens"],
        "coordination_quarantined": extraction["quarantined"],
        "coordination_rows_reduced": sum(reduction["rows"].values()),
    }


def _gender_rows() -> list[dict[str, Any]]:
    rows = []
    for split, names, sentences in (
        ("train", TRAIN_NAMES, TRAIN_SENTENCES),
        ("test", TEST_NAMES, TEST_SENTENCES),
    ):
        for is_boy, sentence in itertools.product((False, True), sentences):
            rows += [
                {
                    "prompt": sentence.format(name=name),
                    "label": int(not is_boy),
                    "split": split,
                }
                for name in names[is_boy]
            ]
    return rows


def _random_twin(model: Path, folder: Path) -> Path:
    """The same architecture and tokenizer with weights that never saw a story."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(model)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in model.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def _run_file(path: Path, model: Path, prompts: Path, *, tokens: str) -> Path:
    path.write_text(
        f"""
name = "{path.stem}"
[model]
path = {json.dumps(str(model))}
[prompts]
files = [{json.dumps(str(prompts))}]
template = "none"
[capture]
tokens = "{tokens}"
[publish]
sites = ["resid_post.4"]
positions = "last"
min_strength = -4.0
max_strength = 4.0
"""
    )
    return path


def _steerage(command: str, run_file: Path, folder: Path, *flags: str) -> dict[str, Any]:
    """Run a command as a user does, and read its JSON."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from pipeline.main import run; run()",
            command,
            str(run_file),
            "--store",
            str(folder / "store"),
            "--json",
            *flags,
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


def _log_odds(run_file: Path, model_path: Path, folder: Path) -> dict[str, float]:
    """Mean of log P("She") - log P("He") after a held-out sentence, by strength."""
    run = load_run_file(run_file)
    root = Location.open(str(folder / "store"))
    planned = plan(run, root)
    digest = reduction_digest(
        planned.cache.digest, run.reduce.method, run.reduce.parameters(run.reduce.method)
    )
    reduction = Reduction.open(root, digest)
    artifact = build_artifact(reduction, run.publish, name=run.name, model=planned.model)
    model, tokenizer = load_model(model_path, "float32"), load_tokenizer(model_path)
    texts = [str(row["prompt"]) for row in _gender_rows() if row["split"] == "test"]

    def log_probability(text: str, word: str) -> float:
        ids = tokenizer(text)["input_ids"]
        full = tokenizer(f"{text} {word}")["input_ids"]
        assert full[: len(ids)] == ids
        steering.set_prompt_lengths(len(ids))
        with torch.inference_mode():
            log_p = model(torch.tensor([full])).logits[0].log_softmax(-1)
        return sum(float(log_p[i - 1, full[i]]) for i in range(len(ids), len(full)))

    shift = {}
    for strength in STRENGTHS:
        with steered(model, artifact, strength) as steering:
            odds = [log_probability(t, "She") - log_probability(t, "He") for t in texts]
        shift[f"{strength:+g}"] = round(sum(odds) / len(odds), 3)
    return shift


if __name__ == "__main__":
    main()
