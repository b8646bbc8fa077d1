"""Reading artifacts: from memory or from the store, large ones, damaged ones, while it is away."""

from __future__ import annotations

import asyncio
import random
import time

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering_service.client.connection import Connection
from steering_service.client.operator import Operator
from steering_service.core.errors import Corrupt, InvalidInput, SteeringError, Unavailable
from steering_service.server.artifacts import Artifacts, ByteCache
from steering_service.server.frames import CHUNK_BYTES, chunk_frame, frame_at, payload_frames
from steering_service.v1 import artifact_pb2
from store.errors import NotFound
from store.location import Location
from store.registry import Registry

WHO = {"actor": "ada", "reason": "a test"}


def download(connection, digest, offset=0):
    request = artifact_pb2.DownloadRequest(digest=digest, offset=offset)
    return list(connection.artifacts.Download(request, timeout=30))


def joined(parts):
    return b"".join(part.chunk for part in parts)


# ---- through a service


@pytest.fixture(scope="module")
def small_cache(guarded_once):
    """A service whose cache holds no payload of these tests."""
    return guarded_once(options={"cache_bytes": 1 << 20})


@pytest.mark.parametrize("offset", [0, 1, (4 << 20) - 1, 4 << 20, (9 << 20) + 5])
def test_a_payload_that_is_not_kept_is_streamed(small_cache, publisher, artifact, offset):
    large = artifact(3, width=2_500_000)  # 10 MB
    with Operator(small_cache.address) as operator:
        publisher.publish(operator, large)
    with Connection(small_cache.address) as connection:
        parts = download(connection, large.digest, offset)
    assert joined(parts) == large.payload_bytes[offset:]
    assert all(len(part.chunk) <= 1 << 20 for part in parts)
    assert [part.offset for part in parts][:1] == [offset]


def test_a_damaged_payload_is_data_loss(service, operator, publisher, artifact):
    item = artifact(1, width=300_000)
    publisher.publish(operator, item)
    blob = service.store / "blobs/sha256" / item.manifest.payload.sha256
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with Connection(service.address) as connection:
        with pytest.raises(grpc.RpcError) as caught:
            download(connection, item.digest)
        assert caught.value.code() is grpc.StatusCode.DATA_LOSS
        data[-1] ^= 1
        blob.write_bytes(data)
        assert joined(download(connection, item.digest)) == item.payload_bytes
        # From now on it is in memory, whatever becomes of the file.
        blob.unlink()
        assert joined(download(connection, item.digest)) == item.payload_bytes


def test_what_is_in_memory_is_served_while_the_store_is_away(
    service, operator, publisher, artifact, channel, tmp_path
):
    known, unknown = artifact(1), artifact(2)
    for item in (known, unknown):
        publisher.publish(operator, item)
    operator.promote(channel, artifact=known.digest, strength=1.0, **WHO)
    operator.manifest(known.digest)
    watch = operator.watch(channel)
    assert next(watch).revision == 1
    with Connection(service.address) as connection:
        download(connection, known.digest)
        away = tmp_path / "away"
        service.store.rename(away)
        service.store.symlink_to(service.store)  # a link to itself: every access is an error
        assert operator.manifest(known.digest).manifest_bytes == known.manifest_bytes
        assert joined(download(connection, known.digest)) == known.payload_bytes
        # Nodes may come and be told what they are to run, all the same.
        second = operator.watch(channel)
        assert next(second).revision == 1
        for call in (
            lambda: operator.promote(channel, strength=0.5, expected_revision=1, **WHO),
            lambda: operator.manifest(unknown.digest),
            lambda: publisher.publish(operator, artifact(3)),
            lambda: list(operator.list()),
            lambda: operator.channel(channel),
        ):
            started = time.monotonic()
            with pytest.raises(Unavailable):
                call()
            assert time.monotonic() - started < 10
        service.store.unlink()
        away.rename(service.store)
        assert operator.promote(channel, strength=0.5, expected_revision=1, **WHO).revision == 2
        assert next(watch).revision == 2
        assert next(second).revision == 2
        assert operator.manifest(unknown.digest).manifest == unknown.manifest
        for stream in (watch, second):
            stream.close()


def test_nodes_that_come_back_find_the_head_while_the_store_is_away(
    service, operator, channel, tmp_path
):
    operator.promote(channel, **WHO)
    watch = operator.watch(channel)
    next(watch)
    watch.close()
    away = tmp_path / "away"
    service.store.rename(away)
    service.store.symlink_to(service.store)
    assert next(operator.watch(channel)).revision == 1
    with pytest.raises(SteeringError):
        next(operator.watch(f"{channel}-never-watched"))
    service.store.unlink()
    away.rename(service.store)


def test_lists_are_filtered(shared_operator, publisher, artifact):
    items = [artifact(seed, fingerprint=f"{seed:064x}") for seed in range(900, 904)]
    for item in items:
        publisher.publish(shared_operator, item)

    def found(**filters):
        return {entry.digest for entry in shared_operator.list(**filters)}

    everything = {item.digest for item in items}
    assert found(name_prefix="artifact 90") == everything
    assert found(name_prefix="artifact 901") == {items[1].digest}
    assert found(model=f"{902:064x}") == {items[2].digest}
    assert found(model="pocket") >= everything
    assert found(kind="intervention", name_prefix="artifact 90") == everything
    assert found(kind="controller", name_prefix="artifact 90") == set()
    assert found(parent="0" * 64) == set()
    entry = next(e for e in shared_operator.list() if e.digest == items[0].digest)
    assert (entry.name, entry.kind, entry.model_name) == ("artifact 900", "intervention", "pocket")
    assert entry.payload_size == len(items[0].payload_bytes)
    for odd in ({"kind": "model"}, {"parent": "x"}, {"name_prefix": "x" * 2000}):
        with pytest.raises(InvalidInput):
            found(**odd)


