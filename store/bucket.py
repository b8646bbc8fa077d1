"""Objects in a bucket (S3, GCS, Azure) or in memory, through obstore."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import obstore
import obstore.store
from obstore import exceptions

from store.errors import Conflict, InvalidInput, NotFound, StoreError, Unavailable
from store.local import ObjectInfo

if TYPE_CHECKING:
    from typing_extensions import Buffer

_DENIED = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
_TAKEN = (exceptions.AlreadyExistsError, exceptions.PreconditionError)


class Bucket:
    """A backend of `Location`; keys are checked there.

    Args:
        store: An obstore store. Its own prefix, if any, is part of the root.
        url: What to call it in messages.
    """

    def __init__(self, store: Any, url: str) -> None:
        self.store = store
        self.url = url

    def put_new(self, key: str, parts: Sequence[Buffer]) -> None:
        with self._mapped("creating", key):
            obstore.put(self.store, key, self._body(parts), mode="create")

    def replace(self, key: str, parts: Sequence[Buffer]) -> None:
        with self._mapped("replacing", key):
            obstore.put(self.store, key, self._body(parts), mode="overwrite")

    def get(self, key: str) -> bytes:
        with self._mapped("reading", key):
            return obstore.get(self.store, key).bytes().to_bytes()

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        starts = [start for start, _ in ranges]
        lengths = [length for _, length in ranges]
        with self._mapped("reading", key):
            try:
                found = obstore.get_ranges(self.store, key, starts=starts, lengths=lengths)
            except exceptions.BaseError as error:
                # Backends word "past the end" differently, so the size decides what the error was.
                if (size := self.info(key).size) >= max(map(sum, ranges)):
                    raise
                raise self._out_of_range(key, ranges, size) from error
        data = [piece.to_bytes() for piece in found]
        if [len(piece) for piece in data] != lengths:
            raise self._out_of_range(key, ranges, self.info(key).size)
        return data

    def read_into(self, key: str, start: int, parts: Sequence[memoryview]) -> None:
        length = sum(map(len, parts))
        found = memoryview(self.get_ranges(key, [(start, length)])[0])
        for part in parts:
            part[:] = found[: len(part)]
            found = found[len(part) :]

    def prefetch(self, key: str, start: int, length: int) -> None:
        pass  # a bucket has nowhere to read to

    def get_tail(self, key: str, length: int) -> bytes:
        with self._mapped("reading", key):
            try:
                return (
                    obstore.get(self.store, key, options={"range": {"suffix": length}})
                    .bytes()
                    .to_bytes()
                )
            except exceptions.NotSupportedError:  # Azure has no suffix ranges
                size = self.info(key).size
                length = min(length, size)
                return self.get_ranges(key, [(size - length, length)])[0]
            except exceptions.GenericError:
                # S3 refuses a range of an empty object, the last bytes too.
                if self.info(key).size:
                    raise
                return b""

    def info(self, key: str) -> ObjectInfo:
        with self._mapped("looking up", key):
            meta = obstore.head(self.store, key)
        return ObjectInfo(key, meta["size"], meta["last_modified"])

    def list(self, prefix: str, after: str) -> Iterator[ObjectInfo]:
        # obstore lists in key order on every bucket; offset is exclusive and, like paths, counts
        # from the store's root.
        with self._mapped("listing", prefix):
            for batch in obstore.list(self.store, prefix or None, offset=after or None):
                for meta in batch:
                    yield ObjectInfo(meta["path"], meta["size"], meta["last_modified"])

    def folders(self, prefix: str) -> Sequence[str]:
        with self._mapped("listing", prefix):
            found = obstore.list_with_delimiter(self.store, prefix or None)
        return sorted(path.rpartition("/")[2] for path in found["common_prefixes"])

    def delete(self, key: str) -> None:
        self.info(key)  # buckets accept to delete what is not there
        with self._mapped("deleting", key):
            obstore.delete(self.store, key)

    def leftovers(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(())

    def remove_leftover(self, key: str) -> bool:
        return False

    def _body(self, parts: Sequence[Buffer]) -> Any:
        # A create-only put is one request, so several parts are joined. A single one goes without
        # a copy, except to a MemoryStore, which keeps the caller's own memory.
        if len(parts) == 1 and not isinstance(self.store, obstore.store.MemoryStore):
            return parts[0]
        return b"".join(parts)

    def _out_of_range(self, key: str, ranges: Sequence[tuple[int, int]], size: int) -> InvalidInput:
        wanted = max(map(sum, ranges))
        message = f"reading {self.url}/{key}: bytes up to {wanted} wanted, it has {size}"
        return InvalidInput(message, kind="out_of_range")

    @contextlib.contextmanager
    def _mapped(self, action: str, key: str) -> Iterator[None]:
        try:
            yield
        except (exceptions.BaseError, FileNotFoundError, ValueError) as error:
            raise _map_error(error, f"{action} {self.url}/{key}") from error


def _map_error(error: Exception, what: str) -> StoreError:
    # obstore appends a Rust debug dump to each message; the first line says it all.
    text = f"{what}: {str(error).partition(chr(10))[0]}"
    if isinstance(error, FileNotFoundError):
        return NotFound(text, kind="no_object")
    if isinstance(error, _TAKEN):
        return Conflict(f"{what}: it exists already and is never overwritten", kind="exists")
    if isinstance(error, _DENIED):
        return InvalidInput(
            f"{text}; check the credentials and the bucket policy", kind="permission_denied"
        )
    if isinstance(error, exceptions.InvalidPathError | ValueError):
        return InvalidInput(text, kind="key")
    return Unavailable(
        f"{text}; check the network and the endpoint, then retry", kind="object_store"
    )
