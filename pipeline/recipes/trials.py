"""Trials of a recipe: what its lab measures candidates on, and which of them is taken."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.evaluation.suites import AnySuite
from pipeline.recipes.lab import Lab
from pipeline.selection import candidates as selection
from pipeline.selection.bench import Bench
from pipeline.selection.candidates import Candidate, Caps
from steering_service.core.artifact import ModelReference


def bench(lab: Lab, target: AnySuite, perplexity: AnySuite | None = None) -> Bench:
    """What candidates are measured on: a suite, and the perplexity of the plain model's answers."""
    reference = ModelReference(name=lab.info.name, fingerprint=lab.info.fingerprint)
    return Bench(lab.model, lab.tokenizer, reference, [target], perplexity=perplexity)


def choose(candidates: Sequence[Candidate], cap: float) -> Candidate:
    """Furthest on validation within the cap; among those within a point, the least perplexity.

    Args:
        cap: Most that the perplexity may rise, as a ratio: the one cap of every method.

    Raises:
        GateRefused: No candidate is within the cap with at least half of its answers defined.
    """
    return selection.choose(candidates, Caps(perplexity=cap))
