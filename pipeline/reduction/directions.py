"""Directions: vectors that separate two classes, for every layer and every head at once.

Shapes: L layers, W width of a stream, H heads, D width of a site; S sites.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.reduction.moments import Moments
from steering_service.core.site import Site
from store.layout import StreamLayout


def difference_of_means(positive: Moments, negative: Moments) -> NDArray[np.float32]:
    """Mean of the positive class minus mean of the negative one.

    It keeps its length (CAA, arXiv 2312.06681; METHODS 5) and its slices by head are the directions
    of HSI and ITI's center of mass (arXiv 2502.05945, 2306.03341; METHODS 1).

    Returns:
        Float32 [L, W].
    """
    return np.asarray(positive.mean - negative.mean, dtype=np.float32)


def split_heads(values: NDArray[Any], layout: StreamLayout) -> NDArray[Any]:
    """View [..., W] as [..., H, D]: the sites of a layer. H is 1 for a stream without heads."""
    num_heads = layout.num_heads or 1
    return values.reshape(*values.shape[:-1], num_heads, layout.width // num_heads)


def site_names(streams: Mapping[str, StreamLayout]) -> Iterator[Site]:
    """Every site of a cache: layers of a stream in order, and heads within a layer."""
    for name, layout in streams.items():
        for layer in layout.layers:
            base = Site.parse(f"{name}.{layer}")
            if layout.num_heads is None:
                yield base
            else:
                for head in range(layout.num_heads):
                    yield Site(base.stream, layer, head)
