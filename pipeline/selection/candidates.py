"""Candidates: which sites there are, what is measured of them at a strength, which are taken."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import GateRefused, InvalidInput
from pipeline.reduction.results import RankBy, Reduction
from steering_service.core.site import Site

_MOST_UNDEFINED = 50.0
"""Points. Past it a share is of too few answers to mean anything (HSI, arXiv 2502.05945;
METHODS 1: strengths with mostly undefined output are discarded)."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Sites that are steered together, at one strength, on prompts that nothing is reported on.

    Attributes:
        share: The target, in points: answers that count, the mean over the target suites.
        undefined: Answers that could not be judged, in points.
        ratio: Perplexity of the plain model's own answers over the plain model's; NaN where it was
            not measured.
        kl: KL divergence from the plain model along those answers, in nats a token; None where it
            was not measured.
        harm: Largest rise of a suite that should stay low, in points; None where there is no such
            suite, or where the target did not rise, so that nobody would take the candidate.
    """

    sites: tuple[Site, ...]
    strength: float
    share: float
    undefined: float
    ratio: float
    kl: float | None = None
    harm: float | None = None

    @property
    def is_defined(self) -> bool:
        """Whether at least half of the answers could be judged."""
        return self.undefined <= _MOST_UNDEFINED

    def figures(self) -> dict[str, Any]:
        """As JSON values; a number that is not finite becomes None."""
        numbers = {
            "strength": self.strength,
            "share": self.share,
            "undefined": self.undefined,
            "ratio": self.ratio,
            "kl": self.kl,
            "harm": self.harm,
        }
        return {"sites": [str(site) for site in self.sites]} | {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in numbers.items()
        }

    @classmethod
    def of_figures(cls, figures: Mapping[str, Any], *, has_kl: bool) -> Candidate:
        """From `figures`.

        Args:
            has_kl: Whether the divergence was measured: a None is then one that was not finite.
        """
        ratio, kl = figures["ratio"], figures["kl"]
        return cls(
            tuple(Site.parse(text) for text in figures["sites"]),
            figures["strength"],
            figures["share"],
            figures["undefined"],
            # No cap allows it, as none allows the infinity or NaN that it was.
            math.inf if ratio is None else ratio,
            math.inf if kl is None and has_kl else kl,
            figures["harm"],
        )

    def __str__(self) -> str:
        return f"{' '.join(map(str, self.sites))} at {self.strength:g}: {self.share:.0f} %"


@dataclass(frozen=True, slots=True)
class Caps:
    """Side effects past which a candidate is not taken, however far it goes.

    Attributes:
        perplexity: Most that the perplexity of the plain model's own answers may rise, as a ratio.
        kl: Most nats a token that the model may diverge along those answers; None: no cap.
        harm: Most points that a suite which should stay low may rise.
    """

    perplexity: float
    kl: float | None = None
    harm: float = math.inf

    def allow(self, candidate: Candidate) -> bool:
        """Whether a candidate keeps to the caps, with at least half of its answers defined."""
        return (
            candidate.is_defined
            and candidate.ratio <= self.perplexity
            and (self.kl is None or (candidate.kl is not None and candidate.kl <= self.kl))
            and (candidate.harm is None or candidate.harm <= self.harm)
        )

    def __str__(self) -> str:
        parts = [f"keeps the perplexity within {self.perplexity:g} times the plain model's"]
        if self.kl is not None:
            parts.append(f"the KL divergence within {self.kl:g} nats a token")
        if math.isfinite(self.harm):
            parts.append(f"the rise of what should stay low within {self.harm:g} points")
        return ", ".join(parts)


def candidate_sites(
    reduction: Reduction,
    *,
    heads: bool,
    by: RankBy = "auroc",
    behaviours: Sequence[Reduction] = (),
) -> list[Site]:
    """Heads or layers of a reduction, best first by a score on its validation rows.

    Those that may not be published are left out: whose sign is in doubt, and at which there is no
    direction, or none of a behaviour, as at the embedding of a token that all prompts share.

    Args:
        behaviours: The reductions of ``publish.norm_of``.

    Raises:
        InvalidInput: No such site was captured, or all are left out.
    """
    ranked = reduction.ranked(heads=heads, by=by)
    usable = set.intersection(*map(_sites_with_direction, (reduction, *behaviours)))
    usable -= set(reduction.signs_in_doubt)
    sites = [Site.parse(row["site"]) for row in ranked if row["site"] in usable]
    if not sites:
        raise InvalidInput(
            f"none of the {len(ranked)} {'heads' if heads else 'layers'} of reduction "
            f"{reduction.digest[:12]} may be published: each has a sign in doubt, or no direction "
            "there or in a reduction of publish.norm_of; capture other streams or layers, or "
            "choose another reduce.method",
            kind="select_sites",
        )
    return sites


def _sites_with_direction(reduction: Reduction) -> set[str]:
    rows = reduction.scores.select(["site", "norm"]).to_pylist()
    return {row["site"] for row in rows if row["norm"] > 0}


def choose(candidates: Sequence[Candidate], caps: Caps, *, slack: float = 1.0) -> Candidate:
    """Furthest within the caps; among those within `slack` points, the least perplexity.

    Raises:
        GateRefused: No candidate is within the caps with at least half of its answers defined.
    """
    allowed = [c for c in candidates if caps.allow(c)]
    if not allowed:
        raise GateRefused(
            f"none of {len(candidates)} candidates {caps} with at least half of its answers "
            f"defined ({_least(candidates)}); try weaker strengths or another cap",
            kind="perplexity_cap",
        )
    most = max(c.share for c in allowed)
    return min((c for c in allowed if c.share >= most - slack), key=lambda c: (c.ratio, c.strength))


def _least(candidates: Sequence[Candidate]) -> str:
    """The least cost of the candidates that could be judged, for a message."""
    defined = [c for c in candidates if c.is_defined]
    if not defined:
        return "there were none with"
    parts = [f"the least perplexity of {len(defined)} was {min(c.ratio for c in defined):.2f}"]
    if kls := [c.kl for c in defined if c.kl is not None]:
        parts.append(f"the least KL {min(kls):.3g}")
    if harms := [c.harm for c in defined if c.harm is not None]:
        parts.append(f"the least rise {min(harms):.0f}")
    return ", ".join(parts)
