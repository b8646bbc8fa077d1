"""Suite files: TOML that says what an artifact is evaluated on.

The suites say what is asked; which artifact, at which strengths and where the results go is said
by flags.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from pipeline.config import PromptsSection, Split
from pipeline.errors import InvalidInput, NotFound
from pipeline.evaluation.generate import ChatPrompt
from pipeline.evaluation.likelihood import choice_likelihood_suite, fluency_suites
from pipeline.evaluation.suites import (
    AnySuite,
    Kind,
    Role,
    answer_suite,
    choice_suite,
    refusal_suite,
)
from pipeline.prompts.corpus import FIELDS, Example, Quarantined, Row, read_rows

_MAX_NEW_TOKENS: Final[dict[Kind, int]] = {"refusal": 16, "choice": 8, "answer": 24, "fluency": 32}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SuiteSection(_Section):
    """One suite: prompts, and what is measured of the answers."""

    name: Annotated[str, Field(min_length=1, max_length=80)]
    """What the number is, such as "refuses jailbroken requests"; the report's label."""
    kind: Kind
    """refusal: share of answers that begin with a phrase of the list `phrases`.
    choice: share that takes the matching one of two options, and its normalised probability.
    answer: share that contains the prompt's field `answer`.
    fluency: perplexity of the plain model's answers, and KL to the plain model along them."""
    files: Annotated[list[Path], Field(min_length=1)]
    """JSONL, CSV or Parquet, with a field prompt or question; relative to the suite file."""
    role: Role | None = None
    """Axis of the trade-off. target: steering should raise it; harm: it should stay low;
    skill: it must not drop."""
    split: Split | None = "test"
    """Rows of this split only, told as for a run file; leave out what directions were fitted on."""
    where: dict[str, str | int | float | bool] = {}
    """Rows only whose fields have these values, such as {label = 1}."""
    limit: Annotated[int, Field(ge=1)] = 100
    """Most prompts, the first of the files. At 100, the interval of a share is under ±10 points."""
    system: str | None = None
    """System prompt of every prompt without one of its own."""
    phrases: Path | None = None
    """refusal: JSON list of lower-case beginnings of refusals; relative to the suite file."""
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longest answer; by default what the kind's judge needs."""

    @model_validator(mode="after")
    def _consistent(self) -> SuiteSection:
        if (self.phrases is not None) != (self.kind == "refusal"):
            raise ValueError('phrases belongs to kind = "refusal", and only there')
        return self


class PromptBaseline(_Section):
    """The control that steering has to beat."""

    system: Annotated[str, Field(min_length=1)]
    """System prompt that asks for the behaviour."""


