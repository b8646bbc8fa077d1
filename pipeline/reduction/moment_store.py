"""The moment store: Moments of a cache's training rows, counted once and kept.

moments/DIGEST/SHA256.safetensors   float64 [8, L, W] and [2, L, W] tensors by stream, and counts
moments/DIGEST/moments.json         names that file; written last: its existence is the commit

They are of groups that many questions can be answered from without another look at the rows: the
class means, those of either half of the rows, those under shuffled labels, and pair differences.
Moments of several caches merge, so prompts appended to a corpus do not make old ones be read again.

Shapes: N samples, A array rows, P pairs, G groups of rows, K groups of pairs, L layers, W width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from pipeline.errors import NotFound
from pipeline.reduction.counting import Counted, Counting, count, num_tasks
from pipeline.reduction.grouped import GroupedMoments
from pipeline.reduction.moments import Moments
from pipeline.reduction.pairs import Pairs
from pipeline.reduction.samples import Samples, not_finite
from store.activations import ActivationCache
from store.digest import canonical_json, sha256_hex
from store.errors import Conflict, Corrupt
from store.location import Location

MOMENTS_SCHEMA: Final = 1

_NUM_GROUPS: Final = 8
"""Label, half and shuffled label: see `_group`."""
_NUM_PAIR_GROUPS: Final = 2
"""Halves."""
NUM_MOMENTS: Final = _NUM_GROUPS + _NUM_PAIR_GROUPS
"""Moments of a stream."""


def moments_digest(capture: str) -> str:
    """The name of the Moments of a capture's training rows."""
    return sha256_hex(canonical_json({"schema_version": MOMENTS_SCHEMA, "capture": capture}))


@dataclass(frozen=True, slots=True, eq=False)
class StoredMoments:
    """Moments of the training rows of a capture, or of several.

    Attributes:
        capture_digest: Of the capture; of the first of several.
        counted: By stream; see `training_counting` for the groups.
    """

    capture_digest: str
    counted: Mapping[str, Counted]

    @classmethod
    def exists(cls, root: Location, capture_digest: str) -> bool:
        """Whether they have been counted."""
        return root.exists(f"moments/{moments_digest(capture_digest)}/moments.json")

    @classmethod
    def open(cls, root: Location, capture_digest: str) -> StoredMoments:
        """Read stored Moments.

        Raises:
            NotFound: They have not been counted.
            Corrupt: kind "blob_checksum", they are not those that were stored.
        """
        if not cls.exists(root, capture_digest):
            raise NotFound(
                f"Moments of cache {capture_digest[:12]} are not in {root.url}; "
                "run `steerage reduce` on its run file first",
                kind="moments",
            )
        location = root.child(f"moments/{moments_digest(capture_digest)}")
        record = json.loads(location.get("moments.json"))
        name = f"{record['sha256']}.safetensors"
        data = location.get(name)
        if (found := sha256_hex(data)) != record["sha256"]:
            raise Corrupt(
                f"{location.url}/{name}: its sha256 is {found[:12]}; remove {location.url} and run "
                "`steerage reduce` again",
                kind="blob_checksum",
            )
        tensors = safetensors.numpy.load(data)
        return cls(
            capture_digest,
            {stream: _counted(tensors, stream) for stream in record["streams"]},
        )

    def write(self, root: Location) -> StoredMoments:
        """Store them.

        Returns:
            What is stored: these, or those of another process that was the first to store the same
            capture's, whose last bits may differ where its libraries do.
        """
        location = root.child(f"moments/{moments_digest(self.capture_digest)}")
        data = safetensors.numpy.save(_tensors(self.counted))
        record = {
            "schema_version": MOMENTS_SCHEMA,
            "capture_digest": self.capture_digest,
            "streams": sorted(self.counted),
            "sha256": sha256_hex(data),
        }
        location.put_same(f"{record['sha256']}.safetensors", data)
        try:
            location.put_new("moments.json", canonical_json(record))
        except Conflict:
            return StoredMoments.open(root, self.capture_digest)
        return self

    def merge(self, other: StoredMoments) -> StoredMoments:
        """Moments of both captures' rows together; the streams are the same."""
        return StoredMoments(
            self.capture_digest,
            {name: counted.merge(other.counted[name]) for name, counted in self.counted.items()},
        )

    def of(self, stream: str, *, label: bool, half: bool | None = None) -> Moments:
        """Moments [L, W] of a class, or of one half of it."""
        halves = (False, True) if half is None else (half,)
        return self.counted[stream].groups.group(
            *(_group(label, one, shuffled) for one in halves for shuffled in (False, True))
        )

    def shuffled(self, stream: str, *, label: bool) -> Moments:
        """Moments [L, W] of what is a class under shuffled labels."""
        return self.counted[stream].groups.group(
            *(_group(side, half, label) for side in (False, True) for half in (False, True))
        )

    def pairs(self, stream: str, *, half: bool | None = None) -> Moments | None:
        """Moments [L, W] of pair differences, or of one half of them; None if there are no pairs
        at all."""
        pairs = self.counted[stream].pairs
        if pairs is None or not pairs.count_G.any():
            return None
        return pairs.group(*((0, 1) if half is None else (int(half),)))


