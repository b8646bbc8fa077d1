"""From a Reduction to an Artifact: which directions become Interventions, and with which limits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce as fold
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import PublishSection
from pipeline.errors import InvalidInput
from pipeline.extraction.models import ModelInfo
from pipeline.reduction.directions import match_norms
from pipeline.reduction.methods import OF_PAIRS
from pipeline.reduction.moment_store import StoredMoments
from pipeline.reduction.results import Reduction
from pipeline.reduction.sparse import paired_t, top_fraction, top_fraction_over, welch_t
from steering_service.core.artifact import Artifact, ModelReference, Policy, build
from steering_service.core.direction import Direction
from steering_service.core.intervention import Intervention
from steering_service.core.site import Site


def build_artifact(
    reduction: Reduction,
    section: PublishSection,
    *,
    name: str,
    model: ModelInfo,
    behaviours: Sequence[Reduction] = (),
) -> Artifact:
    """Make the artifact that a run file's [publish] section describes.

    Args:
        reduction: Where the directions come from.
        section: Sites, how many entries of their directions are kept, how they are applied, and the
            strength limits that nodes enforce.
        name: For people.
        model: The model that the directions were fitted on.
        behaviours: The reductions of `section.norm_of`.

    Raises:
        NotFound: A site was not captured, or the Moments that t statistics are of are gone.
        InvalidInput: No layer or head to choose from, no validation row to choose on,
            keep_fraction leaves nothing of a direction, or a direction's sign is in doubt.
    """
    if isinstance(section.sites, str):
        sites = [reduction.best(heads=section.sites == "best_head")]
    else:
        sites = [Site.parse(text) for text in section.sites]
    if doubtful := sorted({str(site) for site in sites} & set(reduction.signs_in_doubt)):
        raise InvalidInput(
            f"reduction {reduction.digest[:12]}: at {', '.join(doubtful)} most training pairs and "
            "the class means disagree about which side is the positive class, so a positive "
            'strength may do the opposite; choose other sites or reduce.method = "probe"',
            kind="sign_in_doubt",
        )
    directions = [reduction.direction(site) for site in sites]
    if behaviours:
        directions = [
            match_norms([direction, *(other.direction(direction.site) for other in behaviours)])[0]
            for direction in directions
        ]
    if section.keep_fraction < 1:
        directions = _kept(reduction, section, directions)
    lineage: dict[str, Any] = {
        "reduction": reduction.digest,
        "method": reduction.method,
        "rows": dict(reduction.counts),
    }
    if reduction.parameters:
        lineage["parameters"] = dict(reduction.parameters)
    masks = {
        str(item.site): item.lineage["masks"] for item in directions if "masks" in item.lineage
    }
    if masks:
        lineage["masks"] = masks
    if behaviours:
        lineage["norm_of"] = [other.digest for other in behaviours]
    return build(
        [
            Intervention(
                direction,
                operation=section.operation,
                strength_unit=section.strength_unit,
                positions=section.positions,
            )
            for direction in directions
        ],
        name=name,
        model=ModelReference(name=model.name, fingerprint=model.fingerprint),
        policy=Policy(min_strength=section.min_strength, max_strength=section.max_strength),
        parents=[reduction.capture_digest],
        lineage=lineage,
    )


def _kept(
    reduction: Reduction, section: PublishSection, directions: Sequence[Direction]
) -> list[Direction]:
    """The directions with a share of their entries."""
    fraction, match_norm = section.keep_fraction, section.match_norm
    statistics: list[NDArray[np.float64] | None] = [None] * len(directions)
    if section.keep_by == "t":
        t_LW = _t_statistics(reduction)
        statistics = [reduction.at_site(t_LW, direction.site) for direction in directions]
    if section.keep_over == "site":
        return [
            top_fraction(direction, fraction, match_norm=match_norm, statistic_D=statistic_D)
            for direction, statistic_D in zip(directions, statistics, strict=True)
        ]
    known = [statistic_D for statistic_D in statistics if statistic_D is not None]
    return top_fraction_over(directions, fraction, match_norm=match_norm, statistics=known or None)


def _t_statistics(reduction: Reduction) -> dict[str, NDArray[np.float64]]:
    """Float64 [L, W] by stream: of pairs' differences for methods of pairs, else of the classes."""
    root = reduction.root
    captures = (reduction.capture_digest, *reduction.extends)
    moments = fold(StoredMoments.merge, [StoredMoments.open(root, one) for one in captures])
    t_LW = {}
    for stream in reduction.directions_LW:
        pairs = moments.pairs(stream) if reduction.method in OF_PAIRS else None
        if pairs is not None:
            t_LW[stream] = paired_t(pairs)
        else:
            sides = (moments.of(stream, label=label) for label in (True, False))
            t_LW[stream] = welch_t(*sides)
    return t_LW
