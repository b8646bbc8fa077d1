"""The token trie: prompts in an order that shares prefixes, and packs that compute each node once.

A pack is a depth-first piece of the trie, run as one sequence. Its keys are the nodes *carried*
from the pack before, a path from the root, followed by its own. A node attends to its ancestors
alone: node k is an ancestor of q, or q itself, exactly if ``k <= q < ends[k]``.

Shapes: N own nodes of a pack, C carried ones, K = C + N keys, T tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.integer[Any]]

MIN_CARRY: Final = 8
"""A shorter path is cheaper to compute again than to carry."""

_FILL_AHEAD: Final = 64


@dataclass(frozen=True, slots=True)
class PlannedPrompt:
    """A prompt as a worker needs it.

    Attributes:
        token_ids: Int64 [T].
        first_row: The row of its first span.
        spans: Token spans [start, stop), one a row.
    """

    token_ids: NDArray[np.int64]
    first_row: int
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class RowSource:
    """Where a row's tokens lie in a pack.

    Attributes:
        row: Row of the arrays.
        nodes: Int64, own nodes of the pack; the row is the mean over them.
    """

    row: int
    nodes: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """One forward pass.

    Attributes:
        token_ids: Int64 [N].
        positions: Int64 [K], depth of every key; the first C are the carried ones.
        ends: Int64 [K], one past the last key below each key, see the module.
        carried: C.
        keep: Int64, keys that the next pack carries, a path from the root.
        rows: What is gathered.
    """

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    ends: NDArray[np.int64]
    carried: int
    keep: NDArray[np.int64]
    rows: tuple[RowSource, ...]

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.token_ids)


def shared_length(a: Ids, b: Ids) -> int:
    """Tokens that two prompts begin with alike."""
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    first = int(different.argmax()) if length else 0
    return first if length and different[first] else length


def trie_order(prompts: Sequence[Ids]) -> list[int]:
    """Numbers of the prompts in the trie's depth-first order; equal prompts keep their order."""
    # Big-endian bytes compare as the tokens do.
    keys = [np.asarray(ids).astype(">u4").tobytes() for ids in prompts]
    return sorted(range(len(keys)), key=keys.__getitem__)


def fill_shards(
    prompts: Sequence[Ids], num_rows: Sequence[int], rows_per_shard: int, prefix: int
) -> list[int]:
    """Move prompts so that the ends of shards cut little sharing.

    Every shard has the same number of rows (Zarr's grid), so what is chosen is who fills it: where
    a group of prompts that share most of their tokens would be cut, smaller groups from a little
    further on go first.

    Args:
        prompts: In `trie_order`.
        num_rows: Rows of each.
        rows_per_shard: Rows of a shard.
        prefix: Tokens that all prompts share, which a cut does not cost.

    Returns:
        A permutation of the prompts' numbers.
    """
    groups = _groups(prompts, prefix)
    sizes = [sum(num_rows[i] for i in group) for group in groups]
    taken = [False] * len(groups)
    moved: list[int] = []
    filled = 0
    for start in range(len(groups)):
        while not taken[start]:
            room = rows_per_shard - filled % rows_per_shard
            chosen = start
            if room < sizes[start] <= rows_per_shard:
                ahead = range(start + 1, min(start + 1 + _FILL_AHEAD, len(groups)))
                fitting = [group for group in ahead if not taken[group] and sizes[group] <= room]
                # The largest that fits; where there is none, this group is cut.
                chosen = max(fitting, key=sizes.__getitem__, default=start)
            taken[chosen] = True
            moved.extend(groups[chosen])
            filled += sizes[chosen]

    def cost(order: Sequence[int]) -> int:
        """Tokens that are computed again after the ends of shards."""
        first_rows = np.cumsum([0, *(num_rows[i] for i in order)])[:-1]
        shards = first_rows // rows_per_shard
        ends: list[int] = np.flatnonzero(np.diff(shards)).tolist()
        return sum(shared_length(prompts[order[i]], prompts[order[i + 1]]) - prefix for i in ends)

    as_given = list(range(len(prompts)))
    return min(as_given, moved, key=cost)


