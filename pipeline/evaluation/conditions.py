"""Conditions: steering beside everything that it has to be compared with.

    none      the plain model
    prompt    a system prompt that asks for the behaviour, no steering
    steered   the artifact at each strength, 0 among them
    random    random directions of the same norms at the same sites, at the same strengths

All four are always measured, since an effect without them says little: prompting beats steering
for many behaviours (AxBench, METHODS 6), and a push in any direction knocks a model over in the
end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from torch import nn

from pipeline.errors import GateRefused
from pipeline.evaluation.controls import random_twin
from pipeline.evaluation.suites import AnySuite, Condition, Point, sweep
from steering_service.adapters.transformers import steered
from steering_service.core.artifact import Artifact


def measure_conditions(
    model: nn.Module,
    tokenizer: Any,
    suites: Sequence[AnySuite],
    artifact: Artifact,
    *,
    system: str,
    strengths: Sequence[float],
    seeds: Sequence[int],
    on_point: Callable[[Point], None] = lambda point: None,
) -> list[Point]:
    """Ask every suite under every condition. Call it outside of any `steered` block.

    Args:
        system: The prompt that asks for the behaviour; put before each prompt's own system prompt.
        strengths: Within the artifact's policy. 0 is measured too where the policy allows it.
        seeds: Of the random directions, one each; they are measured at every strength but 0.
        on_point: Called with each point as it is measured.

    Returns:
        By condition in the order above; `num_points` of them.

    Raises:
        GateRefused: Strength 0 does not give the plain model's answers and values, bit for bit.
        steering_service.core.errors.Refused: A strength is outside the artifact's policy.
    """
    # Before the first of what may be hours of work.
    for strength in strengths:
        artifact.manifest.policy.check(strength)
    points: list[Point] = []

    def run(
        condition: Condition,
        asked: Sequence[AnySuite],
        at: Sequence[float],
        steering_at: Callable[[float], AbstractContextManager[Any]],
        seed: int | None = None,
    ) -> list[Point]:
        found: list[Point] = []

        def keep(point: Point) -> None:
            found.append(replace(point, condition=condition, seed=seed))
            on_point(found[-1])

        sweep(model, tokenizer, asked, at, steering_at, keep)
        points.extend(found)
        return found

    # Zero first: if the two differ, nothing that follows means anything.
    plain = run("none", suites, [0.0], lambda _: nullcontext())
    run("prompt", [suite.under(system) for suite in suites], [0.0], lambda _: nullcontext())
    ordered = _with_zero(artifact, strengths)
    if 0.0 in ordered:
        zero = run("steered", suites, [0.0], lambda s: steered(model, artifact, s))
        _check_zero(plain, zero)
    nonzero = [strength for strength in ordered if strength != 0]
    run("steered", suites, nonzero, lambda s: steered(model, artifact, s))
    for seed in seeds:
        twin = random_twin(artifact, seed)
        run("random", suites, nonzero, lambda s, twin=twin: steered(model, twin, s), seed)  # type: ignore[misc]
    return points


def num_points(
    artifact: Artifact, num_suites: int, strengths: Sequence[float], seeds: Sequence[int]
) -> int:
    """How many points `measure_conditions` measures, for a progress bar."""
    ordered = _with_zero(artifact, strengths)
    num_nonzero = sum(strength != 0 for strength in ordered)
    return num_suites * (2 + len(ordered) + len(seeds) * num_nonzero)


def _with_zero(artifact: Artifact, strengths: Sequence[float]) -> list[float]:
    policy = artifact.manifest.policy
    allowed = policy.min_strength <= 0 <= policy.max_strength
    return sorted({*map(float, strengths), *([0.0] if allowed else [])})


def _check_zero(plain: Sequence[Point], zero: Sequence[Point]) -> None:
    for a, b in zip(plain, zero, strict=True):
        differ = [
            i for i in range(a.num) if a.answers[i] != b.answers[i] or a.values[i] != b.values[i]
        ]
        if differ:
            raise GateRefused(
                f"suite {a.suite!r}: strength 0 must give the plain model's outputs bit for bit, "
                f"and {len(differ)} of {a.num} prompts differ, first prompt {differ[0]}: "
                f"{a.answers[differ[0]]!r} (value {a.values[differ[0]]:.9g}) without steering, "
                f"{b.answers[differ[0]]!r} (value {b.values[differ[0]]:.9g}) at strength 0. Hooks "
                "of other code on this model, or kernels that are not deterministic, do that",
                kind="zero_strength",
            )
