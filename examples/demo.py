"""The main job, end to end, on the pocket model: `make demo`.

plan, extract (Ray), reduce, publish a signed artifact, start the gRPC service, and let an inference
node follow a channel while its strength is turned up and down. Everything goes through the parts
that a real deployment uses; the strength that the node applies is always the channel's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

from questions import Question, choose, coordination, refusal
from rich.table import Table

from pipeline.cli.batch import planning, print_reduction, reducing, reduction_summary
from pipeline.cli.extraction import extracting
from pipeline.cli.lab import Place, open_lab
from pipeline.cli.options import stderr, stdout
from pipeline.config import load_run_file
from pipeline.errors import OUR_ERRORS
from pipeline.evaluation.controls import random_twin
from pipeline.evaluation.generate import generate
from pipeline.evaluation.suites import Point, Suite
from pipeline.ray_runtime import Pool
from pipeline.recipes.lab import Delivered
from pipeline.reduction.artifacts import build_artifact
from pipeline.reduction.results import Reduction
from pipeline.report.environment import environment
from pipeline.report.page import Answers, Behaviour, write_report
from steering_service.core.artifact import Artifact

RANDOM_SEEDS: Final = (0, 1, 2)
VALIDATION_SEED: Final = 100


@dataclass(frozen=True, slots=True)
class Found:
    """What was measured of one direction, on the test split, in points.

    Attributes:
        up_shift: Change of the raised suite's share at the strength `up`.
        down_shift: Change of the lowered suite's share at the strength `down`.
        kept_shift: Change of the kept suite's share at `up`.
        random_shift: Largest change of any suite by any random direction of the same norm.
    """

    behaviour: Behaviour
    up_shift: float
    down_shift: float
    kept_shift: float | None
    random_shift: float


def main() -> int:
    """Run the demo; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("steerage-demo"), help="output folder")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        run(arguments.out.resolve(), arguments.workers, arguments.json)
    except OUR_ERRORS as error:
        stderr.print(f"demo: {error}", markup=False)
        return 1
    except KeyboardInterrupt:
        stderr.print("demo: interrupted; run it again to go on")
        return 130
    return 0


def run(out: Path, num_workers: int, as_json: bool) -> None:
    """The whole flow."""
    start = time.monotonic()
    store = out / "store"
    questions = (refusal(), coordination())
    # All questions are about one model.
    model_path = load_run_file(questions[0].run_file).model.path
    artifacts: list[tuple[Artifact, Reduction]] = []
    parity = ""
    found = []
    with open_lab(Place(model=model_path, out=out, dtype="float32", workers=num_workers)) as lab:
        for question in questions:
            stderr.rule(question.title)
            run_file, root, planned = planning(question.run_file, str(store))
            extraction = extracting(planned, root, Pool(num_workers), lab.device, "auto", lab.ray)
            if extraction["parity_worst"] is not None:
                parity = f"{extraction['parity_worst']:.1e} at {extraction['parity_site']}"
            reduction, *_ = reducing(
                run_file, root, planned, str(store), num_workers, lab.device, lab.ray
            )
            if not as_json:
                print_reduction(reduction_summary(reduction, top=3))
            artifact = build_artifact(
                reduction, run_file.publish, name=run_file.name, model=planned.model
            )
            artifacts.append((artifact, reduction))
        stderr.rule("Deliver and steer")
        for question, (artifact, reduction) in zip(questions, artifacts, strict=True):
            with lab.delivered(artifact, node_id="demo-node", actor="demo", leave_on=True) as node:
                found.append(_measure(question, node, reduction))
    report = out / "report.html"
    write_report(
        report,
        title="Steering the pocket model",
        behaviours=[item.behaviour for item in found],
        provenance=_provenance(artifacts, store, parity),
    )
    seconds = time.monotonic() - start
    if as_json:
        print(json.dumps(_summary(found, report, seconds), sort_keys=True))
    else:
        _print(found, out, report, seconds)


def _measure(question: Question, node: Delivered, reduction: Reduction) -> Found:
    suites = question.suites["validation"]
    chances = _random_sweeps(
        node, suites, question.strengths, (VALIDATION_SEED,), f"{question.title}: random directions"
    )
    up, down = choose(
        question,
        node.sweep(suites, question.strengths, f"{question.title}: choose strengths"),
        chances[VALIDATION_SEED],
    )
    points = node.sweep(question.suites["test"], question.strengths, f"{question.title}: measure")
    control = _random_sweeps(
        node, question.suites["test"], (down, up), RANDOM_SEEDS, f"{question.title}: control"
    )
    by = {(p.suite, p.strength): p for p in points}

    def shift(suite: str, strength: float) -> float:
        return by[suite, strength].share - by[suite, 0.0].share

    random_shift = max(
        abs(p.share - by[p.suite, 0.0].share) for seed in control for p in control[seed]
    )
    up_shift, down_shift = shift(question.raised, up), shift(question.lowered, down)
    kept_shift = None if question.kept is None else shift(question.kept, up)
    behaviour = Behaviour(
        title=question.title,
        lead=_lead(question, by, up, down, random_shift),
        artifact=node.artifact,
        reduction=reduction,
        points=points,
        control=control,
        up=up,
        down=down,
        # Last, so that the channel is left on at the strength that was chosen.
        answers=_answers(question, node, up, down),
    )
    return Found(behaviour, up_shift, down_shift, kept_shift, random_shift)


