"""HSI, ITI and CAA on two-choice questions (METHODS 1 and 5), at one cap on perplexity.

Directions are fitted on the training split, heads are swept on training questions, and everything
that is chosen (heads, layers, strengths) is chosen on the validation split; the test split reports.

Shapes: L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import numpy as np

from pipeline.config import CaptureSection, PromptsSection, RunFile
from pipeline.errors import InvalidInput
from pipeline.evaluation.controls import random_twin
from pipeline.evaluation.generate import ChatPrompt
from pipeline.evaluation.likelihood import fluency_suites
from pipeline.evaluation.suites import AnySuite, Point, Suite, choice_suite
from pipeline.prompts.corpus import Example, read_corpus
from pipeline.recipes.lab import Lab
from pipeline.recipes.published import Published
from pipeline.recipes.trials import bench, choose
from pipeline.reduction.results import Reduction
from pipeline.selection.candidates import Candidate
from pipeline.selection.search import (
    MULTIPLES,
    SIGMAS,
    best_shares,
    combinations,
    leading_sites,
    sweep_sites,
)
from steering_service.core.artifact import Artifact
from steering_service.core.intervention import Intervention
from steering_service.core.site import Site

Method = Literal["hsi", "iti", "caa"]
METHODS: Final[tuple[Method, ...]] = ("hsi", "iti", "caa")


@dataclass(frozen=True, slots=True)
class Settings:
    """What is searched, and how hard.

    Attributes:
        data: Two-choice questions with the matching and the other answer, in CAA's format.
        neutral: Prompts whose plain answers must stay as probable as they are.
        max_share: Most heads, as a share of all.
        perplexity_cap: Most that the perplexity of the plain model's own answers may rise, as a
            ratio; the same for every method, which is what makes their shifts comparable.
        swept: Training questions of the single-head sweep.
        leading: Heads that are combined, the best of the sweep.
        most: Questions of the validation and of the test split.
        alphas: Strengths of heads, in standard deviations of their projections.
        multiples: Strengths of layers, in mean differences.
        seeds: Of the controls.
        published: Settings to take as they are, in place of searching.
        system: System prompt that asks for the behaviour: the baseline that steering has to beat.
    """

    data: Path
    neutral: Sequence[ChatPrompt]
    max_share: float = 0.05
    perplexity_cap: float = 1.1
    alphas: Sequence[float] = SIGMAS
    multiples: Sequence[float] = MULTIPLES
    swept: int = 32
    leading: int = 6
    most: int = 100
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    published: Published | None = None
    system: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """What a method came to, on the test split.

    Attributes:
        shift: Change of the share of the target choice, in points.
        ratio: Perplexity over the plain model's.
        digest: Of the artifact that the node was sent.
    """

    method: str
    candidate: Candidate
    shift: float
    plain: Point
    steered: Point
    ratio: float
    digest: str


@dataclass(slots=True, eq=False)
class Outcome:
    """Everything measured.

    Attributes:
        chosen: By method.
        random_heads: Shifts by heads drawn at random, on the test split, in points.
        random_directions: By method, shifts by random directions in place of its own.
        single_LH: Best share of each head alone over the strengths, training questions; NaN where
            mostly undefined at every strength. None without HSI's sweep.
        prompt: Share under the system prompt that asks for the behaviour, or None.
        candidates: Every candidate, by method.
        plain: Share of the plain model on the test split.
    """

    num_heads: int
    plain: float
    chosen: dict[str, Chosen] = field(default_factory=dict)
    random_heads: list[float] = field(default_factory=list)
    random_directions: dict[str, list[float]] = field(default_factory=dict)
    single_LH: np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None = None
    prompt: float | None = None
    candidates: dict[str, list[Candidate]] = field(default_factory=dict)


class Search:
    """The search of one run; see the module."""

    def __init__(self, lab: Lab, settings: Settings) -> None:
        self._lab = lab
        self._settings = settings
        corpus = read_corpus(PromptsSection(files=[settings.data]))
        by_split = {
            split: [e for e in corpus.examples if e.split == split]
            for split in ("train", "validation", "test")
        }
        for split, examples in by_split.items():
            if not examples:
                raise InvalidInput(
                    f"{settings.data}: no question in the split {split!r}; the recipe fits on "
                    "train, chooses on validation and reports on test",
                    kind="split_empty",
                )
        self._test = _questions("test", by_split["test"], settings.most)
        self._perplexity: AnySuite = fluency_suites(
            "neutral", settings.neutral, lab.model, lab.tokenizer
        )[0]
        swept = _questions("training", by_split["train"], settings.swept)
        self._swept = bench(lab, swept)
        validation = _questions("validation", by_split["validation"], settings.most)
        self._validation = bench(lab, validation, self._perplexity)

    def run(self, methods: Sequence[Method]) -> Outcome:
        """Search, deliver and measure."""
        lab, settings = self._lab, self._settings
        num_heads = lab.info.num_layers * lab.info.num_heads
        outcome = Outcome(num_heads, 0.0)
        heads: Reduction | None = None
        if {"hsi", "iti"} & set(methods):
            # HSI reads the end of the whole answer, its closing token; ITI shares site and maths.
            planned = lab.cached(self._run("heads", "z", "last", close_turn=True))
            heads = lab.reduced(planned)
        found: dict[Method, tuple[Artifact, Candidate]] = {}
        if "hsi" in methods:
            assert heads is not None
            found["hsi"] = self._hsi(heads, outcome)
        if "iti" in methods:
            assert heads is not None
            size = len(found["hsi"][1].sites) if "hsi" in found else self._most_heads
            found["iti"] = self._iti(heads, lab.reduced(planned, "probe"), size, outcome)
        if "caa" in methods:
            layers = lab.reduced(lab.cached(self._run("layers", "resid_post", "-2")))
            found["caa"] = self._caa(layers, outcome)
        for method, (artifact, candidate) in found.items():
            outcome.chosen[method] = self._measure(method, artifact, candidate)
        outcome.plain = next(iter(outcome.chosen.values())).plain.share
        self._controls(found, heads, outcome)
        if settings.system is not None:
            with lab.track("prompt baseline", 1) as step:
                outcome.prompt = lab.plain([self._test.under(settings.system)])[0].share
                step("")
        return outcome

    @property
    def _most_heads(self) -> int:
        info = self._lab.info
        return max(1, int(self._settings.max_share * info.num_layers * info.num_heads))

    def _run(self, name: str, stream: str, tokens: str, close_turn: bool = False) -> RunFile:
        return RunFile(
            name=f"choice-{name}",
            model=self._lab.model_section,
            prompts=PromptsSection(files=[self._settings.data], close_turn=close_turn),
            capture=CaptureSection(streams=[stream], tokens=tokens),  # type: ignore[list-item]
        )

    # HSI

    def _hsi(self, heads: Reduction, outcome: Outcome) -> tuple[Artifact, Candidate]:
        settings, published = self._settings, self._settings.published
        if published is not None:
            combos = [published.hsi_heads]
            alphas: Sequence[float] = [published.hsi_strength]
        else:
            single = self._single_heads(heads)
            outcome.single_LH = self._grid(single)
            leading = leading_sites(single, settings.leading)
            combos = combinations(leading, self._most_heads)
            alphas = settings.alphas
        trials = [(combo, alpha) for combo in combos for alpha in alphas]
        return self._best("hsi", trials, lambda sites: head_items(heads, sites), outcome)

    def _single_heads(self, heads: Reduction) -> dict[Site, float]:
        """Each head alone, by generation: its best share over the strengths (HSI's causal sweep).

        A strength at which most answers are undefined does not count.
        """
        info, alphas = self._lab.info, self._settings.alphas
        sites = [Site("z", i, j) for i in range(info.num_layers) for j in range(info.num_heads)]
        with self._lab.track("sweep single heads", len(sites) * len(alphas)) as step:

            def measure(chosen: tuple[Site, ...], alpha: float) -> Candidate:
                found = self._swept.measured(head_items(heads, chosen), alpha)
                step(str(found))
                return found

            return best_shares(sweep_sites(sites, alphas, measure))

    def _grid(self, single: dict[Site, float]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        info = self._lab.info
        return np.array(list(single.values())).reshape(info.num_layers, info.num_heads)

    # ITI and CAA

    def _iti(
        self, heads: Reduction, probes: Reduction, size: int, outcome: Outcome
    ) -> tuple[Artifact, Candidate]:
        """The heads whose probes are most accurate on validation, along their mean differences."""
        published = self._settings.published
        num = size if published is None else published.iti_heads
        ranked = probes.ranked(heads=True, by="accuracy")[:num]
        sites = tuple(Site.parse(row["site"]) for row in ranked)
        alphas = self._settings.alphas if published is None else [published.iti_strength]
        trials = [(sites, alpha) for alpha in alphas]
        return self._best("iti", trials, lambda chosen: head_items(heads, chosen), outcome)

    def _caa(self, layers: Reduction, outcome: Outcome) -> tuple[Artifact, Candidate]:
        """One layer, from the end of the instruction on."""
        published = self._settings.published
        if published is None:
            trials = [
                ((Site("resid_post", layer),), multiple)
                for layer in range(self._lab.info.num_layers)
                for multiple in self._settings.multiples
            ]
        else:
            trials = [((Site("resid_post", published.caa_layer),), published.caa_strength)]
        return self._best(
            "caa",
            trials,
            lambda sites: [
                Intervention(layers.direction(site), positions="generated") for site in sites
            ],
            outcome,
        )

    # What they share

    def _artifact(self, name: str, items: Sequence[Intervention], limit: float) -> Artifact:
        sites = [str(item.site) for item in items]
        return self._lab.artifact(name, items, limit, recipe=name, sites=sites)

    def _best(
        self,
        method: Method,
        trials: Sequence[tuple[tuple[Site, ...], float]],
        items: Callable[[Sequence[Site]], Sequence[Intervention]],
        outcome: Outcome,
    ) -> tuple[Artifact, Candidate]:
        """The candidate that moves the validation split furthest within the cap."""
        limit = max(strength for _, strength in trials)
        candidates = outcome.candidates.setdefault(method, [])
        with self._lab.track(f"choose {method} on validation", len(trials)) as step:
            for sites, strength in trials:
                candidates.append(self._validation.measured(items(sites), strength))
                step(str(candidates[-1]))
        if self._settings.published is not None:
            chosen = candidates[0]
        else:
            chosen = choose(candidates, self._settings.perplexity_cap)
        return self._artifact(method, items(chosen.sites), limit), chosen

    def _measure(self, method: str, artifact: Artifact, candidate: Candidate) -> Chosen:
        with self._lab.delivered(artifact) as delivered:
            strengths = (0.0, candidate.strength)
            points = delivered.sweep([self._test, self._perplexity], strengths)
        plain, plain_cost, steered, cost = points
        return Chosen(
            method,
            candidate,
            steered.share - plain.share,
            plain,
            steered,
            cost.value / plain_cost.value,
            artifact.digest,
        )

    def _controls(
        self,
        found: dict[Method, tuple[Artifact, Candidate]],
        heads: Reduction | None,
        outcome: Outcome,
    ) -> None:
        """Random directions of the same norm, and heads drawn at random with their own."""
        for method, (artifact, candidate) in found.items():
            for seed in self._settings.seeds:
                twin = random_twin(artifact, seed)
                shift = self._measure(f"{method} random {seed}", twin, candidate).shift
                outcome.random_directions.setdefault(method, []).append(shift)
        if heads is None:
            return
        _, candidate = found.get("hsi") or found["iti"]
        info = self._lab.info
        for seed in self._settings.seeds:
            generator = np.random.default_rng(seed)
            drawn = generator.choice(outcome.num_heads, len(candidate.sites), replace=False)
            sites = [Site("z", *divmod(int(i), info.num_heads)) for i in sorted(drawn)]
            artifact = self._artifact(
                f"random-heads-{seed}", head_items(heads, sites), candidate.strength
            )
            shift = self._measure(f"random heads {seed}", artifact, candidate).shift
            outcome.random_heads.append(shift)


def head_items(heads: Reduction, sites: Iterable[Site]) -> list[Intervention]:
    """HSI's and ITI's update: strength * sigma * unit mean difference, at the last position."""
    return [
        Intervention(heads.direction(site), strength_unit="sigma", positions="last")
        for site in sites
    ]


def _questions(split: str, examples: Sequence[Example], most: int) -> Suite:
    # Both answers of a question are examples.
    return choice_suite(f"target choice, {split}", examples[: 2 * most])
