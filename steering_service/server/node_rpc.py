"""NodeService: who runs what, and how far a change has come."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from steering_service.server import access
from steering_service.server.board import NodeState
from steering_service.server.nodes import Nodes
from steering_service.server.paging import page_size
from steering_service.server.status import Context
from steering_service.server.store_calls import store_call
from steering_service.v1 import node_pb2, node_pb2_grpc, watch_pb2
from store.channels import ChannelEntry, ChannelLog


class NodeRpc(node_pb2_grpc.NodeServiceServicer):
    """The service over what the replicas know; for the calls see node.proto.

    Args:
        nodes: What is known.
        channels: The log, for the heads.
    """

    def __init__(self, nodes: Nodes, channels: ChannelLog) -> None:
        self._nodes = nodes
        self._channels = channels

    async def ListNodes(
        self, request: node_pb2.ListNodesRequest, context: Context
    ) -> node_pb2.ListNodesResponse:
        """One page of the nodes of a channel."""
        access.caller().check_channel(request.channel)
        limit = page_size(request.page_size)
        head = await store_call(self._channels.find, request.channel)
        states = await self._nodes.of_channel(request.channel)
        rest = [state for state in states if state.node_id > request.page_token]
        page = rest[:limit]
        return node_pb2.ListNodesResponse(
            nodes=[_to_proto(state, head) for state in page],
            next_page_token=page[-1].node_id if len(rest) > limit else "",
            convergence=convergence(head, states),
        )


def convergence(head: ChannelEntry | None, states: Sequence[NodeState]) -> node_pb2.Convergence:
    """How far a channel's head has come among its nodes.

    Args:
        head: None: the channel does not exist yet, and whoever runs nothing is where it is.
        states: All nodes of the channel, once each.
    """
    revision = head.revision if head else 0
    here = [state for state in states if state.connected]
    refusing = sum(_refuses(state, revision) for state in here)
    done = [
        state
        for state in here
        if state.active_revision == revision and not _refuses(state, revision)
    ]
    found = node_pb2.Convergence(
        head_revision=revision,
        connected=len(here),
        converged=len(done),
        refusing=refusing,
        pending=len(here) - len(done) - refusing,
        gone=len(states) - len(here),
    )
    if head is not None:
        found.head_time.FromJsonString(head.time)
        # Who only said at its start that it runs this has accepted it we do not know when.
        acks = [state.active_since for state in done if state.acked]
        if not found.pending and acks:
            started = datetime.fromisoformat(head.time).timestamp()
            found.seconds = max(0.0, max(acks) - started)
    return found


def _refuses(state: NodeState, revision: int) -> bool:
    """Whether a node refuses a revision; also one that it runs with another content, as it may
    after the bucket was restored from a copy.
    """
    return 0 < revision == state.nack_revision and (
        state.active_revision != revision or state.nack_time >= state.active_since
    )


def _to_proto(state: NodeState, head: ChannelEntry | None) -> node_pb2.NodeStatus:
    revision = head.revision if head else 0
    return node_pb2.NodeStatus(
        node_id=state.node_id,
        channel=state.channel,
        connected=state.connected,
        connected_since=_timestamp(state.since),
        active_revision=state.active_revision,
        identity=state.identity,
        active_since=_timestamp(state.active_since),
        nack_revision=state.nack_revision,
        nack_kind=state.nack_kind,
        nack_reason=state.nack_reason,
        nack_time=_timestamp(state.nack_time) if state.nack_revision else None,
        refuses_head=_refuses(state, revision),
        model_fingerprint=state.model_fingerprint,
        client=state.client,
        caller=state.caller,
        revocations_serial=state.revocations_serial,
        replica=state.replica,
        telemetry=(
            watch_pb2.Telemetry.FromString(base64.b64decode(state.telemetry))
            if state.telemetry
            else None
        ),
    )


def _timestamp(seconds: float) -> Timestamp:
    fraction, whole = math.modf(seconds)
    return Timestamp(seconds=int(whole), nanos=int(fraction * 1_000_000) * 1000)
