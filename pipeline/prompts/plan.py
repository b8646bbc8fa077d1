"""Plan: a run file becomes a Capture, an index and a cache that waits for its shards.

Everything that decides the bytes of a cache is fixed here and recorded in the Capture: the order of
the prompts, the rows, the shards, the packs. Whoever computes a shard, on whichever machine of a
kind, gets the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import RunFile
from pipeline.errors import InvalidInput
from pipeline.extraction.models import ModelInfo, load_tokenizer
from pipeline.prompts.corpus import Quarantined, check_quarantine, read_corpus
from pipeline.prompts.tokens import TokenizedPrompt, row_spans, tokenize
from store.activations import ActivationCache
from store.layout import StreamLayout, choose_rows_per_shard
from store.location import Location

CAPTURE_SCHEMA: Final = 1
PROMPTS_FILE: Final = "prompts.parquet"
QUARANTINE_FILE: Final = "quarantine.jsonl"

_ROWS_PER_CHUNK: Final = 32
_MIN_SHARDS: Final = 16
"""A small corpus is still split, so that several workers have something to do."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do, and the cache in which it does it.

    Attributes:
        cache: Created, and perhaps partly or wholly written by an earlier run.
        model: The model that is run.
        num_prompts: Prompts that will be read.
        num_tokens: Their tokens, without padding.
        num_rows: Rows of every array.
        quarantined: Rows of the prompt files that were left out.
    """

    cache: ActivationCache
    model: ModelInfo
    num_prompts: int
    num_tokens: int
    num_rows: int
    quarantined: tuple[Quarantined, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays, without checksums."""
        return sum(
            int(np.prod(layout.shape)) * layout.itemsize for layout in self.cache.streams.values()
        )

    def summary(self) -> dict[str, Any]:
        """What `steerage plan --json` prints."""
        return {
            "capture": self.cache.digest,
            "model": self.model.name,
            "streams": {name: list(s.shape) for name, s in self.cache.streams.items()},
            "prompts": self.num_prompts,
            "tokens": self.num_tokens,
            "rows": self.num_rows,
            "bytes": self.num_bytes,
            "shards": self.cache.num_shards,
            "shards_missing": len(self.cache.missing()),
            "quarantined": len(self.quarantined),
        }


def plan(run: RunFile, root: Location) -> Plan:
    """Read, tokenise and lay out a run, and create its cache.

    Planning again with the same inputs finds the same cache, whatever state it is in.

    Args:
        run: The run file.
        root: The store.

    Raises:
        InvalidInput: Prompts, layers or selection that cannot be used; see the message.
    """
    model = ModelInfo.read(run.model.path)
    corpus = read_corpus(run.prompts)
    tokenizer = load_tokenizer(run.model.path)
    prompts, too_long = tokenize(corpus.examples, tokenizer, run.prompts, model.context)
    prompts, too_short = _with_rows(prompts, run.capture.tokens)
    quarantined = [*corpus.quarantined, *too_long, *too_short]
    check_quarantine(quarantined, corpus.num_rows, len(prompts), run.prompts)
    # By length, so that prompts of a pack need little padding; then by tokens, so that the order
    # does not depend on that of the files.
    prompts.sort(key=lambda p: (len(p.token_ids), p.token_ids, p.example.prompt_id))
    spans = [row_spans(run.capture.tokens, len(prompt.token_ids)) for prompt in prompts]
    table = _prompt_table(prompts, spans)
    layouts = _layouts(run, model, sum(map(len, spans)))
    capture = {
        "schema_version": CAPTURE_SCHEMA,
        "model": {
            "name": model.name,
            "fingerprint": model.fingerprint,
            "dtype": _compute_dtype(run, model),
        },
        "corpus": corpus.digest,
        "prompts": run.prompts.model_dump(
            mode="json", exclude={"files", "format", "max_quarantined"}
        )
        | {"format": corpus.format},
        "token_ids": _digest_tokens(prompts),
        "streams": [layout.stream for layout in layouts],
        "layers": list(layouts[0].layers),
        "tokens": run.capture.tokens,
        "dtype": layouts[0].dtype,
        "tokens_per_pack": run.capture.tokens_per_pack,
        "rows_per_shard": layouts[0].rows_per_shard,
    }
    # Its reasons quote messages of libraries, so another version may word them otherwise.
    notes = {
        QUARANTINE_FILE: b"".join(
            json.dumps(asdict(row), sort_keys=True).encode() + b"\n" for row in quarantined
        )
    }
    cache = ActivationCache.create(
        root,
        capture,
        layouts,
        _index_table(prompts, spans),
        {PROMPTS_FILE: _parquet(table)},
        notes=notes,
    )
    return Plan(
        cache=cache,
        model=model,
        num_prompts=len(prompts),
        num_tokens=sum(len(prompt.token_ids) for prompt in prompts),
        num_rows=layouts[0].num_rows,
        quarantined=tuple(quarantined),
    )


@dataclass(frozen=True, slots=True)
class PlannedPrompt:
    """A prompt as a worker needs it.

    Attributes:
        token_ids: Int64 [T].
        first_row: The row of its first span.
        spans: Token spans [start, stop), one a row.
    """

    token_ids: np.ndarray[Any, np.dtype[np.int64]]
    first_row: int
    spans: tuple[tuple[int, int], ...]


