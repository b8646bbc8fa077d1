"""What a request makes of a channel's state: pure values, before anything is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from steering_service.core.errors import InvalidInput
from steering_service.v1 import channel_pb2
from store.channels import Change, ChannelEntry


class Action(StrEnum):
    """What a change is, as far as the access policy tells them apart."""

    CHANGE = "change"
    OFF = "off"
    ROLLBACK = "rollback"


@dataclass(frozen=True, slots=True)
class State:
    """What a channel says after a change; for the fields see `store.channels.ChannelEntry`."""

    artifact: str | None
    strength: float
    enabled: bool
    share: float
    restores: int | None = None

    @classmethod
    def of(cls, entry: ChannelEntry, *, restores: int | None) -> Self:
        """The state of an entry, in one that restores (or does not) an earlier revision."""
        return cls(entry.artifact, entry.strength, entry.enabled, entry.share, restores)

    def change(self, *, actor: str, reason: str, approver: str | None = None) -> Change:
        """As arguments of `ChannelLog.append` and `draft`."""
        return Change(
            artifact=self.artifact,
            strength=self.strength,
            enabled=self.enabled,
            share=self.share,
            restores=self.restores,
            actor=actor,
            reason=reason,
            approver=approver,
        )


def of_promote(
    request: channel_pb2.PromoteRequest, head: ChannelEntry | None
) -> tuple[State, Action]:
    """What a Promote makes of the head, and what kind of change that is.

    Raises:
        InvalidInput: A share or strength out of range, or no strength where there must be one.
    """
    if request.HasField("artifact"):
        artifact = request.artifact or None
    else:
        artifact = head.artifact if head else None
    enabled = request.enabled if request.HasField("enabled") else (head.enabled if head else True)
    share = request.share if request.HasField("share") else (head.share if head else 1.0)
    strength = _strength(request, head, artifact)
    if not 0.0 <= share <= 1.0:  # NaN fails this too
        raise InvalidInput(f"share {share}: expected a number from 0 to 1", kind="promote_share")
    if not math.isfinite(strength):
        raise InvalidInput(
            f"strength {strength}: expected a finite number", kind="promote_strength"
        )
    state = State(artifact, strength, enabled, share)
    kept = head is not None and state == State(head.artifact, head.strength, False, head.share)
    return state, Action.OFF if kept else Action.CHANGE


def of_rollback(head: ChannelEntry, to_revision: int) -> int:
    """The revision that a Rollback restores.

    Args:
        head: The channel's present entry.
        to_revision: What the request says; 0: one step back. After a rollback that is one step
            before what it restored, so that one after the other walks back.

    Raises:
        InvalidInput: kind "rollback_revision", there is no such earlier revision.
    """
    revision = to_revision or (head.restores or head.revision) - 1
    if not 1 <= revision < head.revision:
        raise InvalidInput(
            f"channel {head.channel!r} is at revision {head.revision}"
            + (f", which restores {head.restores}" if head.restores else "")
            + f"; cannot go back to {revision}: expected one of 1 to {head.revision - 1}",
            kind="rollback_revision",
        )
    return revision


def _strength(
    request: channel_pb2.PromoteRequest, head: ChannelEntry | None, artifact: str | None
) -> float:
    if request.HasField("strength"):
        return request.strength
    if head is not None and head.artifact is not None:
        return head.strength
    if artifact is not None:
        raise InvalidInput(
            f"channel {request.channel!r} has no strength yet; give one with its first artifact",
            kind="promote_strength",
        )
    return 0.0
