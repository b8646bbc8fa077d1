"""The transformers node: apply an Artifact inside a model's forward pass, by hooks.

    with steered(model, artifact, strength=0.8):
        model.generate(**inputs)

    with steered(model, subscription.active) as steering:   # follows a channel, live
        model.generate(**inputs)

At strength 0 no hook is attached to any block, so the outputs are those of the plain model bit for
bit. Nothing is looked up over the network in the forward pass: the source is read once, when a new
sequence begins, and the decision is kept until the next one begins.

Shapes: B batch, T positions of one forward pass, W width of a stream, D width of a site.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steering_service.adapters.deciding import Deciding
from steering_service.adapters.hooks import Handle, Tap, attach
from steering_service.adapters.sites import ModelSites
from steering_service.core.artifact import Artifact
from steering_service.core.controller import Decision
from steering_service.core.errors import InvalidInput, SteeringError
from steering_service.core.intervention import Intervention, Positions, edit
from steering_service.core.site import Site

log = logging.getLogger(__name__)


class Deployed(Protocol):
    """What a node runs: an Artifact (or none) at a strength, with an identity that names both."""

    @property
    def artifact(self) -> Artifact | None: ...
    @property
    def strength(self) -> float: ...
    @property
    def identity(self) -> str: ...


class Source(Protocol):
    """Something whose `current` deployment may change between requests, such as a subscription."""

    @property
    def current(self) -> Deployed: ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """A deployment that never changes, and its own `Source`."""

    artifact: Artifact | None
    strength: float

    @property
    def identity(self) -> str:
        return f"{self.artifact.digest if self.artifact else 'none'}@{self.strength!r}"

    @property
    def current(self) -> Fixed:
        return self


@contextmanager
def steered(
    model: nn.Module, source: Artifact | Source, strength: float | None = None
) -> Iterator[Steering]:
    """Steer a model until the block ends.

    Args:
        model: A transformers causal language model, or its decoder body.
        source: An Artifact, which needs `strength`, or a source that is read anew for every new
            sequence, such as a subscription's `active`.
        strength: With an Artifact: how strongly, within the artifact's signed policy.

    Yields:
        The `Steering`, through which a scoring pass names its prompt lengths.

    Raises:
        InvalidInput: A site that the model does not have, or a vector or controller of another
            width.
        Refused: The strength is outside the artifact's policy.
    """
    if isinstance(source, Artifact):
        if strength is None:
            raise InvalidInput(
                "steered(model, artifact) needs a strength, such as steered(model, artifact, 1.0)",
                kind="strength_missing",
            )
        source.manifest.policy.check(strength)
        source = Fixed(source, strength)
    elif strength is not None:
        raise InvalidInput(
            "a source sets its own strength: pass either an artifact and a strength, or a source",
            kind="strength_twice",
        )
    steering = Steering(model, source)
    try:
        yield steering
    finally:
        steering.close()


def fits(model: nn.Module) -> Callable[[Artifact], None]:
    """A check for a `Subscription`: refuse what this model cannot apply, before it is accepted.

        Subscription(..., check=fits(model))

    Returns:
        A function that raises InvalidInput for a site that the model does not have, or a vector of
        another width.
    """
    sites = ModelSites.of(model)
    return lambda artifact: _check(sites, artifact)


def _check(sites: ModelSites, artifact: Artifact) -> None:
    for item in artifact.interventions:
        sites.check(item.site, edit=True)
        expected, got = _width(sites, item.site), item.direction.vector_D.shape[0]
        if got != expected:
            raise InvalidInput(
                f"artifact's vector at {item.site} has width {got}; this model's is {expected}",
                kind="direction_width",
            )
    if artifact.controller is not None:
        reads = artifact.controller.reads
        expected, got = sum(_width(sites, site) for site in reads), artifact.controller.read_width
        if got != expected:
            raise InvalidInput(
                f"artifact's controller reads {got} activations; this model has {expected} at "
                f"{', '.join(map(str, reads))}",
                kind="controller_width",
            )


def _check_factors(deployed: Deployed, factor_BI: Tensor) -> None:
    artifact = deployed.artifact
    if artifact is None or artifact.controller is not None:
        raise InvalidInput(
            "set_factors is for artifacts without a controller, which decides its factors itself"
            if artifact is not None
            else "there is no artifact whose strength factors could multiply",
            kind="factors_controller",
        )
    if factor_BI.ndim != 2 or factor_BI.shape[1] != len(artifact.interventions):
        raise InvalidInput(
            f"factors: expected [rows, {len(artifact.interventions)}], one a row and intervention, "
            f"got shape {tuple(factor_BI.shape)}",
            kind="factors_shape",
        )
    for end in factor_BI.detach().aminmax():
        artifact.manifest.policy.check(deployed.strength * float(end))


def _width(sites: ModelSites, site: Site) -> int:
    """Width of a site; refuses one that the model does not have."""
    sites.check(site)
    return sites.width(site.stream) if site.head is None else sites.head_dim


class Steering:
    """The hooks of one `steered` block."""

    def __init__(self, model: nn.Module, source: Source) -> None:
        self._sites = ModelSites.of(model)
        self._source = source
        self._deployed: Deployed | None = None
        self._refused: str | None = None
        self._taps: list[Handle] = []
        self._given_prompt_T: int | Tensor | None = None
        self._prompt_T: int | Tensor = 0
        self._cached = 0
        self._deciding: Deciding | None = None
        self._factor_BI: Tensor | None = None
        # Attached to the body, not the blocks: it runs once a forward pass, before any block.
        self._root = self._sites.body.register_forward_pre_hook(self._begin, with_kwargs=True)
        try:
            self._deploy(source.current)
        except BaseException:
            self.close()
            raise

    @property
    def deployed(self) -> Deployed:
        """What the sequence in progress, or the last one, is steered with."""
        assert self._deployed is not None
        return self._deployed

    @property
    def decision(self) -> Decision | None:
        """What the artifact's controller decided for the rows of the request in progress, or of the
        last one; None without a controller, or before its first request.
        """
        return None if self._deciding is None else self._deciding.decision

    def set_prompt_lengths(self, lengths: int | Sequence[int] | None) -> None:
        """Say where the prompts of the following forward passes end.

        By itself a pass tells little: one of several tokens is taken for a prompt (or the next part
        of one, where the cache is not empty), one of a single token on a filled cache for a decoded
        token. That is right for `model.generate` with its cache, for chats that keep their cache
        between turns and for prompts that are filled in chunks. Scoring a whole conversation in one
        pass, decoding without a cache, and assisted decoding give the model several generated
        tokens at once: with the lengths set, those passes edit the positions that plain cached
        decoding would have edited.

        A prompt that is filled in parts needs them as well where a controller decides: without
        them the end of each part is taken for the end of the prompt.

        Args:
            lengths: Positions (padding on the left included) before the first generated token,
                counted from the beginning of the sequence: one number, or one a row. None: tell by
                the pass, as above.
        """
        if lengths is None or isinstance(lengths, int):
            self._given_prompt_T = lengths
        else:
            self._given_prompt_T = torch.tensor(list(lengths))

    def set_factors(self, factor_BI: Tensor | None) -> None:
        """Multiply the strength of each Intervention, row by row, in the following forward passes.

        For requests of one batch that are to be steered differently, and for training a controller:
        gradients flow to the factors.

        Args:
            factor_BI: [B, I], one row a row of the batch, in the order of the artifact; None: 1
                everywhere.

        A deployment that comes while factors are set, and that they do not fit, is refused like any
        other that the model cannot apply.

        Raises:
            Refused: A factor takes the strength out of the artifact's policy.
            InvalidInput: Another number of Interventions than the artifact's, an artifact that has
                a controller, which sets the factors itself, or no artifact to multiply.
        """
        if factor_BI is not None:
            _check_factors(self.deployed, factor_BI)
        self._factor_BI = factor_BI

    def close(self) -> None:
        """Remove every hook."""
        self._root.remove()
        self._remove_taps()

    def _remove_taps(self) -> None:
        while self._taps:
            self._taps.pop().remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        self._cached = int(cache.get_seq_length()) if cache is not None else 0
        values = kwargs.get("input_ids")
        if values is None:
            values = args[0] if args else kwargs.get("inputs_embeds")
        num_positions = int(values.shape[1]) if values is not None else 0
        is_prompt = self._cached == 0 or num_positions > 1
        if self._given_prompt_T is not None:
            self._prompt_T = self._given_prompt_T
        elif is_prompt:
            self._prompt_T = self._cached + num_positions
        if is_prompt:
            # A new request begins: the only moment at which the deployment may change.
            self._follow()
        if self._deciding is not None:
            self._deciding.begin(num_positions, self._cached, self._prompt_T)

    def _follow(self) -> None:
        """Take over what the source runs now, if it is something else."""
        current = self._source.current
        if current.identity in (self.deployed.identity, self._refused):
            return
        try:
            self._deploy(current)
        except SteeringError as error:
            # A delivery that does not fit this model must not break decoding: the last good
            # deployment stays (DESIGN: the node fails static). Said once, not at every request.
            self._refused = current.identity
            log.warning(
                "deployment refused by the model",
                extra={"identity": current.identity, "kind": error.kind, "why": str(error)},
            )

    def _deploy(self, deployed: Deployed) -> None:
        """Put a deployment in the place of the one before; raises before anything has changed."""
        by_site: dict[Site, list[tuple[int, Intervention]]] = {}
        deciding = None
        artifact = deployed.artifact
        if artifact is not None and deployed.strength != 0:
            artifact.manifest.policy.check(deployed.strength)
            _check(self._sites, artifact)
            if self._factor_BI is not None:
                _check_factors(deployed, self._factor_BI)
            if artifact.controller is not None:
                deciding = Deciding(
                    artifact.controller,
                    self._sites.head_dim,
                    artifact.manifest.policy.factors(deployed.strength),
                )
                by_site |= {Site(s.stream, s.layer): [] for s in artifact.controller.reads}
            for number, item in enumerate(artifact.interventions):
                site = Site(item.site.stream, item.site.layer)
                by_site.setdefault(site, []).append((number, item))
        self._remove_taps()
        for site, items in by_site.items():
            tap = self._tap(site, items, deployed.strength, deciding)
            self._taps.append(attach(self._sites, site, tap))
        self._deployed, self._refused, self._deciding = deployed, None, deciding

    def _tap(
        self,
        site: Site,
        numbered: Sequence[tuple[int, Intervention]],
        strength: float,
        deciding: Deciding | None,
    ) -> Tap:
        head_dim = self._sites.head_dim
        items = [item for _, item in numbered]
        steps: list[Tensor] | None = None

        def tap(h_BTW: Tensor) -> Tensor | None:
            nonlocal steps
            if deciding is not None:
                deciding.read(site, h_BTW)
            factors = [self._factor(number, h_BTW, deciding) for number, _ in numbered]
            if all(factor is None for factor in factors):
                # Nothing to do here for any row: their values stay those of the plain model.
                return None
            if steps is None or steps[0].device != h_BTW.device or steps[0].dtype != h_BTW.dtype:
                steps = [torch.tensor(i.step_D).to(h_BTW.device, h_BTW.dtype) for i in items]
            out_BTW = h_BTW.clone()
            for item, step_D, factor in zip(items, steps, factors, strict=True):
                if factor is None:
                    continue
                head = item.site.head
                start, stop = (
                    (0, None) if head is None else (head * head_dim, (head + 1) * head_dim)
                )
                view_BTD = out_BTW[..., start:stop]
                edited_BTD = edit(
                    view_BTD, step_D, item.operation, factor * (strength * item.weight)
                )
                self._write(view_BTD, edited_BTD, item.positions)
            return out_BTW

        return tap

    def _factor(
        self, number: int, h_BTW: Tensor, deciding: Deciding | None
    ) -> Tensor | float | None:
        """What multiplies an Intervention's strength: 1, or [B, 1, 1]; None: 0 for every row."""
        if deciding is not None:
            return deciding.strength(number, h_BTW.shape[0], h_BTW.device)
        if self._factor_BI is None:
            return 1.0
        return self._factor_BI[:, number].to(h_BTW.device)[:, None, None]

    def _write(self, view_BTD: Tensor, edited_BTD: Tensor, policy: Positions) -> None:
        """Copy the edited values into the positions that the policy names."""
        num_positions = view_BTD.shape[1]
        prompt_T = self._prompt_T
        if policy == "all":
            view_BTD.copy_(edited_BTD)
            return
        if isinstance(prompt_T, Tensor):
            at_T = torch.arange(num_positions) + self._cached
            if policy == "prompt":
                mask_BT = at_T < prompt_T[:, None]
            else:
                mask_BT = at_T >= prompt_T[:, None] - 1
            mask_BT1 = mask_BT.to(view_BTD.device)[..., None]
            view_BTD.copy_(torch.where(mask_BT1, edited_BTD, view_BTD))
            return
        # Positions of this pass that are edited, as a range: [start, stop).
        start, stop = 0, num_positions
        if policy == "prompt":
            stop = min(max(prompt_T - self._cached, 0), num_positions)
        else:
            start = max(prompt_T - 1 - self._cached, 0)
        view_BTD[:, start:stop] = edited_BTD[:, start:stop]
