"""Methods: the ways to fit a direction, and the parameters that are part of a result's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from pipeline.errors import InvalidInput

Method = Literal["difference_of_means", "paired_difference", "pca", "probe", "lda"]

DEFAULT_PARAMETERS: Final[Mapping[Method, Mapping[str, int | float]]] = {
    "difference_of_means": {},
    "paired_difference": {},
    "pca": {"pair_order_seed": 0, "max_rows": 65536},
    "probe": {"l2": 1.0, "max_rows": 65536},
    "lda": {"shrinkage": 0.1, "max_rows": 65536},
}
"""Every parameter that changes a method's result. `reduction_digest` has them in it."""

OF_MOMENTS: Final[tuple[Method, ...]] = ("difference_of_means", "paired_difference")
"""Methods that Moments are enough for; the others read rows."""

OF_PAIRS: Final[tuple[Method, ...]] = ("paired_difference", "pca")
"""Methods that compare the sides of pairs, so that every training sample needs a partner."""


def complete_parameters(
    method: str, given: Mapping[str, int | float] | None = None
) -> dict[str, int | float]:
    """A method's parameters, with the defaults for those that are not given.

    Raises:
        InvalidInput: Unknown method, or a parameter that it does not have.
    """
    defaults = next((named for known, named in DEFAULT_PARAMETERS.items() if known == method), None)
    if defaults is None:
        raise InvalidInput(
            f"method must be one of {', '.join(DEFAULT_PARAMETERS)}, got {method!r}", kind="method"
        )
    if unknown := sorted(set(given or {}) - set(defaults)):
        has = f"the parameters {', '.join(defaults)}" if defaults else "no parameters"
        raise InvalidInput(
            f"method {method} has {has}, got {', '.join(unknown)}; "
            "leave that out or choose the method that it belongs to",
            kind="method_parameter",
        )
    return {**defaults, **(given or {})}
