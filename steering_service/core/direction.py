"""Direction: a vector at one Site, with the numbers that give its strength a meaning.

Directions of one site can be added, scaled and made orthogonal to each other. What was done is kept
in the lineage of the result: `sources` holds the lineage of every direction that went in, by its
digest, and `steps` what was done with them, in order.

Shapes: D width of the site (d_model, or head_dim for a head), N rows, K directions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import rfc8785
from numpy.typing import NDArray

from steering_service.core.direction_file import read, write
from steering_service.core.errors import InvalidInput
from steering_service.core.site import Site
from steering_service.core.tensors import is_immutable

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

_NUMBERS: Final = (int, float, np.integer, np.floating)
_NOTHING: Final = 1e-6
"""Share of a float32 vector's length below which what is left of it is rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """A float32 vector at one Site.

    Args:
        site: Where it was read and where it is meant to be applied.
        vector_D: Float32 [D], as fitted: a difference of means keeps its length.
        sigma: Standard deviation (population, both classes) of the reference activations'
            projections on the unit vector, in activation units (HSI, arXiv 2502.05945; METHODS 1).
            None: not measured, as of a sum of directions.
        activation_norm: Mean Euclidean norm of the reference activations at the site.
        method: How it was fitted, such as ``difference_of_means``.
        scores: Held-out scores by name, such as ``auroc``.
        lineage: Digests and settings that it came from; JSON values only.

    Raises:
        InvalidInput: Not one-dimensional, not finite, or of length zero; sigma or norm negative.
    """

    site: Site
    vector_D: Float32
    sigma: float | None
    activation_norm: float
    method: str
    scores: Mapping[str, float] = field(default_factory=dict)
    lineage: Mapping[str, Any] = field(default_factory=dict)

    # So that `numpy.float64(2) * direction` asks the direction, and does not look for its elements.
    __array_ufunc__ = None

    def __post_init__(self) -> None:
        # A copy: the caller's array stays writable, and what becomes of it changes nothing here.
        # What nobody can write to needs none.
        vector = np.array(
            self.vector_D, dtype=np.float32, order="C", copy=not _is_ready(self.vector_D)
        )
        if vector.ndim != 1 or not _is_finite_and_not_zero(vector):
            raise InvalidInput(
                f"direction at {self.site}: expected a finite, non-zero vector of one dimension, "
                f"got shape {vector.shape}, finite {bool(np.isfinite(vector).all())}",
                kind="direction_vector",
            )
        for name in ("sigma", "activation_norm"):
            value = getattr(self, name)
            if name == "sigma" and value is None:
                continue
            if not np.isfinite(value) or value < 0:
                raise InvalidInput(
                    f"direction at {self.site}: {name} must be finite and not negative, "
                    f"got {value!r}",
                    kind="direction_scale",
                )
        if vector.flags.writeable:
            vector.flags.writeable = False
        object.__setattr__(self, "vector_D", vector)

    def __repr__(self) -> str:
        sigma = "not measured" if self.sigma is None else f"{self.sigma:.4g}"
        return (
            f"<Direction at {self.site}, {self.method}: width {len(self.vector_D)}, norm "
            f"{self.norm:.4g}, sigma {sigma}, {len(self.scores)} scores>"
        )

    @property
    def norm(self) -> float:
        """Euclidean length of the vector, in activation units."""
        return float(np.linalg.norm(self.vector_D.astype(np.float64)))

    @property
    def unit_D(self) -> Float32:
        """Float32 [D], the vector at length 1."""
        return (self.vector_D.astype(np.float64) / self.norm).astype(np.float32)

    @property
    def digest(self) -> str:
        """sha256, hex, of what it does: site, vector, sigma and activation norm.

        Not of what is said about it: method, scores and lineage.
        """
        content = {
            "site": str(self.site),
            "vector": hashlib.sha256(self.vector_D.astype("<f4").tobytes()).hexdigest(),
            "sigma": None if self.sigma is None else float(self.sigma),
            "activation_norm": float(self.activation_norm),
        }
        return hashlib.sha256(rfc8785.dumps(content)).hexdigest()

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

    def __mul__(self, factor: float) -> Direction:
        """Scale the vector. Sigma and activation norm stay, as they are of the unit vector and of
        the site; scores stay where the factor is positive.

        Raises:
            InvalidInput: kind "direction_factor", the factor is zero or not finite;
                "direction_vector", the result is too long or too short for float32.
        """
        if isinstance(factor, bool) or not isinstance(factor, _NUMBERS):
            return NotImplemented
        if not np.isfinite(factor) or factor == 0:
            raise InvalidInput(
                f"direction at {self.site}: expected a finite factor that is not zero, got "
                f"{factor!r}; to steer not at all, apply it at strength 0",
                kind="direction_factor",
            )
        with np.errstate(over="ignore"):
            vector_D = (self.vector_D.astype(np.float64) * float(factor)).astype(np.float32)
        scaled = replace(self, vector_D=vector_D, scores=self.scores if factor > 0 else {})
        return scaled.derived_from([self], "scale", factor=float(factor))

    __rmul__ = __mul__

    def __neg__(self) -> Direction:
        return self * -1

    def __add__(self, other: Direction) -> Direction:
        return compose([self, other], [1, 1]) if isinstance(other, Direction) else NotImplemented

    def __sub__(self, other: Direction) -> Direction:
        return compose([self, other], [1, -1]) if isinstance(other, Direction) else NotImplemented

    def unit(self) -> Direction:
        """The direction at length 1. Sigma, activation norm and scores stay."""
        return replace(self, vector_D=self.unit_D).derived_from([self], "unit")

    def orthogonal_to(self, *others: Direction) -> Direction:
        """Without what lies in the span of others, such as a nuisance that must not be moved.

        Sigma is not known any more, and scores are dropped.

        Raises:
            InvalidInput: kind "direction_operands", no other is given; "direction_site" or
                "direction_width", one does not fit; "direction_nothing", it lies in their span.
        """
        if not others:
            raise InvalidInput(
                f"direction at {self.site}: orthogonal_to needs at least one other direction",
                kind="direction_operands",
            )
        _check_operands([self, *others])
        vector_D = self.vector_D.astype(np.float64)
        units_KD = np.stack([item.unit_D for item in others]).astype(np.float64)
        # Others may depend on each other: only what they span counts.
        _, length_K, basis_KD = np.linalg.svd(units_KD, full_matrices=False)
        basis_KD = basis_KD[length_K > _NOTHING * length_K[0]]
        for _ in range(2):
            # The second time takes away what rounding left of the first.
            vector_D = vector_D - (vector_D @ basis_KD.T) @ basis_KD
        operands = [self, *others]
        method = f"{self.method}+orthogonal_to"
        return _derived(operands, vector_D, self.norm, method).derived_from(
            operands, "orthogonal_to"
        )

    def derived_from(
        self, operands: Sequence[Direction], operation: str, **settings: Any
    ) -> Direction:
        """The same direction, whose lineage says how it was made of others.

        For code that makes directions of directions by itself; the operators do it on their own.

        Args:
            operands: What went in; their lineages are kept.
            operation: What was done, such as ``scale``.
            settings: How; JSON values.
        """
        sources: dict[str, Any] = {}
        steps: list[Any] = []
        for item in operands:
            rest = {k: v for k, v in item.lineage.items() if k not in ("sources", "steps")}
            sources |= item.lineage.get("sources", {})
            steps += [step for step in item.lineage.get("steps", []) if step not in steps]
            if rest or not item.lineage.get("steps"):
                sources[item.digest] = {"method": item.method, **rest}
        of = [item.digest for item in operands]
        steps.append({"operation": operation, "of": of, **settings, "result": self.digest})
        return replace(self, lineage={"sources": sources, "steps": steps})

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that `load` reads: the vector, and all else as JSON beside it.

        Raises:
            InvalidInput: kind "direction_json", scores or lineage hold what JSON cannot.
        """
        fields = {
            "site": str(self.site),
            "sigma": None if self.sigma is None else float(self.sigma),
            "activation_norm": float(self.activation_norm),
            "method": self.method,
            "scores": {name: float(value) for name, value in self.scores.items()},
            "lineage": dict(self.lineage),
            "digest": self.digest,
        }
        write(Path(path), self.vector_D, fields)

    @classmethod
    def load(cls, path: str | Path) -> Direction:
        """Read a file of `save`. Only safetensors and JSON are ever parsed, never pickle.

        Raises:
            NotFound: kind "direction_file", there is no such file.
            Corrupt: kind "direction_format", it is not safetensors, or cut short;
                "direction_digest", its content is not what it says.
            InvalidInput: kind "direction_format", it is safetensors, and holds something else.
        """
        vector_D, record = read(Path(path))
        direction = cls(
            site=Site.parse(record.site),
            vector_D=vector_D,
            sigma=record.sigma,
            activation_norm=record.activation_norm,
            method=record.method,
            scores=record.scores,
            lineage=record.lineage,
        )
        record.check(path, direction.digest)
        return direction


