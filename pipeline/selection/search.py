"""Searches over sites: each alone, all combinations of a few, and forward, one more at a time.

A search asks for candidates through a function, and knows neither models nor suites.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from pipeline.selection.candidates import Candidate, Caps, choose
from steering_service.core.site import Site

Measure = Callable[[tuple[Site, ...], float], Candidate]
"""Measures sites that are steered together at a strength."""

SIGMAS: Final = (4.0, 8.0, 16.0, 32.0, 64.0)
"""Strengths in standard deviations of a head's projections (HSI's own run up to 150; METHODS 1)."""
MULTIPLES: Final = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Strengths in lengths of a direction, such as mean differences."""


def sweep_sites(
    sites: Sequence[Site], strengths: Sequence[float], measure: Measure
) -> list[Candidate]:
    """Each site alone at every strength: HSI's causal sweep (arXiv 2502.05945; METHODS 1).

    Returns:
        By site, then strength, in the given orders.
    """
    return [measure((site,), strength) for site in sites for strength in strengths]


def best_shares(candidates: Sequence[Candidate], caps: Caps | None = None) -> dict[Site, float]:
    """The best share of each site alone over the strengths, in points.

    Args:
        candidates: Of one site each.
        caps: A strength past them does not count.

    Returns:
        By site, in their order; NaN where no strength counts. A strength at which most answers are
        undefined never does.
    """
    best: dict[Site, float] = {}
    for candidate in candidates:
        (site,) = candidate.sites
        before = best.setdefault(site, math.nan)
        counts = candidate.is_defined if caps is None else caps.allow(candidate)
        if counts and not before >= candidate.share:
            best[site] = candidate.share
    return best


def leading_sites(best: Mapping[Site, float], num: int) -> list[Site]:
    """The sites of the best shares, best first, as they come among equals; NaN comes last."""
    return sorted(best, key=lambda site: math.inf if math.isnan(best[site]) else -best[site])[:num]


def combinations(sites: Sequence[Site], most: int) -> list[tuple[Site, ...]]:
    """All combinations of 1 to `most` sites, small ones first."""
    return [
        combination
        for size in range(1, most + 1)
        for combination in itertools.combinations(sites, size)
    ]


def forward_search(
    sites: Sequence[Site],
    strengths: Sequence[float],
    measure: Measure,
    *,
    caps: Caps,
    most: int,
    margin: float = 1.0,
) -> list[Candidate]:
    """Begin with the best site alone, and add the one that helps most, while that helps.

    The sites of a step share one strength, which is chosen anew in every step: what two heads do
    together at a strength, one does alone at another.

    Args:
        sites: What is chosen among.
        strengths: Of each step.
        caps: A candidate past them is never taken.
        most: Sites in the end, at most.
        margin: Points by which a further site must raise the share.

    Returns:
        What each step came to, with a site more each; the last is the outcome.

    Raises:
        GateRefused: No site alone is within the caps.
    """
    steps = [choose(sweep_sites(sites, strengths, measure), caps, slack=0.0)]
    while len(steps[-1].sites) < most and steps[-1].share + margin < 100.0:
        before = steps[-1]
        found = [
            measure(tuple(sorted((*before.sites, site))), strength)
            for site in sites
            if site not in before.sites
            for strength in strengths
        ]
        allowed = [candidate for candidate in found if caps.allow(candidate)]
        if not allowed:
            break
        best = choose(allowed, caps, slack=0.0)
        if best.share <= before.share + margin:
            break
        steps.append(best)
    return steps


def most_measured(num_sites: int, num_strengths: int, most: int) -> int:
    """How many candidates `forward_search` measures at most."""
    most = min(most, num_sites)
    return num_strengths * sum(num_sites - taken for taken in range(most))
