"""Sparse directions: a share of the entries, the others zero (Jailbreak Antidote).

arXiv 2410.02298; METHODS 3. The mask takes norm away, so at equal strength it also lowers the dose:
compare at matched norm as well.

Entries are chosen by magnitude, as Jailbreak Antidote does, or by a t statistic: magnitude prefers
the dimensions that are large in every row, t those in which the classes differ beyond their spread.

Shapes: D width of the site, E entries of several sites, K fractions, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InvalidInput
from pipeline.reduction.moments import Moments
from pipeline.reduction.scores import auroc
from steering_service.core.direction import Direction


def welch_t(positive: Moments, negative: Moments) -> NDArray[np.float64]:
    """Welch's t of each dimension: difference of the class means over its standard error.

    Biometrika 34, 1947; the variances of the classes may differ.

    Returns:
        Float64 [...], the moments' shape; 0 where the means are equal, infinite where they are not
        and nothing varies.

    Raises:
        InvalidInput: kind "statistic_rows", a class has fewer than two rows.
    """
    _check_rows(min(positive.count, negative.count), "rows of each class")
    return _over(positive.mean - negative.mean, _error_of_mean(positive) + _error_of_mean(negative))


def paired_t(pairs: Moments) -> NDArray[np.float64]:
    """Student's t of each dimension's differences within pairs; what pairs share cancels out.

    Args:
        pairs: Of positive minus negative.

    Returns:
        Float64 [...], see `welch_t`.

    Raises:
        InvalidInput: kind "statistic_rows", fewer than two pairs.
    """
    _check_rows(pairs.count, "pairs")
    return _over(pairs.mean, _error_of_mean(pairs))


def _check_rows(count: int, what: str) -> None:
    if count < 2:
        raise InvalidInput(
            f"a t statistic needs at least 2 {what}, got {count}", kind="statistic_rows"
        )


def _error_of_mean(moments: Moments) -> NDArray[np.float64]:
    """Squared standard error of the mean."""
    return moments.m2 / (moments.count - 1) / moments.count


def _over(
    difference: NDArray[np.float64], squared_error: NDArray[np.float64]
) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(difference == 0, 0.0, difference / np.sqrt(squared_error)))


def top_fraction(
    direction: Direction,
    fraction: float,
    *,
    match_norm: bool = False,
    statistic_D: NDArray[np.float64] | None = None,
) -> Direction:
    """Keep the int(fraction * D) entries that are largest in magnitude, or in a statistic.

    Of entries as large as each other, the first are kept.

    Args:
        direction: Its sigma and activation norm stay as they are, as units of strength; its scores
            are the whole vector's and move to the lineage.
        fraction: Above 0, at most 1; the direction itself comes back where every entry is kept.
        match_norm: Scale what is kept to the direction's norm. Otherwise nothing is rescaled, and
            the dose is only as intended with ``strength_unit = "direction"``: the other units apply
            the unit vector.
        statistic_D: [D], such as `welch_t` or `paired_t` at the site: the entries of its largest
            magnitudes are kept. None: by the direction's own.

    Raises:
        InvalidInput: kind "fraction", out of range; "nothing_kept", no entry would be left;
            "statistic_shape", a statistic of another width or with NaN.
    """
    num_kept = _num_kept(direction, fraction)
    rank_D = _rank(direction, statistic_D)
    kept = np.argsort(-rank_D, kind="stable")[:num_kept]
    selector = "top" if statistic_D is None else "top_t"
    return _masked(direction, kept, {"selector": selector, "fraction": fraction}, match_norm)


def top_fraction_over(
    directions: Sequence[Direction],
    fraction: float,
    *,
    match_norm: bool = False,
    statistics: Sequence[NDArray[np.float64]] | None = None,
) -> list[Direction]:
    """Keep the int(fraction * E) largest of all E entries of several sites: one threshold for all.

    Activations grow with depth, so entries as they are would only choose the last layers. They are
    compared as shares of their site's activation norm, or, where statistics are given, by those:
    a t statistic has no unit.

    Args:
        directions: One a site; see `top_fraction` for what becomes of them.
        fraction: Above 0, at most 1.
        match_norm: Scale what is kept so that the doses of all sites together, each a share of its
            site's activation norm, have the root sum of squares that they had before. One factor
            for all sites: they keep their proportions.
        statistics: [D] each, in the order of the directions.

    Returns:
        In the same order, without the sites of which no entry is kept.

    Raises:
        InvalidInput: As `top_fraction`; also two directions at one site, or an activation norm
            of zero where it is the unit.
    """
    _check_sites(directions, statistics)
    ranks = [
        _rank(item, None) / item.activation_norm
        if statistics is None
        else _rank(item, statistics[number])
        for number, item in enumerate(directions)
    ]
    widths = [len(item.vector_D) for item in directions]
    named = f"{len(directions)} directions, {directions[0].site} to {directions[-1].site}"
    num_kept = _num_of(fraction, sum(widths), named)
    kept_E = np.zeros(sum(widths), np.bool_)
    kept_E[np.argsort(-np.concatenate(ranks), kind="stable")[:num_kept]] = True
    entry = {
        "selector": "top_over" if statistics is None else "top_t_over",
        "fraction": fraction,
        "sites": [str(item.site) for item in directions],
    }
    masks = np.split(kept_E, np.cumsum(widths)[:-1])
    whole = sum(_squared_dose(item, item.vector_D) for item in directions)
    left = sum(
        _squared_dose(item, item.vector_D * kept_D)
        for item, kept_D in zip(directions, masks, strict=True)
    )
    if left == 0:
        raise InvalidInput(
            f"{named}: all {num_kept} entries that would be kept are zero; choose a larger "
            "fraction or another statistic",
            kind="nothing_kept",
        )
    return [
        _masked(item, np.flatnonzero(kept_D), entry, match_norm, float(np.sqrt(whole / left)))
        for item, kept_D in zip(directions, masks, strict=True)
        if item.vector_D[kept_D].any()
    ]


def _check_sites(
    directions: Sequence[Direction], statistics: Sequence[NDArray[np.float64]] | None
) -> None:
    sites = [str(item.site) for item in directions]
    if not sites or len(set(sites)) < len(sites):
        raise InvalidInput(
            f"one threshold over several sites takes one direction a site, got "
            f"{', '.join(sites) or 'none'}",
            kind="sparse_sites",
        )
    if statistics is not None and len(statistics) != len(directions):
        raise InvalidInput(
            f"expected a statistic for each of {len(directions)} directions, got {len(statistics)}",
            kind="statistic_shape",
        )
    unknown = [str(item.site) for item in directions if item.activation_norm == 0]
    if unknown and statistics is None:
        raise InvalidInput(
            f"the activation norm at {', '.join(unknown)} is 0, so entries there cannot be "
            "compared with those of other sites; give statistics, or measure the direction",
            kind="activation_norm",
        )


def _squared_dose(direction: Direction, vector_D: NDArray[Any]) -> float:
    """Squared length as a share of the activation norm; as it is where that is not known."""
    unit = direction.activation_norm or 1.0
    return float(np.square(vector_D.astype(np.float64) / unit).sum())


@dataclass(frozen=True, slots=True, eq=False)
class SparsityCurve:
    """What is left of a direction when only some of its entries are kept.

    Attributes:
        fraction_K: Float64 [K], as asked for.
        num_kept_K: Int64 [K], entries kept.
        norm_share_K: Float64 [K], norm of what is kept over that of the whole, 0 to 1.
        auroc_K: Float64 [K], of the rows' projections on what is kept; NaN where a class is
            missing or nothing is kept.
    """

    fraction_K: NDArray[np.float64]
    num_kept_K: NDArray[np.int64]
    norm_share_K: NDArray[np.float64]
    auroc_K: NDArray[np.float64]


def sparsity_curve(
    direction: Direction,
    values_ND: NDArray[np.float32],
    label_N: NDArray[np.bool_],
    fractions: Sequence[float],
    *,
    statistic_D: NDArray[np.float64] | None = None,
) -> SparsityCurve:
    """Norm and AUROC that `top_fraction` keeps, for a picture.

    Args:
        direction: The whole one.
        values_ND: Float32 [N, D], held-out activations at its site.
        label_N: Bool [N].
        fractions: 0 to 1.
        statistic_D: See `top_fraction`.

    Raises:
        InvalidInput: A width differs, or a fraction is out of range.
    """
    width = len(direction.vector_D)
    rank_D = _rank(direction, statistic_D)
    if values_ND.shape[-1] != width:
        raise InvalidInput(
            f"direction at {direction.site} has width {width}, got activations of width "
            f"{values_ND.shape[-1]}",
            kind="direction_width",
        )
    for fraction in fractions:
        _check_fraction(fraction, f"direction at {direction.site}")
    order_D = np.argsort(-rank_D, kind="stable")
    num_kept_K = np.array([int(fraction * width) for fraction in fractions], np.int64)
    place_D = np.empty(width, np.int64)
    place_D[order_D] = np.arange(width)
    kept_DK = np.where(place_D[:, None] < num_kept_K, direction.vector_D[:, None], 0)
    norm_K = np.linalg.norm(kept_DK.astype(np.float64), axis=0)
    auroc_K = auroc(values_ND @ kept_DK, label_N)
    auroc_K[norm_K == 0] = np.nan
    return SparsityCurve(
        np.array(fractions, np.float64), num_kept_K, norm_K / direction.norm, auroc_K
    )


def random_fraction(
    direction: Direction, fraction: float, seed: int, *, match_norm: bool = False
) -> Direction:
    """Keep int(fraction * D) entries at random: the control of `top_fraction`.

    With one seed, a smaller fraction keeps some of the entries that a larger one keeps.

    Args:
        direction: See `top_fraction`.
        fraction: See `top_fraction`.
        seed: Not negative.
        match_norm: See `top_fraction`.

    Raises:
        InvalidInput: As `top_fraction`; also if every entry kept is zero.
    """
    num_kept = _num_kept(direction, fraction)
    kept = np.random.default_rng(seed).permutation(len(direction.vector_D))[:num_kept]
    entry = {"selector": "random", "fraction": fraction, "seed": seed}
    return _masked(direction, kept, entry, match_norm)


def _num_kept(direction: Direction, fraction: float) -> int:
    return _num_of(fraction, len(direction.vector_D), f"direction at {direction.site}")


def _check_fraction(fraction: float, what: str) -> None:
    if not 0 < fraction <= 1:
        raise InvalidInput(
            f"{what}: the fraction of entries to keep must be above 0 and at most 1, got "
            f"{fraction!r}",
            kind="fraction",
        )


def _num_of(fraction: float, num_entries: int, what: str) -> int:
    _check_fraction(fraction, what)
    num_kept = int(fraction * num_entries)
    if num_kept == 0:
        raise InvalidInput(
            f"{what}: a fraction of {fraction} keeps int({fraction} * {num_entries}) = 0 of its "
            f"entries; at least {1 / num_entries:.2g} keeps one",
            kind="nothing_kept",
        )
    return num_kept


def _rank(direction: Direction, statistic_D: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """What entries are chosen by, float64 [D]: the larger, the earlier."""
    if statistic_D is None:
        return np.abs(direction.vector_D.astype(np.float64))
    rank_D = np.abs(np.asarray(statistic_D, np.float64))
    if rank_D.shape != direction.vector_D.shape or np.isnan(rank_D).any():
        raise InvalidInput(
            f"direction at {direction.site}: expected a statistic of shape "
            f"{direction.vector_D.shape} without NaN, got shape {rank_D.shape} with "
            f"{int(np.isnan(rank_D).sum())} NaN",
            kind="statistic_shape",
        )
    return rank_D


def _masked(
    direction: Direction,
    kept: NDArray[np.int64],
    entry: dict[str, Any],
    match_norm: bool,
    factor: float | None = None,
) -> Direction:
    """`factor` is what matches the norm; None: that of this direction alone."""
    width = len(direction.vector_D)
    if len(kept) == width and factor in (None, 1.0):
        return direction
    vector_D = np.zeros(width, np.float32)
    vector_D[kept] = direction.vector_D[kept]
    if not vector_D.any():
        raise InvalidInput(
            f"direction at {direction.site}: all {len(kept)} of {width} entries that would be kept "
            "are zero; choose another seed or a larger fraction",
            kind="nothing_kept",
        )
    if match_norm:
        if factor is None:
            factor = direction.norm / float(np.linalg.norm(vector_D.astype(np.float64)))
        vector_D = (vector_D.astype(np.float64) * factor).astype(np.float32)
    step = entry | {
        "num_kept": len(kept),
        "match_norm": match_norm,
        "whole_norm": direction.norm,
        "whole_scores": dict(direction.scores),
    }
    return replace(
        direction,
        vector_D=vector_D,
        method=f"{direction.method}+{entry['selector']}_fraction",
        scores={},
        lineage={**direction.lineage, "masks": [*direction.lineage.get("masks", []), step]},
    )
