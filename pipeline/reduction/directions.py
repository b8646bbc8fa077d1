"""Directions: vectors that separate two classes, for every layer and every head at once.

Shapes: L layers, W width of a stream, H heads, D width of a site; S sites.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from pipeline.errors import InvalidInput
from pipeline.reduction.moments import CrossMoments, Moments
from steering_service.core.direction import Direction
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


def paired_difference(pairs: Moments) -> NDArray[np.float32]:
    """Mean of the differences within pairs, positive minus negative (CAA; METHODS 5).

    Where every row has a partner it is `difference_of_means`. Where some have none, or prompts have
    unequally many rows of a class, only what differs within a prompt counts here.

    Args:
        pairs: Of the differences.

    Returns:
        Float32 [L, W].
    """
    return np.asarray(pairs.mean, dtype=np.float32)


def whitened_difference(
    positive: CrossMoments, negative: CrossMoments, shrinkage: float
) -> NDArray[np.float64]:
    """Difference of means in the metric of the noise: Fisher's linear discriminant (LDA).

    The inverse of the pooled covariance within the classes, times the difference of their means.
    The covariance is that of the population and shrunk towards a sphere of the same trace, (1 -
    shrinkage) C + shrinkage trace(C)/D I (Friedman 1989; scikit-learn's LDA with a number for
    `shrinkage`), so that fewer rows than dimensions is no obstacle.

    Args:
        positive: Of the positive rows, [H, D] and [H, D, D].
        negative: Of the negative rows.
        shrinkage: 0 to 1; at 1 it is the difference of means.

    Returns:
        Float64 [H, D] of norm 1; zero where the means are equal, NaN where a value is not finite.

    Raises:
        InvalidInput: kind "shrinkage", out of range, or too small for the rows there are.
    """
    if not 0 <= shrinkage <= 1:
        raise InvalidInput(
            f"shrinkage must be a number from 0 to 1, got {shrinkage!r}", kind="shrinkage"
        )
    difference_HD = positive.mean_HD - negative.mean_HD
    return np.stack(
        [
            _whitened(difference_D, m2_DD / max(positive.count + negative.count, 1), shrinkage)
            for difference_D, m2_DD in zip(
                difference_HD, positive.m2_HDD + negative.m2_HDD, strict=True
            )
        ]
    )


def _whitened(
    difference_D: NDArray[np.float64], covariance_DD: NDArray[np.float64], shrinkage: float
) -> NDArray[np.float64]:
    width = len(difference_D)
    if not (np.isfinite(covariance_DD).all() and np.isfinite(difference_D).all()):
        return np.full(width, np.nan)
    variance = float(np.trace(covariance_DD)) / width
    if variance > 0 and difference_D.any():
        # In units of the mean variance, so that its scale does not decide what is singular.
        shrunk_DD = covariance_DD * ((1 - shrinkage) / variance)
        shrunk_DD[np.diag_indices(width)] += shrinkage
        try:
            with warnings.catch_warnings():
                # Of a matrix so near to singular that the answer is rounding.
                warnings.simplefilter("error", scipy.linalg.LinAlgWarning)
                difference_D = scipy.linalg.solve(shrunk_DD, difference_D, assume_a="pos")
        except (np.linalg.LinAlgError, scipy.linalg.LinAlgWarning) as error:
            raise InvalidInput(
                f"whitened difference: a covariance of width {width} cannot be inverted with "
                f"shrinkage {shrinkage}, as there are too few rows or some features depend on "
                "others; raise reduce.shrinkage",
                kind="shrinkage",
            ) from error
    return difference_D / max(float(np.linalg.norm(difference_D)), 1e-300)


def scaled_to(
    vectors_LW: NDArray[Any], reference_LW: NDArray[Any], layout: StreamLayout
) -> NDArray[np.float32]:
    """Vectors at the norms that other vectors have, site by site; a control has the same dose.

    Returns:
        Float32 [L, W]; zero where either vector is.
    """
    vectors_LHD = split_heads(np.asarray(vectors_LW, np.float64), layout)
    norm_LH1 = np.linalg.norm(vectors_LHD, axis=-1, keepdims=True)
    reference_LHD = split_heads(np.asarray(reference_LW, np.float64), layout)
    wanted_LH1 = np.linalg.norm(reference_LHD, axis=-1, keepdims=True)
    scaled_LHD = vectors_LHD * (wanted_LH1 / np.maximum(norm_LH1, 1e-300))
    return np.asarray(scaled_LHD.reshape(vectors_LW.shape), dtype=np.float32)


def random_direction(site: Site, width: int, seed: int) -> NDArray[np.float64]:
    """Float64 [D] of norm 1, uniform on the sphere; it depends on the site and the seed alone."""
    name = hashlib.sha256(f"{seed}/{site}".encode()).digest()
    vector_D = np.random.default_rng(int.from_bytes(name)).standard_normal(width)
    return np.asarray(vector_D / np.linalg.norm(vector_D))


def random_directions(layout: StreamLayout, seed: int) -> NDArray[np.float32]:
    """A random direction at every site of a stream: what any effect has to be compared with.

    A site has the same one whichever layers were captured beside it.

    Returns:
        Float32 [L, W], of norm 1 a site.
    """
    width = layout.width // (layout.num_heads or 1)
    vectors = [random_direction(site, width, seed) for site in site_names({layout.stream: layout})]
    return np.concatenate(vectors).reshape(-1, layout.width).astype(np.float32)


def match_norms(directions: Sequence[Direction]) -> list[Direction]:
    """Scale several behaviours' directions at one site to the mean of their norms (CAA; METHODS 5).

    Then one strength is one dose whatever the behaviour.

    Args:
        directions: At one site, one a behaviour. Their units of strength and scores stay.

    Raises:
        InvalidInput: kind "norms", no direction, or they are not of one site and width.
    """
    if not directions or len({(d.site, len(d.vector_D)) for d in directions}) > 1:
        named = ", ".join(f"{d.site} of width {len(d.vector_D)}" for d in directions)
        raise InvalidInput(
            "match_norms takes the directions of several behaviours at one site, as norms of other "
            f"sites mean something else; got {named or 'none'}",
            kind="norms",
        )
    norms = [direction.norm for direction in directions]
    mean = float(np.mean(norms))
    return [
        (direction * (mean / norm)).derived_from(
            directions, "match_norms", norms=norms, mean_norm=mean
        )
        for direction, norm in zip(directions, norms, strict=True)
    ]


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
