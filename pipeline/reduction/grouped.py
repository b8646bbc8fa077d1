"""Grouped Moments: those of many groups of rows from one look at each row, in float64.

Shapes: R rows, N of them, E entries (a row in a group), G groups; X any trailing shape of the
values, and in the inner loops all of it in one axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import InvalidInput
from pipeline.reduction.moments import Moments

_BLOCK_VALUES: Final = 64 * 1024
"""Values that are widened to float64 at a time: 512 KiB, which stays in a core's L2 cache."""
_BLOCK_ROWS: Final = 64
_PILOT_ROWS: Final = 16


_Block = tuple[int, Sequence[torch.Tensor], torch.Tensor]
"""A group, int64 [N] rows of each side, and float64 [N], how often each counts."""


@dataclass(frozen=True, slots=True, eq=False)
class GroupedMoments:
    """Moments of several groups of rows; see `moments.Moments`.

    Attributes:
        count_G: Int64 [G], rows of each group.
        mean: Float64 [G, ...].
        m2: Float64 [G, ...], the sums of squared distances from the groups' means.
    """

    count_G: NDArray[np.int64]
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]

    @classmethod
    def of(cls, values_RX: NDArray[Any], counts_GR: NDArray[np.integer[Any]]) -> GroupedMoments:
        """Moments of rows, each counted as often as `counts_GR` says.

        Args:
            values_RX: [R, ...], float32 or uint16 bits of bfloat16. Rows that count 0 times in all
                groups are not looked at: they may be NaN.
            counts_GR: Integers [G, R], how often a row counts in a group.

        Raises:
            InvalidInput: kind "values", another dtype, or another number of rows.
        """
        sums = GroupSums(len(counts_GR), values_RX.shape[1:])
        sums.add_rows(values_RX, counts_GR)
        return sums.moments()

    @classmethod
    def empty(cls, num_groups: int, shape: Sequence[int]) -> GroupedMoments:
        """Moments of no rows: the neutral element of `merge`."""
        zeros = np.zeros((num_groups, *shape))
        return cls(np.zeros(num_groups, np.int64), zeros, zeros.copy())

    def merge(self, other: GroupedMoments) -> GroupedMoments:
        """Moments of both sets together, group by group (Chan, Golub and LeVeque 1979, the pairwise
        update).
        """
        count_G = self.count_G + other.count_G
        mean, m2 = self.mean.copy(), self.m2.copy()
        for group, count in enumerate(count_G):
            if self.count_G[group] == 0:
                mean[group], m2[group] = other.mean[group], other.m2[group]
            elif other.count_G[group]:
                delta = other.mean[group] - mean[group]
                share = other.count_G[group] / count
                mean[group] += delta * share
                m2[group] += other.m2[group]
                m2[group] += np.square(delta, out=delta) * (self.count_G[group] * share)
        return GroupedMoments(count_G, mean, m2)

    def group(self, *numbers: int) -> Moments:
        """Moments of the rows of one group, or of these groups together."""
        merged = Moments.empty(self.mean.shape[1:])
        for number in numbers:
            merged = merged.merge(
                Moments(int(self.count_G[number]), self.mean[number], self.m2[number])
            )
        return merged


