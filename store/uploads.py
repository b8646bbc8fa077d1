"""Uploads: what an interrupted publish has left of a payload, so that the next one goes on there,
on whichever replica.

    uploads/DIGEST/000008388608-8388608.part    offset and length, under the manifest's digest

Pieces are not trusted. A manifest's digest fixes the payload's sha256, so all who upload under it
mean the same bytes, and may write the same pieces at once or cut them otherwise; whether the bytes
are the right ones is decided when they are joined, by that sha256.
"""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from store.digest import check_digest
from store.errors import Conflict, InvalidInput, NotFound
from store.location import Location

if TYPE_CHECKING:
    from typing_extensions import Buffer

PIECE_BYTES: Final = 8 << 20
"""Most bytes a piece. Payloads that are not larger are not worth staging."""

_PIECE = re.compile(r"([0-9]{12})-([1-9][0-9]{0,8})\.part")
_MAX_OFFSET = 10**12 - 1


@dataclass(frozen=True, slots=True)
class _Piece:
    key: str
    start: int
    stop: int


class Uploads:
    """Stages payloads that come in pieces; safe to share between threads, processes and replicas.

    Usage:
        offset = uploads.received(digest)
        uploads.add(digest, offset, piece)  # and so on, each but the last of PIECE_BYTES
        payload = uploads.read(digest, sha256=..., size=...)
        registry.publish(manifest, payload, signature)
        uploads.remove(digest)

    Args:
        root: Where `uploads` lies.
        piece_bytes: Most bytes a piece.
    """

    def __init__(self, root: Location, *, piece_bytes: int = PIECE_BYTES) -> None:
        self.location = root
        self._piece_bytes = piece_bytes

    def received(self, digest: str) -> int:
        """Bytes that are there from the payload's beginning on, without a gap. One listing.

        Raises:
            InvalidInput: kind "digest".
        """
        return _reach(_cover(self._pieces(digest)))

    def add(self, digest: str, offset: int, data: Buffer) -> None:
        """Keep a piece; whatever an earlier attempt left under the same offset and length goes.

        Args:
            digest: Of the manifest.
            offset: Where in the payload it begins.
            data: Of 1 to `piece_bytes` bytes.

        Raises:
            InvalidInput: kind "digest", or kind "out_of_range" for offset or length.
        """
        length = memoryview(data).nbytes
        if not 0 <= offset <= _MAX_OFFSET or not 1 <= length <= self._piece_bytes:
            message = (
                f"upload of {digest}: expected 1 to {self._piece_bytes} bytes at an offset of 0 to "
                f"{_MAX_OFFSET}, got {length} at {offset}"
            )
            raise InvalidInput(message, kind="out_of_range")
        # The last one wins: which of two is right shows when all are joined, and somebody who sends
        # all of it again must get past what a broken attempt has left.
        self.location.replace(f"{_folder(digest)}/{offset:012d}-{length}.part", data)

    def read(self, digest: str, *, sha256: str, size: int) -> bytes:
        """The whole payload, verified. It is in memory once, with one piece beside it.

        Args:
            digest: Of the manifest.
            sha256: Of the payload, from the manifest.
            size: Of the payload in bytes, from the manifest.

        Raises:
            InvalidInput: kind "digest".
            Conflict: kind "upload_incomplete", pieces are missing: ask what was received and go on
                there. Kind "upload_differs", the pieces are not this payload's and are removed:
                send all of it again.
        """
        cover = _cover([piece for piece in self._pieces(digest) if piece.stop <= size])
        if (received := _reach(cover)) < size:
            raise self._incomplete(digest, received, size)
        # Its buffer grows without being copied, and getvalue hands it out without a copy.
        payload = io.BytesIO()
        hasher = hashlib.sha256()
        for piece in cover:
            position = payload.tell()
            try:
                data = self.location.get(piece.key)
            except NotFound as error:  # another uploader was done, or was refused
                raise self._incomplete(digest, position, size) from error
            part = memoryview(data)[position - piece.start :]
            hasher.update(part)
            payload.write(part)
        if (actual := hasher.hexdigest()) != sha256 or payload.tell() != size:
            self.remove(digest)
            message = (
                f"upload of {digest}: the pieces make {payload.tell()} bytes with sha256 {actual}, "
                f"the manifest says {size} with {sha256}; they are removed, send all of it again"
            )
            raise Conflict(message, kind="upload_differs")
        return payload.getvalue()

    def remove(self, digest: str) -> None:
        """Drop what is there, if anything: the payload is published, or is not what it should be.

        Raises:
            InvalidInput: kind "digest".
        """
        for info in list(self.location.list(_folder(digest))):
            try:
                self.location.delete(info.key)
            except NotFound:  # another uploader of the same was faster
                continue

    def _pieces(self, digest: str) -> list[_Piece]:
        """Pieces in the order of their offsets; whatever else lies there does not count."""
        folder = _folder(digest)
        pieces = []
        for info in self.location.list(folder):
            match = _PIECE.fullmatch(info.key.removeprefix(f"{folder}/"))
            if match and info.size == int(match[2]):
                start = int(match[1])
                pieces.append(_Piece(info.key, start, start + info.size))
        return pieces

    def _incomplete(self, digest: str, received: int, size: int) -> Conflict:
        message = (
            f"upload of {digest}: {received} of {size} bytes are in {self.location.url}; ask what "
            "was received, and send what follows"
        )
        return Conflict(message, kind="upload_incomplete")


def _cover(pieces: list[_Piece]) -> list[_Piece]:
    """Fewest pieces that reach furthest from 0 on without a gap; `pieces` in ascending order.

    Of those that reach equally far the one that begins last, so that whoever sends all again in
    pieces of the largest size gets these, however an earlier attempt was cut.
    """
    cover: list[_Piece] = []
    reach, best = 0, None
    for piece in pieces:
        if piece.start > reach:
            if best is None or piece.start > best.stop:
                break
            cover.append(best)
            reach, best = best.stop, None
        if piece.stop > reach and (best is None or piece.stop >= best.stop):
            best = piece
    return [*cover, best] if best else cover


def _reach(cover: list[_Piece]) -> int:
    return cover[-1].stop if cover else 0


def _folder(digest: str) -> str:
    return f"uploads/{check_digest(digest)}"
