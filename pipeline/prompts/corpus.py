"""Prompt files: three formats in three containers, and the quarantine for rows that are not one.

A bad row is reported with its file, line and reason; it never stops a run by itself.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa
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


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a prompt file that could be read; its fields may still be wrong.

    Attributes:
        file: Name of its file, without folders.
        line: Line of a text file, row of a Parquet file; from 1.
        fields: As the file has them; of a CSV, text alone.
    """

    file: str
    line: int
    fields: Mapping[str, Any]

    def examples(self, known: Format, section: PromptsSection) -> Sequence[Example] | Quarantined:
        """The row's examples: both of a pair, the positive one first, or one of a labelled row.

        Args:
            known: What the fields are read as.
            section: Says how labels are told and, for a row without a split, the splits' shares.
        """
        try:
            return _examples(self.fields, known, section, f"{self.file}:{self.line}")
        except _BadRow as problem:
            return Quarantined(self.file, self.line, str(problem))


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
    names = [path.name for path in section.files]
    if len(set(names)) < len(names):
        raise InvalidInput(
            f"prompt files {', '.join(names)}: two have the same name, so their rows could not be "
            "told apart; rename one",
            kind="prompt_file",
        )

    def all_rows() -> Iterator[Row | Quarantined]:
        for path in section.files:
            raw = _bytes(path)
            hasher.update(f"{path.name}\0".encode() + hashlib.sha256(raw).digest())
            yield from _rows(path, raw)

    # Rows with all their fields take several times the memory of what is kept of them, so only
    # those before the one that tells the format are held at once.
    rows = all_rows()
    held: list[Row | Quarantined] = []
    known: Format | None = None if section.format == "auto" else section.format
    while known is None:
        row = next(rows, None)
        if row is None:
            raise InvalidInput(
                f"no row of {', '.join(names)} tells the format: {_first(held)}. "
                "Expected one of the field sets "
                f"{'; '.join(', '.join(fields) for fields in FIELDS.values())}",
                kind="prompt_format",
            )
        held.append(row)
        known = _format_of(row)
    num_rows = 0
    for row in itertools.chain(held, rows):
        num_rows += 1
        found = row.examples(known, section) if isinstance(row, Row) else row
        if isinstance(found, Quarantined):
            quarantined.append(found)
        else:
            examples.extend(found)
    return Corpus(examples, quarantined, num_rows, hasher.hexdigest(), known)


def read_rows(path: Path) -> Iterator[Row | Quarantined]:
    """The rows of one prompt file, for those who need more of its fields than examples have.

    A row that cannot be read comes as why, in its place.

    Raises:
        InvalidInput: The file is missing, of unknown kind, or not Parquet though it is named so.
    """
    return _rows(path, _bytes(path))


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
    if num_rows == 0:
        raise InvalidInput(
            f"prompt files {', '.join(path.name for path in section.files)} hold no rows",
            kind="prompt_rows",
        )
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


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(
            f"prompt file {str(path)!r} cannot be read: {error.strerror}", kind="prompt_file"
        ) from error


def _rows(path: Path, raw: bytes) -> Iterator[Row | Quarantined]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        rows = _parquet_rows(path, raw)
    elif suffix == ".csv":
        rows = _csv_rows(raw)
    elif suffix in (".jsonl", ".ndjson"):
        rows = _json_rows(raw)
    else:
        raise InvalidInput(
            f"prompt file {str(path)!r}: expected .jsonl, .csv or .parquet", kind="prompt_file"
        )
    for line, row in rows:
        if isinstance(row, _BadRow):
            yield Quarantined(path.name, line, str(row))
        else:
            yield Row(path.name, line, row)


def _json_rows(raw: bytes) -> Iterator[tuple[int, dict[str, Any] | _BadRow]]:
    for line, text in enumerate(raw.removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        if text.strip():
            yield line, _json_row(text)


def _json_row(text: bytes) -> dict[str, Any] | _BadRow:
    try:
        row = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _BadRow(f"not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        # ValueError beside JSONDecodeError: an integer of thousands of digits.
        return _BadRow(f"not JSON: {error}")
    return row if isinstance(row, dict) else _BadRow(f"not a JSON object but {type(row).__name__}")


def _parquet_rows(path: Path, raw: bytes) -> Iterator[tuple[int, dict[str, Any] | _BadRow]]:
    try:
        table = pq.read_table(io.BytesIO(raw))
    except (pa.ArrowException, OSError) as error:
        raise InvalidInput(
            f"prompt file {str(path)!r} is not Parquet: {error}", kind="prompt_file"
        ) from error
    for line in range(1, len(table) + 1):
        try:
            # One by one: Arrow checks that text is UTF-8 only here.
            row = table.slice(line - 1, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield line, _BadRow(f"not UTF-8: {error.reason} at byte {error.start}")
        else:
            yield line, row


def _csv_rows(raw: bytes) -> Iterator[tuple[int, dict[str, Any] | _BadRow]]:
    # surrogateescape keeps a bad byte inside its own row, where it can be quarantined.
    text = raw.decode("utf-8-sig", errors="surrogateescape")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num + 1, _BadRow(f"not CSV: {error}")
            continue
        # The line that the row begins on: it may have line breaks within quotes.
        texts = [value for value in row.values() if isinstance(value, str)]
        line = reader.line_num - sum(text.count("\n") for text in texts)
        yield line, _BadRow("not UTF-8") if any(map(_has_surrogate, texts)) else row


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


def _format_of(row: Row | Quarantined) -> Format | None:
    """The format whose fields a row has."""
    for name, fields in FIELDS.items():
        if isinstance(row, Row) and all(field in row.fields for field in fields):
            return name
    return None


def _examples(
    row: Mapping[str, Any], known: Format, section: PromptsSection, where: str
) -> Sequence[Example]:
    prompt = _text(row, FIELDS[known][0])
    group = _group(row)
    pair = group or where
    # Split by the wording, not the line, so that a row keeps its split when others come or go.
    split = _split(row.get("split"), group or prompt, section)
    system = row.get("system") or section.system
    if system is not None:
        system = _text({"system": system}, "system")
        if section.template == "none":
            raise _BadRow("field 'system' needs template = \"chat\"")
    if known == "labelled":
        return [Example(where, pair, _label(row, section), split, prompt, None, system)]
    _, positive_field, negative_field = FIELDS[known]
    return [
        Example(f"{where}{sign}", pair, label, split, prompt, _text(row, field), system)
        for sign, label, field in (("+", True, positive_field), ("-", False, negative_field))
    ]


def _first(rows: Sequence[Row | Quarantined]) -> str:
    """What the first row is, for a message."""
    if not rows:
        return "there are no rows"
    row = rows[0]
    if isinstance(row, Quarantined):
        return f"the first is {row}"
    return f"the first is {row.file}:{row.line}: fields {', '.join(map(str, row.fields))}"


def _group(row: Mapping[str, Any]) -> str | None:
    value = row.get("pair")
    if isinstance(value, int):
        return str(value)
    return _text(row, "pair") if value else None


def _text(row: Mapping[str, Any], field: str) -> str:
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


def _label(row: Mapping[str, Any], section: PromptsSection) -> bool:
    value = row.get("label")
    if value is None:
        raise _BadRow("field 'label' is missing")
    if isinstance(value, float) and value.is_integer():
        # Data frames turn a column of 0 and 1 with a gap into floats.
        value = int(value)
    if not isinstance(value, (str, int)):
        raise _BadRow(f"field 'label' is {type(value).__name__}, expected text, 0/1 or a boolean")
    text = str(value).strip().lower()
    if not text:
        raise _BadRow("field 'label' is empty")
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
