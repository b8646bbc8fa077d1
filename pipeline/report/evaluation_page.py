"""The page of an evaluation: what steering does, what it costs, and what else would do it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pipeline.evaluation.completions import COMPLETIONS_FILE, write_whole
from pipeline.evaluation.evaluate import Evaluation
from pipeline.evaluation.suites import AnySuite, Metric, Point, Role
from pipeline.report.page import render_page
from pipeline.report.trade_off import Conditions, suite_curve, trade_off

REPORT_FILE: Final = "report.html"
_PROMPTS_SHOWN: Final = 2
_CONDITIONS: Final = {
    "none": "no steering",
    "prompt": "asked by the prompt",
    "steered": "steered",
    "random": "random direction",
}


def write_evaluation_report(
    path: Path, evaluation: Evaluation, environment: Mapping[str, str]
) -> None:
    """Write the page, whole or not at all. It holds everything it shows.

    Args:
        path: The HTML file, which is replaced.
        environment: Device and versions, for the provenance.

    Raises:
        pipeline.errors.InvalidInput: The file cannot be written.
    """
    best = best_strength(evaluation)
    by_suite = {suite.name: _conditions(evaluation, suite) for suite in evaluation.suites}
    targets = [by_suite[s.name] for s in evaluation.suites_of("target")]
    costs = [by_suite[s.name] for r in ("harm", "skill") for s in evaluation.suites_of(r)]
    curves = [(cost.name, trade_off(targets[0], cost)) for cost in costs] if targets else []
    page = render_page(
        "evaluation.html.j2",
        title=f"Evaluation of {evaluation.artifact.manifest.name}",
        model=evaluation.artifact.manifest.model,
        artifact=evaluation.artifact.digest,
        lead=_lead(evaluation, best),
        best=best,
        system=evaluation.system,
        roles=_roles(evaluation),
        trade_offs=curves,
        glance=_glance(evaluation, best),
        curves=[suite_curve(conditions) for conditions in by_suite.values()],
        names=[suite.name for suite in evaluation.suites],
        rows=_rows(evaluation),
        answers=_answers(evaluation, best),
        shown=_PROMPTS_SHOWN,
        completions=COMPLETIONS_FILE,
        undefined=_undefined(evaluation),
        provenance=_provenance(evaluation, environment),
    )
    write_whole(path, page.encode())


def best_strength(evaluation: Evaluation) -> float | None:
    """The strength, other than 0, with the best balance of the target suites and the others.

    Balance: mean gain of the targets, less the mean rise of the harms, less the mean loss of the
    skills, in points against no steering; a perplexity counts by its rise in percent, at most 100.
    Chosen and reported on the same prompts, so it flatters a little. None without a target suite
    or without such a strength.
    """
    strengths = [s for s in evaluation.strengths if s != 0]
    if not strengths or not evaluation.suites_of("target"):
        return None

    def shift(suite: AnySuite, strength: float) -> float:
        before = evaluation.plain(suite.name).value
        after = evaluation.at(suite.name, strength).value
        if suite.metric == "perplexity":
            return -min(100.0, max(0.0, 100.0 * (after / before - 1.0)))
        return after - before

    def balance(strength: float) -> float:
        means = {}
        for role in ("target", "harm", "skill"):
            shifts = [shift(s, strength) for s in evaluation.suites_of(role)]
            means[role] = sum(shifts) / len(shifts) if shifts else 0.0
        return means["target"] - max(0.0, means["harm"]) + min(0.0, means["skill"])

    # Of equals, the gentler.
    return max(strengths, key=lambda s: (round(balance(s), 6), -abs(s)))


def number(value: float, metric: Metric) -> str:
    """A figure as the report writes it."""
    if metric in ("share", "probability"):
        # A line never breaks before the sign.
        return f"{value:.0f}\u00a0%"
    return f"{value:.3f}" if value < 100 else f"{value:.3g}"


def _conditions(evaluation: Evaluation, suite: AnySuite) -> Conditions:
    return Conditions(
        suite.name,
        suite.metric,
        suite.role == "skill" and suite.metric != "perplexity",
        evaluation.plain(suite.name),
        evaluation.prompted(suite.name),
        evaluation.of(suite.name, "steered"),
        evaluation.of(suite.name, "random"),
    )


def _lead(evaluation: Evaluation, best: float | None) -> list[str]:
    """What was found, in a few sentences with the figures."""
    if best is None:
        return ["No suite of this evaluation is a target, so it weighs nothing: see the figures."]
    target = evaluation.suites_of("target")[0]
    before, after = evaluation.plain(target.name), evaluation.at(target.name, best)
    sentences = [
        f"Steering at {best:+g} takes “{target.name}” from {_with_interval(before)} to "
        f"{_with_interval(after)}; the prompt that asks for it reaches "
        f"{_with_interval(evaluation.prompted(target.name))}."
    ]
    costs = [
        f"“{suite.name}” {_text(evaluation.plain(suite.name))} → "
        f"{_text(evaluation.at(suite.name, best))}"
        for suite in [*evaluation.suites_of("harm"), *evaluation.suites_of("skill")]
    ]
    if costs:
        sentences.append(f"What it costs there: {'; '.join(costs)}.")
    if evaluation.seeds:
        random = [p for p in evaluation.of(target.name, "random") if p.strength == best]
        most = max(random, key=lambda p: abs(p.value - before.value))
        sentences.append(
            f"Of {len(random)} random directions of the same norm, the one that moves the target "
            f"most takes it to {_with_interval(most)}."
        )
    return sentences


def _roles(evaluation: Evaluation) -> list[tuple[str, list[str]]]:
    roles: dict[Role, str] = {
        "target": "target",
        "harm": "should stay low",
        "skill": "must not get worse",
    }
    found = [(text, [s.name for s in evaluation.suites_of(role)]) for role, text in roles.items()]
    return [(text, names) for text, names in found if names]


def _glance(evaluation: Evaluation, best: float | None) -> list[dict[str, Any]]:
    """A row a suite: its figure under each condition."""
    rows = []
    for suite in evaluation.suites:
        random = [p.value for p in evaluation.of(suite.name, "random") if p.strength == best]
        ends = [number(end, suite.metric) for end in (min(random), max(random))] if random else []
        shown = [evaluation.plain(suite.name), evaluation.prompted(suite.name)]
        shown += [] if best is None else [evaluation.at(suite.name, best)]
        rows.append(
            {
                "name": suite.name,
                "what": " · ".join(filter(None, (suite.role, f"{len(suite.prompts)} prompts"))),
                "cells": [(_text(point), _interval(point)) for point in shown],
                # The sign once; "0 %" alone where both ends are that.
                "random": "–".join(dict.fromkeys(ends)).replace("\u00a0%–", "–"),
            }
        )
    return rows


def _rows(evaluation: Evaluation) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """A row a condition, seed and strength: by suite the figure and its interval."""
    found: dict[tuple[str, int | None, float], dict[str, Point]] = {}
    for point in evaluation.points:
        found.setdefault((point.condition, point.seed, point.strength), {})[point.suite] = point
    order = list(_CONDITIONS)
    rows = []
    for (condition, seed, strength), points in sorted(
        found.items(), key=lambda item: (order.index(item[0][0]), item[0][1] or 0, item[0][2])
    ):
        name = _CONDITIONS[condition] + ("" if seed is None else f" {seed}")
        cells = [(_text(points[s.name]), _interval(points[s.name])) for s in evaluation.suites]
        rows.append((name, f"{strength:+g}" if condition in ("steered", "random") else "", cells))
    return rows


def _answers(evaluation: Evaluation, best: float | None) -> list[dict[str, Any]]:
    """The first prompts of each suite that generates, under every condition."""
    cards = []
    for suite in evaluation.suites:
        if suite.metric != "share":
            continue
        shown = [("no steering", evaluation.plain(suite.name))]
        shown.append(("asked by the prompt", evaluation.prompted(suite.name)))
        if best is not None:
            shown.append((f"steered {best:+g}", evaluation.at(suite.name, best)))
            random = [p for p in evaluation.of(suite.name, "random") if p.strength == best]
            shown += [(f"random direction {p.seed}", p) for p in random[:1]]
        for i, prompt in enumerate(suite.prompts[:_PROMPTS_SHOWN]):
            answers = [(label, p.answers[i], bool(p.values[i])) for label, p in shown]
            cards.append({"suite": suite.name, "prompt": prompt, "answers": answers})
    return cards


def _undefined(evaluation: Evaluation) -> list[str]:
    """Where answers could not be judged."""
    worst: dict[str, Point] = {}
    for point in evaluation.points:
        if len(point.undefined) > len(worst[point.suite].undefined if point.suite in worst else ()):
            worst[point.suite] = point
    return [
        f"“{name}”: up to {len(p.undefined)} of {p.num} ({_CONDITIONS[p.condition]} "
        f"{p.strength:+g})"
        for name, p in worst.items()
    ]


def _provenance(evaluation: Evaluation, environment: Mapping[str, str]) -> dict[str, str]:
    manifest = evaluation.artifact.manifest
    policy = manifest.policy
    sites = ", ".join(
        f"{item.site} ({item.operation}, {item.positions})"
        for item in evaluation.artifact.interventions
    )
    return {
        "artifact": evaluation.artifact.digest,
        "sites": sites,
        "strength limits": f"{policy.min_strength:+g} to {policy.max_strength:+g} (signed)",
        "model": f"{manifest.model.name}, weights sha256 {manifest.model.fingerprint}",
        "suite file": evaluation.name,
        "prompt that asks": evaluation.system,
        "random seeds": ", ".join(map(str, evaluation.seeds)),
        **environment,
    }


def _text(point: Point) -> str:
    return number(point.value, point.metric)


def _interval(point: Point) -> str:
    low, high = (number(end, point.metric).removesuffix("\u00a0%") for end in point.interval)
    return f"{low}–{high}"


def _with_interval(point: Point) -> str:
    return f"{_text(point)} ({_interval(point)})"
