"""CrossSum: adds up Moments whose second is a matrix, block by block, on a CPU or a GPU.

Shapes: R rows, H heads, D width of a site.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.reduction.moments import CrossMoments


class CrossSum:
    """The running sum of one set of rows.

    In float64, about the mean of the first block, so that nothing is lost however far the rows lie
    from zero, and in place, so that a block adds no matrix of its own.

    Args:
        num_heads: H.
        width: D. The sum takes H * D * D * 8 bytes.
        device: Where it is added up, ``cpu`` or ``cuda``.
    """

    def __init__(self, num_heads: int, width: int, device: str) -> None:
        self._count = 0
        self._centre_H1D: torch.Tensor | None = None
        self._sum_HD = torch.zeros((num_heads, width), dtype=torch.float64, device=device)
        self._outer_HDD: torch.Tensor | None = None

    def add(self, values_RHD: NDArray[Any], counts_R: NDArray[np.int64] | None = None) -> None:
        """Add rows.

        Args:
            values_RHD: [R, H, D], float32 or float64.
            counts_R: Int64 [R], how often each row counts; None: once. Rows that count 0 times may
                be NaN.
        """
        if counts_R is not None:
            values_RHD, counts_R = values_RHD[counts_R > 0], counts_R[counts_R > 0]
        if len(values_RHD) == 0:
            return
        x_HRD = torch.from_numpy(values_RHD).to(self._sum_HD.device).double().transpose(0, 1)
        num_heads, num_rows, width = x_HRD.shape
        if self._outer_HDD is None or self._centre_H1D is None:
            self._centre_H1D = x_HRD.mean(dim=1, keepdim=True)
            self._outer_HDD = torch.zeros(
                (num_heads, width, width), dtype=torch.float64, device=x_HRD.device
            )
        x_HRD = x_HRD - self._centre_H1D
        weighted_HRD = x_HRD
        if counts_R is not None:
            weights_R1 = torch.from_numpy(counts_R).to(x_HRD.device).double()[:, None]
            weighted_HRD = x_HRD * weights_R1
            num_rows = int(counts_R.sum())
        self._count += num_rows
        self._sum_HD += weighted_HRD.sum(dim=1)
        self._outer_HDD.baddbmm_(weighted_HRD.transpose(1, 2), x_HRD)

    def moments(self) -> CrossMoments:
        """Moments of all rows that were added."""
        if self._outer_HDD is None or self._centre_H1D is None:
            return CrossMoments.empty(*self._sum_HD.shape)
        sum_HD = self._sum_HD
        outer_HDD = sum_HD[:, :, None] * (sum_HD[:, None, :] / self._count)
        mean_HD = self._centre_H1D[:, 0] + sum_HD / self._count
        m2_HDD = self._outer_HDD - outer_HDD
        return CrossMoments(self._count, mean_HD.cpu().numpy(), m2_HDD.cpu().numpy())
