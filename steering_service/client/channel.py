"""ChannelEntry, Proposal, Assignment: a channel's state, as its log tells it, as somebody wants it,
and as a node is told it.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from steering_service.core.errors import InvalidInput
from steering_service.v1 import channel_pb2, watch_pb2

_CHANNEL: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9_-])?")


@dataclass(frozen=True, slots=True)
class ChannelEntry:
    """One change of a channel; the last one is its state.

    Attributes:
        revision: Counts from 1.
        artifact: Digest, or None when the channel points at nothing.
        strength: In the unit that each Intervention of the artifact names.
        enabled: Off means that nodes run the plain model.
        share: Part of the nodes that take part, 0 to 1.
        actor, time, reason: Who, when (UTC), why.
        previous: sha256 of the stored entry before, "" at revision 1.
        approver: Who approved it; None where one person was enough.
        restores: The revision whose state a rollback restored; None: not a rollback.
    """

    channel: str
    revision: int
    artifact: str | None
    strength: float
    enabled: bool
    share: float
    actor: str
    time: datetime
    reason: str
    previous: str
    approver: str | None = None
    restores: int | None = None

    @classmethod
    def from_proto(cls, message: channel_pb2.ChannelEntry) -> ChannelEntry:
        """Read the wire form."""
        return cls(
            channel=message.channel,
            revision=message.revision,
            artifact=message.artifact or None,
            strength=message.strength,
            enabled=message.enabled,
            share=message.share,
            actor=message.actor,
            time=message.time.ToDatetime(UTC),
            reason=message.reason,
            previous=message.previous,
            approver=message.approver or None,
            restores=message.restores or None,
        )


@dataclass(frozen=True, slots=True)
class Proposal:
    """A change that waits for somebody else's approval, on a channel that asks for two people.

    Attributes:
        id: 16 hex digits; what `Operator.approve` takes.
        entry: What would be appended.
    """

    id: str
    entry: ChannelEntry

    @classmethod
    def from_proto(cls, message: channel_pb2.Proposal) -> Proposal:
        """Read the wire form."""
        return cls(message.id, ChannelEntry.from_proto(message.entry))


def change_from_proto(message: channel_pb2.PromoteResponse) -> ChannelEntry | Proposal:
    """What became of a change: appended, or proposed."""
    if message.HasField("proposal"):
        return Proposal.from_proto(message.proposal)
    return ChannelEntry.from_proto(message.entry)


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a channel asks of its nodes at one revision; the fields are those of ChannelEntry."""

    channel: str
    revision: int
    artifact: str | None
    strength: float
    enabled: bool
    share: float

    @classmethod
    def from_proto(cls, message: watch_pb2.Assignment) -> Assignment:
        """Read the wire form; the nonce belongs to the stream and is left out."""
        return cls(
            channel=message.channel,
            revision=message.revision,
            artifact=message.artifact or None,
            strength=message.strength,
            enabled=message.enabled,
            share=message.share,
        )

    def includes(self, node_id: str) -> bool:
        """Whether the node is within the rollout share.

        Raises:
            InvalidInput: The share is not a number from 0 to 1.
        """
        if not 0.0 <= self.share <= 1.0:  # NaN fails this too
            raise InvalidInput(
                f"channel {self.channel!r} revision {self.revision}: share {self.share} is not a "
                "number from 0 to 1",
                kind="assignment_share",
            )
        return rollout_point(self.channel, node_id) < self.share

    def check_strength(self) -> None:
        """Refuse a strength that is not finite.

        Raises:
            InvalidInput: NaN or infinite.
        """
        if not math.isfinite(self.strength):
            raise InvalidInput(
                f"channel {self.channel!r} revision {self.revision}: strength {self.strength} is "
                "not finite",
                kind="assignment_strength",
            )


def rollout_point(channel: str, node_id: str) -> float:
    """Where a node stands in [0, 1): it takes part in shares above. Stable over restarts.

    The channel is part of the hash, so that not always the same nodes go first.
    """
    digest = hashlib.sha256(f"{channel}\0{node_id}".encode()).digest()
    # 53 bits, what a double holds: with 64 the quotient could round up to 1.0.
    return (int.from_bytes(digest[:8]) >> 11) / (1 << 53)


def check_channel(name: str) -> str:
    """Return a channel's name if it is one; such names are also safe as file names.

    Raises:
        InvalidInput: It is not.
    """
    if _CHANNEL.fullmatch(name) is None:
        raise InvalidInput(
            f"channel {name[:80]!r}: expected 1 to 63 characters of a-z 0-9 . _ - , the first a "
            "letter or digit, the last not a dot",
            kind="channel_name",
        )
    return name