def read_prompts(cache: ActivationCache) -> list[PlannedPrompt]:
    """The prompts of a planned cache, in row order."""
    table = pq.read_table(
        io.BytesIO(cache.read_file(PROMPTS_FILE)), columns=["token_ids", "first_row"]
    )
    token_ids = table["token_ids"].combine_chunks()
    offsets = token_ids.offsets.to_numpy()
    values = token_ids.values.to_numpy()
    first_rows = table["first_row"].to_numpy()
    selection = cache.capture["tokens"]
    return [
        PlannedPrompt(
            values[offsets[i] : offsets[i + 1]].astype(np.int64),
            int(first_rows[i]),
            tuple(row_spans(selection, int(offsets[i + 1] - offsets[i]))),
        )
        for i in range(len(table))
    ]


def shard_packs(
    prompts: Sequence[PlannedPrompt], rows: range, tokens_per_pack: int
) -> Iterator[list[PlannedPrompt]]:
    """Split the prompts that have rows in a shard into packs: batches of one forward pass.

    A prompt whose rows lie in two shards is in packs of both.

    Args:
        prompts: All prompts, in row order.
        rows: The rows of the shard.
        tokens_per_pack: Most tokens of a pack, padding included; a longer prompt is a pack alone.
    """
    pack: list[PlannedPrompt] = []
    longest = 0
    for prompt in prompts:
        if prompt.first_row + len(prompt.spans) <= rows.start or prompt.first_row >= rows.stop:
            continue
        longest_now = max(longest, len(prompt.token_ids))
        if pack and longest_now * (len(pack) + 1) > tokens_per_pack:
            yield pack
            pack, longest_now = [], len(prompt.token_ids)
        pack.append(prompt)
        longest = longest_now
    if pack:
        yield pack


def _with_rows(
    prompts: list[TokenizedPrompt], selection: str
) -> tuple[list[TokenizedPrompt], list[Quarantined]]:
    left_out = {}
    for prompt in prompts:
        if not row_spans(selection, len(prompt.token_ids)):
            reason = f"{len(prompt.token_ids)} tokens, too few for tokens = {selection!r}"
            source = prompt.example.source
            left_out[source] = Quarantined(*source, reason)
    # Like a pair of which one side is too long, the other side goes with it.
    return [p for p in prompts if p.example.source not in left_out], list(left_out.values())


def _layouts(run: RunFile, model: ModelInfo, num_rows: int) -> list[StreamLayout]:
    layers = run.capture.layers
    chosen = tuple(range(model.num_layers)) if layers == "all" else tuple(sorted(set(layers)))
    if chosen[0] < 0 or chosen[-1] >= model.num_layers:
        raise InvalidInput(
            f"capture.layers {list(chosen)}: the model {model.name!r} has layers 0 to "
            f"{model.num_layers - 1}",
            kind="capture_layers",
        )
    dtype = _compute_dtype(run, model) if run.capture.dtype == "auto" else run.capture.dtype
    streams = run.capture.streams
    by_size = choose_rows_per_shard(
        len(chosen),
        [model.width(stream) for stream in streams],
        itemsize=4 if dtype == "float32" else 2,
        target_bytes=int(run.capture.shard_mib * 2**20),
    )
    chunks = -(-num_rows // (_MIN_SHARDS * _ROWS_PER_CHUNK))
    return [
        StreamLayout(
            stream=stream,
            num_rows=num_rows,
            layers=chosen,
            width=model.width(stream),
            dtype=dtype,
            rows_per_shard=min(by_size, chunks * _ROWS_PER_CHUNK),
            rows_per_chunk=_ROWS_PER_CHUNK,
            num_heads=model.num_heads if stream == "z" else None,
        )
        for stream in streams
    ]


def _compute_dtype(run: RunFile, model: ModelInfo) -> Any:
    return model.dtype if run.model.dtype == "auto" else run.model.dtype


def _prompt_table(
    prompts: Sequence[TokenizedPrompt], spans: Sequence[Sequence[tuple[int, int]]]
) -> pa.Table:
    first_row = np.cumsum([0, *map(len, spans)])[:-1] if prompts else np.zeros(0)
    return pa.table(
        {
            "prompt_id": pa.array([p.example.prompt_id for p in prompts], pa.string()),
            "token_ids": pa.array([p.token_ids for p in prompts], pa.list_(pa.int32())),
            "first_row": pa.array(first_row, pa.int64()),
            "text": pa.array([p.text for p in prompts], pa.large_string()),
        }
    )


def _index_table(
    prompts: Sequence[TokenizedPrompt], spans: Sequence[Sequence[tuple[int, int]]]
) -> pa.Table:
    """One row a row of the arrays: which prompt, class, split, token and characters it is."""
    columns: dict[str, list[Any]] = {name: [] for name in _INDEX_SCHEMA.names}
    for prompt, rows in zip(prompts, spans, strict=True):
        for start, stop in rows:
            columns["prompt_id"].append(prompt.example.prompt_id)
            columns["pair"].append(prompt.example.pair)
            columns["label"].append(prompt.example.label)
            columns["split"].append(prompt.example.split)
            columns["first_position"].append(start)
            columns["position"].append(stop - 1)
            # The mean of several tokens is no token.
            single = stop - start == 1
            columns["token_id"].append(prompt.token_ids[start] if single else None)
            columns["text_start"].append(prompt.offsets[start][0])
            columns["text_stop"].append(prompt.offsets[stop - 1][1])
    return pa.table(columns, schema=_INDEX_SCHEMA)


_INDEX_SCHEMA: Final = pa.schema(
    [
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


def _digest_tokens(prompts: Sequence[TokenizedPrompt]) -> str:
    """Digest of what the model reads; it stands for the tokenizer and the template."""
    hasher = hashlib.sha256()
    for prompt in prompts:
        hasher.update(np.asarray([len(prompt.token_ids), *prompt.token_ids], "<i8").tobytes())
    return hasher.hexdigest()


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
