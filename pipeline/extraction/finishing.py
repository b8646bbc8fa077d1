"""The end of `extract --no-cache`: parts become the capture's Moments and its kept rows.

Shapes: K rows, P pairs, G groups, L layers, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.extraction.part_store import PartRecord, PartStore
from pipeline.extraction.parts import Apart, rows_in
from pipeline.reduction.counting import Counted, Counting, count_shard
from pipeline.reduction.grouped import GroupedMoments
from pipeline.reduction.moment_store import StoredMoments
from store.activations import ActivationCache
from store.location import Location
from store.records import QuarantinedRow

_SHARDS_PER_CALL: Final = 4

Values = dict[str, NDArray[Any]]
"""Rows by stream, [K, L, W] as stored."""


class SavedRows:
    """The saved rows of all parts. It pickles.

    Args:
        root: The store.
        capture: Digest of the whole capture.
        kept: Digest of the kept rows' capture.
        rows: Int64, which rows are saved, increasing.
        records: Of all parts, in order.
    """

    def __init__(
        self,
        root: Location,
        capture: str,
        kept: str,
        rows: NDArray[np.int64],
        records: Sequence[PartRecord],
    ) -> None:
        self.root, self.capture, self.kept, self.rows = root, capture, kept, rows
        self.records = list(records)
        self.store = PartStore(root, capture, kept)
        self._at_hand: tuple[int, Values] | None = None

    def of_part(self, number: int, wanted: NDArray[np.int64]) -> Values:
        """Some rows of a part; one part is held in memory."""
        if self._at_hand is None or self._at_hand[0] != number:
            self._at_hand = number, self.store.saved_rows(self.records[number])
        slots = np.searchsorted(self.part_rows(number, self.rows), wanted)
        return {stream: values[slots] for stream, values in self._at_hand[1].items()}

    def of(self, wanted: NDArray[np.int64]) -> Values:
        """Rows, increasing, at least one."""
        pieces: dict[str, list[NDArray[Any]]] = {}
        for number in range(len(self.records)):
            here = self.part_rows(number, wanted)
            if len(here):
                for stream, values in self.of_part(number, here).items():
                    pieces.setdefault(stream, []).append(values)
        return {stream: np.concatenate(some) for stream, some in pieces.items()}

    def part_rows(self, number: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of increasing rows that are of a part."""
        return rows_in(rows, range(*self.records[number].rows))

    def __reduce__(self) -> tuple[object, ...]:
        return SavedRows, (self.root, self.capture, self.kept, self.rows, self.records)


class HasQuarantine(Protocol):
    """A record that names rows that do not count."""

    @property
    def quarantined(self) -> tuple[QuarantinedRow, ...]: ...


def reasons(records: Iterable[HasQuarantine]) -> dict[int, str]:
    """Reasons by array row."""
    return {item.row: item.reason for record in records for item in record.quarantined}


def finish(
    cache: ActivationCache,
    kept: ActivationCache,
    rows_K: NDArray[np.int64],
    saved: SavedRows,
    apart: Apart,
    address: str | None,
) -> None:
    """Store the Moments and the kept rows. May be repeated, also after a crash at any moment.

    Args:
        cache: Of the whole capture.
        kept: The cache of the kept rows.
        rows_K: Int64 [K], the rows of the whole capture that are kept.
        saved: What the parts hold.
        apart: Pairs that are in no part's Moments.
        address: A Ray cluster, or None where the workers are on this machine.
    """
    if not StoredMoments.exists(saved.root, cache.digest):
        streams = list(cache.streams)
        calls = [(saved, stream) for stream in streams]
        merged = dict(zip(streams, _run(_merged_parts, calls, address), strict=True))
        if len(apart):
            [last] = _run(count_apart, [(saved, apart)], address)
            merged = {
                stream: Counted(one.groups, one.pairs and one.pairs.merge(last[stream]))
                for stream, one in merged.items()
            }
        StoredMoments(cache.digest, merged).write(saved.root)
    # Damaged ones are repaired: the values are the same bit for bit.
    shards = sorted({*kept.missing(), *kept.damaged()})
    groups = [shards[i : i + _SHARDS_PER_CALL] for i in range(0, len(shards), _SHARDS_PER_CALL)]
    _run(_write_kept_shards, [(saved, rows_K, group) for group in groups], address)
    kept.seal()


