"""One conformance suite for every backend of `Location`, and what only a local disk can show."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.backend import check_key
from store.errors import Conflict, InvalidInput, NotFound, StoreError, Unavailable
from store.local import LocalDirectory, map_os_error
from store.location import Location

ROOT = Path(__file__).parents[2]


class LocationConformance:
    """What every backend must do; subclasses give a fixture `location`, empty."""

    def test_put_new_then_get(self, location):
        location.put_new("a/b", b"12345")
        assert location.get("a/b") == b"12345"
        assert location.size("a/b") == 5
        assert location.exists("a/b")

    def test_put_new_of_several_buffers(self, location):
        location.put_new("x", [b"12", memoryview(b"345"), bytearray(b""), b"6"])
        assert location.get("x") == b"123456"

    def test_the_buffer_may_be_reused_after_a_put(self, location):
        for put in (location.put_new, location.replace):
            buffer = bytearray(b"before")
            put("x", buffer)
            buffer[:] = b"after!"
            assert location.get("x") == b"before"

    def test_empty_object(self, location):
        location.put_new("empty", b"")
        assert location.get("empty") == b""
        assert location.size("empty") == 0
        assert location.get_tail("empty", 4) == b""

    def test_put_new_never_overwrites(self, location):
        location.put_new("x", b"first")
        with pytest.raises(Conflict) as caught:
            location.put_new("x", b"second")
        assert caught.value.kind == "exists"
        assert "x" in str(caught.value)
        assert location.get("x") == b"first"

    def test_put_same(self, location):
        assert location.put_same("x", [b"ab", b"c"])
        assert not location.put_same("x", b"abc")
        with pytest.raises(Conflict) as caught:
            location.put_same("x", b"abd")
        assert caught.value.kind == "differs"
        assert location.get("x") == b"abc"

    def test_replace(self, location):
        location.replace("x", b"one")
        location.replace("x", [b"t", b"wo"])
        assert location.get("x") == b"two"

    def test_ranges(self, location):
        location.put_new("x", b"0123456789")
        assert location.get_range("x", 2, 3) == b"234"
        assert location.get_ranges("x", [(8, 2), (0, 1), (5, 0), (0, 10)]) == [
            b"89",
            b"0",
            b"",
            b"0123456789",
        ]
        assert location.get_tail("x", 3) == b"789"
        assert location.get_tail("x", 30) == b"0123456789"

    def test_read_into_fills_one_part_after_the_other(self, location):
        location.put_new("x", b"0123456789")
        parts = [bytearray(3), bytearray(0), bytearray(1), np.zeros((2, 2), np.uint8)]
        location.read_into("x", 1, parts)
        assert list(map(bytes, parts)) == [b"123", b"", b"4", b"5678"]
        location.read_into("x", 99, [])

    def test_read_into_takes_any_number_of_parts(self, location):
        data = random.Random(0).randbytes(9000)
        location.put_new("x", data)
        parts = [bytearray(number % 4) for number in range(5000)]
        location.read_into("x", 700, parts)
        assert b"".join(parts) == data[700 : 700 + 7500]

    def test_prefetch_changes_nothing(self, location):
        location.put_new("x", b"0123456789")
        location.prefetch("x", 2, 3)
        location.prefetch("x", 8, 99)
        assert location.get("x") == b"0123456789"

    @pytest.mark.parametrize("start", [8, 10, 99, -1])
    def test_read_into_outside_is_invalid(self, location, start):
        location.put_new("x", b"0123456789")
        with pytest.raises(InvalidInput) as caught:
            location.read_into("x", start, [bytearray(1), bytearray(2)])
        assert caught.value.kind == "out_of_range"

    @pytest.mark.parametrize("span", [(8, 3), (10, 1), (99, 1), (-1, 2), (0, -1)])
    def test_range_outside_is_invalid(self, location, span):
        location.put_new("x", b"0123456789")
        with pytest.raises(InvalidInput) as caught:
            location.get_range("x", *span)
        assert caught.value.kind == "out_of_range"

    @pytest.mark.parametrize("key", ["nothing", "a", "a/b/c"])
    def test_absent_objects(self, location, key):
        location.put_new("a/b", b"")
        for call in (
            lambda: location.get(key),
            lambda: location.size(key),
            lambda: location.get_range(key, 0, 1),
            lambda: location.read_into(key, 0, [bytearray(1)]),
            lambda: location.get_tail(key, 1),
            lambda: location.delete(key),
        ):
            with pytest.raises(NotFound):
                call()
        assert not location.exists(key)

    def test_delete(self, location):
        location.put_new("a/b", b"")
        location.delete("a/b")
        assert not location.exists("a/b")
        assert list(location.list()) == []

    def test_list_is_in_key_order(self, location):
        keys = ["b", "a/c", "a-b", "a/b/c", "a.b", "a/b-c", "a0", "B"]
        for key in keys:
            location.put_new(key, key.encode())
        infos = list(location.list())
        assert [info.key for info in infos] == sorted(keys)
        assert [info.size for info in infos] == [len(key) for key in sorted(keys)]
        assert all(abs(info.modified.timestamp() - time.time()) < 3600 for info in infos)
        for after in [*keys, "a", "a/", "zz", "a/b/cc"]:
            if not after.endswith("/"):
                found = [info.key for info in location.list(after=after)]
                assert found == [key for key in sorted(keys) if key > after]

    def test_list_takes_whole_names(self, location):
        for key in ["ab/c", "a/b", "a/d/e", "abc"]:
            location.put_new(key, b"")
        assert [info.key for info in location.list("a")] == ["a/b", "a/d/e"]
        assert [info.key for info in location.list("a", after="a/b")] == ["a/d/e"]
        assert list(location.list("nothing")) == []

    def test_folders(self, location):
        for key in ["x/1/a", "x/2/b/c", "x/file", "y/z"]:
            location.put_new(key, b"")
        assert location.folders() == ["x", "y"]
        assert location.folders("x") == ["1", "2"]
        assert list(location.folders("nothing")) == []

    def test_child(self, location):
        child = location.child("a/b")
        child.put_new("c", b"1")
        assert location.get("a/b/c") == b"1"
        assert [info.key for info in child.list()] == ["c"]
        assert child.url == location.url + "/a/b"
        assert Location.open(child.url).get("c") == b"1"

    def test_pickles_as_its_url(self, location):
        location.child("a").put_new("b", b"1")
        again = pickle.loads(pickle.dumps(location.child("a")))
        assert again == location.child("a")
        assert again.get("b") == b"1"

    def test_one_winner_of_many_threads(self, location):
        def create(number):
            try:
                location.put_new(f"k{number % 10}", str(number).encode())
            except Conflict:
                return None
            return number

        with ThreadPoolExecutor(8) as executor:
            winners = [n for n in executor.map(create, range(80)) if n is not None]
        assert sorted(n % 10 for n in winners) == list(range(10))
        for number in winners:
            assert location.get(f"k{number % 10}") == str(number).encode()

    @pytest.mark.parametrize(
        "key",
        [
            "",
            "/a",
            "a/",
            "a//b",
            "..",
            "a/../b",
            ".",
            ".hidden",
            "a\\b",
            "a\x00b",
            "é",
            "a:b",
            "a\nb",
            "x" * 256,
            "/".join(["y" * 200] * 6),
            "C:/x",
            "~/../..",
            "a/b.",
            "%2e%2e",
            None,
        ],
    )
    def test_bad_keys_are_refused_everywhere(self, location, key):
        for call in (
            lambda: location.put_new(key, b""),
            lambda: location.replace(key, b""),
            lambda: location.get(key),
            lambda: location.delete(key),
            lambda: location.child(key),
            lambda: location.get_range(key, 0, 1),
        ):
            with pytest.raises(InvalidInput) as caught:
                call()
            assert caught.value.kind == "key"


class TestLocal(LocationConformance):
    @pytest.fixture
    def location(self, tmp_path):
        return Location.open(tmp_path / "with space" / "ünd#so")


class TestMemory(LocationConformance):
    @pytest.fixture
    def location(self):
        return Location.open("memory://").child("some/prefix")


@pytest.mark.skipif(
    "STEERAGE_TEST_BUCKET" not in os.environ,
    reason="set STEERAGE_TEST_BUCKET to s3://BUCKET, with credentials and endpoint in AWS_*",
)
class TestBucket(LocationConformance):
    @pytest.fixture
    def location(self):
        return Location.open(os.environ["STEERAGE_TEST_BUCKET"]).child(uuid4().hex)


@pytest.mark.skipif(not Path("/proc/kallsyms").exists(), reason="needs Linux's /proc")
def test_reads_that_stop_early_go_on():
    # This file gives a page or less a call, however much is asked for.
    expected = Path("/proc/kallsyms").read_bytes()[:50_000]
    parts = [bytearray(20_000), bytearray(1), bytearray(29_999)]
    LocalDirectory(Path("/proc")).read_into("kallsyms", 0, list(map(memoryview, parts)))
    assert b"".join(parts) == expected


def test_open_takes_paths_and_urls(tmp_path):
    a = Location.open(str(tmp_path / "x y"))
    b = Location.open(tmp_path / "x y")
    c = Location.open((tmp_path / "x y").as_uri())
    assert a == b == c
    assert a.local_path() == tmp_path / "x y"
    assert a.local_path("k") == tmp_path / "x y" / "k"
    assert Location.open("memory://").local_path("k") is None


@pytest.mark.parametrize("url", ["ftp://x", "file://host/x", "file://", "", "a\0b", "s3://"])
def test_open_refuses(url):
    with pytest.raises(InvalidInput) as caught:
        Location.open(url)
    assert caught.value.kind == "url"


def test_open_refuses_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in ("file", "file/deeper"):
        with pytest.raises(InvalidInput, match="a file is in the way"):
            Location.open(tmp_path / path)


def test_memory_is_shared_by_name_only():
    Location.open("memory://conformance-shared/a").put_new("k", b"1")
    assert Location.open("memory://conformance-shared").get("a/k") == b"1"
    assert not Location.open("memory://").exists("k")


def test_memory_does_not_travel_to_another_process():
    pickled = pickle.dumps(Location.open("memory://"))
    script = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"
    done = subprocess.run(
        [sys.executable, "-c", script], input=pickled, capture_output=True, cwd=ROOT
    )
    assert done.returncode != 0
    assert b"give workers a path or a bucket URL" in done.stderr


def test_a_file_where_a_folder_is_wanted(tmp_path):
    location = Location.open(tmp_path)
    location.put_new("a", b"")
    with pytest.raises(InvalidInput) as caught:
        location.put_new("a/b", b"")
    assert caught.value.kind == "not_a_directory"


def test_leftovers_are_hidden_and_swept(tmp_path):
    location = Location.open(tmp_path)
    location.put_new("a/b", b"")
    leftover = tmp_path / "a" / ".tmp-1-0123"
    leftover.write_bytes(b"half")
    assert [info.key for info in location.list()] == ["a/b"]
    assert location.child("a").remove_leftovers(older_than_s=60) == 0
    os.utime(leftover, (time.time() - 100,) * 2)
    assert location.child("a").remove_leftovers(older_than_s=60) == 1
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b"]


def test_a_failed_put_leaves_nothing(tmp_path):
    location = Location.open(tmp_path)
    location.put_new("a/b", b"")
    with pytest.raises(TypeError):
        location.put_new("a/c", ["not bytes"])
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_real_full_disk_is_unavailable_and_leaves_nothing(tmp_path):
    script = """
