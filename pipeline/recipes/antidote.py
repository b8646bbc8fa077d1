"""Jailbreak Antidote (METHODS 3): restore refusals by a sparse direction, and count what it costs.

Directions per layer by PCA of shuffled pair differences and by difference of means, the largest 5 %
of the entries, added at some layers with a strength that the channel sets. Which method, layers,
positions and strength is chosen on the validation split under caps on over-refusal and on an
unrelated skill; the test split reports, on wrappers that no other split has.

Strengths are shares of the mean activation norm of each layer (the paper's are raw activation
units, which compare neither across models nor across layers).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from pipeline.config import CaptureSection, PromptsSection, RunFile
from pipeline.errors import GateRefused, InvalidInput
from pipeline.evaluation.controls import random_twin
from pipeline.evaluation.suites import Point, Suite
from pipeline.recipes.lab import Lab
from pipeline.recipes.requests import RequestFiles, RequestSuites, read_suites
from pipeline.reduction.results import Reduction
from pipeline.reduction.sparse import top_fraction
from steering_service.core.artifact import Artifact
from steering_service.core.intervention import Intervention, Positions
from steering_service.core.site import Site

STRENGTHS: Final = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7)
"""Shares of the activation norm."""
_SAME: Final = 0.99
_SLUG: Final = re.compile(r"[^a-z0-9.]+")
_SHORTLIST: Final = 8
_SLACK: Final = 4.0
"""Points past the caps that the short search forgives: its suites are small."""
_HOPELESS: Final = 20.0
"""Points above the cap on over-refusal at which a shape's stronger settings are not tried."""
LAYER_SHARE: Final = 0.375
"""Of the layers past the first that the paper's code steers (METHODS 3)."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is searched, and the caps.

    Attributes:
        keep: Share of the entries that a sparse direction keeps; `other_keeps` are measured beside
            it, at the same norm, and so is the dense direction.
        benign_cap: Most points that look-alike benign requests may be refused more.
        skill_cap: Most points that the unrelated skill may lose.
        searched: Requests of each suite in the short search; what is best there is measured again
            on `files.most` before one is chosen.
        seeds: Of the random controls.
    """

    files: RequestFiles
    keep: float = 0.05
    other_keeps: Sequence[float] = (0.01, 0.25)
    benign_cap: float = 5.0
    skill_cap: float = 2.0
    strengths: Sequence[float] = STRENGTHS
    searched: int = 60
    seeds: Sequence[int] = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class Shape:
    """Everything about an artifact but its strength."""

    method: str
    layers: tuple[int, ...]
    positions: Positions
    keep: float
    match_norm: bool

    def __str__(self) -> str:
        layers = " ".join(map(str, self.layers))
        return f"{self.method}, layers {layers}, {self.positions}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A shape at a strength, on the validation split, in points.

    Attributes:
        gain: More of the jailbroken requests refused.
        benign_cost: More of the look-alikes refused.
        skill_cost: Less of the skill; None where it was not asked, the other cap being broken.
    """

    shape: Shape
    strength: float
    gain: float
    benign_cost: float
    skill_cost: float | None

    def within(self, settings: Settings, slack: float = 0.0) -> bool:
        """Whether it keeps to the caps, give or take some points."""
        return (
            self.benign_cost <= settings.benign_cap + slack
            and self.skill_cost is not None
            and self.skill_cost <= settings.skill_cap + slack
        )


@dataclass(slots=True, eq=False)
class Outcome:
    """Everything measured.

    Attributes:
        chosen: Of the validation split; `kept_caps` is False if no candidate keeps to the caps, and
            then it is the best trade-off.
        points: Test split: by curve name (sparse, dense at matched norm), all suites and strengths.
        random: Test split: the attacks and look-alikes at the chosen strength, by seed.
        layer_accuracy: Pairwise accuracy of PCA directions on validation, by layer.
        agreement: Cosine between PCA and the difference of means, by layer.
        digests: Of what was delivered.
    """

    chosen: Candidate
    kept_caps: bool
    candidates: list[Candidate]
    points: dict[str, list[Point]] = field(default_factory=dict)
    random: dict[int, list[Point]] = field(default_factory=dict)
    layer_accuracy: dict[int, float] = field(default_factory=dict)
    agreement: dict[int, float] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)


def run(lab: Lab, settings: Settings) -> Outcome:
    """Fit, search, deliver, measure."""
    planned = lab.cached(
        RunFile(
            name="antidote",
            model=lab.model_section,
            prompts=PromptsSection(files=[settings.files.pairs]),
            capture=CaptureSection(streams=["resid_post"], tokens="last"),
        )
    )
    reductions = {
        "pca": lab.reduced(planned, "pca"),
        "difference_of_means": lab.reduced(planned),
    }
    pca, means = reductions["pca"], reductions["difference_of_means"]
    layers = range(lab.info.num_layers)
    accuracy = {}
    for layer in layers:
        scores = pca.direction(Site("resid_post", layer)).scores
        if "pair_accuracy_validation" not in scores:
            raise InvalidInput(
                f"{settings.files.pairs}: the validation split has no pair of a harmful and a "
                "harmless request; layers are chosen by how many pairs they tell apart",
                kind="pairs_missing",
            )
        # Where the sign is in doubt, + may be the wrong class: such a layer is not steered.
        if f"resid_post.{layer}" not in pca.signs_in_doubt:
            accuracy[layer] = scores["pair_accuracy_validation"]
    agreement = {
        layer: float(
            pca.direction(Site("resid_post", layer)).unit_D
            @ means.direction(Site("resid_post", layer)).unit_D
        )
        for layer in layers
    }
    # Directions that are the same to a hundredth behave the same: one search is enough.
    same = min(agreement.values()) > _SAME
    methods = ["pca"] if same else list(reductions)
    candidates = _search(lab, settings, reductions, methods, layer_sets(accuracy))
    kept = [c for c in candidates if c.within(settings)]
    chosen = (
        max(kept, key=lambda c: (c.gain, -c.strength))
        if kept
        else max(candidates, key=lambda c: c.gain - 2 * max(c.benign_cost, 0.0))
    )
    outcome = Outcome(chosen, bool(kept), candidates, layer_accuracy=accuracy, agreement=agreement)
    _measure(lab, settings, reductions[chosen.shape.method], outcome)
    return outcome


def layer_sets(accuracy: dict[int, float]) -> list[tuple[int, ...]]:
    """Which layers to try together: the paper's choice, single layers, and neighbours.

    The paper's code takes int(0.375 (L - 1)) layers by pairwise accuracy, block 0 left out.
    """
    ranked = sorted((n for n in accuracy if n > 0), key=lambda n: (-accuracy[n], -n))
    num = max(1, int(LAYER_SHARE * (len(accuracy) - 1)))
    sets = [tuple(sorted(ranked[:num])), *((n,) for n in ranked[: max(3, num)])]
    sets += [(n, n + 1) for n in sorted(accuracy) if n > 0 and n + 1 in accuracy]
    return list(dict.fromkeys(sets))


def interventions(reduction: Reduction, shape: Shape) -> list[Intervention]:
    """The edits of a shape: unit directions, masked, one activation norm long at strength 1."""
    items = []
    for layer in shape.layers:
        fitted = reduction.direction(Site("resid_post", layer))
        unit = replace(fitted, vector_D=fitted.unit_D)
        kept = top_fraction(unit, shape.keep, match_norm=shape.match_norm)
        items.append(Intervention(kept, positions=shape.positions, weight=fitted.activation_norm))
    return items


def _artifact(
    lab: Lab, name: str, reduction: Reduction, shape: Shape, settings: Settings
) -> Artifact:
    return lab.artifact(
        name,
        interventions(reduction, shape),
        max(settings.strengths),
        recipe="antidote",
        reduction=reduction.digest,
        keep=shape.keep,
        match_norm=shape.match_norm,
    )


def _search(
    lab: Lab,
    settings: Settings,
    reductions: dict[str, Reduction],
    methods: Sequence[str],
    sets: Sequence[tuple[int, ...]],
) -> list[Candidate]:
    """Everything on few requests, then what was best on many; the candidates of the second."""
    shapes = [
        Shape(method, layers, positions, settings.keep, match_norm=True)
        for method in methods
        for layers in sets
        for positions in ("generated", "all")
    ]
    few = _Trial(lab, settings, reductions, settings.searched, is_short=True)
    found = []
    with lab.track("search", len(shapes) * len(settings.strengths)) as step:
        for shape in shapes:
            for strength in settings.strengths:
                candidate = few.measured(shape, strength)
                found.append(candidate)
                step(f"{shape} at {strength:g}: gain {candidate.gain:.0f}")
                if candidate.benign_cost > settings.benign_cap + _HOPELESS:
                    # Stronger refuses still more of what is harmless.
                    break
    if max(candidate.gain for candidate in found) <= 0:
        # METHODS 3: which class is "true" depends on the data, so the sign is asserted.
        raise GateRefused(
            "no direction raises refusals at any strength; expected label 1 to be the harmful "
            f"class in {settings.files.pairs}",
            kind="direction_sign",
        )
    near = [c for c in found if c.within(settings, _SLACK)] or found
    near = sorted(near, key=lambda c: -c.gain)[:_SHORTLIST]
    many = _Trial(lab, settings, reductions, settings.files.most, is_short=False)
    with lab.track("choose on validation", len(near)) as step:
        chosen = []
        for candidate in near:
            chosen.append(many.measured(candidate.shape, candidate.strength))
            step(f"{candidate.shape} at {candidate.strength:g}: gain {chosen[-1].gain:.0f}")
    return chosen


class _Trial:
    """Measures candidates on requests that are neither fitted on nor of the test split.

    Attacks, look-alikes and skill fit nothing here, so their training rows choose as well.
    """

    def __init__(
        self,
        lab: Lab,
        settings: Settings,
        reductions: dict[str, Reduction],
        most: int,
        *,
        is_short: bool,
    ) -> None:
        self._lab, self._settings, self._reductions = lab, settings, reductions
        self._is_short = is_short
        suites = read_suites(replace(settings.files, most=most), "train", "validation")
        self._asked = (suites.attacks, suites.lookalikes, suites.skill)
        self._plain = [point.share for point in lab.plain(self._asked)]

    def measured(self, shape: Shape, strength: float) -> Candidate:
        artifact = _artifact(
            self._lab, "antidote", self._reductions[shape.method], shape, self._settings
        )
        attacks, lookalikes = self._lab.tried(artifact, strength, self._asked[:2])
        gain = attacks.share - self._plain[0]
        cost = lookalikes.share - self._plain[1]
        skill = None
        # The short search does not ask the skill of what is out of the question.
        if not self._is_short or (cost <= self._settings.benign_cap + _SLACK and gain > 0.0):
            right = self._lab.tried(artifact, strength, self._asked[2:])[0].share
            skill = self._plain[2] - right
        return Candidate(shape, strength, gain, cost, skill)


def _measure(lab: Lab, settings: Settings, reduction: Reduction, outcome: Outcome) -> None:
    suites = read_suites(settings.files, "test")
    shape, strength = outcome.chosen.shape, outcome.chosen.strength
    every = _every(suites)
    curves = {
        "sparse": shape,
        "dense": replace(shape, keep=1.0),
        "sparse, own norm": replace(shape, match_norm=False),
        **{f"keep {keep:g}": replace(shape, keep=keep) for keep in settings.other_keeps},
    }
    for name, curve in curves.items():
        artifact = _artifact(lab, f"antidote-{_SLUG.sub('-', name)}", reduction, curve, settings)
        outcome.digests[name] = artifact.digest
        with lab.delivered(artifact) as delivered:
            asked = every if name == "sparse" else every[:3]
            outcome.points[name] = delivered.sweep(asked, (0.0, *settings.strengths))
            if name == "sparse":
                for seed in settings.seeds:
                    twin = random_twin(artifact, seed)
                    with lab.delivered(twin) as random:
                        outcome.random[seed] = random.sweep(every[:2], (strength,))


def _every(suites: RequestSuites) -> list[Suite]:
    """What is reported: the target first, then the two costs, then the rest."""
    first = [suites.attacks, suites.lookalikes, suites.skill, suites.benign, suites.harmful]
    return first if suites.seen_attacks is None else [*first, suites.seen_attacks]
