"""Mean differences by token position, from a cache that holds several tokens of each prompt.

`reduce` pools the rows of a class, whichever tokens they are of; the rules for a refusal direction
choose among tokens as well as layers (METHODS 6). The samples are those that `reduce` takes.

Shapes: N samples, A array rows, R rows of a shard, G groups (position and class), W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InvalidInput
from pipeline.prompts.selection import Selection
from pipeline.reduction.results import Reduction
from pipeline.reduction.sources import Source
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

    Of a capture that was extracted with ``--no-cache``, means by token are of its kept rows; those
    of captures that the reduction extends count too.

    Args:
        cache: What the reduction is of.
        reduction: Its difference of means; where one token of each prompt was captured, it is what
            comes back.

    Yields:
        Position and direction, by position, stream and layer; none where the classes do not differ,
        as at the embedding of a token of the chat template.

    Raises:
        NotFound: A cache is not complete, and no rows were kept.
        InvalidInput: Tokens that are not counted from the end, no residual stream, or no training
            row of a class.
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
    root = reduction.root
    extended = [ActivationCache.open(root, digest) for digest in reduction.extends]
    sources = [Source.open(root, one) for one in (cache, *extended)]
    counts = [_training_counts(source, positions) for source in sources]
    _check_classes(sources[0], positions, np.sum([c.sum(axis=1) for c in counts], axis=0))
    means = {site: _mean_differences(sources, site, counts) for site in sites}
    for number, position in enumerate(positions):
        for site in sites:
            vector_W = means[site][number].astype(np.float32)
            if vector_W.any():
                # Sigma and norm are for strengths in units; this one is applied as long as it is.
                lineage = {"reduction": reduction.digest, "position": position}
                yield position, Direction(site, vector_W, 0.0, 0.0, reduction.method, {}, lineage)


def _training_counts(source: Source, positions: list[int]) -> NDArray[np.float64]:
    """[G, A]: how often each array row counts; by position, the positive class first."""
    samples = source.samples
    last = _last_positions(source.rows)
    last_N = np.array([last[name] for name in samples.index["prompt_id"].to_pylist()], np.int64)
    from_end_N = samples.index["position"].to_numpy() - last_N - 1
    train_N = source.chosen("train")
    counts = [
        samples.counts(train_N & (from_end_N == position) & (samples.label_N == label))
        for position in positions
        for label in (True, False)
    ]
    return np.array(counts, np.float64)


def _last_positions(rows: ActivationCache) -> dict[str, int]:
    """The last token of each prompt; of all prompts, as it may be in quarantine itself."""
    index = rows.index()
    found = index.group_by("prompt_id").aggregate([("position", "max")])
    return dict(zip(found["prompt_id"].to_pylist(), found["position_max"].to_pylist(), strict=True))


def _check_classes(source: Source, positions: list[int], num_G: NDArray[np.float64]) -> None:
    for group in np.flatnonzero(num_G == 0):
        raise InvalidInput(
            f"{source.where}: no training row of label {group % 2 == 0} at token "
            f"{positions[group // 2]}; check the labels and the split shares of the run file",
            kind="class_empty",
        )


def _mean_differences(
    sources: Sequence[Source], site: Site, counts: Sequence[NDArray[np.float64]]
) -> NDArray[np.float64]:
    """[positions, W]: mean of the positive class minus mean of the negative one.

    Args:
        counts: [G, A] of each source.
    """
    sums_GW = np.zeros((len(counts[0]), sources[0].rows.layout(site.stream).width))
    for source, counts_GA in zip(sources, counts, strict=True):
        layout = source.rows.layout(site.stream)
        for shard, _, stored_RW in source.rows.scan(site.stream, [site.layer]):
            rows = layout.shard_rows(shard)
            counts_GR = counts_GA[:, rows.start : rows.stop]
            values_RW: NDArray[Any] = to_float32(stored_RW).astype(np.float64)
            # Rows in quarantine hold NaN, which no weight of 0 takes away.
            values_RW[~counts_GR.any(axis=0)] = 0.0
            sums_GW += counts_GR @ values_RW
    num_G = np.sum([counts_GA.sum(axis=1) for counts_GA in counts], axis=0)
    means_GW = sums_GW / num_G[:, None]
    return np.asarray(means_GW[0::2] - means_GW[1::2])
