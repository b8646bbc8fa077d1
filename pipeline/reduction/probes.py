"""Probes: L2-regularised logistic regressions at many sites, fitted as one batched problem.

ITI (arXiv 2306.03341; METHODS 5) fits one probe a head and ranks heads by its accuracy.

Shapes: S sites, N rows, D width of a site, E unknowns of the problem that is solved (at most D, or
N where there are fewer rows, and the intercept).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import scipy.special
from numpy.typing import NDArray

from pipeline.errors import InvalidInput

_MAX_STEPS: Final = 100
_MAX_HALVINGS: Final = 40
_LAST_STEP: Final = 1e-7
"""A step this short, relative to the solution, is a site's last: what is left is of its square. The
loss says less, since it is flat long before the weights of separable classes stand still."""
_ROWS_PER_BLOCK: Final = 4096
_CONSTANT: Final = 1e-7
"""Spread relative to the mean below which a feature of float32 values is rounding, not signal."""

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
) -> Probes:
    """Minimise, for every site, sum of log losses + l2/2 |w|^2 over standardised features.

    That is scikit-learn's LogisticRegression(C=1/l2) behind a StandardScaler; the intercept is not
    penalised. Weights come back in activation space. The problem is strictly convex, so there is
    one answer, also where the classes can be separated. A feature that does not vary gets weight 0.

    Args:
        features_SND: [S, N, D], any float dtype.
        label_N: Bool [N].
        l2: Positive.
        names: Of the sites, for messages.

    Raises:
        InvalidInput: kind "probe_data", a class is missing, shapes disagree, a value is not finite
            or l2 is not positive; "probe_convergence", a site did not converge.
    """
    positive_N = label_N.astype(np.int64)
    return fit_counted_probes(features_SND, positive_N, 1 - positive_N, l2=l2, names=names)


def fit_counted_probes(
    features_SND: NDArray[Any],
    positive_N: NDArray[np.int64],
    negative_N: NDArray[np.int64],
    *,
    l2: float,
    names: Sequence[str] | None = None,
) -> Probes:
    """`fit_probes` of rows that each stand for several samples, perhaps of both classes.

    Args:
        features_SND: [S, N, D], any float dtype.
        positive_N: Int64 [N], samples of the positive class that a row stands for.
        negative_N: Int64 [N], those of the negative class.
        l2: Positive.
        names: Of the sites, for messages.

    Raises:
        InvalidInput: As `fit_probes`, or a row stands for no sample.
    """
    names = names or [f"site {number}" for number in range(len(features_SND))]
    _check(features_SND, positive_N, negative_N, l2, names)
    scaled_SND = np.array(features_SND, np.float64)
    num_rows, width = scaled_SND.shape[1:]
    counts_N = (positive_N + negative_N).astype(np.float64)
    if (counts_N == 1).all():
        mean_SD = scaled_SND.mean(axis=1)
        scaled_SND -= mean_SD[:, None]
        spread_SD = np.sqrt(np.einsum("snd,snd->sd", scaled_SND, scaled_SND) / num_rows)
    else:
        share_N = counts_N / counts_N.sum()
        mean_SD = np.einsum("snd,n->sd", scaled_SND, share_N)
        scaled_SND -= mean_SD[:, None]
        spread_SD = np.sqrt(np.einsum("snd,snd,n->sd", scaled_SND, scaled_SND, share_N))
    varies_SD = spread_SD > _CONSTANT * np.abs(mean_SD)
    scale_SD = np.where(varies_SD, 1 / np.where(varies_SD, spread_SD, 1), 0)
    scaled_SND *= scale_SD[:, None]
    basis_SDE = None
    if num_rows < width:
        # The weights lie in the span of the rows, and a rotation does not change their length, so
        # the same problem has only as many unknowns as there are rows.
        basis_SDE, triangle_SEN = np.linalg.qr(scaled_SND.swapaxes(1, 2))
        scaled_SND = np.ascontiguousarray(triangle_SEN.swapaxes(1, 2))
    solution_SE, num_steps = _newton(scaled_SND, positive_N.astype(np.float64), counts_N, l2, names)
    weights_SD, intercept_S = solution_SE[:, :-1], solution_SE[:, -1]
    if basis_SDE is not None:
        weights_SD = np.einsum("sde,se->sd", basis_SDE, weights_SD)
    weights_SD = weights_SD * scale_SD
    return Probes(weights_SD, intercept_S - np.einsum("sd,sd->s", weights_SD, mean_SD), num_steps)


def _check(
    features_SND: NDArray[Any],
    positive_N: NDArray[np.int64],
    negative_N: NDArray[np.int64],
    l2: float,
    names: Sequence[str],
) -> None:
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
    else:
        finite_S = np.isfinite(features_SND).all(axis=(1, 2))
        if not finite_S.all():
            problem = f"activations at {names[int(np.argmin(finite_S))]} are not all finite"
    if problem:
        raise InvalidInput(f"probes of {len(names)} sites: {problem}", kind="probe_data")


def _newton(
    x_SND: Float64, positive_N: Float64, counts_N: Float64, l2: float, names: Sequence[str]
) -> tuple[Float64, int]:
    """Damped Newton for all sites at once (IRLS with a line search).

    Args:
        x_SND: Standardised features.
        positive_N: Positive samples that each row stands for, of `counts_N` samples.

    Returns:
        Float64 [S, E], the intercept last, and the number of steps.
    """
    num_sites, num_rows, width = x_SND.shape
    x_SNE = np.concatenate([x_SND, np.ones((num_sites, num_rows, 1))], axis=2)
    penalty_E = np.append(np.full(width, l2), 0.0)
    solution_SE = np.zeros((num_sites, width + 1))
    logits_SN = np.zeros((num_sites, num_rows))
    loss_S = _loss(logits_SN, solution_SE, positive_N, counts_N, penalty_E)
    open_S = np.ones(num_sites, np.bool_)
    for step in range(1, _MAX_STEPS + 1):
        share_SN = scipy.special.expit(logits_SN)
        gradient_SE = (
            np.einsum("sne,sn->se", x_SNE, counts_N * share_SN - positive_N)
            + penalty_E * solution_SE
        )
        hessian_SEE = _hessian(x_SNE, counts_N * (share_SN * (1 - share_SN)), penalty_E)
        try:
            move_SE = -np.linalg.solve(hessian_SEE, gradient_SE[..., None])[..., 0]
        except np.linalg.LinAlgError:
            # Every row's share has reached 0 or 1, and the L2 term is too weak to hold the weights.
            break
        slope_S = np.einsum("se,se->s", gradient_SE, move_SE)
        limit_S = _LAST_STEP * (1 + np.abs(solution_SE).max(axis=1))
        # A site that has converged stays, so that its numbers do not depend on its neighbours.
        move_SE[~open_S] = 0
        along_SN = np.einsum("sne,se->sn", x_SNE, move_SE)
        size_S1 = np.ones((num_sites, 1))
        for _ in range(_MAX_HALVINGS):
            tried_SE, tried_SN = solution_SE + size_S1 * move_SE, logits_SN + size_S1 * along_SN
            tried_S = _loss(tried_SN, tried_SE, positive_N, counts_N, penalty_E)
            # Armijo's rule, with room for the rounding of the loss.
            too_far_S = tried_S > loss_S + 1e-4 * size_S1[:, 0] * slope_S + 1e-12 * (1 + loss_S)
            too_far_S &= open_S
            if not too_far_S.any():
                break
            size_S1[too_far_S] /= 2
        solution_SE, logits_SN, loss_S = tried_SE, tried_SN, tried_S
        open_S &= ~(np.abs(move_SE).max(axis=1) <= limit_S)
        if not open_S.any():
            return solution_SE, step
    stuck = [name for name, is_open in zip(names, open_S, strict=True) if is_open]
    raise InvalidInput(
        f"probes at {len(stuck)} of {num_sites} sites, first {stuck[0]}, have not converged after "
        f"{step} Newton steps with l2 = {l2}; raise reduce.l2",
        kind="probe_convergence",
    )


def _loss(
    logits_SN: Float64,
    solution_SE: Float64,
    positive_N: Float64,
    counts_N: Float64,
    penalty_E: Float64,
) -> Float64:
    losses_SN = counts_N * np.logaddexp(0, logits_SN) - positive_N * logits_SN
    return np.asarray(losses_SN.sum(axis=1) + 0.5 * (np.square(solution_SE) @ penalty_E))


def _hessian(x_SNE: Float64, weight_SN: Float64, penalty_E: Float64) -> Float64:
    num_sites, num_rows, width = x_SNE.shape
    hessian_SEE = np.zeros((num_sites, width, width)) + np.diag(penalty_E)
    for first in range(0, num_rows, _ROWS_PER_BLOCK):
        # By blocks, since the weighted rows would be a second copy of all activations.
        x = x_SNE[:, first : first + _ROWS_PER_BLOCK]
        weight = weight_SN[:, first : first + _ROWS_PER_BLOCK, None]
        hessian_SEE += x.swapaxes(1, 2) @ (x * weight)
    return hessian_SEE