def test_a_page_ends_early_and_the_last_one_says_so(
    shared_service, shared_operator, publisher, artifact
):
    wanted = {publisher.publish(shared_operator, artifact(seed)) for seed in range(910, 915)}
    with Connection(shared_service.address) as connection:
        found, token, pages = [], "", 0
        while not pages or token:
            request = artifact_pb2.ListRequest(
                page_size=2, page_token=token, name_prefix="artifact 91"
            )
            page = connection.artifacts.List(request, timeout=10)
            assert len(page.artifacts) <= 2
            found += [entry.digest for entry in page.artifacts]
            token, pages = page.next_page_token, pages + 1
    assert found == sorted(wanted)


def test_a_damaged_artifact_hides_no_other(service, operator, publisher, artifact):
    first, second = (publisher.publish(operator, artifact(seed)) for seed in (1, 2))
    # Another process, which has neither in memory.
    (service.store / "artifacts" / first / "manifest.json").write_bytes(b"{}")
    service.kill()
    service.start()
    with service.operator() as again:
        assert [entry.digest for entry in again.list()] == [second]
        with pytest.raises(Corrupt):
            again.manifest(first)


# ---- values


@given(st.integers(0, 2**40), st.binary(min_size=1, max_size=300))
def test_a_frame_is_the_message(offset, chunk):
    message = artifact_pb2.DownloadResponse(offset=offset, chunk=chunk)
    assert chunk_frame(offset, memoryview(chunk)) == message.SerializeToString()


@given(st.integers(1, 3 * CHUNK_BYTES), st.data())
def test_frames_from_any_offset_are_the_payload(size, data):
    payload = random.Random(size).randbytes(size)
    frames = payload_frames(payload)
    offset = data.draw(st.integers(0, size - 1))
    at, joined = offset, b""
    while at < size:
        message = artifact_pb2.DownloadResponse.FromString(frame_at(frames, at, size))
        assert (message.offset, 0 < len(message.chunk) <= CHUNK_BYTES) == (at, True)
        joined += message.chunk
        at += len(message.chunk)
    assert joined == payload[offset:]


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 60)), max_size=60))
def test_a_cache_keeps_what_was_used_last_within_its_budget(puts):
    cache: ByteCache[int] = ByteCache(100)
    sizes: dict[str, int] = {}
    for number, (key, size) in enumerate(puts):
        cache.put(key, number, size)
        sizes.pop(key, None)
        sizes[key] = size
        while sum(sizes.values()) > 100:
            del sizes[next(iter(sizes))]
        assert cache.num_bytes == sum(sizes.values())
    for name in "abcdef":
        assert (cache.get(name) is not None) == (name in sizes)


def test_a_value_beyond_the_budget_is_not_kept_and_drops_nothing():
    cache: ByteCache[int] = ByteCache(10)
    cache.put("a", 1, 10)
    cache.put("b", 2, 11)
    assert (cache.get("a"), cache.get("b")) == (1, None)


# ---- in one loop


def test_many_readers_cost_one_read_of_the_store(tmp_path, artifact):
    item = artifact(1, width=100_000)
    registry = Registry(Location.open(str(tmp_path)))
    registry.publish(item.manifest_bytes, item.payload_bytes, b"{}")

    async def run():
        artifacts = Artifacts(registry)
        many = await asyncio.gather(*(artifacts.known(item.digest) for _ in range(50)))
        assert len({id(known) for known in many}) == 1
        await asyncio.gather(*(artifacts.load(many[0]) for _ in range(50)))
        frame = artifacts.cached_frame(many[0], 0)
        assert artifact_pb2.DownloadResponse.FromString(frame).chunk == item.payload_bytes
        assert artifacts.cached_frame(many[0], 0) is frame
        # A reader that goes away ends nobody else's read.
        fresh = Artifacts(registry)
        tasks = [asyncio.create_task(fresh.known(item.digest)) for _ in range(5)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one).__name__ for one in found] == ["CancelledError"] + ["Known"] * 4
        with pytest.raises(NotFound):
            await artifacts.known("0" * 64)
        registry.publish(*_another(artifact))
        assert (await artifacts.known(artifact(2).digest)).name == "artifact 2"

    asyncio.run(asyncio.wait_for(run(), timeout=30))


def _another(artifact):
    item = artifact(2)
    return item.manifest_bytes, item.payload_bytes, b"{}"


def test_reads_of_any_part_are_right(tmp_path, artifact):
    item = artifact(1, width=50_000)
    registry = Registry(Location.open(str(tmp_path)))
    registry.publish(item.manifest_bytes, item.payload_bytes, b"{}")
    size = len(item.payload_bytes)

    async def run():
        artifacts = Artifacts(registry, cache_bytes=1 << 16)
        known = await artifacts.known(item.digest)
        await artifacts.load(known)
        assert artifacts.cached_frame(known, 0) is None
        generator = random.Random(0)
        for _ in range(30):
            start = generator.randrange(size)
            length = generator.randrange(1, 100_000)
            found = await artifacts.read(known, start, length)
            assert found == item.payload_bytes[start : start + length]

    asyncio.run(asyncio.wait_for(run(), timeout=30))
