"""Plan: a run file becomes a Capture, an index and a cache that waits for its shards.

Everything that decides the bytes of a cache is fixed here and recorded in the Capture: the order of
the prompts, the rows, the shards, the packs. Whoever computes a shard, on whichever machine of a
kind, gets the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np

from pipeline.config import RunFile
from pipeline.errors import InvalidInput
from pipeline.extraction.models import ModelInfo, load_tokenizer
from pipeline.prompts.corpus import Quarantined, check_quarantine, read_corpus
from pipeline.prompts.packing import Layout, Packing
from pipeline.prompts.rows import lay_out_rows
from pipeline.prompts.selection import Selection
from pipeline.prompts.tokens import TokenizedPrompt, tokenize
from pipeline.prompts.trie import MIN_CARRY, fill_shards, shared_length, trie_order
from pipeline.prompts.worklist import PROMPTS_FILE, write_worklist
from store.activations import ActivationCache
from store.layout import StreamLayout, choose_rows_per_shard
from store.location import Location

CAPTURE_SCHEMA: Final = 2
QUARANTINE_FILE: Final = "quarantine.jsonl"

_ROWS_PER_CHUNK: Final = 32
_NARROW: Final = 2048
MIN_SHARDS: Final = 32
"""A small corpus is still split, so that several workers have something to do."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do, and the cache in which it does it.

    Attributes:
        cache: Created, and perhaps partly or wholly written by an earlier run.
        model: The model that is run.
        num_prompts: Prompts that will be read.
        packing: How they become forward passes.
        packing_reason: Why not as a trie with attention of ours, or None.
        num_tokens: Their tokens, without padding.
        num_nodes: Nodes of their trie: tokens that are computed where packs share them.
        num_rows: Rows of every array.
        quarantined: Rows of the prompt files that were left out.
        max_quarantined: Share of all rows that may be, extraction's included.
    """

    cache: ActivationCache
    model: ModelInfo
    packing: Packing
    packing_reason: str | None
    num_prompts: int
    num_tokens: int
    num_nodes: int
    num_rows: int
    quarantined: tuple[Quarantined, ...]
    max_quarantined: float

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
            "trie_nodes": self.num_nodes,
            "packing": self.packing.layout,
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
    selection = Selection.parse(run.capture.tokens)
    corpus = read_corpus(run.prompts)
    selection.check_format(corpus.format)
    tokenizer = load_tokenizer(run.model.path)
    prompts, too_long = tokenize(corpus.examples, tokenizer, run.prompts, model.context)
    prompts, too_short = _with_rows(prompts, selection)
    quarantined = [*corpus.quarantined, *too_long, *too_short]
    check_quarantine(quarantined, corpus.num_rows, len(prompts), run.prompts)
    packing, packing_reason = _packing(run, model, prompts)
    layout = packing.layout
    prompts = _in_order(prompts, layout)
    packing = replace(packing, prefix=_prefix(prompts, layout))
    share = selection.form == "all" and layout != "batches"
    spans = [np.array(selection.spans(prompt), np.int32).reshape(-1, 2) for prompt in prompts]
    num_rows = _num_nodes(prompts) if share else sum(map(len, spans))
    layouts = _layouts(run, model, num_rows)
    if layout != "batches" and not share:
        ids = [prompt.token_ids for prompt in prompts]
        order = fill_shards(
            ids, [len(chosen) for chosen in spans], layouts[0].rows_per_shard, packing.prefix
        )
        prompts, spans = [prompts[i] for i in order], [spans[i] for i in order]
    rows = lay_out_rows(prompts, spans, share=share)
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
        "packing": packing.record(),
        "rows_per_shard": layouts[0].rows_per_shard,
    }
    # Its reasons quote messages of libraries, so another version may word them otherwise.
    notes = {
        QUARANTINE_FILE: b"".join(
            json.dumps(asdict(row), sort_keys=True).encode() + b"\n" for row in quarantined
        )
    }
    worklist = write_worklist(prompts, rows, layouts[0].rows_per_shard, layouts[0].num_shards)
    cache = ActivationCache.create(
        root, capture, layouts, rows.index, {PROMPTS_FILE: worklist}, notes=notes
    )
    return Plan(
        cache=cache,
        model=model,
        packing=packing,
        packing_reason=packing_reason,
        num_prompts=len(prompts),
        num_tokens=sum(len(prompt.token_ids) for prompt in prompts),
        num_nodes=_num_nodes(prompts),
        num_rows=rows.num_rows,
        quarantined=tuple(quarantined),
        max_quarantined=run.prompts.max_quarantined,
    )


def _packing(
    run: RunFile, model: ModelInfo, prompts: Sequence[TokenizedPrompt]
) -> tuple[Packing, str | None]:
    """How the prompts are packed but for their prefix, and why not as a trie if they are not."""
    asked = run.capture.tokens_per_pack
    narrow = model.d_model < _NARROW
    tokens = (1024 if narrow else 4096) if asked == "auto" else asked
    layout, reason = model.layout, model.layout_reason
    longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
    if model.rope_limit is not None and longest > model.rope_limit:
        # A budget of one token: each prompt by itself.
        layout, tokens = "batches", 1
        reason = (
            f"a prompt of {longest} tokens is longer than {model.rope_limit}, past which LongRoPE "
            "turns every prompt of its pass otherwise"
        )
    if run.capture.packing == "batches":
        return Packing("batches", tokens), None
    if layout == "batches" and run.capture.packing == "trie":
        raise InvalidInput(
            f'capture.packing = "trie": prompts of the model {model.name!r} cannot be packed so: '
            f'{reason}; leave packing out, or set it to "batches"',
            kind="capture_packing",
        )
    return Packing(layout, tokens), reason


def _in_order(prompts: Sequence[TokenizedPrompt], layout: Layout) -> list[TokenizedPrompt]:
    """The prompts in an order that depends on their tokens and names, not on that of the files."""
    by_name = sorted(prompts, key=lambda prompt: prompt.example.prompt_id)
    order = trie_order([prompt.token_ids for prompt in by_name])
    if layout == "batches":
        # By length, so that prompts of a batch need little padding.
        order.sort(key=lambda i: len(by_name[i].token_ids))
    return [by_name[i] for i in order]


def _prefix(prompts: Sequence[TokenizedPrompt], layout: Layout) -> int:
    """Tokens that all prompts begin with, if it pays to keep them."""
    if layout != "trie" or len(prompts) < 2:
        return 0
    # In the trie's order, what the first and the last share is shared by all.
    shared = shared_length(prompts[0].token_ids, prompts[-1].token_ids)
    return shared if shared >= MIN_CARRY else 0


def _num_nodes(prompts: Sequence[TokenizedPrompt]) -> int:
    """Nodes of the trie of prompts in its order."""
    num_nodes = 0
    before = np.zeros(0, np.int32)
    for prompt in prompts:
        num_nodes += len(prompt.token_ids) - shared_length(before, prompt.token_ids)
        before = prompt.token_ids
    return num_nodes


def _with_rows(
    prompts: list[TokenizedPrompt], selection: Selection
) -> tuple[list[TokenizedPrompt], list[Quarantined]]:
    left_out = {}
    for prompt in prompts:
        if (reason := selection.reason(prompt)) is not None:
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
    chunks = -(-num_rows // (MIN_SHARDS * _ROWS_PER_CHUNK))
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


def _digest_tokens(prompts: Sequence[TokenizedPrompt]) -> str:
    """Digest of what the model reads; it stands for the tokenizer and the template."""
    hasher = hashlib.sha256()
    for prompt in prompts:
        hasher.update(np.asarray(len(prompt.token_ids), "<i8").tobytes())
        hasher.update(prompt.token_ids.astype("<i8").tobytes())
    return hasher.hexdigest()
