"""Sparse directions: a share of the entries, the others zero (Jailbreak Antidote).

arXiv 2410.02298; METHODS 3. The mask takes norm away, so at equal strength it also lowers the dose:
compare at matched norm as well.

Shapes: D width of the site.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InvalidInput
from steering_service.core.direction import Direction


def top_fraction(direction: Direction, fraction: float, *, match_norm: bool = False) -> Direction:
    """Keep the int(fraction * D) entries that are largest in magnitude.

    Of entries as large as each other, the first are kept.

    Args:
        direction: Its sigma and activation norm stay as they are, as units of strength; its scores
            are the whole vector's and move to the lineage.
        fraction: Above 0, at most 1; the direction itself comes back where every entry is kept.
        match_norm: Scale what is kept to the direction's norm. Otherwise nothing is rescaled, and
            the dose is only as intended with ``strength_unit = "direction"``: the other units apply
            the unit vector.

    Raises:
        InvalidInput: kind "fraction", out of range; "nothing_kept", no entry would be left.
    """
    num_kept = _num_kept(direction, fraction)
    kept = np.argsort(-np.abs(direction.vector_D), kind="stable")[:num_kept]
    return _masked(direction, kept, {"selector": "top", "fraction": fraction}, match_norm)


def random_fraction(
    direction: Direction, fraction: float, seed: int, *, match_norm: bool = False
) -> Direction:
    """Keep int(fraction * D) entries at random: the control of `top_fraction`.

    With one seed, a smaller fraction keeps some of the entries that a larger one keeps.

    Args:
        direction: See `top_fraction`.
        fraction: See `top_fraction`.
        seed: Not negative.
        match_norm: See `top_fraction`.

    Raises:
        InvalidInput: As `top_fraction`; also if every entry kept is zero.
    """
    num_kept = _num_kept(direction, fraction)
    kept = np.random.default_rng(seed).permutation(len(direction.vector_D))[:num_kept]
    entry = {"selector": "random", "fraction": fraction, "seed": seed}
    return _masked(direction, kept, entry, match_norm)


def _num_kept(direction: Direction, fraction: float) -> int:
    if not 0 < fraction <= 1:
        raise InvalidInput(
            f"direction at {direction.site}: the fraction of entries to keep must be above 0 and "
            f"at most 1, got {fraction!r}",
            kind="fraction",
        )
    width = len(direction.vector_D)
    num_kept = int(fraction * width)
    if num_kept == 0:
        raise InvalidInput(
            f"direction at {direction.site}: a fraction of {fraction} keeps int({fraction} * "
            f"{width}) = 0 of its entries; at least {1 / width:.2g} keeps one",
            kind="nothing_kept",
        )
    return num_kept


def _masked(
    direction: Direction, kept: NDArray[np.int64], entry: dict[str, Any], match_norm: bool
) -> Direction:
    width = len(direction.vector_D)
    if len(kept) == width:
        return direction
    vector_D = np.zeros(width, np.float32)
    vector_D[kept] = direction.vector_D[kept]
    if not vector_D.any():
        raise InvalidInput(
            f"direction at {direction.site}: all {len(kept)} of {width} entries that would be kept "
            "are zero; choose another seed or a larger fraction",
            kind="nothing_kept",
        )
    if match_norm:
        norm = float(np.linalg.norm(vector_D.astype(np.float64)))
        vector_D = (vector_D.astype(np.float64) * (direction.norm / norm)).astype(np.float32)
    step = entry | {
        "num_kept": len(kept),
        "match_norm": match_norm,
        "whole_norm": direction.norm,
        "whole_scores": dict(direction.scores),
    }
    return replace(
        direction,
        vector_D=vector_D,
        method=f"{direction.method}+{entry['selector']}_fraction",
        scores={},
        lineage={**direction.lineage, "masks": [*direction.lineage.get("masks", []), step]},
    )
