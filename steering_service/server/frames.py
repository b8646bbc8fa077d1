"""Frames: payloads as serialised DownloadResponses, made once and sent many times.

A message that is built and serialised for every download copies its megabyte three times, which is
a good part of what sending it costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from typing_extensions import Buffer

CHUNK_BYTES: Final = 1 << 20


def chunk_frame(offset: int, chunk: memoryview) -> bytes:
    """A serialised DownloadResponse of a chunk that is not empty."""
    head = b"\x08" + _varint(offset) if offset else b""
    return b"".join((head, b"\x12", _varint(len(chunk)), chunk))


def payload_frames(payload: Buffer) -> tuple[bytes, ...]:
    """A whole payload as frames of `CHUNK_BYTES` each, the last one perhaps of fewer."""
    view = memoryview(payload)
    starts = range(0, len(view), CHUNK_BYTES)
    return tuple(chunk_frame(start, view[start : start + CHUNK_BYTES]) for start in starts)


def frame_at(frames: Sequence[bytes], offset: int, size: int) -> bytes:
    """The frame that begins at an offset and ends where one of `payload_frames` does.

    Args:
        frames: Of the whole payload.
        offset: Less than `size`.
        size: Of the payload, in bytes.
    """
    index, into = divmod(offset, CHUNK_BYTES)
    frame = frames[index]
    if not into:
        return frame
    length = min(CHUNK_BYTES, size - index * CHUNK_BYTES)
    return chunk_frame(offset, memoryview(frame)[len(frame) - length + into :])


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)
