"""From a Reduction to an Artifact: which directions become Interventions, and with which limits."""

from __future__ import annotations

from pipeline.config import PublishSection
from pipeline.extraction.models import ModelInfo
from pipeline.reduction.results import Reduction
from steering_service.core.artifact import Artifact, ModelReference, Policy, build
from steering_service.core.intervention import Intervention
from steering_service.core.site import Site


def build_artifact(
    reduction: Reduction, section: PublishSection, *, name: str, model: ModelInfo
) -> Artifact:
    """Make the artifact that a run file's [publish] section describes.

    Args:
        reduction: Where the directions come from.
        section: Sites, how they are applied, and the strength limits that nodes enforce.
        name: For people.
        model: The model that the directions were fitted on.

    Raises:
        NotFound: A site was not captured.
        InvalidInput: No layer or head to choose from, or no validation row to choose on.
    """
    if isinstance(section.sites, str):
        sites = [reduction.best(heads=section.sites == "best_head")]
    else:
        sites = [Site.parse(text) for text in section.sites]
    return build(
        [
            Intervention(
                reduction.direction(site),
                operation=section.operation,
                strength_unit=section.strength_unit,
                positions=section.positions,
            )
            for site in sites
        ],
        name=name,
        model=ModelReference(name=model.name, fingerprint=model.fingerprint),
        policy=Policy(min_strength=section.min_strength, max_strength=section.max_strength),
        parents=[reduction.capture_digest],
        lineage={
            "reduction": reduction.digest,
            "method": reduction.method,
            "rows": dict(reduction.counts),
        },
    )
