"""Inbox: the latest Assignment of a watch stream, between its listener and its worker."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from steering_service.core.errors import SteeringError, Unavailable
from steering_service.v1 import watch_pb2


@dataclass(frozen=True, slots=True)
class Event:
    """What came since the last `take`.

    Attributes:
        assignment: The latest, if one came; earlier ones were overwritten.
        head_revision: As last heard.
        interval_s: Seconds between heartbeats; 0.0 before the first one.
    """

    assignment: watch_pb2.Assignment | None
    head_revision: int
    interval_s: float


class Inbox:
    """Holds one Assignment: a later one replaces it. Safe to use from several threads."""

    __slots__ = (
        "_assignment",
        "_changed",
        "_closed",
        "_error",
        "_head_revision",
        "_heard",
        "_interval_s",
        "_opened_at",
    )

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._assignment: watch_pb2.Assignment | None = None
        self._head_revision = 0
        self._interval_s = 0.0
        self._heard = False
        self._closed = False
        self._error: SteeringError | None = None
        self._opened_at = time.monotonic()

    @property
    def pending(self) -> bool:
        """Whether an Assignment waits, or the stream is over: a reason to stop what one is at."""
        return self._assignment is not None or self._closed

    @property
    def age_s(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._opened_at

    def put(self, response: watch_pb2.WatchResponse) -> None:
        """Keep a message of the service."""
        with self._changed:
            if response.WhichOneof("message") == "assignment":
                self._assignment = response.assignment
                self._head_revision = response.assignment.revision
            elif response.WhichOneof("message") == "heartbeat":
                self._head_revision = response.heartbeat.head_revision
                self._interval_s = response.heartbeat.interval_ms / 1000
            self._heard = True
            self._changed.notify_all()

    def close(self, error: SteeringError | None) -> None:
        """The stream is over: `take` raises from now on."""
        with self._changed:
            self._closed = True
            self._error = self._error or error
            self._changed.notify_all()

    def take(self, timeout_s: float) -> Event:
        """Wait for the next message, and empty the inbox.

        Raises:
            SteeringError: The stream ended with this error.
            Unavailable: It ended without one, or nothing came within the time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._heard or self._closed, timeout_s):
                raise Unavailable(
                    f"nothing heard from the service for {timeout_s} s; the stream is taken for "
                    "dead",
                    kind="watch_silent",
                )
            if self._closed:
                raise self._error or Unavailable("the service ended the stream", kind="watch_ended")
            event = Event(self._assignment, self._head_revision, self._interval_s)
            self._assignment = None
            self._heard = False
            return event
