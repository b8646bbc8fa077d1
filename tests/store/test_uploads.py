"""Uploads: pieces in any order and cut, from any number of uploaders, make the payload or none."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.digest import sha256_hex
from store.errors import Conflict, InvalidInput
from store.location import Location
from store.uploads import PIECE_BYTES, Uploads

ROOT = Path(__file__).parents[2]
DIGEST = "d" * 64
PAYLOAD = bytes(range(60))

spans = st.tuples(st.integers(0, 59), st.integers(1, 25)).map(
    lambda s: (s[0], min(s[1], 60 - s[0]))
)


def read(uploads, payload=PAYLOAD):
    return uploads.read(DIGEST, sha256=sha256_hex(payload), size=len(payload))


def memory():
    return Uploads(Location.open("memory://"), piece_bytes=25)


def test_an_upload_goes_on_where_it_was(root):
    one, two = Uploads(root), Uploads(root)  # two replicas
    assert one.received(DIGEST) == 0
    one.add(DIGEST, 0, PAYLOAD[:20])
    two.add(DIGEST, 20, bytearray(PAYLOAD[20:50]))
    assert [info.key for info in root.list()] == [
        f"uploads/{DIGEST}/000000000000-20.part",
        f"uploads/{DIGEST}/000000000020-30.part",
    ]
    assert one.received(DIGEST) == two.received(DIGEST) == 50
    assert one.received("e" * 64) == 0
    with pytest.raises(Conflict) as caught:
        read(two)
    assert caught.value.kind == "upload_incomplete"
    one.add(DIGEST, 50, memoryview(PAYLOAD)[50:])
    assert read(two) == PAYLOAD
    assert type(read(two)) is bytes
    two.remove(DIGEST)
    two.remove(DIGEST)
    assert one.received(DIGEST) == 0
    assert list(root.list()) == []


def test_wrong_pieces_go_and_all_is_sent_again(root):
    uploads = Uploads(root)
    uploads.add(DIGEST, 0, b"x" * 20)
    uploads.add(DIGEST, 20, PAYLOAD[20:])
    uploads.add("e" * 64, 0, b"another")
    with pytest.raises(Conflict, match="send all of it again") as caught:
        read(uploads)
    assert caught.value.kind == "upload_differs"
    assert uploads.received(DIGEST) == 0
    assert uploads.received("e" * 64) == 7
    uploads.add(DIGEST, 0, PAYLOAD)
    assert read(uploads) == PAYLOAD


def test_bad_input(root):
    uploads = Uploads(root, piece_bytes=4)
    for offset, data in ((-1, b"x"), (10**12, b"x"), (0, b""), (0, b"12345")):
        with pytest.raises(InvalidInput) as caught:
            uploads.add(DIGEST, offset, data)
        assert caught.value.kind == "out_of_range"
    for call in (
        lambda: uploads.add("../x", 0, b"x"),
        lambda: uploads.received("../x"),
        lambda: uploads.read("../x", sha256="", size=1),
        lambda: uploads.remove("../x"),
    ):
        with pytest.raises(InvalidInput) as caught:
            call()
        assert caught.value.kind == "digest"
    assert list(root.list()) == []


def test_stray_objects_are_no_pieces(root):
    uploads = Uploads(root)
    for name in ("notes.txt", "000000000000-9.part", "0-5.part", "000000000000-05.part"):
        root.put_new(f"uploads/{DIGEST}/{name}", b"stray")
    assert uploads.received(DIGEST) == 0
    root.put_new(f"uploads/{DIGEST}/000000000000-5.part/x", b"stray")
    assert uploads.received(DIGEST) == 0
    uploads.remove(DIGEST)
    assert list(root.list()) == []


@given(st.lists(spans, max_size=12))
def test_what_was_received_is_what_lies_there_without_a_gap(parts):
    """In any order, with gaps and overlaps."""
    uploads = memory()
    for start, length in parts:
        uploads.add(DIGEST, start, PAYLOAD[start : start + length])
    there = {byte for start, length in parts for byte in range(start, start + length)}
    reach = next(byte for byte in range(61) if byte not in there)
    assert uploads.received(DIGEST) == reach
    if reach == 60:
        assert read(uploads) == PAYLOAD
    else:
        with pytest.raises(Conflict) as caught:
            read(uploads)
        assert caught.value.kind == "upload_incomplete"


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 25), st.integers(0, 6))))
def test_interrupted_anywhere_and_resumed_by_anybody(attempts):
    """Each attempt asks, goes on in pieces of its own size, and ends after some of them."""
    location = Location.open("memory://")
    replicas = [Uploads(location, piece_bytes=25), Uploads(location, piece_bytes=25)]
    for which, piece_bytes, num_pieces in [*attempts, (0, 7, 99)]:
        offset = replicas[which].received(DIGEST)
        for _ in range(num_pieces):
            if piece := PAYLOAD[offset : offset + piece_bytes]:
                replicas[1 - which].add(DIGEST, offset, piece)
            offset += len(piece)
    assert read(replicas[0]) == PAYLOAD


@given(st.lists(st.tuples(spans, st.booleans()), max_size=12), st.integers(1, 24))
def test_wrong_bytes_never_make_a_payload(parts, piece_bytes):
    """Whatever broken or hostile attempts left: the payload or an error, and a way on."""
    uploads = memory()
    for (start, length), is_right in parts:
        piece = PAYLOAD[start : start + length]
        uploads.add(DIGEST, start, piece if is_right else bytes(255 - byte for byte in piece))
    for _ in range(2):
        offset = uploads.received(DIGEST)
        while offset < 60:
            uploads.add(DIGEST, offset, PAYLOAD[offset : offset + piece_bytes])
            offset = min(offset + piece_bytes, 60)
        try:
            found = read(uploads)
        except Conflict as error:
            found = error.kind.encode()
        if found == PAYLOAD:
            return
        assert found == b"upload_differs"
        assert uploads.received(DIGEST) == 0
    pytest.fail("sending all of it again did not help")


@given(st.lists(spans, max_size=12), st.integers(30, 60))
def test_sending_all_again_in_the_largest_pieces_gets_past_what_is_there(wrong, size):
    uploads = memory()
    payload = PAYLOAD[:size]
    for start, length in wrong:
        if start < size:
            uploads.add(DIGEST, start, b"x" * min(length, size - start))
    for offset in range(0, size, 25):
        uploads.add(DIGEST, offset, payload[offset : offset + 25])
    assert read(uploads, payload) == payload


UPLOADER = """
import itertools, random, sys
from store.location import Location
from store.uploads import Uploads
uploads = Uploads(Location.open(sys.argv[1]))
payload = random.Random(1).randbytes(int(sys.argv[3]))
for number in itertools.count():
    size = 1000 + number % 7 * int(sys.argv[2])
    for offset in range(0, len(payload), size):
        uploads.add("d" * 64, offset, payload[offset : offset + size])
        print(uploads.received("d" * 64), flush=True)
