"""Passes: what a Ray task reads, waiting for the tasks of a pass, and merging their results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from store.layout import StreamLayout

_ROWS_PER_TASK: Final = 4096
"""Rows of which a task counts the Moments: Moments of ten groups take 160 bytes a site and value,
so what it sends away is 2 % of what it has read, or less."""
_RESULT_NBYTES: Final = 8 << 20
"""What a task sends away at most, if it is more than one layer: a local Ray's object store holds
16 of these."""
_READ_NBYTES: Final = 256 << 20
"""What a task reads at most, if it is more than one layer: a second of work, of which a killed
worker loses half."""
_MERGED_PER_TASK: Final = 4
MOST_RETRIES: Final = 8
"""Workers that may be lost over one layer: more is no accident, but too little memory."""


def shard_groups(layout: StreamLayout) -> list[list[int]]:
    """All shards in order, in groups that do not depend on the number of workers."""
    size = -(-_ROWS_PER_TASK // layout.rows_per_shard)
    return [
        list(range(first, min(first + size, layout.num_shards)))
        for first in range(0, layout.num_shards, size)
    ]


def layer_blocks(layout: StreamLayout, num_moments: int) -> list[tuple[int, ...]]:
    """All layers in order, in blocks that a task can read and whose Moments it can send away.

    Args:
        num_moments: How many Moments [W] there are of each layer.
    """
    num_rows = min(len(shard_groups(layout)[0]) * layout.rows_per_shard, layout.num_rows)
    size = min(
        _RESULT_NBYTES // (num_moments * layout.width * 16),
        _READ_NBYTES // (num_rows * layout.width * layout.itemsize),
    )
    size = max(size, 1)
    return [layout.layers[at : at + size] for at in range(0, len(layout.layers), size)]


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


def merge_tasks(
    begin: Iterable[Callable[[], tuple[Any, Any]]], merge: Any, on_done: Callable[[], None]
) -> Any:
    """Start tasks, and merge their results as a tree whose shape depends on their number alone.

    Not more tasks are begun than twice the cluster's CPUs beyond those that are done, so that
    results do not pile up before they are merged.

    Args:
        begin: Starts a task; gives references to its result, and to something small that is there
            when the result is.
        merge: A Ray remote function that merges consecutive results.
        on_done: Called after each task, but not after a merge.

    Returns:
        A reference to all of them merged.

    Raises:
        Exception: What a task raised.
    """
    import ray

    levels: list[list[Any]] = [[]]
    waiting: list[Any] = []

    def wait_until(most: int) -> None:
        nonlocal waiting
        while len(waiting) > most:
            finished, waiting = ray.wait(waiting)
            ray.get(finished)
            for _ in finished:
                on_done()

    for start in begin:
        wait_until(2 * max(int(ray.cluster_resources().get("CPU", 1)), 1) - 1)
        result, done = start()
        waiting.append(done)
        levels[0].append(result)
        for level, results in enumerate(levels):
            if len(results) == _MERGED_PER_TASK:
                if level + 1 == len(levels):
                    levels.append([])
                levels[level + 1].append(merge.remote(*results))
                results.clear()
    wait_until(0)
    # The higher a level, the earlier the tasks whose results it holds.
    rest = [result for results in reversed(levels) for result in results]
    while len(rest) > 1:
        rest = [
            merge.remote(*rest[at : at + _MERGED_PER_TASK])
            for at in range(0, len(rest), _MERGED_PER_TASK)
        ]
    return rest[0]
