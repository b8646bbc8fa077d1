"""Objects as files under one directory, each appearing whole or not at all.

obstore's LocalStore creates atomically but does not fsync, and raises strings where the operating
system gives error numbers; a cache that survives power loss needs both, hence this file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from store.errors import Conflict, InvalidInput, NotFound, StoreError, Unavailable

if TYPE_CHECKING:
    from typing_extensions import Buffer

_LEFTOVER = ".tmp-"
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_WRONG_SORT = frozenset({errno.ENOTDIR, errno.EISDIR})
_WRITE_BYTES = 1 << 30  # Linux writes at most 2 GiB - 4 KiB a call
_MOST_PARTS = 1024  # that Linux fills a call


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One listed object: key relative to the listing Location, size in bytes, time of last change
    (UTC).
    """

    key: str
    size: int
    modified: datetime


def map_os_error(
    error: OSError, *, what: str, writing: bool, num_bytes: int | None = None
) -> StoreError:
    """The store's error for an operating-system error, with advice; `what` names the action and the
    object, `num_bytes` are those to be written.
    """
    text = f"{what}: {os.strerror(error.errno) if error.errno else error}"
    if error.errno in _NO_SPACE:
        needed = "" if num_bytes is None else f", {num_bytes:,} bytes are needed"
        message = (
            f"{text}{needed}; nothing that is recorded is lost: free space or inodes (or raise the "
            "quota), then run the same command again, which goes on where this one ended"
        )
        return Unavailable(message, kind="no_space")
    if error.errno in _DENIED:
        return InvalidInput(
            f"{text}; check owner and mode of the directory", kind="permission_denied"
        )
    if error.errno == errno.ENOENT or (error.errno in _WRONG_SORT and not writing):
        return NotFound(
            text, kind="no_object"
        )  # in a bucket, a folder is no object and an object no folder
    if error.errno in _WRONG_SORT:
        return InvalidInput(
            f"{text}; a file and a directory want the same name", kind="not_a_directory"
        )
    if error.errno == errno.ENAMETOOLONG:
        return InvalidInput(f"{text}; choose a shorter name", kind="key")
    return Unavailable(f"{text} (errno {error.errno}); check the disk, then retry", kind="io")