class SuiteFile(_Section):
    """One evaluation."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
    """Names the evaluation, for people."""
    prompt_baseline: PromptBaseline
    suites: Annotated[list[SuiteSection], Field(min_length=1)]
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    test_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """As in the run file that fitted the directions, for rows without a split of their own."""

    @model_validator(mode="after")
    def _consistent(self) -> SuiteFile:
        names = [suite.name for suite in self.suites]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"suites have one name each; twice: {', '.join(twice)}")
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share and test_share leave nothing to train on")
        return self


def load_suite_file(path: Path, only: Sequence[str] = ()) -> SuiteFile:
    """Read a suite file; paths in it are taken from its folder.

    Args:
        only: Names of the suites to keep; empty for all.

    Raises:
        InvalidInput: Missing, not TOML, a field that is unknown, missing or out of range, or a file
            that is named and absent; all such problems are named at once.
        NotFound: No suite has a name of `only`.
    """
    try:
        file = SuiteFile.model_validate(tomllib.loads(path.read_bytes().decode()))
    except OSError as error:
        raise InvalidInput(
            f"suite file {str(path)!r} cannot be read: {error.strerror}; "
            "examples/suites.toml is one to start from",
            kind="suite_file",
        ) from error
    except ValidationError as error:
        problems = [_describe(item) for item in error.errors()]
        raise _invalid(path, problems) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(
            f"suite file {str(path)!r} is not TOML: {error}", kind="suite_file"
        ) from error
    base = path.resolve().parent
    known = {suite.name for suite in file.suites}
    if unknown := [name for name in only if name not in known]:
        raise NotFound(
            f"suite file {str(path)!r} has no suite {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(map(repr, sorted(known)))}",
            kind="suite_name",
        )
    suites = [
        suite.model_copy(
            update={
                "files": [base / name for name in suite.files],
                "phrases": None if suite.phrases is None else base / suite.phrases,
            }
        )
        for suite in file.suites
        if not only or suite.name in only
    ]
    if absent := [
        f"suite {suite.name!r}: no file {str(name)!r}"
        for suite in suites
        for name in (*suite.files, suite.phrases)
        if name is not None and not name.is_file()
    ]:
        raise _invalid(path, absent)
    return file.model_copy(update={"suites": suites})


def build_suites(file: SuiteFile, model: nn.Module, tokenizer: Any) -> tuple[AnySuite, ...]:
    """Read the prompts of a suite file. Call it outside of any `steered` block.

    Args:
        model: The plain model; it answers the prompts of ``fluency`` suites at once.

    Raises:
        InvalidInput: A row is bad, or no row is left of a suite.
    """
    built: list[AnySuite] = []
    for section in file.suites:
        rows = _selected(section, file)
        role, tokens = section.role, section.max_new_tokens or _MAX_NEW_TOKENS[section.kind]
        examples = [example for _, pair in rows for example in pair]
        prompts = [ChatPrompt(pair[0].prompt, pair[0].system) for _, pair in rows]
        if section.kind == "refusal":
            phrases = _phrases(section)
            built.append(
                refusal_suite(section.name, examples, phrases, role=role, max_new_tokens=tokens)
            )
        elif section.kind == "choice":
            name = f"{section.name}: probability"
            built += [
                choice_suite(section.name, examples, role=role, max_new_tokens=tokens),
                choice_likelihood_suite(name, examples, role=role),
            ]
        elif section.kind == "answer":
            expected = [_answer(section, row, pair[0]) for row, pair in rows]
            built.append(
                answer_suite(section.name, prompts, expected, role=role, max_new_tokens=tokens)
            )
        else:
            built += fluency_suites(
                section.name, prompts, model, tokenizer, role=role, max_new_tokens=tokens
            )
    return tuple(built)


_Fields = Mapping[str, Any]


def _selected(section: SuiteSection, file: SuiteFile) -> list[tuple[_Fields, Sequence[Example]]]:
    """The rows that a suite asks, each with its one or two examples."""
    rows = list(_read(section, file))
    for field in section.where:
        if not any(field in row for row, _ in rows):
            fields = sorted({str(name) for row, _ in rows for name in row})
            raise InvalidInput(
                f"suite {section.name!r}: where names the field {field!r}, and the rows have "
                f"{', '.join(fields)}",
                kind="suite_where",
            )
    chosen = [
        (row, examples)
        for row, examples in rows
        if (section.split is None or examples[0].split == section.split)
        and all(_equal(row.get(field), value) for field, value in section.where.items())
    ]
    if not chosen:
        raise InvalidInput(
            f"suite {section.name!r}: none of {len(rows)} rows of "
            f"{', '.join(path.name for path in section.files)} is of split {section.split!r} and "
            f"where {section.where}; change split or where",
            kind="suite_empty",
        )
    return chosen[: section.limit]


def _read(section: SuiteSection, file: SuiteFile) -> Iterator[tuple[_Fields, Sequence[Example]]]:
    shares = PromptsSection(
        files=section.files,
        system=section.system,
        validation_share=file.validation_share,
        test_share=file.test_share,
    )
    for path in section.files:
        for row in read_rows(path):
            found = _examples(row, section.kind, shares) if isinstance(row, Row) else row
            if not isinstance(row, Row) or isinstance(found, Quarantined):
                # Unlike a run, an evaluation has few rows, and a share over other rows is another
                # number: so a bad row is mended, not left out.
                raise InvalidInput(f"suite {section.name!r}: {found}", kind="suite_row")
            yield row.fields, found


def _examples(row: Row, kind: Kind, shares: PromptsSection) -> Sequence[Example] | Quarantined:
    """The examples of a row; one that only asks gets a label, which is not used."""
    if kind == "choice":
        return row.examples("caa" if FIELDS["caa"][0] in row.fields else "pairs", shares)
    asked = row.fields.get("prompt", row.fields.get("question"))
    # Positive, as suites ask the positive examples of a pair.
    labelled = replace(row, fields={**row.fields, "prompt": asked, "label": 1})
    return labelled.examples("labelled", shares)


def _answer(section: SuiteSection, row: _Fields, example: Example) -> str:
    answer = row.get("answer")
    if isinstance(answer, (str, int)) and str(answer).strip():
        return str(answer).strip()
    raise InvalidInput(
        f'suite {section.name!r}: {example.prompt_id}: kind = "answer" needs a field answer, text '
        f"or a whole number; got {answer!r}",
        kind="suite_row",
    )


def _phrases(section: SuiteSection) -> list[str]:
    assert section.phrases is not None
    try:
        phrases = json.loads(section.phrases.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"suite {section.name!r}: {str(section.phrases)!r} is not JSON: {error}",
            kind="suite_phrases",
        ) from error
    if not (isinstance(phrases, list) and phrases and all(isinstance(p, str) for p in phrases)):
        raise InvalidInput(
            f"suite {section.name!r}: {str(section.phrases)!r} holds no list of texts; expected "
            'JSON such as ["i can\'t help", "i won\'t"]',
            kind="suite_phrases",
        )
    return [phrase.lower() for phrase in phrases]


def _equal(value: Any, wanted: Any) -> bool:
    # A CSV has text alone.
    return bool(value == wanted) or str(value).strip().lower() == str(wanted).strip().lower()


def _invalid(path: Path, problems: Sequence[str]) -> InvalidInput:
    lines = "\n".join(f"  {problem}" for problem in problems)
    return InvalidInput(
        f"suite file {str(path)!r} has {len(problems)} problem(s):\n{lines}", kind="suite_file"
    )


def _describe(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "the file"
    got = "" if item["type"] in ("missing", "extra_forbidden") else f", got {item['input']!r}"
    # A whole table is no help in a message.
    got = "" if isinstance(item["input"], dict) else got
    return f"{where}: {item['msg'].removeprefix('Value error, ')}{got}"
