"""Reduction: the stored result of `reduce`: directions, scores and where they came from.

reductions/<digest>/directions.safetensors   one float32 [L, W] tensor a stream, and a control's
reductions/<digest>/scores.parquet           one row a site
reductions/<digest>/reduction.json           written last: its existence is the commit
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from numpy.typing import NDArray

from pipeline.errors import InvalidInput, NotFound
from pipeline.reduction.directions import random_direction
from pipeline.reduction.methods import complete_parameters
from pipeline.reduction.tables import as_html, as_text
from steering_service.core.direction import Direction
from steering_service.core.site import Site
from store.activations import ActivationCache
from store.digest import canonical_json, sha256_hex
from store.location import Location

REDUCTION_SCHEMA: Final = 2

_SHUFFLED: Final = "shuffled."
_NOT_SCORES: Final = ("norm", "sigma", "activation_norm")

RankBy = Literal["auroc", "accuracy", "pair_accuracy"]


def reduction_digest(
    capture: str,
    method: str,
    parameters: Mapping[str, int | float] | None = None,
    extends: Sequence[str] = (),
    rows_from: Mapping[str, str] | None = None,
) -> str:
    """The name of a reduction: what it is computed from, and how.

    Args:
        capture: Digest of the cache.
        method: See `methods.Method`.
        parameters: The method's; those that are not given have their defaults. They are part of the
            name, defaults as well, so that a default may change.
        extends: Digests of other captures whose rows count too.
        rows_from: See `Reduction`.

    Raises:
        InvalidInput: Unknown method or parameter.
    """
    request = {"schema_version": REDUCTION_SCHEMA, "capture": capture, "method": method}
    parameters = complete_parameters(method, parameters)
    return sha256_hex(
        canonical_json(request | _optional_fields(parameters, extends, rows_from or {}))
    )


def _optional_fields(
    parameters: Mapping[str, int | float], extends: Sequence[str], rows_from: Mapping[str, str]
) -> dict[str, Any]:
    fields = {
        "parameters": dict(parameters),
        "extends": sorted(extends),
        "rows_from": dict(rows_from),
    }
    return {name: value for name, value in fields.items() if value}


@dataclass(frozen=True, slots=True, eq=False)
class Reduction:
    """Directions and scores of a cache.

    Attributes:
        digest: See `reduction_digest`.
        capture: The Capture's JSON.
        method: How the directions were computed.
        counts: Samples by split and class.
        directions_LW: Float32 [L, W] by stream.
        scores: One row a site: norm, sigma, activation_norm; auroc, accuracy, cohens_d and
            pair_accuracy on the splits validation and test; auroc_low_test and auroc_high_test
            (95 % by resampling pairs); p_test (permutation of labels) and q_test (Benjamini and
            Hochberg, over the sites of the stream); split_half_cosine; auroc_random_test and
            auroc_shuffled_test, of the two controls; histogram_start, histogram_stop,
            histogram_positive and histogram_negative, of the projections on the split test, or
            validation without one. NaN where there is nothing to compute from.
        shuffled_LW: Like `directions_LW`, and of the same norms: difference of means under
            shuffled labels, a control.
        root: The store that it is in.
        parameters: The method's.
        signs_in_doubt: Sites where most training pairs and the class means disagree about which
            side is the positive class (``pca`` only).
        left_out: Samples that were left out, as they or others of their pairs are in quarantine.
        extends: Digests of other captures whose rows count too.
        rows_from: By capture digest, the cache of kept rows that scores, and the methods that need
            rows, are of; empty where captures have all their rows.
    """

    digest: str
    capture: Mapping[str, Any]
    capture_digest: str
    method: str
    counts: Mapping[str, int]
    directions_LW: Mapping[str, NDArray[np.float32]]
    shuffled_LW: Mapping[str, NDArray[np.float32]]
    scores: pa.Table
    num_heads: int | None
    root: Location
    parameters: Mapping[str, int | float] = field(default_factory=dict)
    signs_in_doubt: tuple[str, ...] = ()
    left_out: int = 0
    extends: tuple[str, ...] = ()
    rows_from: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    @property
    def location(self) -> Location:
        """Where in the store it lies."""
        return self.root.child(f"reductions/{self.digest}")

    @classmethod
    def exists(cls, root: Location, digest: str) -> bool:
        """Whether it has been computed."""
        return root.exists(f"reductions/{digest}/reduction.json")

    @classmethod
    def write(
        cls,
        root: Location,
        *,
        cache: ActivationCache,
        method: str,
        parameters: Mapping[str, int | float],
        directions_LW: Mapping[str, NDArray[np.float32]],
        shuffled_LW: Mapping[str, NDArray[np.float32]],
        scores: pa.Table,
        counts: Mapping[str, int],
        signs_in_doubt: Sequence[str] = (),
        left_out: int = 0,
        extends: Sequence[str] = (),
        rows_from: Mapping[str, str] | None = None,
    ) -> Reduction:
        """Store a result. What a killed run has left of the same result is replaced."""
        digest = reduction_digest(cache.digest, method, parameters, extends, rows_from)
        location = root.child(f"reductions/{digest}")
        sink = io.BytesIO()
        pq.write_table(scores, sink, compression="zstd")
        # Nobody may read these before reduction.json is there, and their last bits may differ
        # between versions of the libraries that write them.
        vectors = dict(directions_LW) | {
            f"{_SHUFFLED}{stream}": vectors_LW for stream, vectors_LW in shuffled_LW.items()
        }
        location.replace("directions.safetensors", safetensors.numpy.save(vectors))
        location.replace("scores.parquet", sink.getvalue())
        heads = [s.num_heads for s in cache.streams.values() if s.num_heads is not None]
        record = {
            "schema_version": REDUCTION_SCHEMA,
            "capture": dict(cache.capture),
            "capture_digest": cache.digest,
            "method": method,
            "counts": dict(counts),
            "num_heads": heads[0] if heads else None,
        } | _optional_fields(parameters, extends, rows_from or {})
        if signs_in_doubt:
            record["signs_in_doubt"] = list(signs_in_doubt)
        if left_out:
            record["left_out"] = left_out
        location.put_same("reduction.json", canonical_json(record))
        return cls.open(root, digest)

    @classmethod
    def open(cls, root: Location, digest: str) -> Reduction:
        """Read a stored result.

        Raises:
            NotFound: It has not been computed.
        """
        if not cls.exists(root, digest):
            raise NotFound(
                f"reduction {digest[:12]} is not in {root.url}; "
                "run `steerage reduce` on the same run file first",
                kind="reduction",
            )
        location = root.child(f"reductions/{digest}")
        record = json.loads(location.get("reduction.json"))
        vectors = safetensors.numpy.load(location.get("directions.safetensors"))
        return cls(
            digest=digest,
            capture=record["capture"],
            capture_digest=record["capture_digest"],
            method=record["method"],
            counts=record["counts"],
            directions_LW={
                name: value for name, value in vectors.items() if not name.startswith(_SHUFFLED)
            },
            shuffled_LW={
                name.removeprefix(_SHUFFLED): value
                for name, value in vectors.items()
                if name.startswith(_SHUFFLED)
            },
            scores=pq.read_table(io.BytesIO(location.get("scores.parquet"))),
            num_heads=record["num_heads"],
            root=root,
            parameters=record.get("parameters", {}),
            signs_in_doubt=tuple(record.get("signs_in_doubt", ())),
            left_out=record.get("left_out", 0),
            extends=tuple(record.get("extends", ())),
            rows_from=record.get("rows_from", {}),
        )

    def direction(self, site: Site) -> Direction:
        """The Direction at a site, with its scores.

        Raises:
            NotFound: The site was not captured.
        """
        names = self.scores["site"].to_pylist()
        if str(site) not in names:
            raise NotFound(
                f"reduction {self.digest[:12]} has no site {site}; it has {names[0]} to "
                f"{names[-1]} (streams and layers are set under [capture])",
                kind="site",
            )
        row = self.scores.slice(names.index(str(site)), 1).to_pylist()[0]
        return Direction(
            site=site,
            vector_D=self.at_site(self.directions_LW, site),
            sigma=row["sigma"],
            activation_norm=row["activation_norm"],
            method=self.method,
            scores={
                name: value
                for name, value in row.items()
                if isinstance(value, float)
                and np.isfinite(value)
                and name not in _NOT_SCORES
                and not name.startswith("histogram_")
            },
            lineage={"capture": self.capture_digest, "reduction": self.digest},
        )

    def control(
        self, site: Site, kind: Literal["random", "shuffled"] = "random", seed: int = 0
    ) -> Direction:
        """A direction of the same norm that should do nothing: what any effect is compared with.

        Args:
            site: See `direction`.
            kind: ``random``: uniform on the sphere; ``shuffled``: the difference of means under
                shuffled labels, which has the scale and the correlations of the activations.
            seed: Of the random direction.

        Raises:
            NotFound: As `direction`.
        """
        direction = self.direction(site)
        if kind == "random":
            unit_D = random_direction(site, len(direction.vector_D), seed)
            vector_D = (unit_D * direction.norm).astype(np.float32)
        else:
            vector_D = self.at_site(self.shuffled_LW, site)
        return replace(
            direction,
            vector_D=vector_D,
            sigma=None,
            method=f"control_{kind}",
            scores={},
            lineage={**direction.lineage, "control": kind, "seed": seed},
        )

    def at_site(self, values_LW: Mapping[str, NDArray[Any]], site: Site) -> NDArray[Any]:
        """[D], the part of [L, W] values by stream that belongs to a site that was captured."""
        layer = list(self.capture["layers"]).index(site.layer)
        values_W: NDArray[Any] = values_LW[site.stream][layer]
        if site.head is None:
            return values_W
        width = values_W.shape[0] // (self.num_heads or 1)
        return values_W[site.head * width : (site.head + 1) * width]

    def ranked(self, *, heads: bool, by: RankBy = "auroc") -> list[dict[str, Any]]:
        """Rows of `scores` for layers or for heads, best first by a score on the validation split.

        Validation chooses and test reports, so that the reported number is not the luckiest. Among
        sites with equal scores, the wider apart in Cohen's d comes first.

        Args:
            heads: Heads, or layers.
            by: ``auroc``; ``accuracy``, by which ITI ranks probes of heads (METHODS 5); or
                ``pair_accuracy``, by which Jailbreak Antidote ranks layers (METHODS 3).

        Raises:
            InvalidInput: No such site was captured.
        """
        rows = [
            row
            for row in self.scores.to_pylist()
            if (Site.parse(row["site"]).head is not None) == heads
        ]
        if not rows:
            raise InvalidInput(
                f"reduction {self.digest[:12]} has no {'heads' if heads else 'layers'}; "
                f"add the stream {'z' if heads else 'resid_post'!r} under [capture]",
                kind="site_kind",
            )
        column = f"{by}_validation"
        return sorted(
            rows,
            key=lambda row: (
                -np.nan_to_num(row[column]),
                -np.nan_to_num(row["cohens_d_validation"]),
                Site.parse(row["site"]),
            ),
        )

    def best(self, *, heads: bool, by: RankBy = "auroc") -> Site:
        """The first of `ranked`.

        Raises:
            InvalidInput: As `ranked`, or there is nothing to choose on: the validation split lacks
                rows of a class, or pairs.
        """
        row = self.ranked(heads=heads, by=by)[0]
        if np.isnan(row[f"{by}_validation"]):
            raise InvalidInput(
                f"reduction {self.digest[:12]} has no site to prefer by {by}: its validation split "
                f"lacks {'pairs' if by == 'pair_accuracy' else 'rows of a class'}. Raise "
                "prompts.validation_share, or name publish.sites",
                kind="validation_empty",
            )
        return Site.parse(row["site"])
