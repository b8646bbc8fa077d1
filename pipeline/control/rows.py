"""What a controller is trained on: the rows of a cache at the sites that it reads.

Shapes: N samples, R widths of the read sites together, W width of a stream, D width of a site.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InvalidInput, NotFound
from pipeline.prompts.worklist import read_prompts
from pipeline.reduction.directions import split_heads
from pipeline.reduction.samples import read_samples
from steering_service.core.site import Site
from store.activations import ActivationCache
from store.bfloat16 import to_float32


@dataclass(frozen=True, slots=True, eq=False)
class ControllerRows:
    """Rows of one cache, one for each sample; see `reduction.samples`.

    Attributes:
        reads_NR: Float32 [N, R], on disk: a cache may be larger than the memory.
        label_N: Bool [N], whether the row's prompt is one to steer.
        split_N: Split names [N].
        token_ids: The prompt of each row, Int64 [T] each.
    """

    reads_NR: NDArray[np.float32]
    label_N: NDArray[np.bool_]
    split_N: NDArray[Any]
    token_ids: Sequence[NDArray[np.int64]]

    def chosen(self, split: str, label: bool) -> NDArray[np.int64]:
        """Numbers of the rows of a split and class."""
        return np.flatnonzero((self.split_N == split) & (self.label_N == label))


def read_rows(cache: ActivationCache, reads: Sequence[Site]) -> ControllerRows:
    """Copy what a controller reads out of a cache, once.

    Raises:
        NotFound: The cache is not complete, or lacks a stream or layer that is read.
        InvalidInput: The cache holds other tokens than the last one of each prompt, which is where
            a controller reads, or its prompts hold completions.
    """
    if not cache.is_complete:
        raise NotFound(
            f"cache {cache.digest[:12]} lacks {len(cache.missing())} of {cache.num_shards} shards; "
            "run `steerage extract` on the same run file first",
            kind="cache_incomplete",
        )
    if cache.capture["tokens"] != "last":
        raise InvalidInput(
            f"cache {cache.digest[:12]} holds tokens = {cache.capture['tokens']!r}; a controller "
            'reads the last token of the prompt: set tokens = "last" under [capture]',
            kind="controller_tokens",
        )
    if (form := cache.capture["prompts"]["format"]) != "labelled":
        raise InvalidInput(
            f"cache {cache.digest[:12]} is of {form} prompts, whose last token is that of a "
            "completion; a controller reads where a request ends: use prompts with labels, "
            "{prompt, label}",
            kind="controller_prompts",
        )
    samples = read_samples(cache)
    widths = [_width(cache, site) for site in reads]
    # Unlinked at once, so it goes with the process, however that ends.
    with tempfile.TemporaryFile(prefix="steerage-controller-") as file:
        reads_NR = np.memmap(file, np.float32, "w+", shape=(len(samples), sum(widths)))
    first = 0
    for site, width in zip(reads, widths, strict=True):
        layout = cache.layout(site.stream)
        for shard, _, values_RW in cache.scan(site.stream, [site.layer]):
            values = to_float32(values_RW)
            if site.head is not None:
                values = split_heads(values, layout)[:, site.head]
            rows = layout.shard_rows(shard)
            here = samples.in_rows(rows)
            reads_NR[here, first : first + width] = values[samples.row_N[here] - rows.start]
        first += width
    if not np.isfinite(reads_NR).all():
        raise InvalidInput(
            f"cache {cache.digest[:12]}: rows that are not in quarantine hold NaN or infinity; run "
            "`steerage verify`, which finds a quarantine that was lost",
            kind="not_finite",
        )
    # With tokens = "last", a row is of one prompt.
    token_ids = {prompt.first_row: prompt.token_ids for prompt in read_prompts(cache)}
    return ControllerRows(
        reads_NR,
        samples.label_N,
        samples.split_N,
        [token_ids[row] for row in samples.row_N.tolist()],
    )


def _width(cache: ActivationCache, site: Site) -> int:
    layout = cache.layout(site.stream)
    if site.layer not in layout.layers:
        raise NotFound(
            f"cache {cache.digest[:12]} has layers {list(layout.layers)} of {site.stream}, and the "
            f"controller reads {site}; add the layer under [capture]",
            kind="site",
        )
    if site.head is None:
        return layout.width
    num_heads = layout.num_heads or 1
    if site.head >= num_heads:
        raise NotFound(
            f"cache {cache.digest[:12]} has heads 0 to {num_heads - 1} of {site.stream}, and the "
            f"controller reads {site}",
            kind="site",
        )
    return layout.width // num_heads
