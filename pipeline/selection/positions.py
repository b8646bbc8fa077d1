"""Mean differences by token position, from a cache that holds several tokens of each prompt.

`reduce` pools the rows of a class, whichever tokens they are of; the rules for a refusal direction
choose among tokens as well as layers (METHODS 6).

Shapes: N entries of the index, R rows of a shard, G groups (position and class), W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InvalidInput
from pipeline.prompts.selection import Selection
from pipeline.reduction.results import Reduction
from pipeline.selection.refusal import RESIDUAL_STREAMS
from steering_service.core.direction import Direction
from steering_service.core.site import Site
from store.activations import ActivationCache
from store.bfloat16 import to_float32


def token_positions(tokens: str) -> list[int]:
    """Which tokens a capture holds, from the end of the prompt: -1 is the last.

    Raises:
        InvalidInput: It does not name tokens from the end.
    """
    selection = Selection.parse(tokens)
    if selection.form == "index":
        return [-selection.count]
    if selection.form == "last":
        return list(range(-selection.count, 0))
    raise InvalidInput(
        f"capture.tokens = {tokens!r}: a refusal direction is read at tokens after the "
        'instruction, from the end of the prompt: set "last", "-2" or "last_3", say',
        kind="refusal_tokens",
    )


def position_directions(
    cache: ActivationCache, reduction: Reduction
) -> Iterator[tuple[int, Direction]]:
    """Mean differences at every captured layer of the residual stream, and every captured token.

    Args:
        cache: Complete.
        reduction: Its difference of means; where one token of each prompt was captured, it is what
            comes back.

    Yields:
        Position and direction, by position, stream and layer; none where the classes do not differ,
        as at the embedding of a token of the chat template.

    Raises:
        InvalidInput: Tokens that are not counted from the end, or no residual stream.
    """
    positions = token_positions(reduction.capture["tokens"])
    streams = [name for name in cache.streams if name in RESIDUAL_STREAMS]
    if not streams:
        raise InvalidInput(
            f"cache {cache.digest[:12]} has the streams {', '.join(cache.streams)}; a refusal "
            f"direction is of the residual stream: add one of {', '.join(RESIDUAL_STREAMS)} under "
            "[capture]",
            kind="refusal_streams",
        )
    sites = [Site.parse(f"{n}.{layer}") for n in streams for layer in cache.streams[n].layers]
    if len(positions) == 1:
        for site in sites:
            layer = list(cache.streams[site.stream].layers).index(site.layer)
            if reduction.directions_LW[site.stream][layer].any():
                yield positions[0], reduction.direction(site)
        return
    counts_GA = _training_counts(cache, positions)
    means = {site: _mean_differences(cache, site, counts_GA) for site in sites}
    for number, position in enumerate(positions):
        for site in sites:
            vector_W = means[site][number].astype(np.float32)
            if vector_W.any():
                # Sigma and norm are for strengths in units; this one is applied as long as it is.
                lineage = {"reduction": reduction.digest, "position": position}
                yield position, Direction(site, vector_W, 0.0, 0.0, reduction.method, {}, lineage)


def _training_counts(cache: ActivationCache, positions: list[int]) -> NDArray[np.float64]:
    """[G, A]: how often each array row counts; by position, the positive class first."""
    index = cache.index()
    _, prompt_N = np.unique(index["prompt_id"].to_numpy(zero_copy_only=False), return_inverse=True)
    position_N = index["position"].to_numpy()
    last_P = np.full(prompt_N.max() + 1, -1, np.int64)
    np.maximum.at(last_P, prompt_N, position_N)
    from_end_N = position_N - last_P[prompt_N] - 1
    row_N, label_N = index["row"].to_numpy(), index["label"].to_numpy()
    train_N = index["split"].to_numpy(zero_copy_only=False) == "train"
    train_N &= ~np.isin(row_N, np.array(sorted(cache.quarantined()), np.int64))
    counts_GA = np.zeros((2 * len(positions), cache.num_rows))
    for number, position in enumerate(positions):
        for side, label in enumerate((True, False)):
            chosen_N = train_N & (from_end_N == position) & (label_N == label)
            np.add.at(counts_GA[2 * number + side], row_N[chosen_N], 1.0)
            if not chosen_N.any():
                raise InvalidInput(
                    f"cache {cache.digest[:12]}: no training row of label {label} at token "
                    f"{position}; check the labels and the split shares of the run file",
                    kind="class_empty",
                )
    return counts_GA


def _mean_differences(
    cache: ActivationCache, site: Site, counts_GA: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[positions, W]: mean of the positive class minus mean of the negative one."""
    layout = cache.layout(site.stream)
    sums_GW = np.zeros((len(counts_GA), layout.width))
    for shard, _, stored_RW in cache.scan(site.stream, [site.layer]):
        rows = layout.shard_rows(shard)
        counts_GR = counts_GA[:, rows.start : rows.stop]
        values_RW: NDArray[Any] = to_float32(stored_RW).astype(np.float64)
        # Rows in quarantine hold NaN, which no weight of 0 takes away.
        values_RW[~counts_GR.any(axis=0)] = 0.0
        sums_GW += counts_GR @ values_RW
    means_GW = sums_GW / counts_GA.sum(axis=1, keepdims=True)
    return np.asarray(means_GW[0::2] - means_GW[1::2])
