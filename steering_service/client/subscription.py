"""Subscription: a node follows one channel, in the background; decoding never waits or fails.

Two threads besides gRPC's: one listens to the stream and keeps only the latest Assignment, one
verifies, fetches, swaps and reports. So "off" and a revocation overtake a download in progress.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Self

from steering_service.client.channel import Assignment, check_channel
from steering_service.client.connection import CLIENT_NAME, Connection
from steering_service.client.credentials import Credentials
from steering_service.client.fetch import ArtifactCache
from steering_service.client.inbox import Event, Inbox
from steering_service.client.node import Node
from steering_service.client.stream import WatchStream
from steering_service.client.telemetry import Telemetry
from steering_service.core.address import check_address
from steering_service.core.artifact import Artifact
from steering_service.core.errors import InvalidInput, Refused, SteeringError, Unavailable
from steering_service.core.signing import TrustRoots
from steering_service.core.wire import check_node_id
from steering_service.v1 import watch_pb2

log = logging.getLogger(__name__)

BACKOFF_S: Final = 0.25
MAX_BACKOFF_S: Final = 5.0
TELEMETRY_S: Final = 30.0
# A stream that lived this long was a good one: the delay starts small again.
_GOOD_STREAM_S: Final = 10.0
_CLOSE_S: Final = 5.0
_MAX_REASON_CHARS: Final = 1000
_MAX_TEXT_CHARS: Final = 200


@dataclass(frozen=True, slots=True)
class SubscriptionStatus:
    """How the subscription is doing; for people and health checks, not for decisions.

    Attributes:
        connected: The stream is up: a heartbeat has come since it was opened.
        head_revision: The channel's revision as last heard; 0: unknown, or no such channel yet.
        last_error: The last failure as ``kind: message``; None after the next success.
        refused_revision: The last revision answered with a NACK; None after the next ACK.
        revocations_serial: Of the revocation list that counts here; 0: none.
        disk_error: Why what runs now could not be kept on the disk, so that a restart without the
            service would begin with an older state; None when it was kept.
    """

    connected: bool = False
    head_revision: int = 0
    last_error: str | None = None
    refused_revision: int | None = None
    revocations_serial: int = 0
    disk_error: str | None = None


class Subscription:
    """Follows a channel while the context is open.

    ``active.current`` always answers: with the last good deployment from the disk right after
    entering, with what the service assigns as soon as it does, and with the last good one whenever
    the service is away or assigns what this node must refuse. What is revoked makes way for the
    plain model at once.

        with Subscription("127.0.0.1:8780", channel="prod", node_id="node-1", cache_dir="cache",
                          trust_roots=TrustRoots.from_paths(["keys"]),
                          model_fingerprint=model_fingerprint(folder)) as subscription:
            deployment = subscription.active.current

    Args:
        address: host:port of the service; without TLS on loopback. It need not run yet.
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
        credentials: See `Connection`. Their files are read at each attempt to connect, so they
            need not exist yet.
        telemetry_s: Seconds between two batches of counters.

    Attributes:
        active: What to run now.
        telemetry: Where whoever runs it counts.

    Raises:
        InvalidInput: A name or the address is malformed.
        Refused: The address is not loopback, without TLS.
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
        credentials: Credentials | None = None,
        telemetry_s: float = TELEMETRY_S,
    ) -> None:
        self._credentials = credentials or Credentials()
        self.address = check_address(address, secure=self._credentials.secure)
        self.channel = check_channel(channel)
        self.node_id = check_node_id(node_id)
        self._cache = ArtifactCache(
            cache_dir, trust_roots=trust_roots, model_fingerprint=model_fingerprint
        )
        self._node = Node(channel, node_id, self._cache, check)
        self.active = self._node.active
        self.telemetry = Telemetry()
        self._model_fingerprint = model_fingerprint
        self._telemetry_s = telemetry_s
        self._status = SubscriptionStatus()
        self._stop = threading.Event()
        self._inbox: Inbox | None = None
        self._thread = threading.Thread(target=self._run, name=f"steerage-{channel}", daemon=True)

    @property
    def status(self) -> SubscriptionStatus:
        """A snapshot."""
        return self._status

    def __enter__(self) -> Self:
        if self._model_fingerprint is None:
            log.warning("model fingerprint not checked", extra=self._extra(0))
        self._node.claim()
        self._node.restore()
        self._note(revocations_serial=self._node.revocations.serial)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop following. `active` keeps answering with what it has."""
        self._stop.set()
        if self._inbox is not None:
            self._inbox.close(None)  # which also ends a download
        if self._thread.is_alive():
            self._thread.join(timeout=_CLOSE_S)
        self._node.release()

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
        subscribe = watch_pb2.Subscribe(
            node_id=self.node_id,
            channel=self.channel,
            active_revision=self._node.reported_revision,
            revocations_serial=self._node.revocations.serial,
            model_fingerprint=(self._model_fingerprint or "")[:_MAX_TEXT_CHARS],
            client=CLIENT_NAME,
        )
        self._inbox = inbox
        with (
            Connection(self.address, self._credentials) as connection,
            WatchStream(connection, subscribe, inbox) as stream,
        ):
            try:
                self._work(inbox, stream, connection)
            finally:
                self._send_counters(stream)
                self._note(connected=False)

    def _work(self, inbox: Inbox, stream: WatchStream, connection: Connection) -> None:
        count_at = time.monotonic() + self._telemetry_s
        interrupted: watch_pb2.Assignment | None = None
        while not self._stop.is_set():
            wait_s = count_at - time.monotonic() if interrupted is None else 0.0
            event = inbox.take(wait_s)
            if time.monotonic() >= count_at:
                self._send_counters(stream)
                if self._status.disk_error is not None:
                    self._keep()
                count_at = time.monotonic() + self._telemetry_s
            message = interrupted
            if event is not None:
                self._hear(event)
                if event.revocations is not None and self._take_revocations(event.revocations):
                    # Subscribed again, it is assigned the same revision, and can refuse it, or
                    # take what it refused.
                    return
                message = event.assignment or interrupted
            if message is not None:
                taken = self._take(message, inbox, stream, connection)
                interrupted = None if taken else message

    def _hear(self, event: Event) -> None:
        if event.interval_s:
            self._note(connected=True, head_revision=event.head_revision)
            if event.assignment is None and self._status.refused_revision is None:
                self._note(last_error=None)

    def _take_revocations(self, message: watch_pb2.Revocations) -> bool:
        """Take a list that goes forward; what runs and is revoked stops at once.

        Returns:
            Whether to subscribe again: something stopped, or what was refused may pass now.

        Raises:
            Unavailable: The disk would not tell what it has to go forward from. Nothing is steered
                then, and subscribed again, it is sent once more.
        """
        revocations = self._node.revocations
        revision = self.active.current.revision
        extra = self._extra(revision) | {"serial": message.serial}
        try:
            if not revocations.offer(message.envelope):
                return False
        except (Refused, InvalidInput) as error:
            log.warning(
                "revocations refused", extra=extra | {"kind": error.kind, "why": str(error)}
            )
            return False
        refusal = self._node.obey()
        log.info("revocations accepted", extra=extra)
        self._note(revocations_serial=revocations.serial)
        try:
            self._keep()
        except Refused as error:
            refusal = error
        if refusal is not None:
            log.warning(
                "deployment revoked", extra=extra | {"kind": refusal.kind, "why": str(refusal)}
            )
            self._note(refused_revision=revision, last_error=f"{refusal.kind}: {refusal}")
        # A refusal for want of a list that can be believed is over, and only the service knows
        # what was assigned.
        return self._status.refused_revision is not None

    def _take(
        self,
        message: watch_pb2.Assignment,
        inbox: Inbox,
        stream: WatchStream,
        connection: Connection,
    ) -> bool:
        """Verify, fetch, check, swap and ACK; or NACK and keep what is active.

        Returns:
            False: something more urgent came; take it once more after that.
        """
        try:
            self._node.apply(
                Assignment.from_proto(message),
                lambda digest: self._cache.get(digest, connection, inbox),
            )
            # After the swap, which must not wait for a disk; before the ACK, which may.
            self._keep()
        except Exception as error:
            kind = error.kind if isinstance(error, SteeringError) else type(error).__name__
            if kind == "fetch_interrupted":
                return False
            report = self._report(message, watch_pb2.Report.STATUS_NACK)
            report.kind, report.reason = kind, str(error)[:_MAX_REASON_CHARS]
            stream.report(report)
            self._note(refused_revision=message.revision, last_error=f"{kind}: {error}")
            if not isinstance(error, Refused | InvalidInput):
                raise  # it may heal: subscribe again after a delay, and be assigned it again
            log.warning(
                "assignment refused",
                extra=self._extra(message.revision) | {"kind": kind, "why": str(error)},
            )
            return True
        stream.report(self._report(message, watch_pb2.Report.STATUS_ACK))
        self._note(refused_revision=None, last_error=None)
        log.info("assignment accepted", extra=self._extra(message.revision))
        return True

    def _report(
        self, message: watch_pb2.Assignment, status: watch_pb2.Report.Status.ValueType
    ) -> watch_pb2.Report:
        return watch_pb2.Report(
            channel=message.channel,
            revision=message.revision,
            nonce=message.nonce,
            status=status,
            active_revision=self._node.reported_revision,
            identity=self.active.current.identity,
        )

    def _keep(self) -> None:
        """Keep what is new on the disk, or note that it cannot be. Refused: see `Node.keep`."""
        try:
            if self._node.keep():
                self._note(disk_error=None)
        except Unavailable as error:
            # It counts all the same; only a restart without the service would start further back.
            # Tried again with every batch of counters, of which one line is enough.
            log.log(
                logging.WARNING if self._status.disk_error is None else logging.DEBUG,
                "state not saved",
                extra=self._extra(self.active.current.revision) | {"why": str(error)},
            )
            self._note(disk_error=str(error))
        finally:
            self._note(revocations_serial=self._node.revocations.serial)

    def _send_counters(self, stream: WatchStream) -> None:
        if self._status.connected and (batch := self.telemetry.take()) is not None:
            stream.telemetry(batch)

    def _note(self, **changes: Any) -> None:
        self._status = replace(self._status, **changes)

    def _extra(self, revision: int) -> dict[str, object]:
        return {"channel": self.channel, "node": self.node_id, "revision": revision}
