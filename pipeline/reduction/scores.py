"""Scores of how well projections on a direction tell the classes apart.

Shapes: N rows, P pairs, S sites.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import NDArray


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
