"""Controller: a small frozen network that reads activations once a request and decides how strongly
each Intervention of its artifact acts.

Weighted activation steering (Guiding Giants, arXiv 2505.20309; METHODS 2): the edit at layer l is
strength * s * w_l * step_l, with s and w_l from the controller.

Shapes: B requests, R widths of the read sites together, K hidden units, I interventions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from steering_service.core.direction import Float32
from steering_service.core.errors import InvalidInput
from steering_service.core.site import Site

Mode = Literal["gated", "reference_compat"]
MODES: Final[tuple[Mode, ...]] = get_args(Mode)

TENSORS: Final = ("hidden_weight", "hidden_bias", "output_weight", "output_bias")
"""Names of a controller's tensors, in the payload under the prefix ``controller.``."""


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What a controller said of some requests.

    Attributes:
        logit_B: Float32 [B], of the scale: above 0 leans towards steering.
        scale_B: Float32 [B], s.
        weight_BI: Float32 [B, I], w.
    """

    logit_B: Float32
    scale_B: Float32
    weight_BI: Float32

    @property
    def strength_BI(self) -> Float32:
        """Float32 [B, I], s * w: what multiplies the strength of each Intervention."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self.scale_B[:, None] * self.weight_BI, dtype=np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Controller:
    """A network of one hidden layer: relu(x W1 + b1) W2 + b2.

    Args:
        reads: Sites whose activations it reads, concatenated in this order, at the last token of
            the prompt. In a forward pass they come before every site that is edited, so that one
            pass both decides and steers.
        hidden_weight_RK: Float32 [R, K]; inputs are read as they are, so a normalisation of them
            has to be folded in.
        hidden_bias_K: Float32 [K].
        output_weight_KO: Float32 [K, 1 + I]: the scale's logit, then one logit an Intervention, in
            the order of the artifact.
        output_bias_O: Float32 [1 + I].
        threshold: A scale below it counts as 0, so that requests which the controller leaves alone
            get exactly the plain model. Of `gated` controllers only.
        mode: ``gated``: s = sigmoid of its logit, decided once a request and kept while it is
            answered. ``reference_compat``: as the code released with the paper does it: s is the
            logit itself, unbounded and of either sign, decided anew in every forward pass at its
            last position.

    Raises:
        InvalidInput: Shapes that do not fit together, numbers that are not finite, an unknown
            mode, or a threshold outside 0 to 1.
    """

    reads: tuple[Site, ...]
    hidden_weight_RK: Float32
    hidden_bias_K: Float32
    output_weight_KO: Float32
    output_bias_O: Float32
    threshold: float = 0.0
    mode: Mode = "gated"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InvalidInput(
                f"controller: mode must be one of {', '.join(MODES)}, got {self.mode!r}",
                kind="controller_mode",
            )
        if not self.reads or len(set(self.reads)) != len(self.reads):
            raise InvalidInput(
                "controller: reads must name at least one site, each once; got "
                f"{[str(site) for site in self.reads]}",
                kind="controller_reads",
            )
        if not 0 <= self.threshold <= 1:
            raise InvalidInput(
                f"controller: threshold must be in [0, 1], got {self.threshold!r}",
                kind="controller_threshold",
            )
        arrays = [
            np.ascontiguousarray(array, dtype=np.float32) for array in self.tensors().values()
        ]
        shapes = [array.shape for array in arrays]
        (w1, b1, w2, b2) = shapes
        fits = (
            [len(shape) for shape in shapes] == [2, 1, 2, 1]
            and w1[1] == b1[0] == w2[0] > 0
            and w2[1] == b2[0] >= 2
            and w1[0] > 0
        )
        if not fits or not all(np.isfinite(array).all() for array in arrays):
            raise InvalidInput(
                "controller: expected finite [R, K], [K], [K, 1 + I] and [1 + I], got shapes "
                f"{', '.join(map(str, shapes))}",
                kind="controller_shape",
            )
        for field, array in zip(self._fields(), arrays, strict=True):
            array.flags.writeable = False
            object.__setattr__(self, field, array)

    @staticmethod
    def _fields() -> tuple[str, ...]:
        return ("hidden_weight_RK", "hidden_bias_K", "output_weight_KO", "output_bias_O")

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """The network's tensors by the names that a payload gives them."""
        return {
            name: getattr(self, field) for name, field in zip(TENSORS, self._fields(), strict=True)
        }

    @property
    def read_width(self) -> int:
        """R: the widths of the read sites together."""
        return int(self.hidden_weight_RK.shape[0])

    @property
    def num_interventions(self) -> int:
        """I: how many Interventions it weighs."""
        return int(self.output_bias_O.shape[0]) - 1

    def decide(self, reads_BR: Any) -> Decision:
        """Decide for some requests.

        Args:
            reads_BR: [B, R] activations at the read sites, concatenated in the order of `reads`.

        Raises:
            InvalidInput: Another width than the controller reads.
        """
        x_BR = np.asarray(reads_BR, dtype=np.float32)
        if x_BR.ndim != 2 or x_BR.shape[1] != self.read_width:
            raise InvalidInput(
                f"controller reads [requests, {self.read_width}] activations, got shape "
                f"{x_BR.shape}",
                kind="controller_input",
            )
        # Numbers that overflow do not stop a node; what it makes of them is bounded there.
        with np.errstate(over="ignore", invalid="ignore"):
            hidden_BK = np.maximum(x_BR @ self.hidden_weight_RK + self.hidden_bias_K, 0.0)
            logits_BO = hidden_BK @ self.output_weight_KO + self.output_bias_O
        logit_B = logits_BO[:, 0]
        if self.mode == "reference_compat":
            scale_B = logit_B
        else:
            scale_B = _sigmoid(logit_B)
            scale_B = np.where(scale_B < self.threshold, np.float32(0.0), scale_B)
        return Decision(logit_B, scale_B, _sigmoid(logits_BO[:, 1:]))


def check_order(reads: tuple[Site, ...], edited: tuple[Site, ...]) -> None:
    """Refuse a controller that would have to know what is computed after its first edit.

    A site may be read and edited: it is read first.

    Raises:
        InvalidInput: A site that is edited comes before one that is read.
    """
    last_read, first_edit = max(reads, key=_order), min(edited, key=_order)
    if _order(first_edit) < _order(last_read):
        raise InvalidInput(
            f"controller reads {last_read}, which a forward pass computes after the edit at "
            f"{first_edit}; read earlier layers or edit later ones",
            kind="controller_order",
        )


def _order(site: Site) -> tuple[int, int]:
    """When a forward pass comes by, layer by layer and within a block."""
    within = ("resid_pre", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")
    return site.layer, within.index(site.stream)


def _sigmoid(x: NDArray[np.float32]) -> NDArray[np.float32]:
    # By tanh, which does not overflow.
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)), dtype=np.float32)
