"""Frames: DownloadResponse messages as they come over the wire, taken apart without copies.

The generated code copies a chunk twice, which takes as long as a good part of its network.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from steering_service.core.errors import Corrupt
from steering_service.v1 import artifact_pb2

# Field number and wire type of `offset` and `chunk`.
_OFFSET, _CHUNK = 0x08, 0x12


def split(frame: bytes) -> tuple[int, memoryview | bytes]:
    """Offset and chunk of a serialised DownloadResponse.

    Args:
        frame: Its fields are usually in order, and then the chunk is a view of it. Whatever else
            protobuf allows is left to the generated code.

    Raises:
        Corrupt: It is no such message (kind ``download_chunk``).
    """
    try:
        offset = at = 0
        if frame[0] == _OFFSET:
            offset, at = _varint(frame, 1)
        if frame[at] == _CHUNK:
            length, at = _varint(frame, at + 1)
            if at + length == len(frame):
                return offset, memoryview(frame)[at:]
    except IndexError:
        pass
    try:
        message = artifact_pb2.DownloadResponse.FromString(frame)
    except DecodeError as error:
        raise Corrupt(
            f"a part of a download of {len(frame)} bytes is not a DownloadResponse: {error}",
            kind="download_chunk",
        ) from error
    return message.offset, message.chunk


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at a position, and where it ends; at most 63 bits.

    Raises:
        IndexError: The data ends in it, or it is longer.
    """
    number = 0
    for shift in range(0, 63, 7):
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
    raise IndexError(at)
