"""What reductions of the pocket model are worth: the claims of docs/reduction.md, measured.

1. Seeds: two draws of the training and validation rows must rank the same layers and heads first.
2. Methods: at the sites that are published, which methods find the same direction.
3. Sparsity: what a direction of 5 % of the entries keeps of the dense one's effect on answers, at
   the same norm; by magnitude, by t statistic, and at random.

    python benchmarks/reduction_truth.py [--out FILE.json]

Prints tables on stderr and one JSON object as the last line of stdout. Takes about five minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import numpy as np
import scipy.stats

from pipeline.config import RunFile, load_run_file
from pipeline.evaluation.suites import Point, Suite, sweep
from pipeline.extraction.models import load_model, load_tokenizer
from pipeline.extraction.workers import extract
from pipeline.prompts.plan import Plan, plan
from pipeline.ray_runtime import Pool, ray_session
from pipeline.reduction.artifacts import build_artifact
from pipeline.reduction.methods import DEFAULT_PARAMETERS
from pipeline.reduction.reduce import reduce_all
from pipeline.reduction.results import Reduction
from pipeline.report.environment import environment
from steering_service.adapters.transformers import steered
from steering_service.core.site import Site
from store.location import Location

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import questions

WORKERS: Final = 2
SEEDS: Final = (0, 1)
TOP: Final = {"layers": 3, "heads": 10}
KEPT: Final = 0.05
STRENGTHS: Final = {"refusal": 0.4, "coordination": 0.25}
"""Of the demo, which chose them on the validation split."""


@dataclass(frozen=True, slots=True)
class Found:
    """One run, extracted and reduced by every method."""

    run: RunFile
    planned: Plan
    reductions: dict[str, Reduction]


def main() -> None:
    """Measure it all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the JSON there too")
    out = parser.parse_args().out
    result: dict[str, Any] = {"benchmark": "reduction_truth", "environment": environment()}
    with tempfile.TemporaryDirectory(prefix="steerage-truth-") as name, ray_session(None, WORKERS):
        folder = Path(name)
        root = Location.open(str(folder / "store"))
        for question in (questions.refusal(), questions.coordination()):
            run = load_run_file(question.run_file)
            found = _found(run, root)
            redrawn = [_found(_redrawn(run, seed, folder), root) for seed in SEEDS]
            result[run.name] = {
                "overlap_of_seeds": _overlap(redrawn),
                "cosines": _cosines(found),
                "sparse": _sparse(found, question.suites["test"], question.raised),
            }
    line = json.dumps(result, sort_keys=True)
    if out is not None:
        out.write_text(json.dumps(result, sort_keys=True, indent=2) + "\n")
    print(line)


def _found(run: RunFile, root: Location) -> Found:
    planned = plan(run, root)
    extract(planned, root, pool=Pool(WORKERS))
    reductions = reduce_all(
        planned.cache, root, [(method, {}) for method in DEFAULT_PARAMETERS], num_workers=WORKERS
    )
    return Found(run, planned, {reduction.method: reduction for reduction in reductions})


def _redrawn(run: RunFile, seed: int, folder: Path) -> RunFile:
    """The same run with other rows to train on: training and validation are drawn again."""
    files = []
    for file in run.prompts.files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        drawn: dict[Any, str] = {}
        generator = np.random.default_rng(seed)
        for number, row in enumerate(rows):
            if row["split"] != "test":
                name = row.get("pair", number)
                drawn.setdefault(name, "train" if generator.random() < 0.7 else "validation")
                row["split"] = drawn[name]
        files.append(folder / f"{file.stem}-{seed}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run.model_copy(update={"prompts": run.prompts.model_copy(update={"files": files})})


def _overlap(redrawn: Sequence[Found]) -> dict[str, Any]:
    """Of the best sites by one draw, the share that is among the best by the other."""
    overlaps: dict[str, Any] = {}
    for method in DEFAULT_PARAMETERS:
        for kind, num in TOP.items():
            ranked = [
                [row["site"] for row in found.reductions[method].ranked(heads=kind == "heads")]
                for found in redrawn
            ]
            first, second = ranked
            places = [second.index(site) for site in first]
            overlaps[f"{method}_{kind}"] = {
                "top": num,
                "overlap": len(set(first[:num]) & set(second[:num])) / num,
                "rank_correlation": round(
                    float(scipy.stats.spearmanr(range(len(first)), places).statistic), 3
                ),
                "same_best": first[0] == second[0],
            }
            print(f"{method} {kind}: {overlaps[f'{method}_{kind}']}", file=sys.stderr)
    return overlaps


def _cosines(found: Found) -> dict[str, dict[str, float]]:
    """Between methods, at the published layer and the best head."""
    first = found.reductions["difference_of_means"]
    published = [Site.parse(site) for site in found.run.publish.sites]
    cosines = {}
    for site in (*published, first.best(heads=True)):
        units = {name: one.direction(site).unit_D for name, one in found.reductions.items()}
        cosines[str(site)] = {
            f"{a} ~ {b}": round(float(units[a] @ units[b]), 3) for a, b in combinations(units, 2)
        }
        print(f"cosines at {site}: {cosines[str(site)]}", file=sys.stderr)
    return cosines


def _sparse(found: Found, suites: Sequence[Suite], raised: str) -> dict[str, Any]:
    """Effect on the answers of the dense direction, and of sparse ones of the same norm."""
    model = load_model(found.run.model.path, "float32")
    tokenizer = load_tokenizer(found.run.model.path)
    strength = STRENGTHS[found.run.name]
    reduction = found.reductions["difference_of_means"]

    def shares(keep: dict[str, Any] | None, at: float) -> dict[str, float]:
        section = found.run.publish.model_copy(update=keep or {})
        artifact = build_artifact(reduction, section, name="truth", model=found.planned.model)
        points: list[Point] = sweep(
            model,
            tokenizer,
            suites,
            [at],
            lambda value: steered(model, artifact, value) if value else nullcontext(),
        )
        return {point.suite: round(point.share, 1) for point in points}

    kept = {"keep_fraction": KEPT, "match_norm": True}
    plain = shares(None, 0.0)
    measured = {
        "plain": plain,
        "dense": shares(None, strength),
        "magnitude": shares(kept, strength),
        "t": shares(kept | {"keep_by": "t"}, strength),
        "magnitude_own_norm": shares(kept | {"match_norm": False}, strength),
    }
    full = measured["dense"][raised] - plain[raised]
    effect = {
        name: round((values[raised] - plain[raised]) / full, 3)
        for name, values in measured.items()
        if name not in ("plain", "dense")
    }
    print(f"{found.run.name}, sparse: {measured}\neffect kept: {effect}", file=sys.stderr)
    return {"strength": strength, "suite": raised, "shares": measured, "effect_kept": effect}


if __name__ == "__main__":
    main()
