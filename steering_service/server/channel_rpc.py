"""ChannelService: compare-and-set on channels, with proposals where two people are needed."""

from __future__ import annotations

import asyncio
import logging
from functools import lru_cache
from typing import Final, NamedTuple

from google.protobuf.timestamp_pb2 import Timestamp

from steering_service.core.errors import Conflict, InvalidInput, Refused
from steering_service.server import access, metrics
from steering_service.server.artifacts import Artifacts
from steering_service.server.changes import Action, State, of_promote, of_rollback
from steering_service.server.hub import Hub
from steering_service.server.paging import page_size
from steering_service.server.status import Context
from steering_service.server.store_calls import store_call
from steering_service.v1 import channel_pb2
from steering_service.v1.channel_pb2_grpc import ChannelServiceServicer
from store.channels import Change, ChannelEntry, ChannelLog
from store.errors import NotFound
from store.proposals import Proposals

log = logging.getLogger(__name__)

MAX_REASON_CHARS: Final = 2000
# Of one person for one revision, so that nobody can keep the others from proposing.
_MAX_PROPOSALS: Final = 8
# What of rollbacks is remembered, since one may restore another, and so on.
_LINKS: Final = 4096


class _Link(NamedTuple):
    """What matters of an entry once it is restored."""

    restores: int | None
    approved: bool


