"""Logistic: the solver of one L2-regularised logistic regression.

Newton steps whose gradients are exact and whose Hessian is kept for as long as steps shrink
(Shamanskii 1967): the Gram matrix of the rows is, but for a factor, the Hessian at the start, and
where the classes can hardly be told apart it is nearly the Hessian at the end. Steps along a kept
Hessian are conjugate to the one before (Polak and Ribiere 1969) and end where their parabola does.
A Hessian that is off costs steps and changes no answer.

Shapes: N rows, E unknowns, the intercept last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

_MAX_HALVINGS: Final = 40
_ROWS_PER_BLOCK: Final = 4096

Floats = NDArray[Any]
"""Of the dtype of a problem's precision."""


@dataclass(frozen=True, slots=True)
class Precision:
    """How exactly a site is solved.

    Attributes:
        dtype: Of features, weights and gradients.
        last_step: A step this short, relative to the solution, is a site's last. The loss says
            less, since it is flat long before the weights of separable classes stand still.
        kept_below: A Hessian is kept while a step is shorter than this share of the one before,
            both measured by that Hessian. 0: never, so that what is left after the last step is of
            its square.
        room: Rounding of the loss, relative.
        max_steps: After which a site is stuck.
    """

    dtype: type[np.floating[Any]]
    last_step: float
    kept_below: float
    room: float
    max_steps: int


SINGLE: Final = Precision(np.float32, 1e-4, 0.3, 1e-6, 40)
DOUBLE: Final = Precision(np.float64, 1e-7, 0.0, 1e-12, 100)


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """One site's problem.

    Attributes:
        x_NE: Centred features, and ones for the intercept.
        scale_E: What standardises them: to scale an unknown is less than to scale a column.
        positive_N: Positive samples that each row stands for, of `counts_N` samples.
        l2: On all unknowns but the last.
    """

    x_NE: Floats
    scale_E: Floats
    positive_N: Floats
    counts_N: Floats
    l2: float
    precision: Precision

    def along(self, direction_E: Floats) -> Floats:
        """[N], by how much logits change along a direction."""
        along_N: Floats = self.x_NE @ (self.scale_E * direction_E)
        return along_N

    def penalised(self, values_E: Floats) -> Floats:
        """Gradient of the penalty."""
        penalised_E: Floats = values_E * self.precision.dtype(self.l2)
        penalised_E[-1] = 0
        return penalised_E

    def gradient(self, logits: _Logits, solution_E: Floats) -> Floats:
        """[E]."""
        residual_N = self.counts_N * logits.share_N - self.positive_N
        gradient_E: Floats = self.scale_E * (residual_N @ self.x_NE)
        gradient_E += self.penalised(solution_E)
        return gradient_E

    def loss(self, logits: _Logits, solution_E: Floats) -> float:
        """What is minimised."""
        losses_N = self.counts_N * logits.softplus_N - self.positive_N * logits.values_N
        return float(losses_N.sum() + 0.5 * (solution_E @ self.penalised(solution_E)))

    def factor(self, gram_EE: Floats) -> Floats | None:
        """Cholesky factor of the Hessian that a weighted Gram matrix makes; None where rounding
        leaves it not positive."""
        hessian_EE = self.scale_E[:, None] * gram_EE * self.scale_E
        np.fill_diagonal(hessian_EE[:-1], np.diagonal(hessian_EE)[:-1] + self.l2)
        (potrf,) = scipy.linalg.get_lapack_funcs(("potrf",), (hessian_EE,))
        # Its transpose, which it equals, is in the order that LAPACK reads.
        factor_EE, info = potrf(hessian_EE.T, lower=1, clean=0, overwrite_a=1)
        return None if info else factor_EE

    def newton_step(self, factor_EE: Floats, gradient_E: Floats) -> Floats:
        """[E], from the solution towards the minimum, with its sign turned."""
        (potrs,) = scipy.linalg.get_lapack_funcs(("potrs",), (factor_EE,))
        return np.asarray(potrs(factor_EE, gradient_E, lower=1)[0])


class _Logits:
    """Logits [N] and what follows from them, of which each is computed in the range of exp."""

    def __init__(self, values_N: Floats) -> None:
        self.values_N = values_N
        self._small_N = np.exp(-np.abs(values_N))

    @property
    def softplus_N(self) -> Floats:
        return np.asarray(np.maximum(self.values_N, 0) + np.log1p(self._small_N))

    @property
    def share_N(self) -> Floats:
        share_N: Floats = np.where(self.values_N > 0, 1, self._small_N) / (1 + self._small_N)
        return share_N

    @property
    def weight_N(self) -> Floats:
        """Of a row in the Hessian: share (1 - share)."""
        return np.asarray(self._small_N / np.square(1 + self._small_N))


