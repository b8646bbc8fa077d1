"""What the activations are, one text at a time with plain transformers, and how far others are off.

Shapes: N texts, L layers, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers

from extraction_peers.contestants import NORMED_LAST
from extraction_peers.inputs import Case
from pipeline.extraction.models import load_tokenizer
from store.activations import ActivationCache
from store.location import Location

MOST_TEXTS: Final = 100
"""Evenly spread over a case's texts; a row in a wrong place shows as well as with all of them."""

TOLERANCE: Final = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest relative error of a row (in the Euclidean norm) with which a time counts."""

Rows = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True)
class Reference:
    """Activations of some of a case's texts.

    Attributes:
        texts: Which texts.
        rows: By stream, [len(texts), L, W] float32.
        dtype: Of the model.
    """

    texts: tuple[int, ...]
    rows: Rows
    dtype: str

    @classmethod
    @torch.inference_mode()
    def of(cls, case: Case, model_path: Path, dtype: str, device: str) -> Reference:
        """Compute them: no batches, no padding, hooks on the blocks."""
        chosen = sorted(
            {
                round(i)
                for i in np.linspace(0, len(case.texts) - 1, min(MOST_TEXTS, len(case.texts)))
            }
        )
        tokenizer = load_tokenizer(model_path)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model_path, dtype=getattr(torch, dtype)
        )
        model.to(device).eval()
        found: dict[str, list[torch.Tensor]] = {"resid_post": [], "z": [], NORMED_LAST: []}
        for i in chosen:
            ids = tokenizer(case.texts[i], add_special_tokens=False)["input_ids"]
            resid: list[torch.Tensor] = []
            z: list[torch.Tensor] = []
            handles = []
            for block in model.model.layers:
                handles += [
                    block.register_forward_hook(lambda _m, _a, out, kept=resid: kept.append(out)),
                    block.self_attn.o_proj.register_forward_pre_hook(
                        lambda _m, args, kept=z: kept.append(args[0])
                    ),
                ]
            body = model.model(input_ids=torch.tensor([ids], device=device), use_cache=False)
            for handle in handles:
                handle.remove()
            last = [layer_1TD[0, -1] for layer_1TD in resid]
            found["resid_post"].append(torch.stack(last))
            found["z"].append(torch.stack([layer_1TW[0, -1] for layer_1TW in z]))
            found[NORMED_LAST].append(torch.stack([*last[:-1], body.last_hidden_state[0, -1]]))
        rows = {name: torch.stack(kept).float().cpu().numpy() for name, kept in found.items()}
        return cls(tuple(chosen), rows, dtype)

    def error(self, rows: Rows) -> float:
        """Largest relative error of a row, over all streams that are there.

        Args:
            rows: Of the chosen texts, [len(texts), L, W] by stream.
        """
        worst = 0.0
        for stream, values_NLW in rows.items():
            want_NLW = self.rows[stream]
            if values_NLW.shape != want_NLW.shape:
                return float("inf")
            off_NL = np.linalg.norm(values_NLW - want_NLW, axis=-1)
            errors_NL = off_NL / np.linalg.norm(want_NLW, axis=-1)
            # NaN is larger than any number here, not smaller.
            worst = max(worst, float(np.nan_to_num(errors_NL, nan=np.inf).max()))
        return worst

    def of_peer(self, path: Path) -> Rows:
        """The chosen rows of a peer's file."""
        with np.load(path) as saved:
            return {name: saved[name][list(self.texts)] for name in saved.files}

    def of_cache(self, store: Path, capture: str) -> Rows:
        """The chosen rows of a cache of ours."""
        cache = ActivationCache.open(Location.open(str(store)), capture)
        index = cache.index()
        names = index["prompt_id"].to_pylist()
        stored = index["row"].to_pylist() if "row" in index.column_names else range(len(names))
        row_of = dict(zip(names, stored, strict=True))
        in_order = sorted(row_of, key=_line_and_side)
        wanted = [row_of[in_order[i]] for i in self.texts]
        return {
            stream: np.stack(
                [_float32(cache.read_rows(stream, layer, wanted)) for layer in layout.layers], 1
            )
            for stream, layout in cache.streams.items()
        }


def unique_tokens(case: Case, model_path: Path) -> tuple[int, int, int]:
    """How much a case shares.

    Returns:
        Tokens in all; those left if each prefix is computed once (the nodes of the trie); and the
        sum over these of how many tokens each attends to, itself included.
    """
    tokenizer = load_tokenizer(model_path)
    rows = sorted(tokenizer(list(case.texts), add_special_tokens=False)["input_ids"])
    nodes = attended = 0
    before: Sequence[int] = ()
    for row in rows:
        pairs = enumerate(zip(before, row, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(before), len(row)))
        nodes += len(row) - shared
        attended += sum(range(shared + 1, len(row) + 1))
        before = row
    return sum(map(len, rows)), nodes, attended


def _line_and_side(prompt_id: str) -> tuple[int, bool]:
    """Where a prompt is in its file; the positive side of a pair comes first."""
    line = prompt_id.rpartition(":")[2]
    return int(line.rstrip("+-")), line.endswith("-")


def _float32(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if values.dtype == np.float32:
        return values
    return torch.from_numpy(values.copy()).view(torch.bfloat16).float().numpy()
