"""A place for objects: a URL, and the few operations that behave the same on a disk and in a
bucket.

The store's protocols use creation, never compare-and-swap, because create-if-absent is the one
conditional write that local disks, S3, GCS and Azure all do correctly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import obstore.store
from obstore import exceptions

from store.backend import Backend, check_key
from store.bucket import Bucket
from store.errors import Conflict, InvalidInput, NotFound
from store.local import LocalDirectory, ObjectInfo, map_os_error

if TYPE_CHECKING:
    from obstore.store import RetryConfig
    from typing_extensions import Buffer

__all__ = ["Location", "ObjectInfo"]

_REMOTE = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss", "https", "http")

_memory_stores: dict[str, obstore.store.MemoryStore] = {}
_memory_names = count(1)


class Location:
    """Objects under one URL. Immutable; safe to share between threads; pickles as its URL.

    Objects appear whole or not at all, and survive power loss once a put has returned. Keys are
    checked by `check_key` and relative to the URL.

    Usage:
        root = Location.open("s3://bucket/steerage")
        caches = root.child("caches")
        caches.put_new("a/b", b"bytes")
    """

    __slots__ = ("_backend", "_prefix", "_root")

    def __init__(self, backend: Backend, root: str, prefix: str = "") -> None:
        self._backend = backend
        self._root = root
        self._prefix = prefix

    @classmethod
    def open(cls, url: str | os.PathLike[str], *, patience_s: float | None = None) -> Location:
        """Open a path, or a file://, memory://, s3://, gs:// or az:// URL; a local directory is
        created.

        `memory://NAME` is shared by the whole process, `memory://` alone is a new one. Buckets take
        credentials and endpoints from the usual environment variables (`AWS_*`, `GOOGLE_*`,
        `AZURE_*`).

        Args:
            url: Where.
            patience_s: Seconds for which a bucket that does not answer is asked again; for services
                whose own callers wait. None: minutes, as suits work that nobody waits for. Kept by
                `child`, not by pickling.

        Raises:
            InvalidInput: unknown scheme, a path that is a file, or a directory that may not be
                made.
            Unavailable: the disk refused to make the directory.
        """
        text = os.fspath(url)
        # urlsplit would take "C:\..." for a scheme and treat "?" and "#" in paths as its own.
        scheme = text.partition("://")[0] if "://" in text else ""
        if scheme in ("", "file"):
            return cls._open_directory(text)
        if scheme == "memory":
            return cls._open_memory(text)
        if scheme not in _REMOTE:
            message = (
                f"cannot open {text!r}: expected a path or one of file, memory, s3, gs, az, got "
                f"{scheme!r}"
            )
            raise InvalidInput(message, kind="url")
        try:
            retry = _retry(patience_s) if patience_s is not None else None
            store = obstore.store.from_url(text, retry_config=retry)
            return cls(Bucket(store, text.rstrip("/")), text.rstrip("/"))
        except (exceptions.BaseError, ValueError) as error:
            message = (
                f"cannot open {text!r}: {str(error).partition(chr(10))[0]}; check the URL and the "
                "environment"
            )
            raise InvalidInput(message, kind="url") from error

    @classmethod
    def _open_directory(cls, text: str) -> Location:
        if text.startswith("file://"):
            parts = urlsplit(text)
            if (
                parts.netloc not in ("", "localhost")
                or not parts.path
                or parts.query
                or parts.fragment
            ):
                raise InvalidInput(
                    f"cannot open {text!r}: expected file:///absolute/path", kind="url"
                )
            text = unquote(parts.path)
        if not text or "\0" in text:
            raise InvalidInput(
                f"cannot open {text!r}: expected the path of a directory", kind="url"
            )
        folder = Path(text).absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            message = f"cannot open {folder}: a file is in the way; name a directory"
            raise InvalidInput(message, kind="not_a_directory") from error
        except OSError as error:
            raise map_os_error(error, what=f"creating directory {folder}", writing=True) from error
        return cls(LocalDirectory(folder), folder.as_uri())

    @classmethod
    def _open_memory(cls, text: str) -> Location:
        name, _, prefix = text.removeprefix("memory://").strip("/").partition("/")
        name = name or f"anonymous-{next(_memory_names)}"
        root = f"memory://{name}"
        backend = Bucket(_memory_stores.setdefault(name, obstore.store.MemoryStore()), root)
        return cls(backend, root, check_key(prefix) if prefix else "")

    @property
    def url(self) -> str:
        """The URL that opens this location again."""
        return f"{self._root}/{self._prefix}" if self._prefix else self._root

    def child(self, path: str) -> Location:
        """The location `path` further down; shares this one's connection, creates nothing."""
        return Location(self._backend, self._root, self._key(path))

    def put_new(self, key: str, data: Buffer | Sequence[Buffer]) -> None:
        """Create an object; of several writers, exactly one succeeds.

        Args:
            key: Its name.
            data: Its bytes, as one buffer or as several to be written one after the other.

        Raises:
            Conflict: kind "exists", the key is taken; nothing was changed. After a lost reply of a
                bucket, the object may be our own: compare, as `put_same` does.
            Unavailable: no space, or the medium failed; nothing is visible under the key (or all of
                it, where only making its directory entry durable failed).
        """
        self._backend.put_new(self._key(key), _parts(data))

    def put_same(self, key: str, data: Buffer | Sequence[Buffer]) -> bool:
        """Create an object, or find that it holds the same bytes already. True if it was created.

        Raises:
            Conflict: kind "differs", the key holds other bytes.
        """
        parts = _parts(data)
        try:
            self.put_new(key, parts)
        except Conflict:
            wanted = b"".join(parts)
            if (found := self.get(key)) == wanted:
                return False
            message = (
                f"creating {self.url}/{key}: it exists with other bytes ({len(found)} there, "
                f"{len(wanted)} given); "
                "it is never overwritten, so use a new name or give the same bytes"
            )
            raise Conflict(message, kind="differs") from None
        return True

    def replace(self, key: str, data: Buffer | Sequence[Buffer]) -> None:
        """Create or overwrite atomically. Only for objects that nobody may rely on yet."""
        self._backend.replace(self._key(key), _parts(data))

    def get(self, key: str) -> bytes:
        """A whole object.

        Raises:
            NotFound: no such object.
        """
        return self._backend.get(self._key(key))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly the bytes [start, start + length) of an object.

        Raises:
            NotFound: no such object.
            InvalidInput: kind "out_of_range", the object is shorter.
        """
        return self.get_ranges(key, [(start, length)])[0]

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Several (start, length) ranges at once; buckets fetch near ones together. Errors as for
        `get_range`.
        """
        if any(start < 0 or length < 0 for start, length in ranges):
            raise InvalidInput(
                f"reading {self.url}/{key}: negative range in {ranges}", kind="out_of_range"
            )
        wanted = [(start, length) for start, length in ranges if length]
        found = iter(self._backend.get_ranges(self._key(key), wanted) if wanted else ())
        return [next(found) if length else b"" for _, length in ranges]

    def read_into(self, key: str, start: int, parts: Sequence[Buffer]) -> None:
        """Fill memory with the bytes of an object from `start` on.

        Args:
            key: The object.
            start: Its first byte that is wanted.
            parts: Writable contiguous buffers, filled one after the other: from a disk without a
                copy. What they hold after an error is not defined.

        Raises:
            NotFound: no such object.
            InvalidInput: kind "out_of_range", the object is shorter.
        """
        views = [view for part in parts if (view := memoryview(part).cast("B"))]
        if start < 0:
            raise InvalidInput(
                f"reading {self.url}/{key}: negative start {start}", kind="out_of_range"
            )
        if views:
            self._backend.read_into(self._key(key), start, views)

    def prefetch(self, key: str, start: int, length: int) -> None:
        """Have a disk begin to read bytes [start, start + length) into the system's page cache, and
        do not wait for them. Buckets, and systems that cannot, do nothing; nor do bytes past the
        end matter.

        Raises:
            NotFound: no such object, on a disk.
        """
        self._backend.prefetch(self._key(key), start, length)

    def get_tail(self, key: str, length: int) -> bytes:
        """The last `length` bytes of an object, or all of it if it is shorter."""
        return self._backend.get_tail(self._key(key), length)

    def size(self, key: str) -> int:
        """Bytes in an object.

        Raises:
            NotFound: no such object.
        """
        return self._backend.info(self._key(key)).size

    def info(self, key: str) -> ObjectInfo:
        """Size and time of last change of an object. Buckets give whole seconds here, and may give
        parts of them in `list`.

        Raises:
            NotFound: no such object.
        """
        info = self._backend.info(self._key(key))
        return ObjectInfo(key, info.size, info.modified)

    def exists(self, key: str) -> bool:
        """Whether the object exists; a folder is not an object."""
        try:
            self.size(key)
        except NotFound:
            return False
        return True

    def list(self, prefix: str = "", *, after: str | None = None) -> Iterator[ObjectInfo]:
        """Objects in the folder `prefix`, at any depth, in key order; those of killed writers are
        hidden.

        Args:
            prefix: A folder as in a path: "a/b" holds "a/b/c" and not "a/bc". "" is this location
                itself.
            after: List only keys greater than this one (a key of this location, which need not
                exist).
        """
        skip = len(self._prefix) + 1 if self._prefix else 0
        start = self._key(after) if after else ""
        for info in self._backend.list(self._key(prefix) if prefix else self._prefix, start):
            yield ObjectInfo(info.key[skip:], info.size, info.modified)

    def folders(self, prefix: str = "") -> Sequence[str]:
        """Names of the folders directly under the folder `prefix`, sorted; one request, however
        full they are.
        """
        return self._backend.folders(self._key(prefix) if prefix else self._prefix)

    def delete(self, key: str) -> None:
        """Remove an object.

        Raises:
            NotFound: no such object.
        """
        self._backend.delete(self._key(key))

    def remove_leftovers(self, *, older_than_s: float) -> int:
        """Delete the hidden files of writers killed more than `older_than_s` seconds ago; how many
        there were.
        """
        limit = datetime.now(UTC) - timedelta(seconds=older_than_s)
        return sum(
            self.remove_leftover(info.key) for info in self.leftovers() if info.modified < limit
        )

    def leftovers(self) -> Iterator[ObjectInfo]:
        """The hidden files of killed writers, and of those at work now, in no order. A bucket shows
        no half-written objects; its lifecycle rules end uploads that were cut off.
        """
        skip = len(self._prefix) + 1 if self._prefix else 0
        for info in self._backend.leftovers(self._prefix):
            yield ObjectInfo(info.key[skip:], info.size, info.modified)

    def remove_leftover(self, key: str) -> bool:
        """Delete one that `leftovers` listed; False if it was gone already."""
        return self._backend.remove_leftover(f"{self._prefix}/{key}" if self._prefix else key)

    def local_path(self, key: str = "") -> Path | None:
        """Where an object (or, for "", this folder) lies on the local disk; None in a bucket."""
        full = self._key(key) if key else self._prefix
        return self._backend.folder / full if isinstance(self._backend, LocalDirectory) else None

    def obstore_and_prefix(self) -> tuple[obstore.store.ObjectStore, str] | None:
        """The obstore store and the prefix within it, for libraries that speak obstore; None on a
        local disk.
        """
        return (self._backend.store, self._prefix) if isinstance(self._backend, Bucket) else None

    def _key(self, key: str) -> str:
        check_key(key)
        return f"{self._prefix}/{key}" if self._prefix else key

    def __repr__(self) -> str:
        return f"Location({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Location) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.url, os.getpid())


def _reopen(url: str, process: int) -> Location:
    if url.startswith("memory://") and process != os.getpid():
        message = f"{url} lives in process {process} only; give workers a path or a bucket URL"
        raise InvalidInput(message, kind="memory_location")
    return Location.open(url)


def _retry(patience_s: float) -> RetryConfig:
    # Not the client's timeouts too: given in code, they would hide those of the environment.
    return {
        "retry_timeout": timedelta(seconds=patience_s),
        "backoff": {
            "init_backoff": timedelta(seconds=0.05),
            "max_backoff": timedelta(seconds=1.0),
            "base": 2,
        },
    }


def _parts(data: Buffer | Sequence[Buffer]) -> Sequence[Buffer]:
    return data if isinstance(data, list | tuple) else [data]  # type: ignore[list-item]
