"""Prompt files: three formats in three containers, and the quarantine for rows that are not one.

A bad row is reported with its file, line and reason; it never stops a run by itself.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow.parquet as pq

from pipeline.config import PromptsSection, Split
from pipeline.errors import InvalidInput

Format = Literal["pairs", "caa", "labelled"]

FIELDS: Final[Mapping[Format, tuple[str, ...]]] = {
    "pairs": ("prompt", "positive", "negative"),
    "caa": ("question", "answer_matching_behavior", "answer_not_matching_behavior"),
    "labelled": ("prompt", "label"),
}
_SPLITS: Final[tuple[Split, ...]] = ("train", "validation", "test")
_TRUE: Final = frozenset({"1", "true", "positive"})
_FALSE: Final = frozenset({"0", "false", "negative"})


@dataclass(frozen=True, slots=True)
class Example:
    """One text that the model reads.

    Attributes:
        prompt_id: ``file:line`` and, for a pair, ``+`` or ``-``.
        pair: Names the contrastive pair (or group) that belongs in one split.
        label: True for the positive class.
        completion: Text after the prompt, or None.
        system: System prompt of its own, or None.
    """

    prompt_id: str
    pair: str
    label: bool
    split: Split
    prompt: str
    completion: str | None
    system: str | None

    @property
    def source(self) -> tuple[str, int]:
        """File and line that it came from."""
        file, _, line = self.prompt_id.rpartition(":")
        return file, int(line.rstrip("+-"))


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A row that was left out.

    Attributes:
        file: Its file, as named in the run file.
        line: Line of a text file, row of a Parquet file; from 1.
        reason: What is wrong with it.
    """

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Corpus:
    """What was read.

    Attributes:
        examples: In the order of the files.
        quarantined: Rows left out so far.
        num_rows: Rows seen, good and bad.
        digest: sha256 over the files' names and bytes, hex.
        format: The format that was named or told from the first row.
    """

    examples: list[Example]
    quarantined: list[Quarantined]
    num_rows: int
    digest: str
    format: Format


class _BadRow(Exception):
    """Why a row is quarantined."""


def read_corpus(section: PromptsSection) -> Corpus:
    """Read every prompt file of a run.

    Raises:
        InvalidInput: A file is missing or of unknown kind, or no row tells the format.
    """
    hasher = hashlib.sha256()
    examples: list[Example] = []
    quarantined: list[Quarantined] = []
    num_rows = 0
    known: Format | None = None if section.format == "auto" else section.format
    for path in section.files:
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise InvalidInput(
                f"prompt file {str(path)!r} cannot be read: {error.strerror}", kind="prompt_file"
            ) from error
        hasher.update(f"{path.name}\0".encode() + hashlib.sha256(raw).digest())
        for line, row in _rows(path, raw):
            num_rows += 1
            try:
                if isinstance(row, _BadRow):
                    raise row
                known = known or _detect(row)
                examples.extend(_examples(row, known, section, f"{path.name}:{line}"))
            except _BadRow as problem:
                quarantined.append(Quarantined(path.name, line, str(problem)))
    if known is None:
        first = f"; the first problem is {quarantined[0]}" if quarantined else "; they are empty"
        raise InvalidInput(
            f"no row of {', '.join(str(p) for p in section.files)} tells the format{first}. "
            f"Expected one of the field sets {'; '.join(', '.join(f) for f in FIELDS.values())}",
            kind="prompt_format",
        )
    return Corpus(examples, quarantined, num_rows, hasher.hexdigest(), known)


def check_quarantine(
    quarantined: Sequence[Quarantined], num_rows: int, num_good: int, section: PromptsSection
) -> None:
    """Stop a run in which too many rows are bad.

    Args:
        quarantined: The bad rows, whoever found them.
        num_rows: Rows of the files, good and bad.
        num_good: Prompts that are left.

    Raises:
        InvalidInput: More than `max_quarantined` of the rows are bad, or none is good.
    """
    num_bad = len(quarantined)
    if num_good and num_bad <= section.max_quarantined * num_rows:
        return
    shown = "\n".join(f"  {row}" for row in quarantined[:10])
    more = f"\n  and {num_bad - 10} more" if num_bad > 10 else ""
    raise InvalidInput(
        f"{num_bad} of {num_rows} rows are bad, more than prompts.max_quarantined = "
        f"{section.max_quarantined:g} allows:\n{shown}{more}\n"
        "Mend the rows, or raise prompts.max_quarantined in the run file",
        kind="prompt_quarantine",
    )