def minimise(problem: Problem, gram_EE: Floats) -> tuple[Floats | None, int]:
    """Damped Newton with a Hessian that is kept.

    Args:
        gram_EE: Of `problem.x_NE`, rows counted.

    Returns:
        [E], or None where it is stuck, and the number of steps.
    """
    precision, counts_N = problem.precision, problem.counts_N
    share = problem.positive_N.sum() / counts_N.sum()
    solution_E = np.zeros(len(problem.scale_E), precision.dtype)
    solution_E[-1] = np.log(share / (1 - share))
    logits = _Logits(np.full(len(counts_N), solution_E[-1], precision.dtype))
    # All rows have the same weight in it.
    factor_EE = problem.factor(gram_EE * (share * (1 - share)))
    loss = problem.loss(logits, solution_E)
    if factor_EE is None or not np.isfinite(loss):
        return None, 0
    gradient_E = problem.gradient(logits, solution_E)
    newton_E = problem.newton_step(factor_EE, gradient_E)
    move_E, is_fresh, size = -newton_E, True, 1.0
    decrement = float(gradient_E @ newton_E)
    for step in range(1, precision.max_steps + 1):
        if not np.isfinite(decrement):
            return None, step
        longest = size * float(np.abs(newton_E).max())
        if longest <= precision.last_step * (1 + float(np.abs(solution_E).max())):
            return solution_E - precision.dtype(size) * newton_E, step
        slope = float(gradient_E @ move_E)
        if slope >= 0:
            # Rounding, or a Hessian that is far off: begin afresh with what surely goes down.
            move_E, slope = -newton_E, -decrement
        along_N = problem.along(move_E)
        size = 1.0
        if not is_fresh:
            bend = float((counts_N * logits.weight_N * along_N) @ along_N)
            size = -slope / (bend + float(move_E @ problem.penalised(move_E)))
        for halvings in range(_MAX_HALVINGS):  # noqa: B007
            tried_E = solution_E + precision.dtype(size) * move_E
            tried = _Logits(logits.values_N + precision.dtype(size) * along_N)
            tried_loss = problem.loss(tried, tried_E)
            # Armijo's rule, with room for the rounding of the loss.
            if tried_loss <= loss + 1e-4 * size * slope + precision.room * (1 + loss):
                break
            size /= 2
        solution_E, logits, loss = tried_E, tried, tried_loss
        last_gradient_E, last_decrement = gradient_E, decrement
        gradient_E = problem.gradient(logits, solution_E)
        newton_E = problem.newton_step(factor_EE, gradient_E)
        decrement = float(gradient_E @ newton_E)
        is_fresh = halvings > 0 or decrement > precision.kept_below**2 * last_decrement
        if is_fresh:
            fresh_EE = problem.factor(gram(problem.x_NE, counts_N * logits.weight_N))
            if fresh_EE is None:
                # Every row's share has reached 0 or 1, and the L2 term is too weak to hold the
                # weights.
                return None, step
            factor_EE = fresh_EE
            newton_E = problem.newton_step(factor_EE, gradient_E)
            decrement = float(gradient_E @ newton_E)
            move_E, size = -newton_E, 1.0
        else:
            turn = float(newton_E @ (gradient_E - last_gradient_E)) / last_decrement
            move_E = max(turn, 0.0) * move_E - newton_E
    return None, precision.max_steps


def gram(x_NE: Floats, weight_N: Floats | None) -> Floats:
    """[E, E], the sum of outer products of the rows, each of its weight; None: of 1."""
    if weight_N is None:
        return np.asarray(x_NE.T @ x_NE)
    gram_EE = np.zeros((x_NE.shape[1],) * 2, x_NE.dtype)
    root_N1 = np.sqrt(weight_N)[:, None]
    for first in range(0, len(x_NE), _ROWS_PER_BLOCK):
        # By blocks, since the weighted rows would be a second copy of them all. Of a matrix and its
        # own transpose, numpy has BLAS compute only half.
        rows_RE = x_NE[first : first + _ROWS_PER_BLOCK] * root_N1[first : first + _ROWS_PER_BLOCK]
        gram_EE += rows_RE.T @ rows_RE
    return gram_EE
