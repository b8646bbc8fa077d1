"""Disk: files that are replaced as a whole, and locks between the processes of a node."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

# Who holds a lock writes one small file; whoever takes longer is stopped, or its disk hangs.
_PATIENCE_S: Final = 1.0
_LOOK_S: Final = 0.01


def replace_file(path: Path, data: bytes) -> None:
    """Write a file: after a crash or a power failure it has either the old content or the new.

    Args:
        path: Its folder is made when missing.
        data: The whole content.

    Raises:
        OSError: The disk refused; the old file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names that were made or replaced in a folder last.

    Raises:
        OSError: The disk refused.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(path: Path) -> int | None:
    """Lock a file until the descriptor is closed, or the process ends; it stays, empty.

    Args:
        path: Its folder is made when missing.

    Returns:
        The descriptor; None when another holds the lock.

    Raises:
        OSError: The disk refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes while the body runs; for moments, since others wait.

    Args:
        path: As in `try_lock`.

    Raises:
        OSError: The disk refused.
        TimeoutError: Another process held it for a second: it may be stopped, and must not stop
            this one. An OSError too.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while (descriptor := try_lock(path)) is None:
        if time.monotonic() >= deadline:
            raise TimeoutError(
                f"another process has held the lock {str(path)!r} for {_PATIENCE_S:g} s; look "
                "whether it is stopped or its disk hangs"
            )
        time.sleep(_LOOK_S)
    try:
        yield
    finally:
        os.close(descriptor)
