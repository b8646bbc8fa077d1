"""Bench: measures Interventions on a loaded model, on prompts that nothing is reported on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

from torch import nn

from pipeline.evaluation.suites import AnySuite, Point, sweep
from pipeline.selection.candidates import Candidate
from steering_service.adapters.transformers import steered
from steering_service.core.artifact import ModelReference, Policy, build
from steering_service.core.intervention import Intervention


class Bench:
    """What candidates are measured on.

    Args:
        model: The plain model; no `steered` block is active.
        reference: Names it.
        targets: Suites that steering should raise; their shares are averaged.
        perplexity: Of the plain model's own answers, or None: ratios are NaN.
        kl: Divergence along them, or None.
        harms: Suites that should stay low.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        reference: ModelReference,
        targets: Sequence[AnySuite],
        *,
        perplexity: AnySuite | None = None,
        kl: AnySuite | None = None,
        harms: Sequence[AnySuite] = (),
    ) -> None:
        self._model, self._tokenizer, self._reference = model, tokenizer, reference
        self._targets, self._perplexity, self._kl, self._harms = targets, perplexity, kl, harms

    @cached_property
    def plain_share(self) -> float:
        """The target without steering, in points."""
        return _mean(self._plain(self._targets))

    @cached_property
    def plain_perplexity(self) -> float:
        """The plain model's own; NaN where it is not measured."""
        return (
            float("nan") if self._perplexity is None else self._plain([self._perplexity])[0].value
        )

    @cached_property
    def plain_harms(self) -> list[float]:
        """Shares of what should stay low, without steering, in points."""
        return [point.share for point in self._plain(self._harms)]

    @property
    def generations(self) -> tuple[int, int]:
        """Answers that are generated for a candidate: of the targets, and of the suites that should
        stay low, which are asked of those alone that raise the target.
        """
        targets, harms = (
            sum(len(suite.prompts) for suite in suites) for suites in (self._targets, self._harms)
        )
        return targets, harms

    @property
    def scorings(self) -> int:
        """Answers of the plain model that are scored for a candidate."""
        scored = [suite for suite in (self._perplexity, self._kl) if suite is not None]
        return sum(len(suite.prompts) for suite in scored)

    def measured(self, items: Sequence[Intervention], strength: float) -> Candidate:
        """Apply Interventions at a strength, as a node would."""
        plain_perplexity = self.plain_perplexity
        costs = [suite for suite in (self._perplexity, self._kl) if suite is not None]
        points = self._steered(items, strength, [*self._targets, *costs])
        targets = points[: len(self._targets)]
        values = iter(point.value for point in points[len(self._targets) :])
        share = _mean(targets)
        return Candidate(
            tuple(item.site for item in items),
            strength,
            share,
            100.0 * sum(len(p.undefined) for p in targets) / sum(p.num for p in targets),
            float("nan") if self._perplexity is None else next(values) / plain_perplexity,
            None if self._kl is None else next(values),
            self._harm(items, strength, share),
        )

    def _harm(self, items: Sequence[Intervention], strength: float, share: float) -> float | None:
        if not self._harms or share <= self.plain_share:
            return None
        plain = self.plain_harms
        points = self._steered(items, strength, self._harms)
        return max(point.share - before for point, before in zip(points, plain, strict=True))

    def _plain(self, suites: Sequence[AnySuite]) -> list[Point]:
        return sweep(self._model, self._tokenizer, suites, [0.0], lambda _: nullcontext())

    def _steered(
        self, items: Sequence[Intervention], strength: float, suites: Sequence[AnySuite]
    ) -> list[Point]:
        artifact = build(
            items,
            name="candidate",
            model=self._reference,
            policy=Policy(min_strength=min(strength, 0.0), max_strength=max(strength, 0.0)),
        )
        return sweep(
            self._model,
            self._tokenizer,
            suites,
            [strength],
            lambda value: steered(self._model, artifact, value),
        )


def _mean(points: Sequence[Point]) -> float:
    return sum(point.share for point in points) / len(points)
