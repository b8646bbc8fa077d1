"""Inbox: the latest news of a watch stream, between its listener and its worker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from steering_service.core.errors import SteeringError, Unavailable
from steering_service.v1 import watch_pb2

# Until the service has told its interval.
FIRST_PATIENCE_S: Final = 10.0
_MISSED_HEARTBEATS: Final = 3
# Whatever interval the service tells.
_MAX_PATIENCE_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Event:
    """What came since the last `take`.

    Attributes:
        assignment: The latest, if one came; earlier ones were overwritten.
        revocations: The list of the highest serial, if one came.
        head_revision: As last heard.
        interval_s: Seconds between heartbeats; 0.0 before the first one.
    """

    assignment: watch_pb2.Assignment | None
    revocations: watch_pb2.Revocations | None
    head_revision: int
    interval_s: float


class Inbox:
    """Holds one Assignment and one revocation list. Safe to use from several threads.

    It also interrupts what its worker is at when there is something more urgent.

    Args:
        patience_s: For how long nothing may be heard, until a heartbeat tells its interval.
    """

    __slots__ = (
        "_assignment",
        "_cancel",
        "_changed",
        "_closed",
        "_error",
        "_head_revision",
        "_heard",
        "_heard_at",
        "_interval_s",
        "_opened_at",
        "_patience_s",
        "_revocations",
    )

    def __init__(self, patience_s: float = FIRST_PATIENCE_S) -> None:
        self._changed = threading.Condition()
        self._assignment: watch_pb2.Assignment | None = None
        self._revocations: watch_pb2.Revocations | None = None
        self._head_revision = 0
        self._interval_s = 0.0
        self._heard = False
        self._closed = False
        self._error: SteeringError | None = None
        self._cancel: Callable[[], object] | None = None
        self._opened_at = self._heard_at = time.monotonic()
        self._patience_s = patience_s

    @property
    def pending(self) -> bool:
        """Whether news wait, or the stream is over or dead: a reason to stop what one is at."""
        return (
            self._assignment is not None
            or self._revocations is not None
            or self._closed
            or self.patience_left_s <= 0
        )

    @property
    def patience_left_s(self) -> float:
        """Seconds until the stream is to be taken for dead, if nothing is heard."""
        return self._heard_at + self._patience_s - time.monotonic()

    @property
    def age_s(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._opened_at

    @contextmanager
    def cancelling(self, cancel: Callable[[], object]) -> Iterator[None]:
        """While the body runs, call this as soon as something is `pending`."""
        with self._changed:
            self._cancel = cancel
            if self.pending:
                cancel()
        try:
            yield
        finally:
            with self._changed:
                self._cancel = None

    def put(self, response: watch_pb2.WatchResponse) -> None:
        """Keep a message of the service."""
        with self._changed:
            match response.WhichOneof("message"):
                case "assignment":
                    self._assignment = response.assignment
                    self._head_revision = response.assignment.revision
                case "heartbeat":
                    self._head_revision = response.heartbeat.head_revision
                    self._interval_s = response.heartbeat.interval_ms / 1000
                    if self._interval_s:
                        patience_s = self._interval_s * _MISSED_HEARTBEATS
                        self._patience_s = min(patience_s, _MAX_PATIENCE_S)
                case "revocations":
                    if self._revocations is None or (
                        self._revocations.serial <= response.revocations.serial
                    ):
                        self._revocations = response.revocations
            self._heard = True
            self._heard_at = time.monotonic()
            self._wake()

    def close(self, error: SteeringError | None) -> None:
        """The stream is over: `take` raises from now on."""
        with self._changed:
            self._error = self._error or (None if self._closed else error)
            self._closed = True
            self._wake()

    def _wake(self) -> None:
        self._changed.notify_all()
        if self._cancel is not None and self.pending:
            self._cancel()

    def take(self, timeout_s: float) -> Event | None:
        """Wait for the next message, and empty the inbox.

        Returns:
            None: nothing came within the time.

        Raises:
            SteeringError: The stream ended with this error.
            Unavailable: It ended without one, or is to be taken for dead.
        """
        with self._changed:
            wait_s = min(timeout_s, self.patience_left_s)
            if not self._changed.wait_for(lambda: self._heard or self._closed, wait_s):
                if self.patience_left_s > 0:
                    return None
                raise Unavailable(
                    f"nothing heard from the service for {self._patience_s:g} s; the stream is "
                    "taken for dead",
                    kind="watch_silent",
                )
            if self._closed:
                raise self._error or Unavailable("the service ended the stream", kind="watch_ended")
            event = Event(
                self._assignment, self._revocations, self._head_revision, self._interval_s
            )
            self._assignment = self._revocations = None
            self._heard = False
            return event
