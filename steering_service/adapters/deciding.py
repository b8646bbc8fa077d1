"""Running a Controller inside a forward pass: gather what it reads, decide once, keep the decision.

Shapes: B rows of a batch, T positions of one forward pass, W width of a stream, R widths of the
read sites together, I interventions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from steering_service.core.controller import Controller, Decision
from steering_service.core.errors import InvalidInput
from steering_service.core.site import Site


class Deciding:
    """The state of one controller while requests pass through a model.

    A pass that holds the last token of a row's prompt decides for that row; in passes after it the
    decision is kept, so a generation is steered as it began. The reads of a pass come before its
    edits (`core.controller.check_order`), so no pass is run twice.

    Args:
        controller: Of the artifact that is applied.
        head_dim: Width of a head, for reads at heads.
        limits: Least and largest factor that the artifact's policy leaves room for. They bind a
            `reference_compat` controller, whose scale has no bounds of its own.
    """

    def __init__(self, controller: Controller, head_dim: int, limits: tuple[float, float]) -> None:
        self._controller = controller
        self._limits = limits
        self._head_dim = head_dim
        self._sites = list(controller.reads)
        self._gathered: dict[Site, Tensor] = {}
        self._at_B: Tensor | int | None = None
        self._decision: Decision | None = None

    @property
    def decision(self) -> Decision | None:
        """For the rows of the request in progress, or of the last one; None before the first."""
        return self._decision

    def begin(self, num_positions: int, cached: int, prompt_T: int | Tensor) -> None:
        """Begin a forward pass.

        Args:
            num_positions: T.
            cached: Positions in the cache before this pass.
            prompt_T: Where the prompts end, one number or one a row; see `Steering`.
        """
        self._gathered.clear()
        if cached == 0:
            # Another request: what was decided for the one before is not for this one.
            self._decision = None
        if self._controller.mode == "reference_compat":
            self._at_B = num_positions - 1
        elif isinstance(prompt_T, Tensor):
            self._at_B = prompt_T - 1 - cached
        else:
            at = prompt_T - 1 - cached
            self._at_B = at if 0 <= at < num_positions else None

    def read(self, base: Site, h_BTW: Tensor) -> None:
        """Take what the controller reads at a layer, and decide after the last of its reads.

        Args:
            base: The stream and layer, without a head.
            h_BTW: The values there, before any edit.
        """
        if self._at_B is None:
            return
        for site in self._sites:
            if Site(site.stream, site.layer) == base:
                self._gathered[site] = self._take(site, h_BTW)
        if len(self._gathered) == len(self._sites):
            reads_BR = torch.cat([self._gathered[site] for site in self._sites], dim=-1)
            self._gathered.clear()
            self._decide(reads_BR.cpu().numpy(), h_BTW.shape[1])

    def strength(self, number: int, rows: int, device: torch.device) -> Tensor | None:
        """Float32 [B, 1, 1], s * w of an intervention; None where it is 0 for every row.

        Raises:
            InvalidInput: The batch has other rows than the one that was decided for.
        """
        decision = self._decision
        if decision is None:
            # The first part of a prompt, whose end is still to come.
            return None
        if len(decision.scale_B) != rows:
            raise InvalidInput(
                f"a controller has decided for {len(decision.scale_B)} rows, and this pass has "
                f"{rows}: rows may not be added or dropped while a batch is answered",
                kind="controller_rows",
            )
        # A controller of huge weights can give inf * 0; no steering is the safe reading of that.
        values_B = np.nan_to_num(decision.strength_BI[:, number], nan=0.0).clip(*self._limits)
        if not values_B.any():
            return None
        return torch.from_numpy(values_B.copy()).to(device)[:, None, None]

    def _take(self, site: Site, h_BTW: Tensor) -> Tensor:
        start, stop = 0, h_BTW.shape[-1]
        if site.head is not None:
            start, stop = site.head * self._head_dim, (site.head + 1) * self._head_dim
        if isinstance(self._at_B, Tensor):
            # Rows whose prompt ends elsewhere take any position: what they decide is not used.
            at_B = self._at_B.clamp(0, h_BTW.shape[1] - 1).to(h_BTW.device)
            taken_BW = h_BTW[torch.arange(len(at_B), device=h_BTW.device), at_B]
        else:
            assert self._at_B is not None
            taken_BW = h_BTW[:, self._at_B]
        # A copy: a model may write into what a tap sees (Falcon adds attn_out into mlp_out).
        return taken_BW[:, start:stop].detach().to(torch.float32, copy=True)

    def _decide(
        self, reads_BR: np.ndarray[tuple[int, ...], np.dtype[np.float32]], num: int
    ) -> None:
        new, old = self._controller.decide(reads_BR), self._decision
        if isinstance(self._at_B, Tensor):
            inside_B = ((self._at_B >= 0) & (self._at_B < num)).cpu().numpy()
            if old is not None and len(old.scale_B) == len(new.scale_B):
                new = Decision(
                    np.where(inside_B, new.logit_B, old.logit_B),
                    np.where(inside_B, new.scale_B, old.scale_B),
                    np.where(inside_B[:, None], new.weight_BI, old.weight_BI),
                )
            else:
                # A row whose prompt has not ended is not steered yet.
                scale_B = np.where(inside_B, new.scale_B, np.float32(0.0))
                new = Decision(new.logit_B, scale_B, new.weight_BI)
        self._decision = new
