"""Packing: how prompts become forward passes, fixed by the plan as it decides the last bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.prompts.trie import PlannedPrompt

Layout = Literal["trie", "masks", "batches"]


@dataclass(frozen=True, slots=True)
class Packing:
    """How prompts become forward passes.

    Attributes:
        layout: ``trie``: packs of the token trie through attention of our own. ``masks``: the same,
            for models that take a 4-D mask but no attention of ours; nothing is carried from pack
            to pack. ``batches``: right-padded prompts of like lengths, for models that can take
            neither.
        tokens: Most own nodes of a pack, or padded tokens of a batch; a longer prompt is one alone.
        prefix: Tokens that all prompts begin with and that a worker computes once; 0 for none.
    """

    layout: Layout
    tokens: int
    prefix: int = 0

    @classmethod
    def read(cls, capture: Mapping[str, Any]) -> Packing:
        """The packing of a cache's capture."""
        return cls(**capture["packing"])

    def record(self) -> dict[str, Any]:
        """What the capture says."""
        return asdict(self)

    @property
    def carries(self) -> bool:
        """Whether a pack may take over keys and values from the one before."""
        return self.layout == "trie"

    def batches(
        self, prompts: Sequence[PlannedPrompt], rows: range
    ) -> Iterator[list[PlannedPrompt]]:
        """Split the prompts that have rows in a shard into padded batches.

        A prompt whose rows lie in two shards is in batches of both.
        """
        batch: list[PlannedPrompt] = []
        longest = 0
        for prompt in prompts:
            if prompt.first_row + len(prompt.spans) <= rows.start or prompt.first_row >= rows.stop:
                continue
            longest_now = max(longest, len(prompt.token_ids))
            if batch and longest_now * (len(batch) + 1) > self.tokens:
                yield batch
                batch, longest_now = [], len(prompt.token_ids)
            batch.append(prompt)
            longest = longest_now
        if batch:
            yield batch
