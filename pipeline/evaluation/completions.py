"""Completions: every answer of an evaluation as Parquet, and its figures as JSON."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InvalidInput
from pipeline.evaluation.evaluate import Evaluation
from pipeline.evaluation.suites import AnySuite, Point

COMPLETIONS_FILE: Final = "completions.parquet"
SUMMARY_FILE: Final = "summary.json"

_SCHEMA: Final = pa.schema(
    [
        ("condition", pa.string()),
        ("seed", pa.int32()),
        ("strength", pa.float64()),
        ("suite", pa.string()),
        ("kind", pa.string()),
        ("metric", pa.string()),
        ("role", pa.string()),
        ("prompt_index", pa.int32()),
        ("system", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("verdict", pa.string()),
        ("value", pa.float64()),
        ("tokens", pa.int32()),
    ]
)


def write_completions(
    folder: Path, evaluation: Evaluation, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Write `COMPLETIONS_FILE` and `SUMMARY_FILE`, each whole or not at all.

    One row a prompt, suite and condition. `verdict` is ``hit``, ``miss`` or ``undefined`` (a miss
    that could not be judged), and null where nothing is judged; `value` is a `Point`'s value;
    `tokens` is what the value is the mean of, or null.

    Args:
        folder: Made when missing; what an evaluation before has left is replaced.
        environment: Device and versions, kept in the summary.

    Returns:
        The summary.

    Raises:
        InvalidInput: The folder cannot be written.
    """
    table = pa.Table.from_pylist(
        [row for point in evaluation.points for row in _rows(point, _suite(evaluation, point))],
        schema=_SCHEMA,
    )
    summary = summarise(evaluation, environment)
    text = json.dumps(summary, indent=1, sort_keys=True, allow_nan=False)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_whole(folder / COMPLETIONS_FILE, sink.getvalue().to_pybytes())
    write_whole(folder / SUMMARY_FILE, text.encode())
    return summary


def summarise(evaluation: Evaluation, environment: Mapping[str, str]) -> dict[str, Any]:
    """The figures of an evaluation: JSON values only, a null for a number that is not finite."""
    manifest = evaluation.artifact.manifest
    return {
        "name": evaluation.name,
        "artifact": evaluation.artifact.digest,
        "artifact_name": manifest.name,
        "model": manifest.model.model_dump(),
        "prompt_baseline": evaluation.system,
        "strengths": evaluation.strengths,
        "seeds": evaluation.seeds,
        "suites": [
            {
                "name": suite.name,
                "kind": suite.kind,
                "metric": suite.metric,
                "role": suite.role,
                "prompts": len(suite.prompts),
            }
            for suite in evaluation.suites
        ],
        "points": [_figures(point) for point in evaluation.points],
        "environment": dict(environment),
    }


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old one or the new one, never a part.

    Raises:
        InvalidInput: The folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            # mkstemp makes it private; a report is there to be read.
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InvalidInput(
            f"{str(path)!r} cannot be written: {error.strerror}; name another folder with --out",
            kind="output",
        ) from error


def _figures(point: Point) -> dict[str, Any]:
    low, high = point.interval
    boot_low, boot_high = point.bootstrap()
    return {
        "condition": point.condition,
        "seed": point.seed,
        "strength": point.strength,
        "suite": point.suite,
        "value": _finite(point.value),
        "low": _finite(low),
        "high": _finite(high),
        "interval": "wilson" if point.metric == "share" else "bootstrap",
        "bootstrap_low": _finite(boot_low),
        "bootstrap_high": _finite(boot_high),
        "num": point.num,
        "undefined": len(point.undefined),
    }


def _rows(point: Point, suite: AnySuite) -> list[dict[str, Any]]:
    undefined = set(point.undefined)
    return [
        {
            "condition": point.condition,
            "seed": point.seed,
            "strength": point.strength,
            "suite": point.suite,
            "kind": suite.kind,
            "metric": point.metric,
            "role": suite.role,
            "prompt_index": i,
            "system": prompt.system,
            "prompt": prompt.user,
            "answer": point.answers[i],
            "verdict": _verdict(point, i, undefined),
            "value": point.values[i],
            "tokens": None if point.weights is None else point.weights[i],
        }
        for i, prompt in enumerate(suite.prompts)
    ]


def _suite(evaluation: Evaluation, point: Point) -> AnySuite:
    suite = next(suite for suite in evaluation.suites if suite.name == point.suite)
    # As it was asked.
    return suite.under(evaluation.system) if point.condition == "prompt" else suite


def _verdict(point: Point, i: int, undefined: set[int]) -> str | None:
    if point.metric != "share":
        return None
    if i in undefined:
        return "undefined"
    return "hit" if point.values[i] else "miss"


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
