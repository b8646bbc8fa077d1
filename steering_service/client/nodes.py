"""NodeStatus and Convergence: who runs what, as the service observed it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from steering_service.client.telemetry import Counters
from steering_service.v1 import node_pb2


@dataclass(frozen=True, slots=True)
class Nack:
    """A node's refusal of a revision.

    Attributes:
        kind: Stable code, such as ``signature_untrusted``.
        time: UTC.
    """

    revision: int
    kind: str
    reason: str
    time: datetime | None


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One node of a channel.

    Attributes:
        connected_since: Since when it is connected, or gone (UTC).
        active_revision: What it runs, as it last said; 0: nothing yet.
        identity: Of the deployment it runs; see `client.active.identity_of`.
        active_since: UTC; None before its first report.
        nack: Its last refusal; None: none. It stays after later ACKs.
        refuses_head: Whether the refusal is of the channel's present revision.
        model_fingerprint, client: As it told.
        caller: Whom the service knows it as; "" on loopback without policy.
        revocations_serial: Of the revocation list it has; 0: none.
        replica: Which one it watches through.
        telemetry: Its last counters, by (revision, identity).
    """

    node_id: str
    channel: str
    connected: bool
    connected_since: datetime | None
    active_revision: int
    identity: str
    active_since: datetime | None
    nack: Nack | None
    refuses_head: bool
    model_fingerprint: str
    client: str
    caller: str
    revocations_serial: int
    replica: str
    telemetry: Mapping[tuple[int, str], Counters]

    @classmethod
    def from_proto(cls, message: node_pb2.NodeStatus) -> NodeStatus:
        """Read the wire form."""
        nack = (
            Nack(
                message.nack_revision,
                message.nack_kind,
                message.nack_reason,
                _time(message.nack_time),
            )
            if message.nack_revision
            else None
        )
        return cls(
            node_id=message.node_id,
            channel=message.channel,
            connected=message.connected,
            connected_since=_time(message.connected_since),
            active_revision=message.active_revision,
            identity=message.identity,
            active_since=_time(message.active_since),
            nack=nack,
            refuses_head=message.refuses_head,
            model_fingerprint=message.model_fingerprint,
            client=message.client,
            caller=message.caller,
            revocations_serial=message.revocations_serial,
            replica=message.replica,
            telemetry={
                (item.revision, item.identity): Counters.from_proto(item)
                for item in message.telemetry.deployments
            },
        )


@dataclass(frozen=True, slots=True)
class Convergence:
    """How far a channel's present revision has come.

    Attributes:
        head_revision: 0: there is no such channel yet.
        head_time: When it was appended (UTC).
        connected: Nodes that are connected; the sum of the next three.
        converged, refusing, pending: Those that run the head, refuse it, have not answered yet.
        gone: Nodes that have gone within the last ten minutes.
        seconds: From the head's time to the last ACK of it; None as long as some are pending.
    """

    head_revision: int
    head_time: datetime | None
    connected: int
    converged: int
    refusing: int
    pending: int
    gone: int
    seconds: float | None

    @classmethod
    def from_proto(cls, message: node_pb2.Convergence) -> Convergence:
        """Read the wire form."""
        return cls(
            head_revision=message.head_revision,
            head_time=_time(message.head_time),
            connected=message.connected,
            converged=message.converged,
            refusing=message.refusing,
            pending=message.pending,
            gone=message.gone,
            seconds=None if message.pending else message.seconds,
        )


def _time(message: Timestamp) -> datetime | None:
    """UTC; None for a field that was not set."""
    return message.ToDatetime(UTC) if message.seconds or message.nanos else None