class LocalDirectory:
    """A backend of `Location`; keys are checked there and only joined here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put_new(self, key: str, parts: Sequence[Buffer]) -> None:
        path = self.folder / key
        with _mapped(f"creating {path}", writing=True, num_bytes=_size(parts)):
            if (
                path.exists()
            ):  # saves writing a shard just to learn that it is there; the link decides
                raise _exists(path)
            leftover = _write_leftover(path, parts)
            try:
                # A link fails if the name is taken; a rename would overwrite.
                os.link(leftover, path)
            except FileExistsError:
                raise _exists(path) from None
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                message = (
                    f"creating {path}: this file system has no hard links "
                    f"({os.strerror(error.errno)}); use a local disk, NFS or an object store URL"
                )
                raise Unavailable(message, kind="no_hard_links") from error
            finally:
                leftover.unlink(missing_ok=True)
            _sync_folder(path.parent)

    def replace(self, key: str, parts: Sequence[Buffer]) -> None:
        path = self.folder / key
        with _mapped(f"replacing {path}", writing=True, num_bytes=_size(parts)):
            leftover = _write_leftover(path, parts)
            try:
                leftover.replace(path)
            except BaseException:
                leftover.unlink(missing_ok=True)
                raise
            _sync_folder(path.parent)

    def get(self, key: str) -> bytes:
        path = self.folder / key
        with _mapped(f"reading {path}"):
            return path.read_bytes()

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        path = self.folder / key
        with _mapped(f"reading {path}"), path.open("rb", buffering=0) as file:
            return [_read_exactly(file.fileno(), start, length, path) for start, length in ranges]

    def read_into(self, key: str, start: int, parts: Sequence[memoryview]) -> None:
        path = self.folder / key
        with _mapped(f"reading {path}"), path.open("rb", buffering=0) as file:
            _fill(file.fileno(), start, parts, path)

    def prefetch(self, key: str, start: int, length: int) -> None:
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        path = self.folder / key
        with _mapped(f"reading {path}"), path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)

    def get_tail(self, key: str, length: int) -> bytes:
        path = self.folder / key
        with _mapped(f"reading {path}"), path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            length = min(length, size)
            return _read_exactly(file.fileno(), size - length, length, path)

    def info(self, key: str) -> ObjectInfo:
        path = self.folder / key
        with _mapped(f"looking up {path}"):
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            return _info(key, status)

    def list(self, prefix: str, after: str) -> Iterator[ObjectInfo]:
        yield from self._walk(prefix, after)

    def folders(self, prefix: str) -> Sequence[str]:
        path = self.folder / prefix
        with _mapped(f"listing {path}"):
            try:
                with os.scandir(path) as entries:
                    return sorted(
                        e.name for e in entries if e.is_dir() and not e.name.startswith(".")
                    )
            except FileNotFoundError:
                return []  # as in an object store, an empty folder and no folder are the same

    def delete(self, key: str) -> None:
        path = self.folder / key
        with _mapped(f"deleting {path}"):
            path.unlink()
            _sync_folder(path.parent)

    def leftovers(self, prefix: str) -> Iterator[ObjectInfo]:
        for folder, _, names in os.walk(self.folder / prefix):
            for name in names:
                if name.startswith(_LEFTOVER):
                    path = Path(folder, name)
                    with contextlib.suppress(FileNotFoundError):  # its writer was done
                        yield _info(path.relative_to(self.folder).as_posix(), path.stat())

    def remove_leftover(self, key: str) -> bool:
        path = self.folder / key
        if not path.name.startswith(_LEFTOVER):
            raise InvalidInput(f"removing {path}: it is no leftover of a writer", kind="key")
        with _mapped(f"deleting {path}"):
            try:
                path.unlink()
            except FileNotFoundError:  # another sweep was faster
                return False
        return True

    def _walk(self, prefix: str, after: str) -> Iterator[ObjectInfo]:
        path = self.folder / prefix
        with _mapped(f"listing {path}"):
            try:
                with os.scandir(path) as scan:
                    # A folder sorts as its name plus "/", which makes the walk's order the order of
                    # whole keys.
                    entries = sorted((e.name + "/" if e.is_dir() else e.name, e) for e in scan)
            except FileNotFoundError:
                return
        for name, entry in entries:
            if name.startswith("."):  # leftovers of killed writers; keys never begin with a dot
                continue
            key = f"{prefix}/{name}" if prefix else name
            if name.endswith("/"):
                if key > after or after.startswith(key):
                    yield from self._walk(key[:-1], after)
            elif key > after:
                with _mapped(f"listing {path}"):
                    try:
                        status = entry.stat()
                    except FileNotFoundError:
                        continue  # deleted since the scan
                yield _info(key, status)


def _info(key: str, status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))


def _exists(path: Path) -> Conflict:
    return Conflict(f"creating {path}: it exists already and is never overwritten", kind="exists")


def _size(parts: Sequence[Buffer]) -> int:
    return sum(memoryview(part).nbytes for part in parts)


@contextlib.contextmanager
def _mapped(what: str, *, writing: bool = False, num_bytes: int | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise map_os_error(error, what=what, writing=writing, num_bytes=num_bytes) from error


def _write_leftover(path: Path, parts: Sequence[Buffer]) -> Path:
    """Write and fsync a hidden file beside `path`; a writer killed here leaves only that, and lists
    skip it.
    """
    _make_folders(path.parent)
    leftover = path.parent / f"{_LEFTOVER}{os.getpid()}-{secrets.token_hex(8)}"
    try:
        with leftover.open("xb", buffering=0) as file:
            for part in parts:
                rest = memoryview(part).cast("B")
                while rest:
                    rest = rest[file.write(rest[:_WRITE_BYTES]) :]
            os.fsync(file.fileno())
    except BaseException:
        leftover.unlink(missing_ok=True)
        raise
    return leftover


def _make_folders(folder: Path) -> None:
    """Like mkdir -p, but a new directory's entry is on disk before anything is put into it."""
    if folder.is_dir():
        return
    _make_folders(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
        _sync_folder(folder.parent)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_exactly(descriptor: int, start: int, length: int, path: Path) -> bytes:
    data = os.pread(descriptor, length, start)
    if len(data) == length:
        return data
    pieces = [data]
    missing = length - len(data)
    while missing:  # a read stops at 2 GiB, at a signal, or at the end
        piece = os.pread(descriptor, missing, start + length - missing)
        if not piece:
            raise _out_of_range(descriptor, start, length, path)
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def _fill(descriptor: int, start: int, parts: Sequence[memoryview], path: Path) -> None:
    missing, first, position = list(parts), 0, start
    while first < len(missing):
        num_read = os.preadv(descriptor, missing[first : first + _MOST_PARTS], position)
        if not num_read:
            raise _out_of_range(descriptor, start, _size(parts), path)
        position += num_read
        # A read stops at 2 GiB, at a signal, or at the end.
        while first < len(missing) and num_read >= len(missing[first]):
            num_read -= len(missing[first])
            first += 1
        if num_read:
            missing[first] = missing[first][num_read:]


def _out_of_range(descriptor: int, start: int, length: int, path: Path) -> InvalidInput:
    size = os.fstat(descriptor).st_size
    message = f"reading {path}: bytes {start} to {start + length} wanted, it has {size}"
    return InvalidInput(message, kind="out_of_range")