class GroupSums:
    """Sums and sums of squares of groups of rows, taken from a shift, in float64.

    Sums of squares alone lose what the mean is larger than the spread, squared. Taken from a shift
    amid the rows they lose nothing to speak of: the shift is the mean of the first rows that count.
    Rows of bfloat16 need none, which spares one step of six: where the mean is much larger than the
    spread, values are of a few exponents, squares of 8 bits have 16, and so the sums of thousands
    of them are exact. `moments` then takes one from the other without rounding.
    Values are widened a block at a time, so that every step after the first finds its input in the
    core's own cache: this costs a third of the same steps over whole arrays.

    Args:
        num_groups: G.
        shape: Of one row.
    """

    def __init__(self, num_groups: int, shape: Sequence[int]) -> None:
        self._shape = tuple(shape)
        width = int(np.prod(self._shape))
        self._count_G = np.zeros(num_groups, np.int64)
        self._shift_X: torch.Tensor | None = None
        self._sum_GX = torch.zeros(num_groups, width, dtype=torch.float64)
        self._square_GX = torch.zeros(num_groups, width, dtype=torch.float64)

    def add_rows(self, values_RX: NDArray[Any], counts_GR: NDArray[np.integer[Any]]) -> None:
        """Add rows, each as often as `counts_GR` says; see `GroupedMoments.of`."""
        _check_values(values_RX, counts_GR.shape[1])
        group_E, row_E = np.nonzero(counts_GR)
        if len(group_E) == 0:
            return
        bits_RX = _tensor(values_RX)
        weight_E = torch.from_numpy(counts_GR[group_E, row_E].astype(np.float64))
        if bits_RX.dtype != torch.bfloat16 and not self._count_G.any():
            pilots = np.sort(row_E)[:: -(-len(row_E) // _PILOT_ROWS)]
            self._shift_X = _shift(bits_RX[torch.from_numpy(pilots)].double())
        self._count_G += counts_GR.sum(axis=1)
        rows_E = torch.from_numpy(row_E)
        self._add(
            (bits_RX,),
            [
                (group, (rows_E[block],), weight_E[block])
                for group, block in _blocks_of_one_group(group_E)
            ],
        )

    def add_differences(
        self,
        positive: tuple[NDArray[Any], NDArray[np.int64]],
        negative: tuple[NDArray[Any], NDArray[np.int64]],
        group_N: NDArray[np.int64],
    ) -> None:
        """Add differences of rows, each once.

        Args:
            positive: Values [R, ...], float32 or uint16 bits of bfloat16, and int64 [N], which of
                their rows.
            negative: What is taken from these; the same, perhaps of other values.
            group_N: Int64 [N], the group of each difference.

        Raises:
            InvalidInput: kind "values", another dtype.
        """
        if len(group_N) == 0:
            return
        order_N = np.argsort(group_N, kind="stable")
        sides, rows = [], []
        for values_RX, row_N in (positive, negative):
            _check_values(values_RX, len(values_RX))
            sides.append(_tensor(values_RX))
            rows.append(torch.from_numpy(row_N[order_N]))
        if not self._count_G.any():
            pilots = slice(None, None, -(-len(group_N) // _PILOT_ROWS))
            first_NX, second_NX = (
                side_RX[row_N[pilots]].double() for side_RX, row_N in zip(sides, rows, strict=True)
            )
            self._shift_X = _shift(first_NX - second_NX)
        self._count_G += np.bincount(group_N, minlength=len(self._count_G))
        weight_N = torch.ones(len(group_N), dtype=torch.float64)
        self._add(
            sides,
            [
                (group, [row_N[block] for row_N in rows], weight_N[block])
                for group, block in _blocks_of_one_group(group_N[order_N])
            ],
        )

    def moments(self) -> GroupedMoments:
        """Moments of all that was added."""
        count_G1 = torch.from_numpy(self._count_G).clamp(min=1)[:, None]
        mean_GX = self._sum_GX / count_G1
        m2_GX = self._square_GX - self._sum_GX * mean_GX
        # As much again is lost by rounding the product, and the mean.
        m2_GX -= _lost(self._sum_GX, mean_GX)
        num_G1 = count_G1.double()
        rest_GX = (self._sum_GX - num_G1 * mean_GX) - _lost(num_G1, mean_GX)
        m2_GX -= self._sum_GX * (rest_GX / num_G1)
        # A column that does not vary may come out a rounding below 0.
        m2_GX.clamp_(min=0)
        if self._shift_X is not None:
            mean_GX += self._shift_X
            mean_GX[torch.from_numpy(self._count_G == 0)] = 0
        shape = (len(self._count_G), *self._shape)
        return GroupedMoments(
            self._count_G.copy(), mean_GX.numpy().reshape(shape), m2_GX.numpy().reshape(shape)
        )

    def _add(self, sides: Sequence[torch.Tensor], blocks: Sequence[_Block]) -> None:
        """Add rows of the first side, less those of the second if there is one.

        Args:
            sides: [R, X].
            blocks: Which rows of each side.
        """
        width = self._sum_GX.shape[1]
        most = max(len(weight_N) for _, _, weight_N in blocks)
        num_columns = min(max(_BLOCK_VALUES // most, 1), width)
        # Fresh memory for every step, and a view of it for every block, would cost as much as some
        # of the steps.
        narrow_B = torch.empty(most * num_columns, dtype=sides[0].dtype)
        wide_SB = torch.empty(len(sides), most * num_columns, dtype=torch.float64)
        for start in range(0, width, num_columns):
            columns = slice(start, min(start + num_columns, width))
            shape = (most, columns.stop - start)
            num_values = shape[0] * shape[1]
            narrow_NX = narrow_B[:num_values].view(shape)
            wide = [wide_B[:num_values].view(shape) for wide_B in wide_SB]
            sides_RX = [side_RX[:, columns] for side_RX in sides]
            shift_X = None if self._shift_X is None else self._shift_X[columns]
            sums_X = self._sum_GX[:, columns].unbind()
            squares_X = self._square_GX[:, columns].unbind()
            for group, rows, weight_N in blocks:
                if len(weight_N) != len(narrow_NX):
                    narrow_NX = narrow_B[: len(weight_N) * shape[1]].view(-1, shape[1])
                    wide = [wide_B[: narrow_NX.numel()].view(narrow_NX.shape) for wide_B in wide_SB]
                for side_RX, rows_N, wide_NX in zip(sides_RX, rows, wide, strict=True):
                    torch.index_select(side_RX, 0, rows_N, out=narrow_NX)
                    wide_NX.copy_(narrow_NX)
                y_NX = wide[0]
                if len(wide) == 2:
                    y_NX.sub_(wide[1])
                if shift_X is not None:
                    y_NX.sub_(shift_X)
                y_XN = y_NX.T
                sums_X[group].addmv_(y_XN, weight_N)
                y_NX.mul_(y_NX)
                squares_X[group].addmv_(y_XN, weight_N)


def _blocks_of_one_group(group_E: NDArray[np.int64]) -> list[tuple[int, slice]]:
    """Cuts sorted group numbers into blocks of one group each, of at most `_BLOCK_ROWS`."""
    edges = np.flatnonzero(np.diff(group_E)) + 1
    return [
        (int(group_E[start]), slice(start, min(start + _BLOCK_ROWS, stop)))
        for first, stop in zip([0, *edges.tolist()], [*edges.tolist(), len(group_E)], strict=True)
        for start in range(first, stop, _BLOCK_ROWS)
    ]


def _lost(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """What the product of float64s loses by rounding, which is a float64 itself (Dekker 1971)."""

    def halves(whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = whole * (2**27 + 1)
        high = scaled - (scaled - whole)
        return high, whole - high

    (high, low), (other_high, other_low) = halves(first), halves(second)
    lost = high * other_high - first * second
    return lost + high * other_low + low * other_high + low * other_low


def _shift(pilots_NX: torch.Tensor) -> torch.Tensor:
    """The mean of some rows. 0 where it is not finite: the groups of such rows come out NaN, and
    those of the others as they are.
    """
    return pilots_NX.mean(dim=0).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _tensor(values_RX: NDArray[Any]) -> torch.Tensor:
    """[R, X], bfloat16 or float32, without a copy."""
    if not values_RX.flags.writeable:
        # torch warns of memory that it might write to.
        values_RX = values_RX.copy()
    tensor = torch.from_numpy(values_RX.reshape(len(values_RX), -1))
    return tensor.view(torch.bfloat16) if values_RX.dtype == np.uint16 else tensor


def _check_values(values_RX: NDArray[Any], num_rows: int) -> None:
    if values_RX.dtype not in (np.float32, np.uint16) or len(values_RX) != num_rows:
        raise InvalidInput(
            f"expected {num_rows} rows of float32, or of uint16 bits of bfloat16, got "
            f"{len(values_RX)} of {values_RX.dtype}; convert them first",
            kind="values",
        )