class ChannelRpc(ChannelServiceServicer):
    """The service over one channel log; for the calls see channel.proto.

    Args:
        channels: The log.
        proposals: Changes that wait for somebody else's approval.
        artifacts: Where the artifacts that channels point at must be.
        hub: Told of every change, so that watchers need not wait for its poll.
    """

    def __init__(
        self, channels: ChannelLog, proposals: Proposals, artifacts: Artifacts, hub: Hub
    ) -> None:
        self._channels = channels
        self._proposals = proposals
        self._artifacts = artifacts
        self._hub = hub
        self._link = lru_cache(_LINKS)(self._read_link)  # entries never change

    async def Promote(
        self, request: channel_pb2.PromoteRequest, context: Context
    ) -> channel_pb2.PromoteResponse:
        """Check and append one entry, or keep it as a proposal."""
        actor = self._actor(request.channel, request.actor)
        _check_reason(request.reason)
        head = await self._head_at(request.channel, request.expected_revision)
        state, action = of_promote(request, head)
        return await self._change(request.channel, head, state, action, actor, request.reason)

    async def Rollback(
        self, request: channel_pb2.RollbackRequest, context: Context
    ) -> channel_pb2.PromoteResponse:
        """Check and append an entry with an earlier state, or keep it as a proposal."""
        actor = self._actor(request.channel, request.actor)
        _check_reason(request.reason)
        head = await self._head_at(request.channel, request.expected_revision)
        if head is None:
            raise _no_channel(request.channel)
        revision = of_rollback(head, request.to_revision)
        restored = await store_call(self._channels.entry, request.channel, revision)
        state = State.of(restored, restores=revision)
        return await self._change(
            request.channel, head, state, Action.ROLLBACK, actor, request.reason
        )

    async def Approve(
        self, request: channel_pb2.ApproveRequest, context: Context
    ) -> channel_pb2.PromoteResponse:
        """Append what somebody else proposed."""
        approver = self._actor(request.channel, request.actor)
        proposed = await store_call(self._proposals.get, request.channel, request.proposal_id)
        if approver == proposed.actor:
            raise access.Denied(
                f"{approver!r} proposed this change of channel {request.channel!r}; somebody else "
                "has to approve it",
                kind="approver_is_proposer",
            )
        if not access.caller().source.operates(proposed.actor, request.channel):
            raise access.Denied(
                f"{proposed.actor!r}, who proposed this change of channel {request.channel!r}, may "
                "not change it any more; propose it yourself, and have somebody else approve it",
                kind="proposer_gone",
            )
        head = await self._head_at(request.channel, proposed.revision - 1)
        state = State.of(proposed, restores=proposed.restores)
        await self._check(request.channel, head, state)
        entry = await store_call(
            self._channels.append,
            request.channel,
            expected_revision=proposed.revision - 1,
            **state.change(actor=proposed.actor, reason=proposed.reason, approver=approver),
        )
        self._changed(entry, "approve")
        return channel_pb2.PromoteResponse(entry=_to_proto(entry))

    async def ListProposals(
        self, request: channel_pb2.ListProposalsRequest, context: Context
    ) -> channel_pb2.ListProposalsResponse:
        """Proposals for the channel's next revision."""
        access.caller().check_channel(request.channel)
        head = await store_call(self._channels.find, request.channel)
        found = await store_call(
            self._proposals.open, request.channel, head.revision + 1 if head else 1
        )
        return channel_pb2.ListProposalsResponse(
            proposals=[
                channel_pb2.Proposal(id=proposal_id, entry=_to_proto(entry))
                for proposal_id, entry in found
            ]
        )

    async def GetChannel(
        self, request: channel_pb2.GetChannelRequest, context: Context
    ) -> channel_pb2.GetChannelResponse:
        """The entry of the highest revision."""
        access.caller().check_channel(request.channel)
        entry = await store_call(self._channels.find, request.channel)
        if entry is None:
            raise _no_channel(request.channel)
        return channel_pb2.GetChannelResponse(entry=_to_proto(entry))

    async def History(
        self, request: channel_pb2.HistoryRequest, context: Context
    ) -> channel_pb2.HistoryResponse:
        """One page of the log."""
        access.caller().check_channel(request.channel)
        limit = page_size(request.page_size)
        # One more than a page tells whether there is a next one.
        entries = await store_call(self._history, request.channel, request.after, limit + 1)
        return channel_pb2.HistoryResponse(
            entries=[_to_proto(entry) for entry in entries[:limit]], more=len(entries) > limit
        )

    async def ListChannels(
        self, request: channel_pb2.ListChannelsRequest, context: Context
    ) -> channel_pb2.ListChannelsResponse:
        """One page of the names that the caller may see."""
        who = access.caller()
        limit = page_size(request.page_size)
        names = sorted(await store_call(self._channels.names))
        rest = [name for name in names if name > request.page_token and who.allows_channel(name)]
        return channel_pb2.ListChannelsResponse(
            channels=rest[:limit], next_page_token=rest[limit - 1] if len(rest) > limit else ""
        )

    async def _change(
        self,
        channel: str,
        head: ChannelEntry | None,
        state: State,
        action: Action,
        actor: str,
        reason: str,
    ) -> channel_pb2.PromoteResponse:
        await self._check(channel, head, state)
        rule = access.two_person(channel)
        revision = head.revision if head else 0
        change = state.change(actor=actor, reason=reason)
        if rule.two_person and not (
            action in rule.alone and await self._was_approved(channel, state)
        ):
            return await self._propose(channel, revision, state, action, change)
        entry = await store_call(
            self._channels.append, channel, expected_revision=revision, **change
        )
        self._changed(entry, "rollback" if action is Action.ROLLBACK else "promote")
        return channel_pb2.PromoteResponse(entry=_to_proto(entry))

    async def _propose(
        self, channel: str, revision: int, state: State, action: Action, change: Change
    ) -> channel_pb2.PromoteResponse:
        draft = await store_call(
            self._channels.draft, channel, expected_revision=revision, **change
        )
        waiting = await store_call(self._proposals.open, channel, draft.revision)
        own = [found for found in waiting if found[1].actor == draft.actor]
        off = action is Action.OFF
        same = [
            (proposal_id, entry)
            for proposal_id, entry in own
            if State.of(entry, restores=entry.restores) == state
            # Off has no limit, so one person has one of it, whatever reasons are given.
            and (off or entry.reason == draft.reason)
        ]
        if same:
            proposal_id, entry = same[0]
        elif len(own) >= _MAX_PROPOSALS and not off:
            raise Refused(
                f"channel {channel!r}: {len(own)} proposals of {draft.actor!r} for revision "
                f"{draft.revision} wait already; have one of them approved",
                kind="too_many_proposals",
            )
        else:
            proposal_id, entry = await store_call(self._proposals.add, draft)
            metrics.CHANGES.labels(_label(entry), "propose").inc()
            log.info("change proposed", extra=_extra(entry) | {"proposal": proposal_id})
        return channel_pb2.PromoteResponse(
            proposal=channel_pb2.Proposal(id=proposal_id, entry=_to_proto(entry))
        )

    async def _check(self, channel: str, head: ChannelEntry | None, state: State) -> None:
        """Refuse what nodes would refuse."""
        if state.artifact is None:
            return
        # Turning off must work even when the artifact itself has become unreadable, or is revoked.
        unchanged = head is not None and (state.artifact, state.strength) == (
            head.artifact,
            head.strength,
        )
        if unchanged and not state.enabled:
            return
        known = await self._artifacts.stored(state.artifact)
        access.caller().check_model(known.model_name, known.model_fingerprint)
        known.policy.check(state.strength)
        revocations = self._hub.revocations
        if revocations is not None:
            await revocations.ready()
            published = known.response()
            await asyncio.to_thread(
                revocations.check, state.artifact, published.manifest, published.signature
            )
            revocations.check_revision(channel, head.revision + 1 if head else 1)
            if state.restores is not None and revocations.has_floor(channel):
                # A new number makes no other state of what the floor forbids.
                origin = await store_call(self._origin, channel, state.restores)
                revocations.check_revision(channel, origin)

    async def _was_approved(self, channel: str, state: State) -> bool:
        """Whether two people have seen a state that one person is about to bring back: it may be
        older than the rule that asks for two. What steers nothing needs nobody.
        """
        if state.restores is None or state.artifact is None or not state.enabled:
            return True
        return await store_call(self._approved, channel, state.restores)

    def _approved(self, channel: str, revision: int | None) -> bool:
        while revision is not None:
            link = self._link(channel, revision)
            if link.approved:
                return True
            revision = link.restores
        return False

    def _origin(self, channel: str, revision: int) -> int:
        """The revision that first had the state that this one has."""
        while (restores := self._link(channel, revision).restores) is not None:
            revision = restores
        return revision

    def _read_link(self, channel: str, revision: int) -> _Link:
        entry = self._channels.entry(channel, revision)
        return _Link(entry.restores, entry.approver is not None)

    async def _head_at(self, channel: str, expected_revision: int) -> ChannelEntry | None:
        """The head, which must be the one that the caller looked at."""
        head = await store_call(self._channels.find, channel)
        revision = head.revision if head else 0
        if revision != expected_revision:
            raise Conflict(
                f"channel {channel!r} is at revision {revision}, expected {expected_revision}; "
                "look at what changed, then try again",
                kind="revision_taken",
            )
        return head

    def _actor(self, channel: str, given: str) -> str:
        who = access.caller()
        who.check_channel(channel)
        return access.actor(who, given)

    def _changed(self, entry: ChannelEntry, what: str) -> None:
        self._hub.offer(entry)
        metrics.CHANGES.labels(_label(entry), what).inc()
        log.info("channel changed", extra=_extra(entry) | {"what": what})

    def _history(self, channel: str, after: int, limit: int) -> list[ChannelEntry]:
        try:
            return self._channels.history(channel, after=after, limit=limit)
        except NotFound as error:
            raise _no_channel(channel) from error