def _is_ready(vector_D: object) -> bool:
    return (
        isinstance(vector_D, np.ndarray)
        and vector_D.dtype == np.float32
        and vector_D.flags.c_contiguous
        and is_immutable(vector_D)
    )


def _is_finite_and_not_zero(vector_D: Float32) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(vector_D @ vector_D)
    # One pass tells for nearly all; a square may overflow or vanish where its vector does not.
    return 0 < square < np.inf or bool(np.isfinite(vector_D).all() and vector_D.any())


def compose(directions: Sequence[Direction], weights: Sequence[float]) -> Direction:
    """The weighted sum of directions at one site.

    Its sigma is not known, and scores are dropped: both were the operands'. Its activation norm is
    theirs, or the mean of theirs where they were measured on different activations.

    Args:
        directions: At least one, all at the same site.
        weights: A finite number each.

    Raises:
        InvalidInput: kind "direction_operands", no direction, or not a finite weight for each;
            "direction_site" or "direction_width", they do not fit together; "direction_nothing",
            they cancel out.
    """
    if not directions or len(directions) != len(weights) or not np.isfinite(weights).all():
        raise InvalidInput(
            f"compose: expected at least one direction and a finite weight for each, got "
            f"{len(directions)} directions and the weights {list(weights)}",
            kind="direction_operands",
        )
    _check_operands(directions)
    vector_D = sum(
        float(weight) * item.vector_D.astype(np.float64)
        for item, weight in zip(directions, weights, strict=True)
    )
    longest = max(
        abs(float(weight)) * item.norm for item, weight in zip(directions, weights, strict=True)
    )
    composed = _derived(directions, np.asarray(vector_D), longest, "composed")
    return composed.derived_from(
        directions, "compose", weights=[float(weight) for weight in weights]
    )


