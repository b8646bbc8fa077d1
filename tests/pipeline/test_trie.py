"""The token trie: packs hold every node once, below its ancestors, and rows find their tokens."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.extraction.attention import PackAttention
from pipeline.prompts.trie import (
    MIN_CARRY,
    Pack,
    PlannedPrompt,
    build_packs,
    fill_shards,
    prefix_pack,
    shared_length,
    trie_order,
)

# Few different tokens and long common beginnings, so that much is shared.
BEGINNING = st.integers(0, 40)
TAIL = st.lists(st.integers(0, 2), min_size=1, max_size=12)
PROMPTS = st.lists(st.tuples(BEGINNING, TAIL), min_size=1, max_size=25)
LONG = np.tile([7, 8, 9], 20)


def sorted_prompts(drawn: list[tuple[int, list[int]]]) -> list[np.ndarray]:
    prompts = [np.concatenate([LONG[:length], tail]).astype(np.int64) for length, tail in drawn]
    return [prompts[i] for i in trie_order(prompts)]


def planned(prompts: list[np.ndarray], first_positions: list[int]) -> list[PlannedPrompt]:
    """Two rows a prompt: a span from the drawn position to the end, and the last token."""
    return [
        PlannedPrompt(ids, 2 * i, ((min(first, len(ids) - 1), len(ids)), (len(ids) - 1, len(ids))))
        for i, (ids, first) in enumerate(zip(prompts, first_positions, strict=True))
    ]


def paths(pack: Pack, carried_ids: np.ndarray) -> list[tuple[int, ...]]:
    """Tokens from the root to each key, told from `ends` alone."""
    ids = np.concatenate([carried_ids, pack.token_ids])
    found = []
    for key in range(len(ids)):
        above = np.flatnonzero(pack.ends[: key + 1] > key)
        assert list(pack.positions[above]) == list(range(len(above)))
        found.append(tuple(ids[above]))
    return found


@given(
    drawn=PROMPTS,
    firsts=st.lists(st.integers(0, 50), min_size=25, max_size=25),
    budget=st.integers(1, 120),
    carry=st.booleans(),
    shard=st.tuples(st.integers(0, 20), st.integers(1, 40)),
    with_prefix=st.booleans(),
)
def test_packs_compute_what_the_rows_of_a_shard_need(
    drawn: list[tuple[int, list[int]]],
    firsts: list[int],
    budget: int,
    carry: bool,
    shard: tuple[int, int],
    with_prefix: bool,
) -> None:
    ids = sorted_prompts(drawn)
    prompts = planned(ids, firsts[: len(ids)])
    rows = range(min(shard[0], 2 * len(ids) - 1), min(sum(shard), 2 * len(ids)))
    prefix = shared_length(ids[0], ids[-1]) if with_prefix else 0
    before = prefix_pack(ids[0][:prefix]) if prefix else None
    keys_before = [] if before is None else paths(before, np.zeros(0, np.int64))
    keep_before = np.arange(prefix)
    found: dict[int, list[tuple[int, ...]]] = {}
    for number, pack in enumerate(build_packs(prompts, rows, budget, prefix, carry)):
        carried_ids = np.array(
            [keys_before[key][-1] for key in keep_before[: pack.carried]], np.int64
        )
        assert pack.carried in ((0, prefix) if number == 0 else (0, len(keep_before)))
        assert number == 0 or carry or pack.carried == 0
        assert pack.carried == 0 or pack.carried >= min(MIN_CARRY, prefix)
        keys = paths(pack, carried_ids)
        own = keys[pack.carried :]
        assert len(set(keys)) == len(keys), "a node is in a pack twice"
        assert pack.num_tokens <= budget or len(set(own)) == len(own)
        for source in pack.rows:
            assert source.row not in found, "a row is gathered twice"
            assert source.nodes.min() >= 0
            found[source.row] = [own[node] for node in source.nodes]
        keys_before, keep_before = keys, pack.keep
    assert sorted(found) == list(rows)
    for row, gathered in found.items():
        prompt = prompts[row // 2]
        start, stop = prompt.spans[row % 2]
        assert gathered == [tuple(prompt.token_ids[: i + 1]) for i in range(start, stop)]


@given(drawn=PROMPTS, budget=st.integers(30, 300), window=st.none() | st.integers(1, 20))
def test_blocks_let_each_node_attend_to_its_ancestors_within_the_window(
    drawn: list[tuple[int, list[int]]], budget: int, window: int | None
) -> None:
    prompts = planned(sorted_prompts(drawn), [10**6] * len(drawn))
    for pack in build_packs(prompts, range(2 * len(prompts)), budget, 0, True):
        attention = PackAttention(pack, torch.device("cpu"), torch.float32)
        seen = np.zeros((pack.num_tokens, len(pack.ends)), bool)
        covered: list[int] = []
        for block, mask in attention.blocks(window):
            queries = np.arange(block.start, block.stop)
            keys = np.concatenate([np.arange(a, b) for a, b in block.keys])
            allowed = np.tri(len(queries), dtype=bool) if mask is None else (mask == 0).numpy()
            seen[np.ix_(queries, keys)] = allowed
            covered.extend(queries)
        assert covered == list(range(pack.num_tokens))
        query = np.arange(pack.num_tokens) + pack.carried
        key = np.arange(len(pack.ends))
        wanted = (key[None] <= query[:, None]) & (query[:, None] < pack.ends[None])
        if window is not None:
            wanted &= pack.positions[query][:, None] - pack.positions[key][None] < window
        assert np.array_equal(seen, wanted)


def test_each_node_of_a_shard_is_computed_once_across_packs() -> None:
    rng = np.random.default_rng(0)
    system = rng.integers(0, 100, 500)
    ids = [np.concatenate([system, rng.integers(0, 100, 20)]) for _ in range(50)]
    ids = [ids[i] for i in trie_order(ids)]
    prompts = planned(ids, [10**6] * 50)
    packs = list(build_packs(prompts, range(100), 300, 500, True))
    assert len(packs) > 3
    nodes = 20 * 50 - sum(shared_length(a, b) - 500 for a, b in itertools.pairwise(ids))
    assert sum(pack.num_tokens for pack in packs) == nodes
    # Without a kept prefix the first pack computes it; without carrying, every pack does.
    assert sum(p.num_tokens for p in build_packs(prompts, range(100), 300, 0, True)) == nodes + 500
    alone = list(build_packs(prompts, range(100), 700, 0, False))
    assert sum(p.num_tokens for p in alone) >= nodes + 500 * len(alone)


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=60),
    rows_per_shard=st.sampled_from([4, 8, 32]),
)
def test_filling_shards_is_a_permutation_that_cuts_no_more_groups(
    sizes: list[int], rows_per_shard: int
) -> None:
    prompts, group_of = [], []
    for group, size in enumerate(sizes):
        for member in range(size):
            prompts.append(np.array([group] * 10 + [member]))
            group_of.append(group)
    order = fill_shards(prompts, [1] * len(prompts), rows_per_shard, 0)
    assert sorted(order) == list(range(len(prompts)))

    def cuts(numbers: list[int]) -> int:
        ends = range(rows_per_shard, len(numbers), rows_per_shard)
        return sum(group_of[numbers[end - 1]] == group_of[numbers[end]] for end in ends)

    # Each group stays together.
    changes = sum(group_of[a] != group_of[b] for a, b in itertools.pairwise(order))
    assert changes == len(sizes) - 1
    assert cuts(order) <= cuts(list(range(len(prompts))))


@given(drawn=PROMPTS)
def test_trie_order_is_that_of_the_tokens(drawn: list[tuple[int, list[int]]]) -> None:
    ids = sorted_prompts(drawn)
    assert [tuple(i) for i in ids] == sorted(tuple(i) for i in ids)


@pytest.mark.parametrize(
    ("a", "b", "shared"), [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2], 2), ([1], [2], 0)]
)
def test_shared_length(a: list[int], b: list[int], shared: int) -> None:
    assert shared_length(np.array(a, np.int64), np.array(b, np.int64)) == shared
