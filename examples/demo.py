"""The main job, end to end, on the pocket model: `make demo`.

plan, extract (Ray), reduce, publish a signed artifact, start the gRPC service, and let an inference
node follow a channel while its strength is turned up and down. Everything goes through the parts
that a real deployment uses; the strength that the node applies is always the channel's.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from questions import Question, choose, coordination, refusal
from rich.table import Table

from pipeline.cli.batch import extracting, planning, print_reduction, reducing, reduction_summary
from pipeline.cli.options import progress, stderr, stdout
from pipeline.errors import OUR_ERRORS
from pipeline.evaluation.controls import random_twin
from pipeline.evaluation.generate import generate
from pipeline.evaluation.suites import Point, Suite, sweep
from pipeline.extraction.models import load_model, load_tokenizer
from pipeline.ray_runtime import ray_session
from pipeline.reduction.artifacts import build_artifact
from pipeline.reduction.results import Reduction
from pipeline.report.environment import environment
from pipeline.report.page import Answers, Behaviour, write_report
from steering_service.adapters.transformers import Steering, fits, steered
from steering_service.client.operator import Operator
from steering_service.client.subscription import Subscription
from steering_service.core.artifact import Artifact
from steering_service.core.signing import Signer, TrustRoots, generate_key

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
    # So that the service, a process of its own, is ended on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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
    store.mkdir(parents=True, exist_ok=True)
    private, public = out / "keys" / "publisher.key", out / "keys" / "publisher.pub"
    if not private.exists():
        private.parent.mkdir(exist_ok=True)
        generate_key(private, public)
    questions = (refusal(), coordination())
    artifacts: list[tuple[Artifact, Reduction]] = []
    parity = ""
    model_path = Path()
    with ray_session(None, num_workers):
        for question in questions:
            stderr.rule(question.title)
            run_file, root, planned = planning(question.run_file, str(store))
            extraction = extracting(planned, root, num_workers, "cpu", None)
            if extraction["parity_worst"] is not None:
                parity = f"{extraction['parity_worst']:.1e} at {extraction['parity_site']}"
            reduction = reducing(run_file, root, planned, num_workers, None)
            if not as_json:
                print_reduction(reduction_summary(reduction, top=3))
            artifact = build_artifact(
                reduction, run_file.publish, name=run_file.name, model=planned.model
            )
            artifacts.append((artifact, reduction))
            model_path = run_file.model.path
    stderr.rule("Deliver and steer")
    # More threads make a model of this size no faster, and ten times slower on a busy machine.
    torch.set_num_threads(1)
    model, tokenizer = load_model(model_path, "float32"), load_tokenizer(model_path)
    signer, trust = Signer.from_file(private), TrustRoots.from_paths([public])
    found = []
    with _service(store, public) as address, Operator(address) as operator:
        for question, (artifact, reduction) in zip(questions, artifacts, strict=True):
            operator.publish(artifact, signer.sign(artifact.manifest_bytes))
            with Subscription(
                address,
                channel=artifact.manifest.name,
                node_id="demo-node",
                cache_dir=out / "node",
                trust_roots=trust,
                model_fingerprint=artifact.manifest.model.fingerprint,
                check=fits(model),
            ) as subscription:
                node = Node(model, tokenizer, operator, subscription, artifact)
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


@dataclass(frozen=True, slots=True)
class Node:
    """An inference node and the operator who turns its channel's strength."""

    model: Any
    tokenizer: Any
    operator: Operator
    subscription: Subscription
    artifact: Artifact

    @contextmanager
    def at(self, strength: float) -> Iterator[Steering]:
        """Promote a strength, wait until the node runs it, and steer."""
        entry = self.operator.promote(
            self.subscription.channel,
            artifact=self.artifact.digest,
            strength=strength,
            enabled=True,
            share=1.0,
            actor="demo",
            reason="strength sweep of the demo",
        )
        self.subscription.active.wait_for(entry.revision, timeout_s=10.0)
        with steered(self.model, self.subscription.active) as steering:
            yield steering

    def sweep(self, suites: Sequence[Suite], strengths: Sequence[float], label: str) -> list[Point]:
        """Sweep through the service, with a progress bar."""
        with progress(label, len(suites) * len(strengths)) as (bar, task):
            return sweep(
                self.model,
                self.tokenizer,
                suites,
                strengths,
                self.at,
                lambda point: bar.update(task, advance=1, note=f"strength {point.strength:+g}"),
            )


def _measure(question: Question, node: Node, reduction: Reduction) -> Found:
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
    node: Node,
    suites: Sequence[Suite],
    strengths: Sequence[float],
    seeds: Sequence[int],
    label: str,
) -> dict[int, list[Point]]:
    """By seed: the suites with a random direction of the same norm, applied by the node itself."""
    points = {}
    with progress(label, len(seeds) * len(suites) * len(strengths)) as (bar, task):
        for seed in seeds:
            twin = random_twin(node.artifact, seed)
            points[seed] = sweep(
                node.model,
                node.tokenizer,
                suites,
                strengths,
                lambda strength, twin=twin: steered(node.model, twin, strength),  # type: ignore[misc]
                lambda _: bar.update(task, advance=1),
            )
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


def _answers(question: Question, node: Node, up: float, down: float) -> list[Answers]:
    """Whole answers to the first prompts of each suite: not picked by hand."""
    chosen = [(s.name, prompt) for s in question.suites["test"] for prompt in s.prompts[:2]]
    texts = {}
    for strength in (0.0, down, up):
        with node.at(strength):
            texts[strength] = generate(
                node.model, node.tokenizer, [prompt for _, prompt in chosen], max_new_tokens=48
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


@contextmanager
def _service(store: Path, public_key: Path) -> Iterator[str]:
    """`steerage serve` in a process of its own, on a free loopback port."""
    command = [
        *(sys.executable, "-c", "from pipeline.main import run; run()"),
        *("serve", "--store", str(store), "--address", "127.0.0.1:0"),
        *("--trust", str(public_key), "--json"),
    ]
    with ExitStack() as stack:
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        stack.callback(process.terminate)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit("demo: the service did not start; its message is above")
        yield json.loads(line)["address"]


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
    ):
        where.add_row(what, str(path))
    stdout.print(where, soft_wrap=True)
    stdout.print(f"done in {seconds:.0f} s", highlight=False)


def _plain(text: str) -> str:
    """Text as it is: rich would take [brackets] for markup."""
    return text.replace("[", "\\[")


if __name__ == "__main__":
    sys.exit(main())
