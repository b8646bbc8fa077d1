"""From a Reduction to an Artifact: which directions become Interventions, and with which limits."""

from __future__ import annotations

from typing import Any

from pipeline.config import PublishSection
from pipeline.errors import InvalidInput
from pipeline.extraction.models import ModelInfo
from pipeline.reduction.results import Reduction
from pipeline.reduction.sparse import top_fraction
from steering_service.core.artifact import Artifact, ModelReference, Policy, build
from steering_service.core.intervention import Intervention
from steering_service.core.site import Site


def build_artifact(
    reduction: Reduction, section: PublishSection, *, name: str, model: ModelInfo
) -> Artifact:
    """Make the artifact that a run file's [publish] section describes.

    Args:
        reduction: Where the directions come from.
        section: Sites, how many entries of their directions are kept, how they are applied, and the
            strength limits that nodes enforce.
        name: For people.
        model: The model that the directions were fitted on.

    Raises:
        NotFound: A site was not captured.
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
    directions = [
        top_fraction(
            reduction.direction(site), section.keep_fraction, match_norm=section.match_norm
        )
        for site in sites
    ]
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
