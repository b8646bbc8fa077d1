"""Nodes: who runs what. What this replica sees of the nodes that watch through it, and what the
others have laid down in the store about theirs.

Observations, not state: nothing here decides anything, and losing it costs a view. One event loop
owns `Nodes`; only the store is touched from threads.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import re
import socket
import sys
import time
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from steering_service.core.errors import SteeringError
from steering_service.server.board import (
    MAX_NODES,
    Board,
    NodeState,
    dump_board,
    load_sound,
    plain,
)
from steering_service.server.store_calls import store_call
from steering_service.v1 import watch_pb2
from store.errors import StoreError

if TYPE_CHECKING:
    from store.replicas import ReplicaBoard

log = logging.getLogger(__name__)

GONE_S: Final = 600.0
"""How long nodes that have gone are remembered."""
BOARD_S: Final = 3.0
"""Seconds between two looks whether there is something to lay down."""

# A board that did not change is written again after this long, to say that its replica lives.
_REFRESH_S: Final = 30.0
# Of a replica that has not done so for this long, no node is connected any more.
_SILENT_S: Final = 100.0
# The other replicas' boards are read again after this long.
_REREAD_S: Final = 2.0
_MAX_GONE: Final = MAX_NODES // 2
_MAX_REASON_CHARS: Final = 1000
_MAX_SHORT_CHARS: Final = 200

_Key = tuple[str, str]


class NodeStream:
    """One Watch stream of a node, as `Nodes` knows it. A later stream of the same node takes over,
    and this one's words do not count from then on.
    """

    __slots__ = ("_nodes", "_state")

    def __init__(self, nodes: Nodes, state: NodeState) -> None:
        self._nodes = nodes
        self._state = state

    def accepted(self, report: watch_pb2.Report) -> None:
        """It said ACK."""
        self._runs(report)
        self._nodes.changed = True

    def refused(self, report: watch_pb2.Report, revision: int, kind: str, reason: str) -> None:
        """It said NACK to `revision`; `kind` and `reason` as `board.plain` made them."""
        state = self._state
        self._runs(report)
        # Not before `active_since`: what a node runs and yet refuses is told by these two.
        state.nack_revision, state.nack_time = revision, time.time()
        state.nack_kind, state.nack_reason = kind, reason
        self._nodes.changed = True

    def informed(self, serial: int) -> None:
        """It was sent a revocation list."""
        self._state.revocations_serial = serial
        self._nodes.changed = True

    def counted(self, telemetry: watch_pb2.Telemetry) -> None:
        """It sent its counters, which were found to be sound."""
        self._state.telemetry = base64.b64encode(telemetry.SerializeToString()).decode()
        self._nodes.changed = True

    def ended(self) -> None:
        """The stream is over."""
        self._nodes._gone(self._state)

    def _runs(self, report: watch_pb2.Report) -> None:
        state = self._state
        if not state.acked or report.active_revision != state.active_revision:
            state.active_revision, state.active_since = report.active_revision, time.time()
        state.identity = _shared(report.identity)
        state.acked = True


class Nodes:
    """The nodes of this replica, and of the others.

    Args:
        board: Where replicas lay down what they know.
        replica: This one's name; by default the host's, and something to tell two on it apart.
        board_s: Seconds between two looks whether there is something to lay down.
    """

    def __init__(
        self, board: ReplicaBoard, *, replica: str | None = None, board_s: float = BOARD_S
    ) -> None:
        self.replica = replica or _replica_name()
        self.changed = False
        self._board = board
        self._board_s = board_s
        self._states: dict[_Key, NodeState] = {}
        self._left: dict[_Key, NodeState] = {}  # those of the states that have gone, in that order
        self._others: list[NodeState] = []
        self._read_at = -_REREAD_S
        self._reading = asyncio.Lock()
        self._written_at = 0.0
        self._failing: dict[str, str] = {}
        self._views: dict[str, tuple[float, list[NodeState]]] = {}  # until when, by channel

    def connect(self, subscribe: watch_pb2.Subscribe, caller: str) -> NodeStream:
        """A node has begun to watch. Texts are taken as they come, and cut off.

        Args:
            subscribe: Its node id and channel are good.
            caller: Who the service knows it as.
        """
        key = sys.intern(subscribe.channel), subscribe.node_id
        now = time.time()
        before = self._left.pop(key, None) or self._states.get(key)
        state = NodeState(
            node_id=key[1],
            channel=key[0],
            replica=self.replica,
            connected=True,
            since=now,
            active_revision=subscribe.active_revision,
            active_since=now,
            model_fingerprint=_shared(subscribe.model_fingerprint),
            client=_shared(subscribe.client),
            caller=caller,
            revocations_serial=subscribe.revocations_serial,
        )
        if before is not None:
            state.nack_revision, state.nack_time = before.nack_revision, before.nack_time
            state.nack_kind, state.nack_reason = before.nack_kind, before.nack_reason
            state.telemetry = before.telemetry
            if before.active_revision == state.active_revision:
                state.active_since, state.acked = before.active_since, before.acked
                state.identity = before.identity
        self._states[key] = state
        self.changed = True
        return NodeStream(self, state)

    async def of_channel(self, channel: str) -> list[NodeState]:
        """All nodes of a channel, of all replicas, by their ids. Do not change them.

        Who asks for page after page of many nodes gets the same list for a moment.
        """
        await self._read_others()
        began = time.monotonic()
        expires, found = self._views.get(channel, (0.0, []))
        if began >= expires:
            found = self._view(channel)
            ended = time.monotonic()
            self._views = {c: view for c, view in self._views.items() if view[0] > ended}
            # However many ask, and however many nodes there are: a tenth of the time at most.
            self._views[channel] = ended + 10 * (ended - began), found
        return found

    def _view(self, channel: str) -> list[NodeState]:
        self._forget()
        found: dict[str, NodeState] = {}
        for state in (*self._states.values(), *self._others):
            if state.channel == channel:
                other = found.get(state.node_id)
                found[state.node_id] = state if other is None else _merged(state, other)
        return [found[node_id] for node_id in sorted(found)]

    async def run(self) -> None:
        """Lay down what is known whenever it has changed, until cancelled."""
        while True:
            await asyncio.sleep(self._board_s)
            self._forget()
            stale = self._states and time.time() - self._written_at > _REFRESH_S
            if self.changed or stale:
                await self._write()

    async def close(self) -> None:
        """Lay down that all nodes have gone, for the replicas that stay."""
        for state in list(self._states.values()):
            if state.connected:
                self._gone(state)
        if self.changed:
            await self._write()

    async def _write(self) -> None:
        self.changed = False
        states = list(self._states.values())
        # The gone ones are worth least, then those that came first.
        states = sorted(states, key=lambda state: (state.connected, state.since))[-MAX_NODES:]
        board = Board(replica=self.replica, time=time.time(), nodes=states)
        try:
            await store_call(lambda: self._board.write(self.replica, dump_board(board)))
        except (StoreError, SteeringError) as error:
            self.changed = True  # to be tried again
            self._note("write", error)
            return
        self._written_at = board.time
        self._recovered("write")

    async def _read_others(self) -> None:
        async with self._reading:
            if time.monotonic() - self._read_at < min(_REREAD_S, self._board_s):
                return
            try:
                boards = await store_call(
                    self._board.others, self.replica, newer_than_s=GONE_S + _SILENT_S
                )
                states, broken = await store_call(_load_all, boards)
            except (StoreError, SteeringError) as error:
                # What was read last says when that was: its nodes get old, and then go.
                self._note("read", error)
                return
            self._recovered("read")
            for name, why in broken.items():
                self._note(f"board {name}", why)
            self._others = states
            self._read_at = time.monotonic()

    def _gone(self, state: NodeState) -> None:
        key = state.channel, state.node_id
        if self._states.get(key) is not state:
            return  # a later stream has taken over
        state.connected, state.since = False, time.time()
        self._left[key] = state
        self.changed = True
        if len(self._left) > _MAX_GONE:
            self._drop(next(iter(self._left)))

    def _forget(self) -> None:
        """Drop nodes that have been gone for long enough."""
        horizon = time.time() - GONE_S
        while self._left:
            key = next(iter(self._left))
            if self._left[key].since > horizon:
                break
            self._drop(key)
        self._others = [s for s in self._others if s.connected or s.since > horizon]

    def _drop(self, key: _Key) -> None:
        del self._left[key]
        del self._states[key]
        self.changed = True

    def _note(self, what: str, error: StoreError | SteeringError) -> None:
        # Once for each reason: this goes on every few seconds.
        if self._failing.get(what) != error.kind:
            log.warning("board failed", extra={"what": what, "kind": error.kind, "why": str(error)})
        if len(self._failing) < 1000:
            self._failing[what] = error.kind

    def _recovered(self, what: str) -> None:
        if self._failing.pop(what, None) is not None:
            log.info("board recovered", extra={"what": what})


def _load_all(
    boards: dict[str, bytes],
) -> tuple[list[NodeState], dict[str, SteeringError]]:
    """The nodes on all boards, as they are now; and the boards that cannot be read, or not all."""
    states: list[NodeState] = []
    broken: dict[str, SteeringError] = {}
    now = time.time()
    for name, data in boards.items():
        try:
            board, wrong = load_sound(data)
        except SteeringError as error:
            broken[name] = error
            continue
        if wrong is not None:
            broken[name] = wrong
        if board.time < now - _SILENT_S:  # its replica is no more
            for state in board.nodes:
                if state.connected:
                    state.connected, state.since = False, board.time
        states += board.nodes
    return states, broken


def _shared(text: str) -> str:
    """A text from outside that a whole fleet says alike: cut off, and kept in memory once."""
    return sys.intern(plain(text, _MAX_SHORT_CHARS))


def _merged(one: NodeState, other: NodeState) -> NodeState:
    """One node that two replicas know: as the one says that has it now, or had it last."""
    first, second = sorted((one, other), key=lambda state: (state.connected, state.since))[::-1]
    first = replace(first)
    if second.nack_time > first.nack_time:
        first.nack_revision, first.nack_time = second.nack_revision, second.nack_time
        first.nack_kind, first.nack_reason = second.nack_kind, second.nack_reason
    same = second.active_revision == first.active_revision
    if same and second.acked and (not first.acked or second.active_since < first.active_since):
        first.active_since, first.acked = second.active_since, True
        first.identity = first.identity or second.identity
    first.telemetry = first.telemetry or second.telemetry
    return first


def _replica_name() -> str:
    host = re.sub(r"[^A-Za-z0-9-]+", "-", socket.gethostname())[:40].strip("-") or "replica"
    return f"{host}-{uuid.uuid4().hex[:8]}"
