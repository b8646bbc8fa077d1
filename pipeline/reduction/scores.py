"""Scores of how well projections on a direction tell the classes apart, and how sure they are.

Shapes: N rows, M rows of the negative class, P pairs (or rows of the positive class), S sites,
R resamples, B bins, K blocks of rows, L layers, W width of a stream, H heads, D width of a site.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from pipeline.reduction.directions import split_heads
from store.layout import StreamLayout

_ENTRIES_PER_BLOCK: Final = 4_000_000
"""Entries of a temporary array: 32 MB of float64."""


def auroc(scores_NS: NDArray[Any], label_N: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Area under the ROC curve, all sites at once.

    The probability that a random positive row is above a random negative one, ties counted as half
    (the Mann-Whitney U statistic over its maximum).

    Returns:
        Float64 [S]; NaN where a class is missing.
    """
    num_positive = int(label_N.sum())
    num_negative = len(label_N) - num_positive
    if num_positive == 0 or num_negative == 0:
        return np.full(scores_NS.shape[1], np.nan)
    ranks_NS = scipy.stats.rankdata(scores_NS, axis=0)
    u_S = ranks_NS[label_N].sum(axis=0) - num_positive * (num_positive + 1) / 2
    return np.asarray(u_S / (num_positive * num_negative), dtype=np.float64)


def accuracy(
    scores_NS: NDArray[Any], label_N: NDArray[np.bool_], threshold_S: NDArray[Any]
) -> NDArray[np.float64]:
    """Share of rows on their class's side of a threshold.

    Returns:
        Float64 [S]; NaN without rows.
    """
    if len(label_N) == 0:
        return np.full(scores_NS.shape[1], np.nan)
    return np.asarray(((scores_NS > threshold_S) == label_N[:, None]).mean(axis=0))


