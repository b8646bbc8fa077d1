"""Passes: which shards a Ray task reads, and waiting for the tasks of a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from store.layout import StreamLayout

SHARDS_PER_TASK: Final = 4


def shard_groups(num_shards: int, shards_per_task: int = SHARDS_PER_TASK) -> list[list[int]]:
    """All shards in order, in groups that do not depend on the number of workers."""
    return [
        list(range(first, min(first + shards_per_task, num_shards)))
        for first in range(0, num_shards, shards_per_task)
    ]


def matrix_groups(layout: StreamLayout) -> list[list[int]]:
    """Groups for tasks that answer with a [D, D] matrix a head.

    A group has at least D rows, so that no task sends away much more than it has read.
    """
    width = layout.width // (layout.num_heads or 1)
    return shard_groups(layout.num_shards, max(SHARDS_PER_TASK, -(-width // layout.rows_per_shard)))


def wait_for(references: Sequence[Any], on_done: Callable[[int], None]) -> None:
    """Wait for Ray tasks, and say after each how many are done.

    Raises:
        Exception: What a task raised.
    """
    import ray

    waiting = list(references)
    while waiting:
        finished, waiting = ray.wait(waiting)
        # Raises what the task raised.
        ray.get(finished)
        on_done(len(references) - len(waiting))
