"""The controller as it is trained: a torch module, and its frozen form.

Shapes: B requests, R widths of the read sites together, K hidden units, I interventions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steering_service.core.controller import Controller, Mode
from steering_service.core.site import Site


class ControllerNetwork(nn.Module):
    """Linear, ReLU, linear: one logit of the scale and one a steered site.

    Args:
        mean_R, std_R: Of the training rows; inputs are normalised with them.
        hidden: K.
        num_sites: I.
    """

    def __init__(
        self, mean_R: NDArray[np.float32], std_R: NDArray[np.float32], hidden: int, num_sites: int
    ) -> None:
        super().__init__()
        self.register_buffer("mean_R", torch.tensor(mean_R))
        self.register_buffer("std_R", torch.tensor(std_R))
        self.hidden = nn.Linear(len(mean_R), hidden)
        self.output = nn.Linear(hidden, 1 + num_sites)

    def forward(self, reads_BR: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the scale [B] and of the weights [B, I]."""
        assert isinstance(self.mean_R, Tensor)
        assert isinstance(self.std_R, Tensor)
        x_BR = (reads_BR - self.mean_R) / self.std_R
        logits_BO = self.output(torch.relu(self.hidden(x_BR)))
        return logits_BO[:, 0], logits_BO[:, 1:]

    def frozen(
        self, reads: Sequence[Site], *, threshold: float, mode: Mode, outputs: Sequence[int]
    ) -> Controller:
        """The Controller that an artifact carries.

        The normalisation goes into the first layer, in float64, so that a node reads activations
        as they are.

        Args:
            outputs: Which of the sites the artifact steers, in its order.
        """
        assert isinstance(self.mean_R, Tensor)
        assert isinstance(self.std_R, Tensor)
        weight_KR = self.hidden.weight.detach().double() / self.std_R.double()
        bias_K = self.hidden.bias.detach().double() - weight_KR @ self.mean_R.double()
        kept = [0, *(1 + i for i in outputs)]
        arrays = (
            weight_KR.T,
            bias_K,
            self.output.weight.detach()[kept].T,
            self.output.bias.detach()[kept],
        )
        w1, b1, w2, b2 = (np.asarray(a.cpu().numpy(), np.float32) for a in arrays)
        return Controller(tuple(reads), w1, b1, w2, b2, threshold=threshold, mode=mode)


def best_threshold(logit_N: NDArray[np.float32], label_N: NDArray[np.bool_]) -> float:
    """The scale below which a request is left alone, from validation rows.

    The largest sum of the two classes' accuracies (Youden's J); where several thresholds reach it,
    the one in the middle of them, so that neither class sits at the edge.

    Args:
        logit_N: Logits of the scale.
        label_N: Whether a row is one to steer.

    Returns:
        A scale between 0 and 1; 0.5 where a class is missing.
    """
    if label_N.all() or not label_N.any():
        return 0.5
    ends = np.unique(logit_N.astype(np.float64))
    between = np.concatenate([[ends[0] - 1], (ends[1:] + ends[:-1]) / 2, [ends[-1] + 1]])
    # Shares below a threshold, by sorting: every threshold with every row would be N x N.
    below = [
        np.searchsorted(np.sort(logit_N[chosen]), between) / chosen.sum()
        for chosen in (label_N, ~label_N)
    ]
    gain = below[1] - below[0]
    best = between[np.isclose(gain, gain.max())]
    return float(0.5 * (1 + np.tanh(0.5 * best[len(best) // 2])))
