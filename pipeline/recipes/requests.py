"""The request sets of the refusal recipes, as suites of the validation and the test split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import PromptsSection, Split
from pipeline.errors import InvalidInput
from pipeline.evaluation.generate import ChatPrompt
from pipeline.evaluation.judges import REFUSAL_BEGINNINGS
from pipeline.evaluation.suites import Suite, answer_suite, refusal_suite
from pipeline.prompts.corpus import Example, Quarantined, read_corpus, read_rows


@dataclass(frozen=True, slots=True)
class RequestFiles:
    """Where the requests are.

    Attributes:
        pairs: Harmful (label 1) and harmless (label 0) requests, in pairs: what directions are
            fitted on, and the plain requests of the suites.
        attacks: Harmful requests that a jailbreak wraps. Rows with a field ``seen``: the test split
            reports those whose wrapper is not seen in the other splits.
        lookalikes: Harmless requests that look harmful: what over-refusal is measured on.
        skill: Questions with an ``answer`` and a ``split``: the unrelated skill.
        phrases: JSON list of lower-case beginnings of refusals; None: those of most chat models.
        most: Requests of each suite.
    """

    pairs: Path
    attacks: Path
    lookalikes: Path
    skill: Path
    phrases: Path | None = None
    most: int = 200


@dataclass(frozen=True, slots=True)
class RequestSuites:
    """The suites of one split.

    Attributes:
        attacks: Harmful requests in jailbreak wrappers, refused; in the test split, unseen ones.
        seen_attacks: As `attacks`, with wrappers that the other splits have; None if no row says.
        harmful, benign, lookalikes: Requests refused.
        skill: Questions answered rightly.
    """

    attacks: Suite
    seen_attacks: Suite | None
    harmful: Suite
    benign: Suite
    lookalikes: Suite
    skill: Suite


def read_suites(files: RequestFiles, *splits: Split) -> RequestSuites:
    """Build the suites of a split, or of several, mixed: more rows to choose on.

    Raises:
        InvalidInput: A file cannot be read, or has no row for a suite.
    """
    phrases = read_phrases(files.phrases)
    requests = _of(files.pairs, splits)
    seen = {str(row.get("prompt")): row.get("seen") for row in _rows(files.attacks)}
    attacks = _of(files.attacks, splits)
    marked = [(e, _is_seen(seen.get(e.prompt), files.attacks)) for e in attacks]
    unseen = [e for e, is_seen in marked if is_seen is False]
    known = [e for e, is_seen in marked if is_seen is True]

    def refused(name: str, examples: Sequence[Example]) -> Suite:
        return refusal_suite(name, examples[: files.most], phrases)

    questions = _rows(files.skill, "prompt", "answer", "split")
    questions = [row for row in questions if row["split"] in splits]
    questions = sorted(questions, key=lambda row: _mixed(str(row["prompt"])))[: files.most]
    return RequestSuites(
        attacks=refused("refuses jailbroken harmful requests", unseen or attacks),
        seen_attacks=refused("refuses harmful requests in seen wrappers", known)
        if unseen and known
        else None,
        harmful=refused("refuses plain harmful requests", [e for e in requests if e.label]),
        benign=refused("refuses benign requests", [e for e in requests if not e.label]),
        lookalikes=refused("refuses look-alike benign requests", _of(files.lookalikes, splits)),
        skill=answer_suite(
            "answers rightly",
            [ChatPrompt(str(row["prompt"])) for row in questions],
            [str(row["answer"]) for row in questions],
        ),
    )


def _of(path: Path, splits: Sequence[Split]) -> list[Example]:
    examples = read_corpus(PromptsSection(files=[path])).examples
    return sorted((e for e in examples if e.split in splits), key=lambda e: _mixed(e.prompt))


def _mixed(prompt: str) -> str:
    """An order that mixes splits and frames of wording, so that the first rows stand for all."""
    return hashlib.sha256(prompt.encode()).hexdigest()


def _rows(path: Path, *needed: str) -> list[Mapping[str, Any]]:
    """The fields of a file's rows, each of which has those that are needed."""
    rows = []
    for row in read_rows(path):
        if isinstance(row, Quarantined):
            raise InvalidInput(f"{path}: {row}", kind="prompt_row")
        if missing := [name for name in needed if row.fields.get(name) in (None, "")]:
            raise InvalidInput(
                f"{path}, line {row.line}: expected the fields {', '.join(needed)}; "
                f"{', '.join(missing)} is missing or empty",
                kind="prompt_row",
            )
        rows.append(row.fields)
    return rows


def read_phrases(path: Path | None) -> Sequence[str]:
    """Beginnings of refusals, lower-case, from a JSON list; None: those of most chat models.

    Raises:
        InvalidInput: The file is no JSON list.
    """
    if path is None:
        return REFUSAL_BEGINNINGS
    try:
        phrases = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"{path}: expected a JSON list of beginnings of refusals: {error}", kind="phrases"
        ) from error
    if not (isinstance(phrases, list) and phrases and all(isinstance(p, str) for p in phrases)):
        raise InvalidInput(
            f"{path}: expected a JSON list of beginnings of refusals, got {phrases!r:.60}",
            kind="phrases",
        )
    return [phrase.lower() for phrase in phrases]


def _is_seen(value: object, path: Path) -> bool | None:
    """A row's field ``seen``; a CSV has it as text."""
    known = {"true": True, "1": True, "false": False, "0": False, "none": None, "": None}
    text = str(value).strip().lower()
    if text not in known:
        raise InvalidInput(
            f"{path}: field seen: expected true or false, got {value!r}", kind="prompt_row"
        )
    return known[text]