def _random_sweeps(
    node: Delivered,
    suites: Sequence[Suite],
    strengths: Sequence[float],
    seeds: Sequence[int],
    label: str,
) -> dict[int, list[Point]]:
    """By seed: the suites with a random direction of the same norm, applied by the node itself."""
    points: dict[int, list[Point]] = {seed: [] for seed in seeds}
    with node.lab.track(label, len(seeds) * len(suites) * len(strengths)) as step:
        for seed in seeds:
            twin = random_twin(node.artifact, seed)
            for strength, suite in product(strengths, suites):
                points[seed] += node.lab.tried(twin, strength, [suite])
                step("")
    return points


def _lead(
    question: Question,
    by: Mapping[tuple[str, float], Point],
    up: float,
    down: float,
    random_shift: float,
) -> str:
    def change(suite: str, strength: float) -> str:
        return f"from {by[suite, 0.0].share:.0f} % to {by[suite, strength].share:.0f} %"

    text = (
        f"Adding the direction at strength {up:g} takes “{question.raised}” "
        f"{change(question.raised, up)}; subtracting it at {abs(down):g} takes "
        f"“{question.lowered}” {change(question.lowered, down)}."
    )
    if question.kept is not None:
        text += f" Side effect of adding: “{question.kept}” {change(question.kept, up)}."
    return (
        f"{text} Random directions of the same norm move no share by more than "
        f"{random_shift:.0f} points."
    )


def _answers(question: Question, node: Delivered, up: float, down: float) -> list[Answers]:
    """Whole answers to the first prompts of each suite: not picked by hand."""
    chosen = [(s.name, prompt) for s in question.suites["test"] for prompt in s.prompts[:2]]
    texts = {}
    for strength in (0.0, down, up):
        with node.at(strength):
            texts[strength] = generate(
                node.lab.model,
                node.lab.tokenizer,
                [prompt for _, prompt in chosen],
                max_new_tokens=48,
            )
    return [
        Answers(
            suite,
            prompt.user if prompt.system is None else f"[{prompt.system}] {prompt.user}",
            texts[0.0][i],
            texts[up][i],
            texts[down][i],
        )
        for i, (suite, prompt) in enumerate(chosen)
    ]


def _provenance(
    artifacts: Sequence[tuple[Artifact, Reduction]], store: Path, parity: str
) -> dict[str, str]:
    manifest = artifacts[0][0].manifest
    table = {
        "model": f"{manifest.model.name}, weights sha256 {manifest.model.fingerprint}",
        "store": str(store),
        "parity with plain transformers": parity or "checked by the run that wrote the cache",
    }
    for artifact, reduction in artifacts:
        name = artifact.manifest.name
        rows = ", ".join(
            f"{count} {key.replace('_', ' ')}" for key, count in reduction.counts.items()
        )
        table |= {
            f"{name}: capture": reduction.capture_digest,
            f"{name}: reduction": f"{reduction.digest} ({reduction.method})",
            f"{name}: artifact": artifact.digest,
            f"{name}: rows": rows,
        }
    return table | environment()


def _summary(found: Sequence[Found], report: Path, seconds: float) -> dict[str, Any]:
    refusal, coordination = found
    return {
        "environment": environment(),
        "refusal_up_shift": refusal.up_shift,
        "refusal_up_strength": refusal.behaviour.up,
        "refusal_down_shift": refusal.down_shift,
        "refusal_down_strength": refusal.behaviour.down,
        "refusal_benign_shift": refusal.kept_shift,
        "refusal_random_shift": refusal.random_shift,
        "coordination_up_shift": coordination.up_shift,
        "coordination_up_strength": coordination.behaviour.up,
        "coordination_random_shift": coordination.random_shift,
        "report": str(report),
        "seconds": round(seconds, 1),
    }


def _print(found: Sequence[Found], out: Path, report: Path, seconds: float) -> None:
    for item in found:
        b = item.behaviour
        table = Table(title=b.title, title_justify="left", show_lines=True)
        table.add_column("prompt", ratio=3)
        table.add_column("unsteered", ratio=2)
        table.add_column(f"steered up ({b.up:+g})", ratio=2)
        table.add_column(f"steered down ({b.down:+g})", ratio=2)
        for row in b.answers:
            table.add_row(*(_plain(text) for text in (row.prompt, row.plain, row.up, row.down)))
        stdout.print(table)
        stdout.print(b.lead, highlight=False)
        stdout.print()
    where = Table(show_header=False, box=None, pad_edge=False)
    for what, path in (
        ("report", report),
        ("store: caches, reductions, artifacts, channels", out / "store"),
        ("keys", out / "keys"),
        ("the node's disk cache", out / "node"),
        ("the service's log", out / "service.log"),
    ):
        where.add_row(what, str(path))
    stdout.print(where, soft_wrap=True)
    stdout.print(f"done in {seconds:.0f} s", highlight=False)


def _plain(text: str) -> str:
    """Text as it is: rich would take [brackets] for markup."""
    return text.replace("[", "\\[")


if __name__ == "__main__":
    sys.exit(main())