"""


def test_killed_uploaders_leave_nothing_wrong(shared_root):
    """Two at once, cutting differently, killed in the middle; a third one finishes."""
    payload = random.Random(1).randbytes(100_000)
    uploads = Uploads(shared_root)
    for offset in (20_000, 60_000):
        racers = [
            subprocess.Popen(
                [sys.executable, "-c", UPLOADER, shared_root.url, step, "100000"],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            for step in ("100", "333")
        ]
        for racer in racers:
            while int(racer.stdout.readline()) < offset:
                pass
        for racer in racers:
            racer.kill()
            racer.communicate()
            assert racer.returncode == -signal.SIGKILL
    received = uploads.received(DIGEST)
    assert received >= 60_000
    if received < len(payload):
        uploads.add(DIGEST, received, payload[received:])
    assert read(uploads, payload) == payload


MEMORY = """
import resource, sys
from store.digest import canonical_json, sha256_hex
from store.location import Location
from store.registry import Registry
from store.uploads import PIECE_BYTES, Uploads
root = Location.open(sys.argv[1])
size = int(sys.argv[2])
piece = bytes(PIECE_BYTES)
digest = "d" * 64
import hashlib
hasher = hashlib.sha256()
for offset in range(0, size, len(piece)):
    Uploads(root).add(digest, offset, piece)
    hasher.update(piece)
manifest = canonical_json({"payload": {"sha256": hasher.hexdigest(), "size": size}})
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
payload = Uploads(root).read(digest, sha256=hasher.hexdigest(), size=size)
for _ in range(2):  # the second time, it is there already
    published = Registry(root).publish(manifest, payload, b"s")
del payload
assert len(Registry(root).payload(published)) == size
print(peak() - before)
"""


def test_a_payload_is_in_memory_once(tmp_path):
    size = 12 * PIECE_BYTES
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path, str(size)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < size + 4 * PIECE_BYTES