def _groups(prompts: Sequence[Ids], prefix: int) -> list[list[int]]:
    """Neighbours that share more than half of what is not shared by all."""
    groups: list[list[int]] = []
    for i, ids in enumerate(prompts):
        shared = shared_length(prompts[i - 1], ids) if i else 0
        if i and 2 * (shared - prefix) > len(ids) - prefix:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def build_packs(
    prompts: Sequence[PlannedPrompt], rows: range, tokens_per_pack: int, prefix: int, carry: bool
) -> Iterator[Pack]:
    """Lay the prompts that have rows in a shard out in packs.

    Args:
        prompts: In row order; such without a row in `rows` are left out.
        rows: The rows of the shard.
        tokens_per_pack: Most own nodes of a pack; a longer prompt is a pack alone.
        prefix: Tokens that every prompt of the capture begins with, and that `prefix_pack` has
            computed: a pack that begins a shard carries them. 0 for none.
        carry: Whether a pack may carry nodes of the pack before; if not, each begins at the root.
    """
    building: _Building | None = None
    for prompt in prompts:
        wanted = [
            (prompt.first_row + j, start, stop)
            for j, (start, stop) in enumerate(prompt.spans)
            if prompt.first_row + j in rows
        ]
        if not wanted:
            continue
        first = min(start for _, start, _ in wanted)
        if building is None:
            building = _Building(prompt.token_ids[: prefix if first >= prefix else 0])
        elif not building.takes(prompt.token_ids, first, tokens_per_pack):
            shared = building.shared(prompt.token_ids)
            # Nodes that rows of the next pack are gathered from must be its own.
            carried = min(shared, first) if carry else 0
            carried = carried if carried >= MIN_CARRY else 0
            yield building.finish(carried)
            building = _Building(prompt.token_ids[:carried])
        building.add(prompt.token_ids, wanted)
    if building is not None:
        yield building.finish(0)


def prefix_pack(prefix_ids: Ids) -> Pack:
    """The pack that computes what all prompts begin with, all of which is kept.

    It is a pack of its own, so that its numbers do not depend on what a worker does after it.
    """
    building = _Building(prefix_ids[:0])
    building.add(prefix_ids, [])
    return building.finish(len(prefix_ids))


class _Building:
    """A pack that prompts are added to.

    Args:
        carried: The path of tokens that it carries.
    """

    def __init__(self, carried: Ids) -> None:
        self._carried = len(carried)
        self._last: Ids = carried
        self._path = np.arange(self._carried)
        self._tokens: list[Ids] = []
        self._positions: list[NDArray[np.int64]] = [np.arange(self._carried)]
        self._closed: list[tuple[NDArray[np.int64], int]] = []
        self._num_keys = self._carried
        self._rows: list[RowSource] = []

    def shared(self, token_ids: Ids) -> int:
        return shared_length(self._last, token_ids)

    def takes(self, token_ids: Ids, first: int, tokens_per_pack: int) -> bool:
        """Whether a prompt whose rows begin at position `first` may be added."""
        shared = self.shared(token_ids)
        own = self._num_keys - self._carried
        fits = own + len(token_ids) - shared <= tokens_per_pack
        return fits and (first >= shared or int(self._path[first]) >= self._carried)

    def add(self, token_ids: Ids, wanted: Sequence[tuple[int, int, int]]) -> None:
        shared = self.shared(token_ids)
        new = len(token_ids) - shared
        self._closed.append((self._path[shared:], self._num_keys))
        own = np.arange(self._num_keys, self._num_keys + new)
        self._path = np.concatenate([self._path[:shared], own])
        self._tokens.append(token_ids[shared:])
        self._positions.append(np.arange(shared, len(token_ids)))
        self._num_keys += new
        self._last = token_ids
        for row, start, stop in wanted:
            self._rows.append(RowSource(row, self._path[start:stop] - self._carried))

    def finish(self, keep: int) -> Pack:
        ends = np.full(self._num_keys, self._num_keys, np.int64)
        for nodes, end in self._closed:
            ends[nodes] = end
        tokens = np.concatenate(self._tokens) if self._tokens else np.zeros(0)
        return Pack(
            tokens.astype(np.int64),
            np.concatenate(self._positions),
            ends,
            self._carried,
            self._path[:keep],
            tuple(self._rows),
        )