def cohens_d(scores_NS: NDArray[Any], label_N: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Difference of the class means in pooled standard deviations (sample variance).

    Returns:
        Float64 [S]; NaN where a class has fewer than two rows or nothing varies.
    """
    positive, negative = scores_NS[label_N], scores_NS[~label_N]
    n, m = len(positive), len(negative)
    if n < 2 or m < 2:
        return np.full(scores_NS.shape[1], np.nan)
    pooled = ((n - 1) * positive.var(axis=0, ddof=1) + (m - 1) * negative.var(axis=0, ddof=1)) / (
        n + m - 2
    )
    difference = positive.mean(axis=0, dtype=np.float64) - negative.mean(axis=0, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(pooled > 0, difference / np.sqrt(pooled), np.nan))


def pair_accuracy(positive_PS: NDArray[Any], negative_PS: NDArray[Any]) -> NDArray[np.float64]:
    """Share of pairs whose positive row is above its negative one, ties counted as half.

    Jailbreak Antidote chooses layers by it (METHODS 3, "significance").

    Args:
        positive_PS: [P, S] projections of the positive rows.
        negative_PS: [P, S] those of their partners.

    Returns:
        Float64 [S]; NaN without pairs.
    """
    if len(positive_PS) == 0:
        return np.full(positive_PS.shape[1], np.nan)
    return np.asarray(
        ((positive_PS > negative_PS) + 0.5 * (positive_PS == negative_PS)).mean(axis=0)
    )


def bootstrap_auroc(
    values_NS: NDArray[Any],
    label_N: NDArray[np.bool_],
    block_N: NDArray[np.int64],
    *,
    num: int = 200,
    seed: int = 0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95 % percentile bootstrap interval of `auroc`, all sites on the same resamples.

    Blocks are resampled whole (Davison and Hinkley 1997, section 3.8): the rows of a pair share
    their prompt, and taken apart they would make the interval too narrow. A resample without rows
    of both classes is left out. At an AUROC of 1 the interval is [1, 1], however few rows there
    are: read it with the number of rows.

    Args:
        values_NS: [N, S] projections, finite.
        label_N: Bool [N].
        block_N: Int64 [N]; rows of the same number stay together. A row without a pair has a number
            of its own.
        num: Resamples.
        seed: Of the resampling.

    Returns:
        Float64 [S], the low ends and the high ends; NaN where a class is missing or all rows are
        of one block.
    """
    nowhere_S = np.full(values_NS.shape[1], np.nan)
    _, block_N = np.unique(block_N, return_inverse=True)
    num_blocks = int(block_N.max(initial=-1)) + 1
    if label_N.all() or not label_N.any() or num_blocks < 2:
        return nowhere_S, nowhere_S.copy()
    random = np.random.default_rng(seed)
    drawn = max(1, _ENTRIES_PER_BLOCK // len(label_N))
    found = []
    for first in range(0, num, drawn):
        picks_RK = random.integers(num_blocks, size=(min(drawn, num - first), num_blocks))
        weights_RK = np.stack([np.bincount(picks_K, minlength=num_blocks) for picks_K in picks_RK])
        found.append(_weighted_auroc(values_NS, label_N, weights_RK[:, block_N]))
    auroc_RS = np.concatenate(found)
    # A class is missing from a resample at all sites alike.
    auroc_RS = auroc_RS[~np.isnan(auroc_RS[:, 0])]
    if len(auroc_RS) == 0:
        return nowhere_S, nowhere_S.copy()
    low_S, high_S = np.percentile(auroc_RS, [2.5, 97.5], axis=0)
    return low_S, high_S


def _weighted_auroc(
    values_NS: NDArray[Any], label_N: NDArray[np.bool_], weights_RN: NDArray[np.int64]
) -> NDArray[np.float64]:
    """AUROC of rows that count `weights_RN` times, for every site: float64 [R, S].

    A site is sorted once for all resamples. What lies below a positive row is then a cumulative sum
    of the negative rows' weights.
    """
    weights_NR = weights_RN.T.astype(np.float64)
    positive_PR = np.ascontiguousarray(weights_NR[label_N])
    negative_MR = np.ascontiguousarray(weights_NR[~label_N])
    num_negative, num_resamples = negative_MR.shape
    below_MR = np.zeros((num_negative + 1, num_resamples))
    u_RS = np.empty((num_resamples, values_NS.shape[1]))
    for site in range(values_NS.shape[1]):
        positive_P, negative_M = values_NS[label_N, site], values_NS[~label_N, site]
        order_M = np.argsort(negative_M, kind="stable")
        np.cumsum(negative_MR[order_M], axis=0, out=below_MR[1:])
        left_P = np.searchsorted(negative_M[order_M], positive_P, side="left")
        right_P = np.searchsorted(negative_M[order_M], positive_P, side="right")
        u_R = np.einsum("pr,pr->r", positive_PR, below_MR[left_P])
        tied_P = left_P != right_P
        if tied_P.any():
            ties = below_MR[right_P[tied_P]] - below_MR[left_P[tied_P]]
            u_R = u_R + 0.5 * np.einsum("pr,pr->r", positive_PR[tied_P], ties)
        u_RS[:, site] = u_R
    with np.errstate(invalid="ignore"):
        return np.asarray(u_RS / (positive_PR.sum(axis=0) * negative_MR.sum(axis=0))[:, None])


def permutation_p(
    values_NS: NDArray[Any], label_N: NDArray[np.bool_], block_N: NDArray[np.int64]
) -> NDArray[np.float64]:
    """One-sided p of `auroc` when labels are permuted within blocks: is it above chance?

    A pair is a block: its sides are swapped or not. Blocks of one class, such as prompts without a
    pair, form one block together. Several rows of a class in a block, such as the tokens of a
    prompt, go together and count as one, of their mean rank: they are not independent. The rank sum
    of the positive sides then has an exact mean and variance, ties included (each block is a draw
    without replacement from its ranks), and p is the normal tail. Sampled permutations could say no
    less than one over their number, and a thousand sites need more than that. Where the classes are
    apart, the tail errs upwards.

    Args:
        values_NS: [N, S] projections, finite.
        label_N: Bool [N].
        block_N: Int64 [N], see `bootstrap_auroc`.

    Returns:
        Float64 [S]; 1 where all rows are equal, NaN where a class is missing.
    """
    if label_N.all() or not label_N.any():
        return np.full(values_NS.shape[1], np.nan)
    # Sides of blocks: U of them, each the rows from `first_U` on in the order of `by_side_N`.
    _, block_N = np.unique(block_N, return_inverse=True)
    side_N = block_N * 2 + label_N
    by_side_N = np.argsort(side_N, kind="stable")
    first_U = np.flatnonzero(np.diff(side_N[by_side_N], prepend=-1))
    num_U1 = np.diff(np.append(first_U, len(side_N)))[:, None]
    label_U = label_N[by_side_N[first_U]]
    order_U, start_K = _permuted_blocks(label_U, block_N[by_side_N[first_U]])
    label_U = label_U[order_U]
    size_K1 = np.diff(np.append(start_K, len(order_U)))[:, None].astype(np.float64)
    positive_K1 = np.add.reduceat(label_U.astype(np.float64), start_K)[:, None]
    p_S = np.empty(values_NS.shape[1])
    for at in _site_blocks(values_NS):
        # About their mean, so that sums of squares do not cancel.
        rank_NS = scipy.stats.rankdata(values_NS[by_side_N, at], axis=0) - (len(label_N) + 1) / 2
        rank_US = (np.add.reduceat(rank_NS, first_U) / num_U1)[order_U]
        sum_KS = np.add.reduceat(rank_US, start_K)
        squares_KS = np.add.reduceat(np.square(rank_US), start_K) - np.square(sum_KS) / size_K1
        share_K1 = positive_K1 / size_K1
        mean_S = (share_K1 * sum_KS).sum(axis=0)
        spread_K1 = share_K1 * (size_K1 - positive_K1) / np.maximum(size_K1 - 1, 1)
        variance_S = (spread_K1 * squares_KS).sum(axis=0)
        excess_S = rank_US[label_U].sum(axis=0) - mean_S
        varies_S = variance_S > 1e-9
        z_S = excess_S / np.sqrt(np.where(varies_S, variance_S, 1))
        p_S[at] = np.where(varies_S, scipy.stats.norm.sf(z_S), 1.0)
    return p_S


def _permuted_blocks(
    label_N: NDArray[np.bool_], block_N: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sides in the order of the blocks that labels are permuted within, and where each begins."""
    _, block_N = np.unique(block_N, return_inverse=True)
    size_K = np.bincount(block_N)
    positive_K = np.bincount(block_N, weights=label_N)
    alone_K = (positive_K == 0) | (positive_K == size_K)
    block_N = np.where(alone_K[block_N], -1, block_N)
    order_N = np.argsort(block_N, kind="stable")
    return order_N, np.flatnonzero(np.diff(block_N[order_N], prepend=-2))


def benjamini_hochberg(p_S: NDArray[np.float64]) -> NDArray[np.float64]:
    """The false discovery rate at which each site would just be called found.

    Benjamini and Hochberg 1995, J. R. Stat. Soc. B 57, the step-up procedure as adjusted p. Valid
    where sites are independent, or positively dependent as sites of one model on the same rows are
    (Benjamini and Yekutieli 2001).

    Args:
        p_S: [S]; NaN where there is no p.

    Returns:
        Float64 [S], at most 1; NaN where p is NaN, and such sites do not count.
    """
    q_S = np.full(len(p_S), np.nan)
    known = np.flatnonzero(~np.isnan(p_S))
    if len(known) == 0:
        return q_S
    largest_first = known[np.argsort(-p_S[known], kind="stable")]
    rank = np.arange(len(known), 0, -1)
    q_S[largest_first] = np.minimum(
        np.minimum.accumulate(p_S[largest_first] * len(known) / rank), 1
    )
    return q_S


@dataclass(frozen=True, slots=True, eq=False)
class Histograms:
    """Projections of each class at every site, in bins of equal width.

    Attributes:
        start_S: Float64 [S], the lowest value at a site and the left edge of its first bin.
        stop_S: Float64 [S], the highest value and the right edge of the last bin. NaN like the
            start where there are no rows.
        positive_SB: Int64 [S, B], rows of the positive class in each bin.
        negative_SB: Int64 [S, B], those of the negative class.
    """

    start_S: NDArray[np.float64]
    stop_S: NDArray[np.float64]
    positive_SB: NDArray[np.int64]
    negative_SB: NDArray[np.int64]


def histograms(
    values_NS: NDArray[Any], label_N: NDArray[np.bool_], num_bins: int = 40
) -> Histograms:
    """Count the rows of each class in bins over the range of both.

    A bin has its left edge and not its right one, but the last has both. Where all rows are equal
    the range has no width, and they are in the first bin.
    """
    num_sites = values_NS.shape[1]
    counts_2SB = np.zeros((2, num_sites, num_bins), np.int64)
    if len(label_N) == 0:
        nowhere_S = np.full(num_sites, np.nan)
        return Histograms(nowhere_S, nowhere_S.copy(), counts_2SB[1], counts_2SB[0])
    start_S = values_NS.min(axis=0).astype(np.float64)
    stop_S = values_NS.max(axis=0).astype(np.float64)
    width_S = np.where(stop_S > start_S, stop_S - start_S, 1)
    for at in _site_blocks(values_NS):
        share_NS = (values_NS[:, at] - start_S[at]) / width_S[at]
        bin_NS = np.minimum((share_NS * num_bins).astype(np.int64), num_bins - 1)
        bin_NS += np.arange(bin_NS.shape[1]) * num_bins
        for label in (True, False):
            counts = np.bincount(
                bin_NS[label_N == label].reshape(-1), minlength=bin_NS.shape[1] * num_bins
            )
            counts_2SB[int(label), at] = counts.reshape(-1, num_bins)
    return Histograms(start_S, stop_S, counts_2SB[1], counts_2SB[0])


def site_cosines(
    a_LW: NDArray[Any], b_LW: NDArray[Any], layout: StreamLayout
) -> NDArray[np.float64]:
    """Cosine of two methods' (or halves') directions at each site of a stream.

    Returns:
        Float64 [L * H], in the order of `site_names`; NaN where either direction is zero.
    """
    a_LHD = split_heads(np.asarray(a_LW, np.float64), layout)
    b_LHD = split_heads(np.asarray(b_LW, np.float64), layout)
    norms_LH = np.linalg.norm(a_LHD, axis=-1) * np.linalg.norm(b_LHD, axis=-1)
    dots_LH = np.einsum("lhd,lhd->lh", a_LHD, b_LHD)
    known_LH = norms_LH > 0
    cosine_LH = np.where(known_LH, dots_LH / np.where(known_LH, norms_LH, 1), np.nan)
    return np.clip(cosine_LH, -1, 1).reshape(-1)


def _site_blocks(values_NS: NDArray[Any]) -> Iterator[slice]:
    """Blocks of sites whose float64 copies are small."""
    num_rows, num_sites = values_NS.shape
    step = max(1, _ENTRIES_PER_BLOCK // max(num_rows, 1))
    for first in range(0, num_sites, step):
        yield slice(first, min(first + step, num_sites))
