"""Select: which sites of a reduction are steered, and how strongly.

    score     by a held-out score of the reduction; nothing is run
    sweep     each site alone at several strengths, answers generated and judged (HSI, METHODS 1)
    forward   from the best site on, one more at a time, while that helps
    refusal   the rules for a refusal direction (METHODS 6)

All of them choose on validation prompts. What is measured is kept at once, so that a run which is
stopped goes on where it was; and what is applied is what `steerage publish` would publish.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from pipeline.config import PublishSection
from pipeline.errors import InvalidInput
from pipeline.extraction.models import ModelInfo
from pipeline.reduction.artifacts import build_artifact
from pipeline.reduction.results import RankBy, Reduction
from pipeline.selection.bench import Bench
from pipeline.selection.candidates import Candidate, Caps, candidate_sites, choose
from pipeline.selection.journal import Journal
from pipeline.selection.refusal import RefusalCandidate, RefusalRules, choose_refusal
from pipeline.selection.refusal_bench import RefusalBench
from pipeline.selection.results import SiteSelection
from pipeline.selection.search import (
    MULTIPLES,
    SIGMAS,
    best_shares,
    forward_search,
    leading_sites,
    most_measured,
    sweep_sites,
)
from steering_service.core.direction import Direction
from steering_service.core.intervention import Intervention
from steering_service.core.site import Site
from store.location import Location

MEASUREMENT_SCHEMA: Final = 1
_NOT_APPLIED: Final = {"sites", "norm_of", "min_strength", "max_strength"}
"""Fields of [publish] that are said of each candidate, or that change nothing that it does."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a search over sites is bound by.

    Attributes:
        heads: Whether heads are chosen among, or layers.
        strengths: What each candidate is tried at.
        top: Sites that a forward search chooses among, the best of `start`.
        most: Sites of its outcome, at most.
        margin: Points by which a further site must raise the target.
        start: What gives the `top` sites: the sweep of all, or the reduction's AUROC.
    """

    heads: bool
    strengths: tuple[float, ...]
    caps: Caps
    top: int = 8
    most: int = 4
    margin: float = 1.0
    start: Literal["sweep", "score"] = "sweep"

    def record(self, by: Literal["sweep", "forward"]) -> dict[str, Any]:
        """As JSON values: part of a selection's name."""
        caps = self.caps
        common = {
            "heads": self.heads,
            "strengths": list(self.strengths),
            "caps": {
                "perplexity": caps.perplexity,
                "kl": caps.kl,
                "harm": caps.harm if math.isfinite(caps.harm) else None,
            },
        }
        if by == "sweep":
            return common
        more = {"top": self.top, "most": self.most, "margin": self.margin, "start": self.start}
        return common | more


def applied_section(section: PublishSection, *, heads: bool) -> PublishSection:
    """How candidates are applied: as [publish] says; what it leaves open, as the method does.

    Heads are steered in standard deviations at the last position (HSI and ITI, METHODS 1), layers
    as a run file's defaults say (CAA, METHODS 5).
    """
    of_method: dict[str, Any] = {"strength_unit": "sigma", "positions": "last"} if heads else {}
    if section.operation == "project_out":
        of_method.pop("strength_unit", None)
    left_open = set(of_method) - section.model_fields_set
    return section.model_copy(update={name: of_method[name] for name in left_open})


def default_strengths(section: PublishSection) -> tuple[float, ...]:
    """Strengths that suit the unit.

    Raises:
        InvalidInput: The unit is one of activations, whose size differs from model to model.
    """
    if section.operation == "project_out":
        return (1.0,)
    if section.strength_unit == "unit":
        raise InvalidInput(
            'publish.strength_unit = "unit" counts in activation units, which no default suits: '
            "name --strengths",
            kind="select_strengths",
        )
    return SIGMAS if section.strength_unit == "sigma" else MULTIPLES


def measurement_request(
    reduction: Reduction,
    section: PublishSection,
    suites: dict[str, Any],
    *,
    has_kl: bool,
    behaviours: Sequence[Reduction] = (),
) -> dict[str, Any]:
    """What every measured candidate depends on beside its sites and strength.

    Args:
        section: From `applied_section`.
        suites: From `ValidationFile.record`.
        has_kl: Whether the divergence is measured too.
        behaviours: The reductions of `section.norm_of`.
    """
    request = {
        "schema_version": MEASUREMENT_SCHEMA,
        "reduction": reduction.digest,
        "apply": section.model_dump(mode="json", exclude=_NOT_APPLIED),
        "suites": suites,
        "kl": has_kl,
    }
    if behaviours:
        request["norm_of"] = [other.digest for other in behaviours]
    return request


