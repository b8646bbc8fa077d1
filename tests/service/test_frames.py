"""Messages of a download, taken apart by hand: as the generated code would."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from steering_service.client.frames import split
from steering_service.core.errors import Corrupt
from steering_service.v1 import artifact_pb2


@given(st.integers(0, 2**64 - 1), st.binary(max_size=300))
@example(2**63 - 1, b"x")
@example(0, b"")
def test_a_message_is_taken_apart(offset, chunk):
    frame = artifact_pb2.DownloadResponse(offset=offset, chunk=chunk).SerializeToString()
    got_offset, got_chunk = split(frame)
    assert (got_offset, bytes(got_chunk)) == (offset, chunk)


def test_a_chunk_is_a_view():
    frame = artifact_pb2.DownloadResponse(offset=7, chunk=b"abc").SerializeToString()
    assert isinstance(split(frame)[1], memoryview)


@given(st.binary(max_size=40))
@example(b"\x12\x01a\x08\x05")  # in another order
@example(b"\x08\x01\x08\x02\x12\x01a")  # the last one counts
@example(b"\x12\x01a\x12\x01b")
@example(b"\x12\x01a\x1a\x01z")  # a field of a later version
@example(b"\x12\x05a")
@example(b"\x08" + b"\xff" * 11)
@example(b"\x12" + b"\xff" * 9 + b"\x01")
@example(b"\x08")
def test_any_bytes_mean_what_they_mean_to_the_generated_code(frame):
    try:
        message = artifact_pb2.DownloadResponse.FromString(frame)
    except DecodeError:
        with pytest.raises(Corrupt):
            split(frame)
    else:
        offset, chunk = split(frame)
        assert (offset, bytes(chunk)) == (message.offset, message.chunk)
