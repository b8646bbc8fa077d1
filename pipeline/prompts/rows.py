"""Rows of the arrays: which tokens of which prompt each of them is, and the index that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.prompts.tokens import TokenizedPrompt
from pipeline.prompts.trie import shared_length

Spans = NDArray[np.int32]
"""Token spans [start, stop) of a prompt, [n, 2]. Arrays, as a capture of all tokens has many."""

INDEX_SCHEMA: Final = pa.schema(
    [
        ("row", pa.int64()),
        ("prompt_id", pa.string()),
        ("pair", pa.string()),
        ("label", pa.bool_()),
        ("split", pa.string()),
        ("first_position", pa.int32()),
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        ("text_start", pa.int32()),
        ("text_stop", pa.int32()),
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of a capture, by prompt in row order.

    Attributes:
        first_rows: Of each prompt.
        spans: Of each prompt, of the rows that are its own: none of them if another's are the same.
        num_rows: Rows of the arrays.
        index: Table of `INDEX_SCHEMA`, an entry for each span of each prompt. Several entries name
            one row where the prompts share those tokens.
    """

    first_rows: list[int]
    spans: list[Spans]
    num_rows: int
    index: pa.Table


def lay_out_rows(
    prompts: Sequence[TokenizedPrompt], spans: Sequence[Spans], *, share: bool
) -> Rows:
    """Number the rows.

    Args:
        prompts: In row order.
        spans: Of each prompt.
        share: Whether prompts that begin alike share the rows of those tokens; for spans of single
            tokens that cover each prompt from its first token.
    """
    first_rows: list[int] = []
    own: list[Spans] = []
    entry_rows: list[NDArray[np.int64]] = []
    num_rows = 0
    before, rows_before = np.zeros(0, np.int32), np.zeros(0, np.int64)
    for prompt, chosen in zip(prompts, spans, strict=True):
        shared = shared_length(before, prompt.token_ids) if share else 0
        first_rows.append(num_rows)
        own.append(chosen[shared:])
        new = np.arange(num_rows, num_rows + len(own[-1]), dtype=np.int64)
        rows = np.concatenate([rows_before[:shared], new])
        entry_rows.append(rows)
        num_rows += len(own[-1])
        before, rows_before = prompt.token_ids, rows
    return Rows(first_rows, own, num_rows, _index(prompts, spans, entry_rows))


def _index(
    prompts: Sequence[TokenizedPrompt],
    spans: Sequence[Spans],
    entry_rows: Sequence[NDArray[np.int64]],
) -> pa.Table:
    counts = [len(chosen) for chosen in spans]
    of_prompt = pa.array(np.repeat(np.arange(len(prompts)), counts), pa.int64())
    flat = np.concatenate(spans) if spans else np.zeros((0, 2), np.int32)
    first, last = flat[:, 0], flat[:, 1] - 1
    token_ids, text_start, text_stop = [], [], []
    for prompt, chosen in zip(prompts, spans, strict=True):
        starts, stops = chosen[:, 0], chosen[:, 1]
        token_ids.append(prompt.token_ids[starts])
        text_start.append(prompt.offsets[starts, 0])
        text_stop.append(prompt.offsets[stops - 1, 1])

    def repeated(values: list[Any], kind: pa.DataType) -> pa.Array:
        return pa.array(values, kind).take(of_prompt)

    examples = [prompt.example for prompt in prompts]
    columns = {
        "row": pa.array(_joined(entry_rows), pa.int64()),
        "prompt_id": repeated([e.prompt_id for e in examples], pa.string()),
        "pair": repeated([e.pair for e in examples], pa.string()),
        "label": repeated([e.label for e in examples], pa.bool_()),
        "split": repeated([e.split for e in examples], pa.string()),
        "first_position": pa.array(first, pa.int32()),
        "position": pa.array(last, pa.int32()),
        # The mean of several tokens is no token.
        "token_id": pa.array(_joined(token_ids), pa.int32(), mask=first != last),
        "text_start": pa.array(_joined(text_start), pa.int32()),
        "text_stop": pa.array(_joined(text_stop), pa.int32()),
    }
    return pa.table(columns, schema=INDEX_SCHEMA)


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
