"""Evaluate an artifact: every suite under every condition, as one value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from pipeline.errors import InvalidInput
from pipeline.evaluation.conditions import measure_conditions
from pipeline.evaluation.suites import AnySuite, Condition, Point, Role
from steering_service.core.artifact import Artifact, Policy

NUM_STRENGTHS: Final = 9


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """What was measured of one artifact.

    Attributes:
        name: Of the suite file, for people.
        system: The prompt that asks for the behaviour.
        suites: In the order of the points of one condition.
        points: By condition, strength and suite; see `measure_conditions`.
    """

    name: str
    artifact: Artifact
    system: str
    suites: tuple[AnySuite, ...]
    points: tuple[Point, ...]

    def of(self, suite: str, condition: Condition) -> list[Point]:
        """The points of a suite under a condition, by seed, then strength."""
        found = [p for p in self.points if p.suite == suite and p.condition == condition]
        return sorted(found, key=lambda p: (p.seed or 0, p.strength))

    def plain(self, suite: str) -> Point:
        """The suite's point without steering."""
        return self.of(suite, "none")[0]

    def prompted(self, suite: str) -> Point:
        """The suite's point under the prompt that asks for the behaviour."""
        return self.of(suite, "prompt")[0]

    def at(self, suite: str, strength: float) -> Point:
        """The suite's point at a strength of the artifact."""
        return next(p for p in self.of(suite, "steered") if p.strength == strength)

    def suites_of(self, role: Role) -> list[AnySuite]:
        """The suites of a role."""
        return [suite for suite in self.suites if suite.role == role]

    @property
    def strengths(self) -> list[float]:
        """The strengths of the artifact, ascending."""
        return sorted({p.strength for p in self.points if p.condition == "steered"})

    @property
    def seeds(self) -> list[int]:
        """Of the random directions, ascending."""
        return sorted({p.seed for p in self.points if p.seed is not None})


def default_strengths(policy: Policy) -> list[float]:
    """`NUM_STRENGTHS` strengths evenly over a policy's limits, and 0 where these allow it."""
    low, high = policy.min_strength, policy.max_strength
    step = (high - low) / (NUM_STRENGTHS - 1)
    # Rounded for the reader, but never past a limit.
    grid = {min(max(round(low + i * step, 6), low), high) for i in range(NUM_STRENGTHS)}
    return sorted(grid | ({0.0} if low <= 0 <= high else set()))


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    suites: Sequence[AnySuite],
    artifact: Artifact,
    *,
    name: str,
    system: str,
    strengths: Sequence[float] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    on_point: Callable[[Point], None] = lambda point: None,
) -> Evaluation:
    """Measure an artifact beside no steering, a prompt and random directions.

    Args:
        suites: From `suite_file.build_suites`, or made by hand; names differ.
        system: The prompt that asks for the behaviour.
        strengths: By default `default_strengths` of the artifact's policy.
        seeds: Of the random directions.
        on_point: Called with each point as it is measured.

    Raises:
        InvalidInput: No suite, or two of one name.
        GateRefused: Strength 0 does not give the plain model's outputs.
        steering_service.core.errors.Refused: A strength is outside the artifact's policy.
    """
    names = [suite.name for suite in suites]
    if not names or len(set(names)) < len(names):
        raise InvalidInput(
            f"an evaluation needs at least one suite, and one of each name; got {names}",
            kind="suite_names",
        )
    if strengths is None:
        strengths = default_strengths(artifact.manifest.policy)
    points = measure_conditions(
        model,
        tokenizer,
        suites,
        artifact,
        system=system,
        strengths=strengths,
        seeds=seeds,
        on_point=on_point,
    )
    return Evaluation(name, artifact, system, tuple(suites), tuple(points))
