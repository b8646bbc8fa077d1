"""Probes: L2-regularised logistic regressions at many sites.

ITI (arXiv 2306.03341; METHODS 5) fits one probe a head and ranks heads by its accuracy.

A site's rows are copied once, into a buffer that stays in a core's cache, and its problem is solved
there: all sites at once would read each step's rows from memory.

Shapes: S sites, N rows, D width of a site, E unknowns of the problem that is solved (at most D, or
N where there are fewer rows, and the intercept).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from pipeline.errors import InvalidInput
from pipeline.reduction.logistic import DOUBLE, SINGLE, Floats, Precision, Problem, gram, minimise

_CONSTANT: Final = 1e-7
"""Spread relative to the mean below which a feature of float32 values is rounding, not signal."""
_FLUSHED: Final = 1e-30
"""Variance below which float32 has lost digits, or all, of what a feature varies by."""

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Probes:
    """Fitted probes: the logit of a row x is weights . x + intercept.

    Attributes:
        weights_SD: Float64 [S, D], in activation space.
        intercept_S: Float64 [S].
        num_steps: Newton steps until the last site had converged.
    """

    weights_SD: Float64
    intercept_S: Float64
    num_steps: int


def fit_probes(
    features_SND: NDArray[Any],
    label_N: NDArray[np.bool_],
    *,
    l2: float,
    names: Sequence[str] | None = None,
    num_threads: int = 1,
) -> Probes:
    """Minimise, for every site, sum of log losses + l2/2 |w|^2 over standardised features.

    That is scikit-learn's LogisticRegression(C=1/l2) behind a StandardScaler; the intercept is not
    penalised. Weights come back in activation space. The problem is strictly convex, so there is
    one answer, also where the classes can be separated. A feature that does not vary gets weight 0.

    Features of float64 are solved in float64, until a Newton step is below 1e-7 of the solution;
    others in float32, until a step is below 1e-4 of it, after which less than that is left, or in
    float64 where float32 does not come so far. A site's numbers are of its own rows alone: they
    have the same bits whatever its neighbours are and however many threads there are.

    Args:
        features_SND: [S, N, D], any float dtype.
        label_N: Bool [N].
        l2: Positive.
        names: Of the sites, for messages.
        num_threads: Sites at a time. Each is solved on one thread if BLAS is told to use one
            (OMP_NUM_THREADS), as Ray tells it.

    Raises:
        InvalidInput: kind "probe_data", a class is missing, shapes disagree, a value is not finite
            or l2 is not positive; "probe_convergence", a site did not converge.
    """
    positive_N = label_N.astype(np.int64)
    return fit_counted_probes(
        features_SND, positive_N, 1 - positive_N, l2=l2, names=names, num_threads=num_threads
    )


def fit_counted_probes(
    features_SND: NDArray[Any],
    positive_N: NDArray[np.int64],
    negative_N: NDArray[np.int64],
    *,
    l2: float,
    names: Sequence[str] | None = None,
    num_threads: int = 1,
) -> Probes:
    """`fit_probes` of rows that each stand for several samples, perhaps of both classes.

    In memory beside the features is one site's copy of them a thread.

    Args:
        features_SND: [S, N, D], any float dtype.
        positive_N: Int64 [N], samples of the positive class that a row stands for.
        negative_N: Int64 [N], those of the negative class.
        l2: Positive.
        names: Of the sites, for messages.
        num_threads: As `fit_probes`.

    Raises:
        InvalidInput: As `fit_probes`, or a row stands for no sample.
    """
    names = names or [f"site {number}" for number in range(len(features_SND))]
    _check(features_SND, positive_N, negative_N, l2, names)
    spaces = threading.local()

    def fit(features_ND: NDArray[Any]) -> _Fitted:
        if not hasattr(spaces, "buffers"):
            spaces.buffers = {}
        return _fit_site(features_ND, positive_N, negative_N, l2, spaces.buffers)

    with ThreadPoolExecutor(num_threads) as pool:
        fitted = list(map(fit, features_SND) if num_threads == 1 else pool.map(fit, features_SND))
    for site, one in enumerate(fitted):
        if one.failure == "not_finite":
            raise InvalidInput(
                f"probes of {len(names)} sites: activations at {names[site]} are not all finite",
                kind="probe_data",
            )
    stuck = [name for name, one in zip(names, fitted, strict=True) if one.failure]
    if stuck:
        raise InvalidInput(
            f"probes at {len(stuck)} of {len(names)} sites, first {stuck[0]}, have not converged "
            f"after {max(one.num_steps for one in fitted)} Newton steps with l2 = {l2}; raise "
            "reduce.l2",
            kind="probe_convergence",
        )
    return Probes(
        np.stack([one.weights_D for one in fitted]),
        np.array([one.intercept for one in fitted]),
        max(one.num_steps for one in fitted),
    )


def _check(
    features_SND: NDArray[Any],
    positive_N: NDArray[np.int64],
    negative_N: NDArray[np.int64],
    l2: float,
    names: Sequence[str],
) -> None:
    """All but the values, which are looked at when they are in the cache."""
    problem = ""
    num_positive, num_negative = int(positive_N.sum()), int(negative_N.sum())
    if features_SND.ndim != 3 or features_SND.shape[:2] != (len(names), len(positive_N)):
        problem = f"features must be [{len(names)}, {len(positive_N)}, D], got {features_SND.shape}"
    elif not (num_positive and num_negative):
        total = num_positive + num_negative
        problem = f"both classes need rows, got {num_positive} positive of {total}"
    elif not (positive_N + negative_N > 0).all():
        problem = "every row must stand for a sample"
    elif not (np.isfinite(l2) and l2 > 0):
        problem = f"l2 must be finite and positive, got {l2!r}"
    if problem:
        raise InvalidInput(f"probes of {len(names)} sites: {problem}", kind="probe_data")


@dataclass(frozen=True, slots=True, eq=False)
class _Fitted:
    """A site's probe, as in `Probes`, or why there is none."""

    weights_D: Float64
    intercept: float
    num_steps: int
    failure: Literal["", "not_finite", "stuck"] = ""