def _rows(path: Path, raw: bytes) -> Iterator[tuple[int, dict[str, Any] | _BadRow]]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        table = pq.read_table(io.BytesIO(raw))
        yield from enumerate(table.to_pylist(), start=1)
    elif suffix == ".csv":
        yield from _csv_rows(path, raw)
    elif suffix in (".jsonl", ".ndjson"):
        for line, text in enumerate(raw.splitlines(), start=1):
            if text.strip():
                yield line, _json_row(text)
    else:
        raise InvalidInput(
            f"prompt file {str(path)!r}: expected .jsonl, .csv or .parquet", kind="prompt_file"
        )


def _json_row(text: bytes) -> dict[str, Any] | _BadRow:
    try:
        row = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _BadRow(f"not UTF-8: {error.reason} at byte {error.start}")
    except (json.JSONDecodeError, RecursionError) as error:
        return _BadRow(f"not JSON: {error}")
    return row if isinstance(row, dict) else _BadRow(f"not a JSON object but {type(row).__name__}")


def _csv_rows(path: Path, raw: bytes) -> Iterator[tuple[int, dict[str, Any] | _BadRow]]:
    # surrogateescape keeps a bad byte inside its own row, where it can be quarantined.
    text = raw.decode("utf-8-sig", errors="surrogateescape")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, _BadRow(f"not CSV: {error}")
            continue
        if any(
            isinstance(v, str) and not v.isprintable() and _has_surrogate(v) for v in row.values()
        ):
            yield max(line, 2), _BadRow("not UTF-8")
        else:
            yield max(line, 2), row


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


def _detect(row: dict[str, Any]) -> Format:
    for name, fields in FIELDS.items():
        if all(field in row for field in fields):
            return name
    raise _BadRow(
        f"fields {', '.join(map(str, row))} are none of the known sets: "
        + "; ".join(", ".join(fields) for fields in FIELDS.values())
    )


def _examples(
    row: dict[str, Any], known: Format, section: PromptsSection, where: str
) -> Sequence[Example]:
    prompt = _text(row, FIELDS[known][0])
    pair = str(row.get("pair") or where)
    # Split by the wording, not the line, so that a row keeps its split when others come or go.
    split = _split(row.get("split"), str(row.get("pair") or prompt), section)
    system = row.get("system") or section.system
    if system is not None:
        system = _text({"system": system}, "system")
    if known == "labelled":
        return [Example(where, pair, _label(row, section), split, prompt, None, system)]
    _, positive_field, negative_field = FIELDS[known]
    return [
        Example(f"{where}{sign}", pair, label, split, prompt, _text(row, field), system)
        for sign, label, field in (("+", True, positive_field), ("-", False, negative_field))
    ]


def _text(row: dict[str, Any], field: str) -> str:
    if field not in row or row[field] is None:
        raise _BadRow(f"field {field!r} is missing")
    value = row[field]
    if not isinstance(value, str):
        raise _BadRow(f"field {field!r} is {type(value).__name__}, expected text")
    if not value.strip():
        raise _BadRow(f"field {field!r} is empty")
    if _has_surrogate(value):
        raise _BadRow(f"field {field!r} is not UTF-8: it holds a lone surrogate")
    return value


def _label(row: dict[str, Any], section: PromptsSection) -> bool:
    value = row.get("label")
    if value is None:
        raise _BadRow("field 'label' is missing")
    text = str(value).strip().lower()
    if section.positive_label is not None:
        return text == section.positive_label.strip().lower()
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise _BadRow(
        f"label {value!r} is neither 0/1, true/false nor positive/negative; "
        "name the positive one as prompts.positive_label"
    )


def _split(value: Any, key: str, section: PromptsSection) -> Split:
    if value is not None and value != "":
        for split in _SPLITS:
            if value == split:
                return split
        raise _BadRow(f"split {value!r} is none of {', '.join(_SPLITS)}")
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
    if share < section.test_share:
        return "test"
    return "validation" if share < section.test_share + section.validation_share else "train"