import sys
from store.errors import Unavailable
from store.location import Location
location = Location.open(sys.argv[1])
location.put_new("small", b"x" * 1000)
for put in (location.put_new, location.replace):
    try:
        put("large", b"x" * (2 << 20))
    except Unavailable as error:
        print(error.kind, error)
print([info.key for info in location.list()], [p.name for p in location.local_path().iterdir()])
"""
    (tmp_path / "s.py").write_text(script)
    (tmp_path / "disk").mkdir()
    shell = 'mount -t tmpfs -o size=1m tmpfs "$1" && exec "$2" "$3" "$1"'
    done = subprocess.run(
        [
            "unshare",
            "-rm",
            "sh",
            "-c",
            shell,
            "sh",
            tmp_path / "disk",
            sys.executable,
            tmp_path / "s.py",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("no user namespaces here")
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("no_space") and "free space" in line for line in lines[:2])
    assert lines[2] == "['small'] ['small']"


def test_errors_of_the_system_are_mapped(tmp_path):
    with pytest.raises(OSError, match="No space left") as full:
        Path("/dev/full").write_bytes(b"x")
    error = map_os_error(full.value, what="creating x", writing=True)
    assert isinstance(error, Unavailable)
    assert error.kind == "no_space"
    denied = map_os_error(PermissionError(13, "no"), what="creating x", writing=True)
    assert (type(denied), denied.kind) == (InvalidInput, "permission_denied")
    other = map_os_error(OSError(5, "no"), what="reading x", writing=False)
    assert (type(other), other.kind) == (Unavailable, "io")
    assert all("x: " in str(e) for e in (error, denied, other))


segments = st.text(st.characters(codec="ascii"), min_size=0, max_size=8)


@given(st.lists(segments, min_size=1, max_size=4).map("/".join))
def test_accepted_keys_stay_inside(key):
    try:
        check_key(key)
    except StoreError:
        return
    folder = Path("/base/folder")
    assert Path(os.path.normpath(folder / key)).is_relative_to(folder)
    assert os.path.normpath(folder / key) == str(folder / key)


RACE = """
import sys, time
from store.errors import Conflict
from store.location import Location
location = Location.open(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for number in range(40):
    try:
        location.put_new(f"k{number:02}", sys.argv[2].encode() * 1000)
        print(number)
    except Conflict:
        pass
"""


def test_one_winner_of_many_processes(tmp_path):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, tmp_path, name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "abcd"
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = {name: racer.communicate()[0].split() for name, racer in zip("abcd", racers, strict=True)}
    assert sorted(int(n) for numbers in won.values() for n in numbers) == list(range(40))
    location = Location.open(tmp_path)
    for name, numbers in won.items():
        for number in numbers:
            assert location.get(f"k{int(number):02}") == name.encode() * 1000


REWRITE = """
import hashlib, os, sys
from store.location import Location
location = Location.open(sys.argv[1])
print("ready", flush=True)
number = 0
while True:
    body = os.urandom(1 << 18)
    data = hashlib.sha256(body).digest() + body
    location.put_new(f"new-{os.getpid()}-{number}", data)
    location.replace("same", data)
    number += 1
"""


def test_killed_writers_leave_whole_objects(tmp_path):
    chance = random.Random(0)
    for _ in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", REWRITE, tmp_path], cwd=ROOT, stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(chance.uniform(0, 0.1))
            writer.kill()
    location = Location.open(tmp_path)
    for info in location.list():
        data = location.get(info.key)
        assert data[:32] == hashlib.sha256(data[32:]).digest(), info.key
