"""Download: a payload from the service, hashed while it comes in, resumed where it broke off.

A payload stays in memory; to the disk goes only what a later attempt would have to ask for again:
what came before a break, and every 8 MiB of a large one.
"""

from __future__ import annotations

import _thread
import fcntl
import functools
import hashlib
import io
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol, Self, TypeAlias

import grpc

from steering_service.client.connection import Connection
from steering_service.client.frames import split
from steering_service.core.errors import Corrupt, SteeringError, Unavailable
from steering_service.v1 import artifact_pb2

log = logging.getLogger(__name__)

MAX_PAYLOAD_BYTES: Final = 1 << 30
DEADLINE_S: Final = 10.0
# A download slower than this is cut off; what arrived is kept, and the next attempt goes on there.
_MIN_BYTES_PER_S: Final = 256 << 10
_SAVE_BYTES: Final = 8 << 20
_LOOK_S: Final = 0.5
# What may come in before the manifest is verified.
_EARLY_BYTES: Final = 8 << 20


Part: TypeAlias = bytes | memoryview


class Interruption(Protocol):
    """Something that may become more urgent than a download."""

    @property
    def pending(self) -> bool:
        """Whether it has."""

    def cancelling(self, cancel: Callable[[], object]) -> AbstractContextManager[None]:
        """While the body runs, call `cancel` as soon as it is."""


class Never:
    """Nothing is more urgent."""

    pending = False

    def cancelling(self, cancel: Callable[[], object]) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()


class Partial:
    """A file with the first bytes of a payload. One process at a time reads and writes it.

    It only saves time, so a disk that refuses is logged and then left alone.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._num_saved = 0
        self._usable = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, limit: int) -> bytes:
        """What an earlier attempt has left; b"" if there is more than `limit` bytes."""
        try:
            if not self._path.exists() or not self._open():
                return b""
            assert self._file is not None
            left = self._file.read(limit + 1)
        except OSError as error:
            self._give_up(error)
            return b""
        return left if len(left) <= limit else b""

    def save(self, parts: Sequence[Part], *, num_known: int = 0) -> None:
        """Write those of the parts that are not written yet.

        Args:
            parts: All of the payload so far, and in later calls more of it.
            num_known: How many of them came from `read`.
        """
        try:
            if not self._usable or not (self._file or self._open()):
                return
            assert self._file is not None
            self._num_saved = max(self._num_saved, num_known)
            self._file.seek(sum(map(len, parts[: self._num_saved])))
            self._file.truncate()
            for part in parts[self._num_saved :]:
                self._file.write(part)
            self._file.flush()
            self._num_saved = len(parts)
        except OSError as error:
            self._give_up(error)

    def remove(self) -> None:
        """Delete the file."""
        self._num_saved = 0
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            self._give_up(error)

    def _open(self) -> bool:
        """Open and lock it; False when another process has it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            self._usable = False
            return False
        self._file = os.fdopen(descriptor, "r+b")
        return True

    def _give_up(self, error: OSError) -> None:
        self._usable = False
        log.warning("partial download not kept", extra={"path": str(self._path), "why": str(error)})


class Download:
    """A payload on its way. Most are small, and come in while the manifest that describes them is
    still waited for and verified.

    Args:
        digest: Of the artifact.
        connection: To the service.
        partial: What an earlier attempt has left, and where to leave what comes before a break.
    """

    def __init__(self, digest: str, connection: Connection, partial: Partial) -> None:
        self._begin = functools.partial(_Transfer, digest, connection, partial)
        self._partial = partial
        left = partial.read(MAX_PAYLOAD_BYTES)
        self._transfer = self._begin([left] if left else [], _EARLY_BYTES)

    def cancel(self) -> None:
        """End it, if it has not ended yet."""
        self._transfer.cancel()

    def receive(self, size: int, sha256: str, interruption: Interruption) -> tuple[bytes, str]:
        """Wait for all of it.

        Args:
            size: Of the payload in bytes, as the signed manifest says.
            sha256: Of the payload, as the signed manifest says.
            interruption: Stops it at once.

        Returns:
            The payload, and its sha256, which may be another one.

        Raises:
            Unavailable: The connection broke, or it was interrupted (``fetch_interrupted``).
            Corrupt: The service sent other parts than were asked for.
            SteeringError: What the service answered.
        """
        left = self._transfer.left
        if sum(map(len, left)) > size:
            self._again([], size)
        elif size - sum(map(len, left)) > _EARLY_BYTES:
            # More than its deadline was made for.
            self._again(left, size)
        payload, got = self._transfer.finish(size, interruption)
        if self._transfer.left and got != sha256:
            # The part from before may be what is wrong: once more, from the start.
            self._partial.remove()
            self._again([], size)
            payload, got = self._transfer.finish(size, interruption)
        return payload, got

    def _again(self, left: list[Part], size: int) -> None:
        self._transfer.cancel()
        self._transfer = self._begin(left, size)


