"""Trials on the validation split, and which of them is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import GateRefused
from steering_service.core.site import Site


@dataclass(frozen=True, slots=True)
class Candidate:
    """An artifact at a strength, on the validation split.

    Attributes:
        share: Questions answered with the target choice, in points.
        undefined: Questions answered with both letters or neither, in points.
        ratio: Perplexity over the plain model's.
    """

    sites: tuple[Site, ...]
    strength: float
    share: float
    undefined: float
    ratio: float


def choose(candidates: Sequence[Candidate], cap: float) -> Candidate:
    """Furthest on validation within the cap; among those within a point, the least perplexity.

    Raises:
        GateRefused: No candidate is within the cap with at least half of its answers defined.
    """
    allowed = [c for c in candidates if c.ratio <= cap and c.undefined <= 50.0]
    if not allowed:
        defined = [c.ratio for c in candidates if c.undefined <= 50.0]
        least = f"the least of those was {min(defined):.2f}" if defined else "there were none"
        raise GateRefused(
            f"none of {len(candidates)} candidates keeps the perplexity within {cap:g} times the "
            "plain model's with at least half of the answers naming exactly one choice ("
            f"{len(defined)} name one; {least}); try weaker strengths or another cap",
            kind="perplexity_cap",
        )
    most = max(c.share for c in allowed)
    return min((c for c in allowed if c.share >= most - 1.0), key=lambda c: (c.ratio, c.strength))
