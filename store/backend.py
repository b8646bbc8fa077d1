"""Backend: what a disk and a bucket must both do, and the keys under which they do it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from store.errors import InvalidInput

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from store.local import ObjectInfo

# Printable ASCII without what some file system forbids or some bucket escapes. No leading dot: that
# hides leftovers of killed writers and excludes "." and "..". No trailing dot or space: Windows
# drops them.
_SEGMENT = re.compile(
    r"[A-Za-z0-9_@+=~,()!'$&;-](?:[A-Za-z0-9_@+=~,()!'$&; .-]{0,253}[A-Za-z0-9_@+=~,()!'$&;-])?"
)
_MAX_KEY = 900  # S3 and GCS stop at 1,024 bytes, of which a prefix may take its part


class Backend(Protocol):
    """What a medium must do; see `Location` for the contracts. Keys are relative to its root and
    already checked.
    """

    def put_new(self, key: str, parts: Sequence[Buffer]) -> None: ...
    def replace(self, key: str, parts: Sequence[Buffer]) -> None: ...
    def get(self, key: str) -> bytes: ...
    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]: ...
    def read_into(self, key: str, start: int, parts: Sequence[memoryview]) -> None: ...
    def prefetch(self, key: str, start: int, length: int) -> None: ...
    def get_tail(self, key: str, length: int) -> bytes: ...
    def info(self, key: str) -> ObjectInfo: ...
    def list(self, prefix: str, after: str) -> Iterator[ObjectInfo]: ...
    def folders(self, prefix: str) -> Sequence[str]: ...
    def delete(self, key: str) -> None: ...
    def leftovers(self, prefix: str) -> Iterator[ObjectInfo]: ...
    def remove_leftover(self, key: str) -> bool: ...


def check_key(key: str) -> str:
    """Return `key` unchanged if it names an object safely: relative, no "..", no empty segment,
    printable ASCII.

    Raises:
        InvalidInput: it does not, and so could leave the location or mean different things on
            different media.
    """
    if (
        not isinstance(key, str)
        or len(key) > _MAX_KEY
        or not all(map(_SEGMENT.fullmatch, key.split("/")))
    ):
        message = (
            f"bad key {key!r}: expected names joined by single slashes, each of 1 to 255 letters, "
            "digits, spaces and _@+=~,()!'$&;-. and not beginning with a dot, in all at most "
            f"{_MAX_KEY} characters"
        )
        raise InvalidInput(message, kind="key")
    return key
