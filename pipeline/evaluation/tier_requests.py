"""Requests of both tiers: what is asked, read from a data file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
from pyarrow import csv, json, parquet

from pipeline.config import PromptsSection
from pipeline.errors import InvalidInput
from pipeline.prompts.corpus import Quarantined, Row

Tier = Literal["monitored", "unmonitored", "xx", "yy"]


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked in both tiers.

    Attributes:
        pair: Names it; the answers of both tiers are compared within it.
        systems: System prompts by tier, where the data file brings its own.
    """

    pair: str
    prompt: str
    systems: Mapping[str, str] = field(default_factory=dict)


def read_requests(
    path: Path, split: str | None = "test", limit: int | None = None
) -> list[Request]:
    """Read requests from JSONL, CSV or Parquet with a field ``prompt``.

    Rows with ``tier``, ``system`` and ``pair`` make one request a pair, with its own systems.

    Args:
        split: Rows of another ``split`` are left out. A row without one gets it as in any prompt
            file: by a hash of its pair, or else of its prompt. None for every row.
        limit: Most requests, the first ones.

    Raises:
        InvalidInput: The file cannot be read, or a row lacks a field or contradicts its pair.
    """
    rows = _rows(path)
    shares = PromptsSection(files=[path])
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for line, row in enumerate(rows, start=1):
        tier = row.get("tier")
        for name in ("prompt",) if tier is None else ("prompt", "system"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise _bad(f"expected text in field {name!r}, got {row.get(name)!r}", path, line)
        if split is not None and _split(row, shares, path, line) != split:
            continue
        # Without tiers each row is a request of its own: other files use `pair` for other things.
        if tier is None:
            found[str(line)] = (row["prompt"], {})
            continue
        if tier not in get_args(Tier) or row.get("pair") is None:
            expected = f"a tier of {', '.join(get_args(Tier))}, and a pair"
            raise _bad(f"expected {expected}, got {tier!r} and {row.get('pair')!r}", path, line)
        prompt, systems = found.setdefault(str(row["pair"]), (row["prompt"], {}))
        if prompt != row["prompt"] or tier in systems:
            raise _bad(f"pair {row['pair']} has two prompts, or tier {tier!r} twice", path, line)
        systems[tier] = row["system"]
    if not found:
        raise _bad(f"expected rows of split {split!r}, got none of {len(rows)}", path, 0)
    return [Request(pair, *rest) for pair, rest in found.items()][:limit]


def asked_split(path: Path) -> Literal["test"] | None:
    """The split to ask where nothing is fitted or chosen: all rows where none names a split.

    Raises:
        InvalidInput: The file cannot be read.
    """
    return "test" if any(row.get("split") not in (None, "") for row in _rows(path)) else None


def _rows(path: Path) -> list[dict[str, Any]]:
    readers = {".jsonl": json.read_json, ".csv": csv.read_csv, ".parquet": parquet.read_table}
    try:
        rows: list[dict[str, Any]] = readers[path.suffix.lower()](str(path)).to_pylist()
    except (KeyError, OSError, ValueError, pa.ArrowException) as error:
        raise _bad(f"cannot be read as {', '.join(readers)}: {error}", path, 0) from error
    return rows


def _split(row: Mapping[str, Any], shares: PromptsSection, path: Path, line: int) -> str:
    pair = row.get("pair")
    fields = {"prompt": row["prompt"], "label": 0, "split": row.get("split")}
    if pair is not None:
        fields["pair"] = str(pair)
    found = Row(path.name, line, fields).examples("labelled", shares)
    if isinstance(found, Quarantined):
        raise _bad(found.reason, path, line)
    return found[0].split


def _bad(problem: str, path: Path, line: int) -> InvalidInput:
    where = f", row {line}" if line else ""
    return InvalidInput(f"requests {str(path)!r}{where}: {problem}", kind="requests_file")
