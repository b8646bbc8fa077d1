"""The rules by which a refusal direction is chosen (Arditi et al., arXiv 2406.11717; METHODS 6).

Every candidate is a mean difference between harmful and harmless requests, read at one site and one
token after the instruction. It is ablated everywhere, which must stop refusals (the lower the
better) and leave harmless requests alone (KL); and it is added where it was read, which must bring
refusals about. As in the released code: candidates past a rule are dropped, and of the rest the one
with the lowest refusal score under ablation is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from pipeline.errors import GateRefused
from steering_service.core.direction import Direction
from steering_service.core.intervention import Intervention
from steering_service.core.site import Site, Stream

RESIDUAL_STREAMS: Final[tuple[Stream, ...]] = ("resid_pre", "resid_mid", "resid_post")
_ABLATED: Final[tuple[Stream, ...]] = ("resid_pre", "attn_out", "mlp_out")


@dataclass(frozen=True, slots=True)
class RefusalCandidate:
    """A direction and what it does. Scores are the mean log-odds, in nats, that an answer begins
    with a token of a refusal.

    Attributes:
        site: Where the direction was read, of the residual stream.
        position: At which token, from the end of the prompt: -1 is the last.
        ablated: Score of harmful requests with the direction ablated everywhere.
        induced: Score of harmless requests with the direction added at the site.
        kl: KL divergence of the first answer token's distribution from the plain model's under
            ablation, mean over harmless requests, in nats.
    """

    site: Site
    position: int
    ablated: float
    induced: float
    kl: float

    def figures(self) -> dict[str, Any]:
        """As JSON values; a number that is not finite becomes None."""
        numbers = {"ablated": self.ablated, "induced": self.induced, "kl": self.kl}
        return {"site": str(self.site), "position": self.position} | {
            name: value if math.isfinite(value) else None for name, value in numbers.items()
        }

    @classmethod
    def of_figures(cls, figures: dict[str, Any]) -> RefusalCandidate:
        """From `figures`."""
        ablated, induced, kl = (
            math.nan if figures[name] is None else float(figures[name])
            for name in ("ablated", "induced", "kl")
        )
        return cls(Site.parse(figures["site"]), int(figures["position"]), ablated, induced, kl)


@dataclass(frozen=True, slots=True)
class RefusalRules:
    """What a candidate must keep to.

    Attributes:
        max_kl: Most divergence on harmless requests, in nats.
        min_induced: Least induced score: at 0, refusing is as likely as not.
        last_share: Share of the layers, from the last one, whose directions are not taken: they lie
            close to the tokens that they write.
    """

    max_kl: float = 0.1
    min_induced: float = 0.0
    last_share: float = 0.2

    def objections(self, candidate: RefusalCandidate, num_layers: int) -> list[str]:
        """Why a candidate may not be taken; empty where it may."""
        first_dropped = int(num_layers * (1.0 - self.last_share))
        found = []
        if not all(map(math.isfinite, (candidate.ablated, candidate.induced, candidate.kl))):
            found.append("a score is not finite")
        if source_layer(candidate.site) >= first_dropped:
            found.append(f"among the last {self.last_share:.0%} of layers")
        if candidate.kl > self.max_kl:
            found.append(f"KL {candidate.kl:.3g} > {self.max_kl:g}")
        if candidate.induced < self.min_induced:
            found.append(f"induced {candidate.induced:.3g} < {self.min_induced:g}")
        return found


def source_layer(site: Site) -> int:
    """The block whose input a direction belongs to, as the paper counts: it reads block inputs, and
    the output of block L is the input of block L + 1.
    """
    return site.layer + (site.stream == "resid_post")


def choose_refusal(
    candidates: Sequence[RefusalCandidate], num_layers: int, rules: RefusalRules
) -> RefusalCandidate:
    """The lowest score under ablation among the candidates that keep to the rules; of equal ones,
    the first.

    Raises:
        GateRefused: None keeps to them; the figures say how near they came.
    """
    allowed = [c for c in candidates if not rules.objections(c, num_layers)]
    if allowed:
        return min(allowed, key=lambda c: c.ablated)
    near = sorted(
        (c for c in candidates if math.isfinite(c.kl)),
        key=lambda c: (len(rules.objections(c, num_layers)), c.kl),
    )[:3]
    shown = "\n".join(
        f"  {c.site} at token {c.position}: ablated {c.ablated:+.2f}, induced {c.induced:+.2f}, "
        f"KL {c.kl:.3g}: {'; '.join(rules.objections(c, num_layers))}"
        for c in near
    )
    raise GateRefused(
        f"none of {len(candidates)} directions has a KL of at most {rules.max_kl:g}, induces "
        f"refusals ({rules.min_induced:g} or more) and lies before the last "
        f"{rules.last_share:.0%} of the layers. The nearest:\n{shown}\n"
        "Capture more layers or tokens, or raise --max-kl if that side effect is acceptable",
        kind="refusal_rules",
    )


def ablation(direction: Direction, num_layers: int) -> list[Intervention]:
    """h - r (r . h) at the input, the attention's output and the MLP's output of every block, and
    at every position: no block can write the direction (METHODS 6). To be applied at strength 1.
    """
    return [
        Intervention(replace(direction, site=Site(stream, layer)), "project_out", positions="all")
        for layer in range(num_layers)
        for stream in _ABLATED
    ]


def addition(direction: Direction) -> list[Intervention]:
    """The direction, as long as it was fitted, added where it was read, at every position."""
    return [Intervention(direction, positions="all")]
