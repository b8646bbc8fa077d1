"""Subscription: a node follows one channel, in the background; decoding never waits or fails.

Two threads besides gRPC's: one listens to the stream and keeps only the latest Assignment, one
verifies, fetches, swaps and reports. So "off" overtakes a download that is in progress.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

import grpc

from steering_service.client.active import Active, Deployment
from steering_service.client.channel import Assignment, check_channel
from steering_service.client.connection import Connection
from steering_service.client.fetch import ArtifactCache
from steering_service.client.inbox import Inbox
from steering_service.client.state import StateFile
from steering_service.core.address import loopback
from steering_service.core.artifact import Artifact
from steering_service.core.errors import InvalidInput, Refused, SteeringError, Unavailable
from steering_service.core.signing import TrustRoots
from steering_service.core.wire import check_node_id
from steering_service.v1 import watch_pb2

log = logging.getLogger(__name__)

BACKOFF_S: Final = 0.25
MAX_BACKOFF_S: Final = 10.0
# Until the service has told its interval.
_FIRST_HEARTBEAT_S: Final = 10.0
_MISSED_HEARTBEATS: Final = 3
# A stream that lived this long was a good one: the delay starts small again.
_GOOD_STREAM_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class SubscriptionStatus:
    """How the subscription is doing; for people and health checks, not for decisions.

    Attributes:
        connected: The stream is up: a heartbeat has come since it was opened.
        head_revision: The channel's revision as last heard; 0: unknown, or no such channel yet.
        last_error: The last failure as ``kind: message``; None after the next success.
        refused_revision: The last revision answered with a NACK; None after the next ACK.
    """

    connected: bool = False
    head_revision: int = 0
    last_error: str | None = None
    refused_revision: int | None = None


class Subscription:
    """Follows a channel while the context is open.

    ``active.current`` always answers: with the last good deployment from the disk right after
    entering, with what the service assigns as soon as it does, and with the last good one whenever
    the service is away or assigns what this node must refuse.

        with Subscription("127.0.0.1:8780", channel="prod", node_id="node-1", cache_dir="cache",
                          trust_roots=TrustRoots.from_paths(["keys"]),
                          model_fingerprint=model_fingerprint(folder)) as subscription:
            deployment = subscription.active.current

    Args:
        address: Loopback host:port of the service. It need not run yet.
        channel: It need not exist yet.
        node_id: Stable over restarts, distinct in the fleet; decides the rollout share.
        cache_dir: For artifacts and the last good state; nodes of one machine may share it.
        trust_roots: Keys whose signatures this node accepts.
        model_fingerprint: Of the model that will be steered (`core.fingerprint`). None skips the
            check, which only a tool that applies nothing should do.
        check: Called with each artifact that is verified and about to be used, also with one from
            the disk: a last look by whoever will apply it, such as whether the model has its
            sites. A SteeringError refuses the artifact (NACK, the last good deployment stays):
            Refused and InvalidInput until the next revision, others until they heal, as the node
            subscribes again after a delay. It runs in the subscription's thread (when restoring,
            in the one that enters the context), and "off" waits for it: it must be quick. None
            accepts all that is verified.

    Raises:
        InvalidInput: A name or the address is malformed.
        Refused: The address is not loopback.
    """

    def __init__(
        self,
        address: str,
        channel: str,
        node_id: str,
        cache_dir: str | os.PathLike[str],
        trust_roots: TrustRoots,
        model_fingerprint: str | None = None,
        *,
        check: Callable[[Artifact], None] | None = None,
    ) -> None:
        self.address = loopback(address)
        self.channel = check_channel(channel)
        self.node_id = check_node_id(node_id)
        self._cache = ArtifactCache(
            cache_dir, trust_roots=trust_roots, model_fingerprint=model_fingerprint
        )
        self._check = check
        self._model_checked = model_fingerprint is not None
        self._state = StateFile(Path(cache_dir) / "state" / node_id / f"{channel}.json")
        self.active = Active(Deployment.plain(channel, 0, enabled=False))
        self._assignment: Assignment | None = None
        self._status = SubscriptionStatus()
        self._stop = threading.Event()
        self._stream: tuple[Inbox, Connection] | None = None
        self._thread = threading.Thread(target=self._run, name=f"steerage-{channel}", daemon=True)

    @property
    def status(self) -> SubscriptionStatus:
        """A snapshot."""
        return self._status

    def __enter__(self) -> Self:
        if not self._model_checked:
            log.warning("model fingerprint not checked", extra=self._extra(0))
        self._restore()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop following. `active` keeps answering with what it has."""
        self._stop.set()
        if self._stream is not None:
            inbox, connection = self._stream
            inbox.close(None)
            connection.close()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)

    def _restore(self) -> None:
        """Start from the disk. Whatever is wrong there, the service will send again."""
        try:
            assignment = self._state.read()
            if assignment is None:
                return
            self._swap(assignment, self._deployment(assignment, self._cache.load))
            log.info("deployment restored", extra=self._extra(assignment.revision))
        except Exception as error:
            kind = error.kind if isinstance(error, SteeringError) else type(error).__name__
            log.warning(
                "deployment not restored",
                extra=self._extra(0) | {"kind": kind, "why": str(error)},
                exc_info=None if isinstance(error, SteeringError) else error,
            )

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            inbox = Inbox()
            before = self.active.current.revision
            try:
                self._follow(inbox)
            except Exception as error:
                if self._stop.is_set():
                    return
                kind = error.kind if isinstance(error, SteeringError) else type(error).__name__
                self._note(connected=False, last_error=f"{kind}: {error}")
                # The first failure of a series is worth a line, the rest is in the status.
                level = logging.WARNING if failures == 0 else logging.DEBUG
                log.log(
                    level,
                    "watch interrupted",
                    extra=self._extra(before) | {"kind": kind, "why": str(error)},
                    exc_info=None if isinstance(error, SteeringError) else error,
                )
            progress = self.active.current.revision != before or inbox.age_s > _GOOD_STREAM_S
            failures = 0 if progress else failures + 1
            # Full jitter: a fleet that lost its service comes back spread over the whole delay.
            longest_s = min(MAX_BACKOFF_S, BACKOFF_S * 2 ** min(failures, 10))
            self._stop.wait(random.uniform(0.0, longest_s))

    def _follow(self, inbox: Inbox) -> None:
        """One stream, from Subscribe to its end."""
        outbox: queue.SimpleQueue[watch_pb2.WatchRequest | None] = queue.SimpleQueue()
        outbox.put(
            watch_pb2.WatchRequest(
                subscribe=watch_pb2.Subscribe(
                    node_id=self.node_id,
                    channel=self.channel,
                    active_revision=self.active.current.revision,
                )
            )
        )
        with Connection(self.address) as connection:
            call = connection.watches.Watch(iter(outbox.get, None))
            listener = threading.Thread(
                target=_listen, args=(call, inbox, connection), name="steerage-listen", daemon=True
            )
            self._stream = inbox, connection
            listener.start()
            try:
                self._work(inbox, outbox, connection)
            finally:
                # Half-close and let the service read the last Report before the call is cancelled.
                outbox.put(None)
                if not self._stop.is_set():
                    listener.join(timeout=1.0)
                call.cancel()
                listener.join(timeout=1.0)
                self._note(connected=False)

    def _work(
        self,
        inbox: Inbox,
        outbox: queue.SimpleQueue[watch_pb2.WatchRequest | None],
        connection: Connection,
    ) -> None:
        patience_s = _FIRST_HEARTBEAT_S
        while not self._stop.is_set():
            event = inbox.take(patience_s)
            if event.interval_s:
                patience_s = event.interval_s * _MISSED_HEARTBEATS
                self._note(connected=True, head_revision=event.head_revision)
                if event.assignment is None and self._status.refused_revision is None:
                    self._note(last_error=None)
            if event.assignment is not None:
                self._take(event.assignment, inbox, outbox, connection)

    def _take(
        self,
        message: watch_pb2.Assignment,
        inbox: Inbox,
        outbox: queue.SimpleQueue[watch_pb2.WatchRequest | None],
        connection: Connection,
    ) -> None:
        """Verify, fetch, check, swap and ACK; or NACK and keep what is active."""

        def fetch(digest: str) -> Artifact:
            return self._cache.fetch(
                digest, connection, interrupted=lambda: inbox.pending or self._stop.is_set()
            )

        report = watch_pb2.Report(
            channel=message.channel, revision=message.revision, nonce=message.nonce
        )
        assignment = Assignment.from_proto(message)
        try:
            self._check_order(assignment)
            if assignment != self._assignment:
                self._swap(assignment, self._deployment(assignment, fetch))
                self._remember(assignment)
        except Exception as error:
            kind = error.kind if isinstance(error, SteeringError) else type(error).__name__
            if kind == "fetch_interrupted":
                return  # the Report on the later Assignment settles this one too
            report.status = watch_pb2.Report.STATUS_NACK
            report.kind, report.reason = kind, str(error)[:1000]
            report.active_revision = self.active.current.revision
            report.identity = self.active.current.identity
            outbox.put(watch_pb2.WatchRequest(report=report))
            self._note(refused_revision=message.revision, last_error=f"{kind}: {error}")
            if not isinstance(error, Refused | InvalidInput):
                raise  # it may heal: subscribe again after a delay, and be assigned it again
            log.warning(
                "assignment refused",
                extra=self._extra(message.revision) | {"kind": kind, "why": str(error)},
            )
            return
        report.status = watch_pb2.Report.STATUS_ACK
        report.active_revision = assignment.revision
        report.identity = self.active.current.identity
        outbox.put(watch_pb2.WatchRequest(report=report))
        self._note(refused_revision=None, last_error=None)
        log.info("assignment accepted", extra=self._extra(assignment.revision))

    def _check_order(self, assignment: Assignment) -> None:
        active = self.active.current.revision
        replayed = assignment.revision < active
        forked = (
            assignment.revision == active
            and self._assignment is not None
            and assignment != self._assignment
        )
        if assignment.channel != self.channel or replayed or forked:
            raise Refused(
                f"assigned channel {assignment.channel!r} revision {assignment.revision}, while "
                f"this node runs {self.channel!r} revision {active}; revisions only grow and never "
                "change. If the store was replaced on purpose, delete "
                f"{str(self._state.path)!r} and restart the node",
                kind="revision_order",
            )

    def _deployment(self, assignment: Assignment, get: Callable[[str], Artifact]) -> Deployment:
        """What an Assignment means for this node. Off comes first: it must work in any case."""
        revision = assignment.revision
        if not assignment.enabled:
            return Deployment.plain(self.channel, revision, enabled=False)
        assignment.check_strength()
        if not assignment.includes(self.node_id) or assignment.artifact is None:
            return Deployment.plain(self.channel, revision, enabled=True)
        artifact = get(assignment.artifact)
        artifact.manifest.policy.check(assignment.strength)
        if self._check is not None:
            self._check(artifact)
        return Deployment.steered(self.channel, revision, artifact, assignment.strength)

    def _swap(self, assignment: Assignment, deployment: Deployment) -> None:
        self._assignment = assignment
        self.active.swap(deployment)

    def _remember(self, assignment: Assignment) -> None:
        try:
            self._state.write(assignment)
        except Unavailable as error:
            # It runs all the same; only a restart without the service would start further back.
            log.warning("state not saved", extra=self._extra(assignment.revision) | {"why": error})

    def _note(self, **changes: Any) -> None:
        self._status = replace(self._status, **changes)

    def _extra(self, revision: int) -> dict[str, object]:
        return {"channel": self.channel, "node": self.node_id, "revision": revision}


def _listen(call: Iterable[watch_pb2.WatchResponse], inbox: Inbox, connection: Connection) -> None:
    try:
        for response in call:
            inbox.put(response)
    except grpc.RpcError as error:
        inbox.close(connection.error_of(error))
    else:
        inbox.close(None)