def _fit_site(
    features_ND: NDArray[Any],
    positive_N: NDArray[np.int64],
    negative_N: NDArray[np.int64],
    l2: float,
    buffers: dict[type[np.floating[Any]], Floats],
) -> _Fitted:
    precisions = (DOUBLE,) if features_ND.dtype == np.float64 else (SINGLE, DOUBLE)
    for precision in precisions:
        # What overflows is not finite, or too large for float32: either is seen.
        with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
            fitted = _attempt(features_ND, positive_N, negative_N, l2, precision, buffers)
        if not fitted.failure:
            return fitted
    if not np.isfinite(features_ND).all():
        return replace(fitted, failure="not_finite")
    return fitted


def _attempt(
    features_ND: NDArray[Any],
    positive_N: NDArray[np.int64],
    negative_N: NDArray[np.int64],
    l2: float,
    precision: Precision,
    buffers: dict[type[np.floating[Any]], Floats],
) -> _Fitted:
    """Fit a site with one precision.

    Args:
        buffers: By dtype, [N, D + 1], made where they are missing: a fresh one for every site would
            cost more than the copy into it.
    """
    dtype = precision.dtype
    num_rows, width = features_ND.shape
    if dtype not in buffers:
        buffers[dtype] = np.ones((num_rows, width + 1), dtype)
    x_NE = buffers[dtype]
    counts_N = (positive_N + negative_N).astype(dtype)
    total = counts_N.sum()
    # Copied first: how BLAS sums depends on how the rows lie in memory.
    np.copyto(x_NE[:, :-1], features_ND)
    mean_E = (counts_N / total) @ x_NE
    mean_E[-1] = 0
    # In place, and five times as fast as numpy takes a row from rows.
    (ger,) = scipy.linalg.get_blas_funcs(("ger",), (x_NE,))
    x_NE = ger(-1, mean_E, np.ones_like(counts_N), a=x_NE.T, overwrite_a=1).T
    mean_D = mean_E[:-1]
    weight_N = None if (counts_N == 1).all() else counts_N
    basis_DE = None
    if num_rows < width:
        spread_D = np.sqrt((counts_N / total) @ np.square(x_NE[:, :-1]))
        scale_E = _scale(spread_D, mean_D)
        # The weights lie in the span of the rows, and a rotation does not change their length, so
        # the same problem has only as many unknowns as there are rows.
        basis_DE, triangle_EN = np.linalg.qr((x_NE * scale_E)[:, :-1].T)
        x_NE = np.concatenate([triangle_EN.T, np.ones((num_rows, 1), dtype)], axis=1)
        gram_EE, solved_E = gram(x_NE, weight_N), np.ones(num_rows + 1, dtype)
    else:
        gram_EE = gram(x_NE, weight_N)
        # What rounding has left of the mean, the intercept takes.
        rest_D = gram_EE[-1, :-1] / total
        square_D = np.diagonal(gram_EE)[:-1] / total - np.square(rest_D)
        if precision is SINGLE and x_NE[:, :-1][:, square_D < _FLUSHED].any():
            return _Fitted(np.zeros(width), 0.0, 0, "stuck")
        scale_E = solved_E = _scale(np.sqrt(np.maximum(square_D, 0)), mean_D)
    solution_E, num_steps = minimise(
        Problem(x_NE, solved_E, positive_N.astype(dtype), counts_N, l2, precision), gram_EE
    )
    if solution_E is None:
        return _Fitted(np.zeros(width), 0.0, num_steps, "stuck")
    weights_D = solution_E[:-1] if basis_DE is None else basis_DE @ solution_E[:-1]
    weights_D = (weights_D * scale_E[:-1]).astype(np.float64)
    return _Fitted(weights_D, float(solution_E[-1] - weights_D @ mean_D), num_steps)


def _scale(spread_D: Floats, mean_D: Floats) -> Floats:
    """[D + 1], what standardises features, 0 where one does not vary; 1 for the intercept."""
    varies_D = spread_D > _CONSTANT * np.abs(mean_D)
    return np.append(np.where(varies_D, 1 / np.where(varies_D, spread_D, 1), 0), 1).astype(
        spread_D.dtype
    )
