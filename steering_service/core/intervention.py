"""Intervention: a pure edit of hidden states along a Direction.

`edit_` is written against the few operators that numpy arrays and torch tensors share, so the
arithmetic exists once and `core` needs no torch.

Shapes: B batch, T positions, D width of the site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np

from steering_service.core.direction import Direction, Float32
from steering_service.core.errors import InvalidInput
from steering_service.core.site import Site

Operation = Literal["add", "project_out"]
StrengthUnit = Literal["direction", "sigma", "unit"]
Positions = Literal["last", "all", "generated", "prompt"]

OPERATIONS: Final[tuple[Operation, ...]] = get_args(Operation)
STRENGTH_UNITS: Final[tuple[StrengthUnit, ...]] = get_args(StrengthUnit)
POSITIONS: Final[tuple[Positions, ...]] = get_args(Positions)


@dataclass(frozen=True, slots=True, eq=False)
class Intervention:
    """What is done to hidden states at one Site.

    Args:
        direction: The vector and its site.
        operation: ``add``: h + strength * step. ``project_out``: h - strength * (h . u) u, which at
            strength 1 removes the component along the unit vector u.
        strength_unit: What strength 1 adds. ``direction``: the vector as fitted (CAA, METHODS 5);
            ``sigma``: one standard deviation along the unit vector (ITI and HSI, METHODS 1);
            ``unit``: the unit vector (Jailbreak Antidote, METHODS 3).
        positions: ``last``: the final position of every forward pass, so the last prompt token and
            each decoded one; ``generated``: the position that predicts the first generated token
            and all after it; ``prompt``: the prompt only; ``all``: every position.
        weight: Multiplies the strength of this Intervention within its artifact.

    Raises:
        InvalidInput: An unknown operation, unit or position policy, a weight that is not finite, or
            the unit ``sigma`` for a direction whose sigma was not measured.
    """

    direction: Direction
    operation: Operation = "add"
    strength_unit: StrengthUnit = "direction"
    positions: Positions = "generated"
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("operation", self.operation, OPERATIONS),
            ("strength_unit", self.strength_unit, STRENGTH_UNITS),
            ("positions", self.positions, POSITIONS),
        ):
            if value not in allowed:
                raise InvalidInput(
                    f"intervention at {self.site}: {name} must be one of {', '.join(allowed)}, "
                    f"got {value!r}",
                    kind=f"intervention_{name}",
                )
        if not np.isfinite(self.weight):
            raise InvalidInput(
                f"intervention at {self.site}: weight must be finite, got {self.weight!r}",
                kind="intervention_weight",
            )
        if self.strength_unit == "sigma" and self.direction.sigma is None:
            raise InvalidInput(
                f"intervention at {self.site}: strength_unit 'sigma' needs the direction's sigma, "
                f"which was not measured (method {self.direction.method}); measure it on a cache "
                "with pipeline.notebook.measure, or use 'unit' or 'direction'",
                kind="sigma_missing",
            )

    @property
    def site(self) -> Site:
        """Where the edit happens."""
        return self.direction.site

    @property
    def step_D(self) -> Float32:
        """Float32 [D]: what strength 1 adds; for ``project_out`` the unit vector.

        The weight is not in it.
        """
        if self.operation == "project_out" or self.strength_unit == "unit":
            return self.direction.unit_D
        if self.strength_unit == "sigma":
            assert self.direction.sigma is not None
            return np.asarray(self.direction.unit_D * self.direction.sigma, dtype=np.float32)
        return self.direction.vector_D


def edit(h_BTD: Any, step_D: Any, operation: Operation, strength: Any) -> Any:
    """Apply one edit to hidden states, out of place.

    Args:
        h_BTD: [..., D] hidden states, numpy or torch.
        step_D: [D] `Intervention.step_D`, of the same library, dtype and device.
        operation: See `Intervention`.
        strength: Strength times weight; the sign matters. A number, or [B, 1, 1]: one a row.

    Returns:
        [..., D], the same type and dtype as the input.
    """
    if operation == "add":
        return h_BTD + step_D * strength
    return h_BTD - (h_BTD @ step_D)[..., None] * (step_D * strength)
