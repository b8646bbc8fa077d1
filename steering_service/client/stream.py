"""WatchStream: one Watch call, from Subscribe to its end, with the thread that listens to it."""

from __future__ import annotations

import queue
import threading
from types import TracebackType
from typing import Any, Final, Self

import grpc

from steering_service.client.connection import Connection
from steering_service.client.inbox import Inbox
from steering_service.core.errors import SteeringError
from steering_service.v1 import watch_pb2

# For the service to read what was sent last, before the call is cancelled.
_FAREWELL_S: Final = 1.0


class WatchStream:
    """Open while its context is.

    Args:
        connection: To the service.
        subscribe: The first message.
        inbox: Where what the service says goes.
    """

    def __init__(
        self, connection: Connection, subscribe: watch_pb2.Subscribe, inbox: Inbox
    ) -> None:
        self._connection = connection
        self._inbox = inbox
        self._outbox: queue.SimpleQueue[watch_pb2.WatchRequest | None] = queue.SimpleQueue()
        self._outbox.put(watch_pb2.WatchRequest(subscribe=subscribe))
        self._heard = False
        self._call: Any = None
        self._listener = threading.Thread(target=self._listen, name="steerage-listen", daemon=True)

    def __enter__(self) -> Self:
        self._call = self._connection.watches.Watch(iter(self._outbox.get, None))
        self._listener.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._outbox.put(None)
        if self._heard:
            # Half-closed now: a service that is there ends the stream when it has read all.
            self._listener.join(timeout=_FAREWELL_S)
        self._call.cancel()
        self._listener.join(timeout=_FAREWELL_S)

    def report(self, report: watch_pb2.Report) -> None:
        """Send a Report."""
        self._outbox.put(watch_pb2.WatchRequest(report=report))

    def telemetry(self, telemetry: watch_pb2.Telemetry) -> None:
        """Send counters."""
        self._outbox.put(watch_pb2.WatchRequest(telemetry=telemetry))

    def _listen(self) -> None:
        try:
            for response in self._call:
                self._heard = True
                self._inbox.put(response)
        except grpc.RpcError as error:
            self._inbox.close(self._connection.error_of(error))
        except SteeringError as error:
            # From before the call, such as a token that cannot be read.
            self._inbox.close(error)
        finally:
            self._inbox.close(None)
