"""Direction: a vector at one Site, with the numbers that give its strength a meaning.

Shapes: D width of the site (d_model, or head_dim for a head), N rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering_service.core.errors import InvalidInput
from steering_service.core.site import Site

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """A float32 vector at one Site.

    Args:
        site: Where it was read and where it is meant to be applied.
        vector_D: Float32 [D], as fitted: a difference of means keeps its length.
        sigma: Standard deviation (population, both classes) of the reference activations'
            projections on the unit vector, in activation units (HSI, arXiv 2502.05945; METHODS 1).
        activation_norm: Mean Euclidean norm of the reference activations at the site.
        method: How it was fitted, such as ``difference_of_means``.
        scores: Held-out scores by name, such as ``auroc``.
        lineage: Digests and settings that it came from; JSON values only.

    Raises:
        InvalidInput: Not one-dimensional, not finite, or of length zero; sigma or norm negative.
    """

    site: Site
    vector_D: Float32
    sigma: float
    activation_norm: float
    method: str
    scores: Mapping[str, float] = field(default_factory=dict)
    lineage: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        vector = np.ascontiguousarray(self.vector_D, dtype=np.float32)
        if vector.ndim != 1 or not np.isfinite(vector).all() or not vector.any():
            raise InvalidInput(
                f"direction at {self.site}: expected a finite, non-zero vector of one dimension, "
                f"got shape {vector.shape}, finite {bool(np.isfinite(vector).all())}",
                kind="direction_vector",
            )
        for name in ("sigma", "activation_norm"):
            value = getattr(self, name)
            if not np.isfinite(value) or value < 0:
                raise InvalidInput(
                    f"direction at {self.site}: {name} must be finite and not negative, "
                    f"got {value!r}",
                    kind="direction_scale",
                )
        vector.flags.writeable = False
        object.__setattr__(self, "vector_D", vector)

    @property
    def norm(self) -> float:
        """Euclidean length of the vector, in activation units."""
        return float(np.linalg.norm(self.vector_D.astype(np.float64)))

    @property
    def unit_D(self) -> Float32:
        """Float32 [D], the vector at length 1."""
        return (self.vector_D.astype(np.float64) / self.norm).astype(np.float32)

    def project(self, h_ND: Float32) -> Float32:
        """Signed position of activations along the unit vector.

        Args:
            h_ND: Float32 [N, D] activations at the site.

        Returns:
            Float32 [N], in activation units.

        Raises:
            InvalidInput: D differs from the direction's width.
        """
        if h_ND.shape[-1] != self.vector_D.shape[0]:
            raise InvalidInput(
                f"direction at {self.site} has width {self.vector_D.shape[0]}, "
                f"got activations of width {h_ND.shape[-1]}",
                kind="direction_width",
            )
        return np.asarray(h_ND @ self.unit_D, dtype=np.float32)