def most_candidates(by: Literal["sweep", "forward"], num_sites: int, settings: Settings) -> int:
    """How many candidates a search measures at most."""
    num_strengths = len(settings.strengths)
    swept = num_sites * num_strengths
    if by == "sweep":
        return swept
    top = min(settings.top, num_sites)
    forward = most_measured(top, num_strengths, settings.most)
    # The forward search finds its single sites in the sweep.
    return forward if settings.start == "score" else swept + forward - top * num_strengths


def select_by_score(
    root: Location, reduction: Reduction, *, heads: bool, by: RankBy, num: int
) -> SiteSelection:
    """The sites of the best held-out scores, as ITI takes the heads of its best probes (METHODS 5).

    Raises:
        InvalidInput: No such site, or no validation row to score it on.
    """
    # Says why there is nothing to prefer.
    reduction.best(heads=heads, by=by)
    ranked = reduction.ranked(heads=heads, by=by)
    sites = candidate_sites(reduction, heads=heads, by=by)[:num]
    scores = {row["site"]: row[f"{by}_validation"] for row in ranked}
    shown = ", ".join(f"{site} {scores[str(site)]:.3f}" for site in sites[:3])
    return SiteSelection.write(
        root,
        by="score",
        request={"reduction": reduction.digest, "heads": heads, "score": by, "num": num},
        sites=sites,
        strength=None,
        why=f"the best of {len(ranked)} by {by} on validation rows: {shown}",
        tried=[
            {name: _finite(value) for name, value in row.items() if not isinstance(value, list)}
            for row in ranked
        ],
        publish={"sites": [str(site) for site in sites]},
    )


def select_by_search(
    by: Literal["sweep", "forward"],
    root: Location,
    reduction: Reduction,
    section: PublishSection,
    settings: Settings,
    *,
    bench: Bench,
    journal: Journal,
    model: ModelInfo,
    behaviours: Sequence[Reduction] = (),
    on_measured: Callable[[Candidate], None] = lambda candidate: None,
) -> SiteSelection:
    """Sweep all sites, or search forward among the best.

    Args:
        section: From `applied_section`.
        journal: Of `measurement_request`; what it holds is not measured again.
        behaviours: The reductions of `section.norm_of`.
        on_measured: Called with every candidate, those found included.

    Raises:
        NotFound: The Moments that keep_by = "t" reads are gone.
        InvalidInput: No such site was captured, or keep_fraction leaves nothing of a direction.
        GateRefused: No single site is within the caps.
    """
    has_kl = settings.caps.kl is not None
    tried: dict[tuple[tuple[Site, ...], float], Candidate] = {}

    def measure(sites: tuple[Site, ...], strength: float) -> Candidate:
        if (sites, strength) in tried:
            return tried[sites, strength]
        key = {"sites": [str(site) for site in sites], "strength": strength}

        def figures() -> dict[str, Any]:
            items = _items(reduction, section, sites, model, behaviours)
            # keep_over = "all" may keep nothing of a site. It is named nonetheless: without it,
            # other entries of the others would be kept.
            return replace(bench.measured(items, strength), sites=sites).figures()

        found = Candidate.of_figures(journal.measured(key, figures), has_kl=has_kl)
        tried[sites, strength] = found
        on_measured(found)
        return found

    sites = candidate_sites(reduction, heads=settings.heads, behaviours=behaviours)
    caps = settings.caps
    steps: list[Candidate] = []
    if by == "sweep":
        chosen = choose(sweep_sites(sites, settings.strengths, measure), caps)
        how = f"the furthest of {len(sites)} sites, each alone"
    else:
        leading = sites[: settings.top]
        if settings.start == "sweep":
            singles = sweep_sites(sites, settings.strengths, measure)
            choose(singles, caps)
            best = best_shares(singles, caps)
            leading = [s for s in leading_sites(best, settings.top) if not math.isnan(best[s])]
        steps = forward_search(
            leading,
            settings.strengths,
            measure,
            caps=caps,
            most=settings.most,
            margin=settings.margin,
        )
        chosen = steps[-1]
        how = f"a forward search among the best {len(leading)} by {settings.start}"
    return SiteSelection.write(
        root,
        by=by,
        request={"measurements": journal.digest} | settings.record(by),
        sites=chosen.sites,
        strength=chosen.strength,
        why=(
            f"{how}, within the caps, {len(tried)} candidates in all: the target goes from "
            f"{bench.plain_share:.1f} to {chosen.share:.1f} % at strength {chosen.strength:g}, at "
            f"{chosen.ratio:.3f} times the plain model's perplexity"
        ),
        tried=[candidate.figures() for candidate in tried.values()],
        steps=[step.figures() for step in steps],
        plain={"share": bench.plain_share, "perplexity": _finite(bench.plain_perplexity)},
        publish=_publish_fields(section, chosen),
        measurements=journal.digest,
    )