def _check_reason(reason: str) -> None:
    if not reason.strip() or len(reason) > MAX_REASON_CHARS:
        raise InvalidInput(
            f"reason: expected 1 to {MAX_REASON_CHARS} characters, got {len(reason)}; every change "
            "says who made it and why",
            kind="promote_reason",
        )


def _no_channel(name: str) -> NotFound:
    return NotFound(f"no channel {name!r}; the first promote makes it", kind="no_channel")


def _label(entry: ChannelEntry) -> str:
    # A first proposal makes no channel yet.
    return metrics.CHANNEL(entry.channel) if entry.revision > 1 else metrics.OTHER


def _extra(entry: ChannelEntry) -> dict[str, object]:
    return {
        "channel": entry.channel,
        "revision": entry.revision,
        "artifact": entry.artifact,
        "strength": entry.strength,
        "enabled": entry.enabled,
        "share": entry.share,
        "actor": entry.actor,
        "approver": entry.approver,
        "restores": entry.restores,
    }


def _to_proto(entry: ChannelEntry) -> channel_pb2.ChannelEntry:
    time = Timestamp()
    time.FromJsonString(entry.time)
    return channel_pb2.ChannelEntry(
        channel=entry.channel,
        revision=entry.revision,
        artifact=entry.artifact or "",
        strength=entry.strength,
        enabled=entry.enabled,
        share=entry.share,
        actor=entry.actor,
        time=time,
        reason=entry.reason,
        previous=entry.previous or "",
        approver=entry.approver or "",
        restores=entry.restores or 0,
    )
