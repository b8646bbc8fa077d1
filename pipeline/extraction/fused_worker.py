"""One worker of `extract --no-cache`: it computes the shards of a part and writes their Moments.

The activations of a shard are gone when the next one is begun, but for the kept rows. A worker that
dies takes the part with it that it was at.
"""

from __future__ import annotations

import logging
import pickle
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.extraction.part_store import PartRecord, PartStore
from pipeline.extraction.parts import Part, PartCount
from pipeline.extraction.shard_worker import Receipt, ShardWorker, log_to_stderr
from store.location import Location

log = logging.getLogger(__name__)


class FusedWorker(ShardWorker):
    """A `ShardWorker` that counts its shards in place of writing them.

    Args:
        where: As for `ShardWorker`.
        kept: Digest of the kept rows' capture.
    """

    def __init__(self, *where: Any) -> None:
        *rest, kept = where
        super().__init__(*rest)
        store_url, digest = rest[:2]
        if self._refused is None:
            self._parts = PartStore(Location.open(store_url), digest, kept)

    def _receipts(self, row: Mapping[str, Any]) -> Iterator[Receipt]:
        """Compute and commit the parts of a row of work; a receipt for each of their shards."""
        to_do = []
        for part in unpacked(row):
            # A worker that died between its commit and its receipts brings a part here again.
            if (record := self._parts.find(part)) is not None:
                yield from self._found(part, record)
            else:
                to_do.append(part)
        work = [self._begin(shard) for part in to_do for shard in part.shards]
        results = self._computed(work)
        for part in to_do:
            yield from self._one(part, results)

    def _one(self, part: Part, results: Iterator[Any]) -> Iterator[Receipt]:
        count = PartCount(part)
        receipts = []
        for shard in part.shards:
            result, receipt = next(results)
            start = time.perf_counter()
            count.add(result, self._layout.shard_rows(shard))
            seconds = {**receipt.seconds, "count": time.perf_counter() - start}
            receipts.append(replace(receipt, seconds=seconds))
        start = time.perf_counter()
        counted = count.finish()
        finished = time.perf_counter()
        last = receipts[-1].seconds
        counting = last["count"] + finished - start
        total = {
            "compute": sum(receipt.seconds["compute"] for receipt in receipts),
            "count": sum(receipt.seconds["count"] for receipt in receipts) + finished - start,
        }
        self._parts.write(part, counted, total)
        written = {**last, "count": counting, "write": time.perf_counter() - finished}
        yield from receipts[:-1]
        yield replace(receipts[-1], seconds=written)

    def _found(self, part: Part, record: PartRecord) -> Iterator[Receipt]:
        log.info("part found", extra={"shard": part.shards.start})
        reasons = {item.row: item.reason for item in record.quarantined}
        for shard in part.shards:
            rows = self._layout.shard_rows(shard)
            bad = {row: reason for row, reason in reasons.items() if row in rows}
            yield self._receipt(shard, quarantined=bad)


class FusedPoolWorker(FusedWorker):
    """A `FusedWorker` in a process of its own; see `PoolWorker`."""

    def __init__(self, *where: Any) -> None:
        log_to_stderr()
        super().__init__(*where)


def packed(parts: Sequence[Part]) -> dict[str, Any]:
    """A row of work. Parts are long lists of small numbers, so they are compressed."""
    return {"parts": zlib.compress(pickle.dumps(list(parts)), 1)}


def unpacked(row: Mapping[str, Any]) -> list[Part]:
    """The parts of a row of work."""
    parts: list[Part] = pickle.loads(zlib.decompress(row["parts"]))
    return parts