def _check_operands(directions: Sequence[Direction]) -> None:
    first = directions[0]
    for item in directions[1:]:
        if item.site != first.site:
            raise InvalidInput(
                f"directions at {first.site} and {item.site} cannot be combined: activations of "
                "two sites are in different spaces; publish them side by side instead",
                kind="direction_site",
            )
        if item.vector_D.shape != first.vector_D.shape:
            raise InvalidInput(
                f"directions at {first.site} of the widths {first.vector_D.shape[0]} and "
                f"{item.vector_D.shape[0]} cannot be combined: they are of different models",
                kind="direction_width",
            )


def _derived(
    operands: Sequence[Direction], vector_D: Float64, length: float, method: str
) -> Direction:
    """A direction made of others, of unknown sigma; `length` is that of what it was made of."""
    norm = float(np.linalg.norm(vector_D))
    if norm <= _NOTHING * length:
        raise InvalidInput(
            f"directions at {operands[0].site}: nothing but rounding is left, a vector of length "
            f"{norm:.3g} of one of {length:.3g}; they are parallel, or cancel out",
            kind="direction_nothing",
        )
    norms = {float(item.activation_norm) for item in operands}
    with np.errstate(over="ignore"):
        vector = vector_D.astype(np.float32)
    return Direction(
        site=operands[0].site,
        vector_D=vector,
        sigma=None,
        activation_norm=norms.pop() if len(norms) == 1 else float(np.mean(sorted(norms))),
        method=method,
    )