def training_counting(samples: Samples, pairs: Pairs) -> Counting:
    """What is counted of a cache: its training samples, in groups of one class, one half and one
    shuffled class, and its pairs in halves.

    Args:
        samples: Of the cache.
        pairs: Of its training samples.
    """
    train_N = np.asarray(samples.split_N == "train")
    counts_GA = np.zeros((_NUM_GROUPS, samples.num_rows), np.int32)
    group_N = _group(samples.label_N, samples.half_N, samples.shuffled_N)
    np.add.at(counts_GA, (group_N[train_N], samples.row_N[train_N]), 1)
    return Counting(
        counts_GA,
        samples.row_N[pairs.positive_P],
        samples.row_N[pairs.negative_P],
        samples.half_N[pairs.positive_P].astype(np.int64),
        _NUM_PAIR_GROUPS,
    )


def training_moments(
    cache: ActivationCache,
    root: Location,
    samples: Samples,
    pairs: Pairs,
    *,
    on_done: Callable[[int], None],
) -> StoredMoments:
    """Moments of a cache's training rows: found in the store, or counted by Ray tasks and stored.

    Args:
        cache: A complete cache.
        root: The store that holds it and takes the Moments.
        samples: Of the cache.
        pairs: Of its training samples.
        on_done: Called with the number of tasks done; see `num_count_tasks`.

    Raises:
        InvalidInput: kind "not_finite", a training row is not finite.
    """
    if StoredMoments.exists(root, cache.digest):
        return StoredMoments.open(root, cache.digest)
    counted = count(cache, root, training_counting(samples, pairs), on_done=on_done)
    for stream, one in counted.items():
        # Stored, they would be found again after the rows were put right.
        if not np.isfinite(one.groups.mean).all():
            raise not_finite(f"cache {cache.digest[:12]}: a training row of {stream}")
    return StoredMoments(cache.digest, counted).write(root)


def num_count_tasks(root: Location, cache: ActivationCache) -> int:
    """Tasks of `training_moments`, for progress; 0 where there is nothing to count."""
    if StoredMoments.exists(root, cache.digest):
        return 0
    return num_tasks(cache.streams, NUM_MOMENTS)


def _group(label: Any, half: Any, shuffled: Any) -> Any:
    """Number of a group of rows, from booleans or arrays of them."""
    return 4 * label + 2 * half + 1 * shuffled


def _tensors(counted: Mapping[str, Counted]) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {}
    for stream, one in counted.items():
        for kind, moments in (("groups", one.groups), ("pairs", one.pairs)):
            assert moments is not None, "training_counting asks for pairs"
            tensors |= {
                f"{stream}.{kind}.count": moments.count_G,
                f"{stream}.{kind}.mean": moments.mean,
                f"{stream}.{kind}.m2": moments.m2,
            }
    return tensors


def _counted(tensors: Mapping[str, NDArray[Any]], stream: str) -> Counted:
    groups, pairs = (
        GroupedMoments(
            tensors[f"{stream}.{kind}.count"],
            tensors[f"{stream}.{kind}.mean"],
            tensors[f"{stream}.{kind}.m2"],
        )
        for kind in ("groups", "pairs")
    )
    return Counted(groups, pairs)