def _run(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], address: str | None
) -> list[Any]:
    """Results of calls: of this process where the workers are on its machine, as one more process
    takes longer to start than most of these take; else of Ray tasks, which are nearer to the store.
    """
    if address is None:
        return [function(*call) for call in calls]
    import ray

    task = ray.remote(num_cpus=1)(function)
    results: list[Any] = ray.get([task.remote(*call) for call in calls])
    return results


def _merged_parts(saved: SavedRows, stream: str) -> Counted:
    """Moments of all parts, in their order; no more than two parts are in memory."""
    first, *rest = saved.records
    merged = saved.store.moments(first, stream)
    for record in rest:
        merged = merged.merge(saved.store.moments(record, stream))
    return merged


def count_apart(saved: SavedRows, apart: Apart) -> dict[str, GroupedMoments]:
    """Moments of the differences of pairs whose sides lie in different parts.

    Parts are read in order, and a row is held until the last of its pairs is complete.
    """
    threads = torch.get_num_threads()
    # As in a worker: the number of threads decides the last bits of a sum.
    torch.set_num_threads(1)
    try:
        return _count_apart(saved, apart)
    finally:
        torch.set_num_threads(threads)


def _count_apart(saved: SavedRows, apart: Apart) -> dict[str, GroupedMoments]:
    first_P = np.minimum(apart.positive_P, apart.negative_P)
    last_P = np.maximum(apart.positive_P, apart.negative_P)
    held_rows = np.zeros(0, np.int64)
    held: Values = {}
    counted: dict[str, GroupedMoments] = {}
    for number, record in enumerate(saved.records):
        here = saved.part_rows(number, apart.rows)
        if not len(here):
            continue
        # Parts are in the order of their rows, so what is held comes first.
        rows = np.concatenate([held_rows, here])
        values = saved.of_part(number, here)
        if len(held_rows):
            values = {name: np.concatenate([held[name], new]) for name, new in values.items()}
        complete_P = (last_P >= record.rows[0]) & (last_P < record.rows[1])
        counting = Counting(
            counts_GA=np.zeros((1, len(rows)), np.int64),
            positive_P=np.searchsorted(rows, apart.positive_P[complete_P]),
            negative_P=np.searchsorted(rows, apart.negative_P[complete_P]),
            group_P=apart.group_P[complete_P],
            num_pair_groups=apart.num_groups,
        )
        for stream, one in count_shard(values, range(len(rows)), counting).items():
            assert one.pairs is not None
            before = counted.get(stream)
            counted[stream] = before.merge(one.pairs) if before else one.pairs
        waiting_K = np.isin(rows, first_P[last_P >= record.rows[1]])
        held_rows = rows[waiting_K]
        held = {stream: some[waiting_K] for stream, some in values.items()}
    return counted


def _write_kept_shards(saved: SavedRows, rows_K: NDArray[np.int64], shards: Sequence[int]) -> None:
    """Write shards of the kept rows' cache, or repair them."""
    kept = ActivationCache.open(saved.root, saved.kept)
    damaged = kept.damaged()
    why = reasons(saved.records)
    for shard in shards:
        rows = next(iter(kept.streams.values())).shard_rows(shard)
        wanted = rows_K[rows.start : rows.stop]
        quarantined = {
            row: why[of] for row, of in zip(rows, wanted.tolist(), strict=True) if of in why
        }
        write = kept.repair_shard if shard in damaged else kept.write_shard
        write(shard, saved.of(wanted), quarantined=quarantined)