class _Transfer:
    """One Download call, received in a thread of its own from the first moment on; `finish` hashes
    and joins beside it what has come.

    Until `finish` says what is expected, at most 8 MiB are received, and nothing is kept.
    """

    def __init__(
        self,
        digest: str,
        connection: Connection,
        partial: Partial,
        left: list[Part],
        deadline_bytes: int,
    ) -> None:
        self.left = left
        self.parts = list(left)
        self._digest = digest
        self._connection = connection
        self._partial = partial
        self._offset = sum(map(len, left))
        self._expected: tuple[int, Interruption] | None = None
        self._told = threading.Event()
        self._arrived: queue.SimpleQueue[Part | None] = queue.SimpleQueue()
        for part in left:
            self._arrived.put(part)
        self._error: BaseException | None = None
        self._call: Any = connection.download(
            artifact_pb2.DownloadRequest(digest=digest, offset=self._offset),
            timeout=DEADLINE_S + deadline_bytes / _MIN_BYTES_PER_S,
        )
        # Not a Thread, whose `start` waits for it: that takes as long as a small payload.
        _thread.start_new_thread(self._run, ())

    def cancel(self) -> None:
        """End the call, if it has not ended yet."""
        self._call.cancel()
        self._told.set()

    def finish(self, size: int, interruption: Interruption) -> tuple[bytes, str]:
        """Wait for the rest; returns all of it, and its sha256."""
        self._expected = size, interruption
        self._told.set()
        sha256 = hashlib.sha256()
        # Filled while the rest comes, and taken out without a copy, as joining would make one.
        joined = io.BytesIO(bytes(size))
        with interruption.cancelling(self._call.cancel):
            while True:
                try:
                    part = self._arrived.get(timeout=_LOOK_S)
                except queue.Empty:
                    # Nobody says when a stream has been silent for too long.
                    if interruption.pending:
                        self._call.cancel()
                    continue
                if part is None:
                    break
                sha256.update(part)
                joined.write(part)
        if self._error is not None:
            raise self._error
        return joined.getvalue(), sha256.hexdigest()

    def _run(self) -> None:
        try:
            with self._connection.fetching():
                self._receive()
        except BaseException as error:
            self._error = self._broken(error)
        finally:
            self._arrived.put(None)
        # The end of the stream, for the service to see that it was read.
        with suppress(grpc.RpcError, SteeringError):
            for _ in self._call:
                pass

    def _receive(self) -> None:
        saved = early = self._offset
        while self._expected is None or self._offset < self._expected[0]:
            frame = next(self._call, None)
            if frame is None:
                break
            self._take(frame)
            if self._offset - early > _EARLY_BYTES:
                self._told.wait()
            if self._expected is None:
                if self._told.is_set():
                    return  # cancelled
                continue
            size, interruption = self._expected
            if self._offset < size and interruption.pending:
                raise self._interrupted()
            if self._offset < size and self._offset - saved >= _SAVE_BYTES:
                self._save()
                saved = self._offset
        self._told.wait()
        if self._expected is not None:
            self._check_all(self._expected[0])

    def _take(self, frame: bytes) -> None:
        offset, chunk = split(frame)
        if offset != self._offset or not chunk:
            raise Corrupt(
                f"artifact {self._digest}: chunk of {len(chunk)} bytes at {offset}, "
                f"expected at {self._offset}",
                kind="download_chunk",
            )
        self.parts.append(chunk)
        self._arrived.put(chunk)
        self._offset += len(chunk)

    def _check_all(self, size: int) -> None:
        if self._offset > size:
            self.parts.clear()  # nothing of it is worth keeping
            raise Corrupt(
                f"artifact {self._digest}: {self._offset} bytes came, expected {size}",
                kind="download_chunk",
            )
        if self._offset < size:
            raise Unavailable(
                f"artifact {self._digest}: the download ended at {self._offset} of {size} bytes; "
                "it is resumed at the next attempt",
                kind="download_short",
            )

    def _broken(self, error: BaseException) -> BaseException:
        """Keep what came, if it is wanted; returns what to say."""
        self._call.cancel()
        self._told.wait()
        if self._expected is None:
            return error
        if self._offset <= self._expected[0] and len(self.parts) > len(self.left):
            self._save()
        # Cancelled in the middle of waiting, which looks like a broken connection.
        if isinstance(error, Unavailable) and self._expected[1].pending:
            return self._interrupted()
        return error

    def _save(self) -> None:
        self._partial.save(self.parts, num_known=len(self.left))

    def _interrupted(self) -> Unavailable:
        return Unavailable(
            f"artifact {self._digest}: fetch stopped after {self._offset} bytes",
            kind="fetch_interrupted",
        )