def select_refusal(
    root: Location,
    candidates: Sequence[tuple[int, Direction]],
    rules: RefusalRules,
    *,
    bench: RefusalBench,
    journal: Journal,
    model: ModelInfo,
    on_measured: Callable[[RefusalCandidate], None] = lambda candidate: None,
) -> SiteSelection:
    """The direction that the rules for a refusal direction choose.

    Args:
        candidates: Position and direction, from `positions.position_directions`.
        journal: Of the candidates' cache and prompts.

    Raises:
        GateRefused: No candidate keeps to the rules.
    """
    found = []
    for position, direction in candidates:
        key = {"site": str(direction.site), "position": position}
        figures = journal.measured(
            key,
            lambda p=position, d=direction: bench.measured(p, d).figures(),  # type: ignore[misc]
        )
        found.append(RefusalCandidate.of_figures(dict(figures)))
        on_measured(found[-1])
    chosen = choose_refusal(found, model.num_layers, rules)
    kept = [c for c in found if not rules.objections(c, model.num_layers)]
    several = len({position for position, _ in candidates}) > 1
    harmful, harmless = bench.num_prompts
    return SiteSelection.write(
        root,
        by="refusal",
        request=refusal_request(journal.digest, rules),
        sites=[chosen.site],
        strength=1.0,
        why=(
            f"the lowest refusal score under ablation among the {len(kept)} of {len(found)} "
            f"directions that keep to the rules: {bench.plain_harmful:+.2f} to "
            f"{chosen.ablated:+.2f} on {harmful} harmful prompts, at a KL of {chosen.kl:.3f} on "
            f"{harmless} harmless ones, whose score goes from {bench.plain_harmless:+.2f} to "
            f"{chosen.induced:+.2f} where it is added"
        ),
        tried=[c.figures() | {"objections": rules.objections(c, model.num_layers)} for c in found],
        plain={"harmful": bench.plain_harmful, "harmless": bench.plain_harmless},
        publish={"sites": [str(chosen.site)], "positions": "all"},
        # The run's own reduction is of all its tokens together.
        capture={"tokens": str(chosen.position)} if several else {},
        measurements=journal.digest,
    )


def refusal_request(measurements: str, rules: RefusalRules) -> dict[str, Any]:
    """What a selection by the rules depends on."""
    return {
        "measurements": measurements,
        "max_kl": rules.max_kl,
        "min_induced": rules.min_induced,
        "last_share": rules.last_share,
    }


def _items(
    reduction: Reduction,
    section: PublishSection,
    sites: Sequence[Site],
    model: ModelInfo,
    behaviours: Sequence[Reduction],
) -> Sequence[Intervention]:
    """What `steerage publish` would publish at these sites."""
    chosen = section.model_copy(update={"sites": [str(site) for site in sites]})
    artifact = build_artifact(
        reduction, chosen, name="candidate", model=model, behaviours=behaviours
    )
    return artifact.interventions


def _publish_fields(section: PublishSection, chosen: Candidate) -> dict[str, Any]:
    fields: dict[str, Any] = {"sites": [str(site) for site in chosen.sites]}
    # What `applied_section` may have changed; the rest of the section stays as it is.
    fields |= {name: getattr(section, name) for name in ("operation", "strength_unit", "positions")}
    low, high = sorted((0.0, chosen.strength))
    # Limits that the node allows the strength within; never narrower than they were.
    return fields | {
        "min_strength": min(section.min_strength, low),
        "max_strength": max(section.max_strength, high),
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
