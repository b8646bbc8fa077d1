"""The cache: its life from create to seal, what readers may see, and every kind of damage."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.activations import ActivationCache
from store.errors import Conflict, Corrupt, InvalidInput, NotFound
from store.layout import StreamLayout
from store.location import Location

NUM_ROWS = 150
A = StreamLayout("resid_post", NUM_ROWS, (2, 5), 8, "bfloat16", 64)
B = StreamLayout("z", NUM_ROWS, (0,), 4, "float32", 64, num_heads=2)
CAPTURE = {"model": "m", "revision": "r", "sites": ["resid_post.2", "resid_post.5", "z.0"]}
INDEX = pa.table({"prompt": np.arange(NUM_ROWS), "label": ["yes", "no"] * 75})
RNG = np.random.default_rng(0)
VALUES = {
    "resid_post": RNG.integers(0, 65536, (NUM_ROWS, 2, 8), dtype=np.uint16),
    "z": RNG.standard_normal((NUM_ROWS, 1, 4)).astype(np.float32),
}


def part(shard):
    rows = A.shard_rows(shard)
    return {name: values[rows.start : rows.stop] for name, values in VALUES.items()}


def create(root):
    return ActivationCache.create(root, CAPTURE, [A, B], INDEX, {"plan/0.json": b"{}"})


def fill(root):
    cache = create(root)
    for shard in cache.missing():
        cache.write_shard(shard, part(shard), {"forward": 0.5})
    cache.seal()
    return cache


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    return Location.open(tmp_path if request.param == "local" else "memory://")


def test_life(root):
    cache = create(root)
    assert cache.missing() == [0, 1, 2]
    assert cache.committed() == set()
    assert not cache.is_complete
    records = cache.write_shard(1, part(1), {"forward": 0.25})
    assert [(r.stream, r.shard, r.rows) for r in records] == [
        ("resid_post", 1, (64, 128)),
        ("z", 1, (64, 128)),
    ]
    assert records[0].seconds == {"forward": 0.25}
    assert records[0] == cache.read_record("resid_post", 1)
    assert cache.missing() == [0, 2]
    with pytest.raises(Conflict, match=r"2 of 3 shards have no record, first \[0, 2\]"):
        cache.seal()
    cache.write_shard(0, part(0))
    cache.write_shard(2, part(2))
    marker = cache.seal()
    assert cache.seal() == marker
    assert cache.is_complete
    assert marker.num_bytes == sum(info.size for info in cache.location.list() if "/c/" in info.key)
    again = ActivationCache.open(root, cache.digest)
    assert again.is_complete
    assert again.capture == CAPTURE
    assert again.streams == {"resid_post": A, "z": B}
    assert again.index().equals(INDEX.append_column("row", pa.array(np.arange(NUM_ROWS))))
    assert again.read_file("plan/0.json") == b"{}"
    assert list(again.verify()) == []
    assert ActivationCache.list_digests(root) == [cache.digest]


def test_reads(root):
    cache = fill(root)
    for shard in range(3):
        for position, layer in enumerate(A.layers):
            found = cache.read_layer("resid_post", layer, shard)
            assert np.array_equal(found, part(shard)["resid_post"][:, position])
    scanned = [(shard, layer) for shard, layer, _ in cache.scan("resid_post")]
    assert scanned == [(s, layer) for s in range(3) for layer in (2, 5)]
    for shard, layer, values in cache.scan("resid_post", layers=[5, 2], shards=[2, 0]):
        wanted = part(shard)["resid_post"][:, A.layers.index(layer)]
        assert np.array_equal(values, wanted)
    assert next(iter(cache.scan("z")))[:2] == (0, 0)
    assert list(cache.scan("z", shards=[])) == []


def test_a_scan_may_reuse_its_memory(root):
    cache = fill(root)
    for stream, layout in (("resid_post", A), ("z", B)):
        scan = cache.scan(stream, shards=[2, 0, 1], reuse=True)
        for shard, layer, values in scan:  # the last shard is shorter
            wanted = part(shard)[stream][:, layout.layers.index(layer)]
            assert values.tobytes() == wanted.tobytes()
            values[:] = 0
    kept = [values for _, _, values in cache.scan("resid_post", [2])]
    assert np.array_equal(np.concatenate(kept), VALUES["resid_post"][:, 0])


@pytest.mark.parametrize("reuse", [False, True])
def test_a_scan_gives_what_comes_before_damage(root, reuse):
    cache = fill(root)
    offset = A.stored_chunk_nbytes + 3  # second chunk of the first layer
    cache = damaged(
        cache, A.shard_key(1), lambda b: b[:offset] + bytes([b[offset] ^ 4]) + b[offset + 1 :]
    )
    scan = cache.scan("resid_post", [2], reuse=reuse)
    assert np.array_equal(next(scan)[2], part(0)["resid_post"][:, 0])
    with pytest.raises(Corrupt, match="resid_post/c/1/0/0: crc32c of chunk 1 of layer 2 is"):
        next(scan)
    for stream, change, kind in (
        ("resid_post", lambda b: b[:-10], "shard_index"),
        ("z", lambda b: b[300:], "shard_size"),  # the index is whole
    ):
        layout = cache.streams[stream]
        cache = damaged(cache, layout.shard_key(1), change)
        scan = cache.scan(stream, reuse=reuse)
        for layer in layout.layers:
            assert next(scan)[:2] == (0, layer)
        with pytest.raises(Corrupt, match=f"{stream}/c/1/0/0") as caught:
            next(scan)
        assert caught.value.kind == kind
    cache.location.delete(B.shard_key(1))
    scan = ActivationCache.open(root, cache.digest).scan("z", reuse=reuse)
    assert next(scan)[0] == 0
    with pytest.raises(Corrupt, match="recorded but gone") as caught:
        next(scan)
    assert caught.value.kind == "shard_missing"


def test_read_rows(root):
    cache = fill(root)

    @settings(max_examples=30)
    @given(st.lists(st.integers(0, NUM_ROWS - 1), max_size=20))
    def any_rows(rows):
        assert np.array_equal(cache.read_rows("resid_post", 5, rows), VALUES["resid_post"][rows, 1])
        assert np.array_equal(cache.read_rows("z", 0, np.array(rows)), VALUES["z"][rows, 0])

    any_rows()
    with pytest.raises(InvalidInput, match="rows 0 to 149"):
        cache.read_rows("z", 0, [NUM_ROWS])


def test_names_that_are_not_there(root):
    cache = fill(root)
    for call, kind in (
        (lambda: cache.read_layer("mlp_out", 0, 0), "no_stream"),
        (lambda: cache.read_layer("z", 1, 0), "no_layer"),
        (lambda: cache.read_layer("z", 0, 3), "no_shard"),
        (lambda: cache.read_layer("z", 0, -1), "no_shard"),
        (lambda: cache.read_file("nothing"), "no_object"),
        (lambda: ActivationCache.open(root, "0" * 64), "no_cache"),
    ):
        with pytest.raises(NotFound) as caught:
            call()
        assert caught.value.kind == kind


def test_uncommitted_shards_are_never_read(root):
    cache = create(root)
    cache.write_shard(0, part(0))
    # A shard whose writer died before its record: present, and still not to be read.
    other = fill(Location.open("memory://"))
    key = A.shard_key(1)
    cache.location.put_new(key, other.location.get(key))
    for shard in (1, 2):
        with pytest.raises(NotFound) as caught:
            cache.read_layer("resid_post", 2, shard)
        assert caught.value.kind == "not_committed"
        with pytest.raises(NotFound):
            cache.read_rows("resid_post", 2, [shard * 64])
    with pytest.raises(NotFound):
        list(cache.scan("resid_post"))
    cache.write_shard(1, part(1))
    assert len(cache.read_layer("resid_post", 2, 1)) == 64


def test_create_again_opens(root):
    cache = fill(root)
    again = create(root)
    assert again.digest == cache.digest
    assert again.missing() == []
    reordered = dict(reversed(CAPTURE.items()))
    assert ActivationCache.create(root, reordered, [B, A], INDEX).digest == cache.digest


def test_create_again_with_another_plan_is_refused(root):
    create(root)
    other_layout = StreamLayout("z", NUM_ROWS, (0,), 4, "float32", 32, num_heads=2)
    other_a = StreamLayout("resid_post", NUM_ROWS, (2, 5), 8, "bfloat16", 32)
    other_index = INDEX.set_column(0, "prompt", pa.array(np.arange(NUM_ROWS)[::-1]))
    for streams, index, files in (
        ([other_a, other_layout], INDEX, {}),
        ([A], INDEX, {}),
        ([A, B], other_index, {}),
        ([A, B], INDEX, {"plan/0.json": b"other"}),
    ):
        with pytest.raises(Conflict) as caught:
            ActivationCache.create(root, CAPTURE, streams, index, files)
        assert caught.value.kind == "cache_differs"


def parquet(table, **options):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def test_create_again_compares_parquet_files_as_tables(root):
    """Their bytes change with the version of pyarrow, which must not make another plan of them."""
    table = pa.table({"prompt": ["a", "b"], "row": [0, 1]})
    first, again = parquet(table, compression="zstd"), parquet(table, compression="none")
    annotated = parquet(table.replace_schema_metadata({"writer": "another"}))
    assert len({first, again, annotated}) == 3
    made = ActivationCache.create(root, CAPTURE, [A, B], INDEX, {"prompts.parquet": first})
    for same in (first, again, annotated):
        cache = ActivationCache.create(root, CAPTURE, [A, B], INDEX, {"prompts.parquet": same})
        assert cache.location.get("prompts.parquet") == first
    other_rows = parquet(table.set_column(1, "row", pa.array([1, 0])))
    other_type = parquet(table.set_column(1, "row", pa.array([0, 1], pa.int32())))
    for other in (other_rows, other_type, b"no Parquet", first[:-9]):
        with pytest.raises(Conflict, match="prompts.parquet") as caught:
            ActivationCache.create(root, CAPTURE, [A, B], INDEX, {"prompts.parquet": other})
        assert caught.value.kind == "cache_differs"
    assert made.location.get("prompts.parquet") == first


def test_notes_are_kept_and_never_compared(root):
    def make(notes):
        return ActivationCache.create(root, CAPTURE, [A, B], INDEX, {}, notes=notes)

    cache = make({"left_out.jsonl": b"first"})
    for notes in ({"left_out.jsonl": b"second"}, {"more.txt": b"late"}, {}, None):
        make(notes)
        assert cache.location.get("left_out.jsonl") == b"first"
        assert not cache.location.exists("more.txt")
    # Without capture.json there is no cache yet, and the notes are of whoever makes it.
    cache.location.delete("capture.json")
    make({"left_out.jsonl": b"third"})
    assert cache.location.get("left_out.jsonl") == b"third"
    for notes, kind in (({"capture.json": b""}, "file_name"), ({"../x": b""}, "key")):
        with pytest.raises(InvalidInput) as caught:
            make(notes)
        assert caught.value.kind == kind
    with pytest.raises(InvalidInput, match="files and as notes"):
        ActivationCache.create(root, CAPTURE, [A, B], INDEX, {"p": b""}, notes={"p": b""})


def test_stray_files_are_no_records(root):
    cache = fill(root)
    for name in ("notes.txt", "1.json", "000000001.json", "00000001.json.bak"):
        cache.location.put_new(f"_commits/z/{name}", b"stray")
    cache.location.delete("_commits/z/00000001.json")
    cache.location.delete("_COMPLETE")
    again = ActivationCache.open(root, cache.digest)
    assert again.committed() == {0, 2}
    assert again.missing() == [1]


def test_create_refuses_nonsense(root):
    uneven = StreamLayout("z", NUM_ROWS, (0,), 4, "float32", 32)
    longer = StreamLayout("z", NUM_ROWS + 1, (0,), 4, "float32", 64)
    for streams, index, files, kind in (
        ([], INDEX, {}, "layout"),
        ([A, A], INDEX, {}, "layout"),
        ([A, uneven], INDEX, {}, "layout"),
        ([A, longer], INDEX, {}, "layout"),
        ([A, B], INDEX.slice(1), {}, "index"),
        ([A, B], INDEX, {"capture.json": b""}, "file_name"),
        ([A, B], INDEX, {"z/c/0/0/0": b""}, "file_name"),
        ([A, B], INDEX, {"_commits/z/00000000.json": b""}, "file_name"),
        ([A, B], INDEX, {"../x": b""}, "key"),
    ):
        with pytest.raises(InvalidInput) as caught:
            ActivationCache.create(root, CAPTURE, streams, index, files)
        assert caught.value.kind == kind
    assert ActivationCache.list_digests(root) == []


def test_interrupted_create_is_invisible_and_repaired(root):
    cache = create(root)
    cache.location.delete("capture.json")
    cache.location.replace("index.parquet", b"older bytes")
    with pytest.raises(NotFound):
        ActivationCache.open(root, cache.digest)
    assert ActivationCache.list_digests(root) == []
    assert create(root).index().drop_columns("row").equals(INDEX)


def test_write_again_is_idempotent(root):
    cache = create(root)
    first = cache.write_shard(0, part(0), {"forward": 1.0})
    assert cache.write_shard(0, part(0), {"forward": 2.0}) == first


def test_other_values_for_a_recorded_shard_are_refused(root):
    cache = create(root)
    (old, _) = cache.write_shard(0, part(0))
    changed = part(0)
    changed["resid_post"] = changed["resid_post"] ^ 1
    with pytest.raises(Conflict, match=old.sha256) as caught:
        cache.write_shard(0, changed)
    assert caught.value.kind == "not_deterministic"
    assert np.array_equal(cache.read_layer("resid_post", 2, 0), part(0)["resid_post"][:, 0])


def test_a_whole_shard_without_record_is_adopted(root):
    cache = create(root)
    (old, _) = cache.write_shard(0, part(0))
    cache.location.delete("_commits/resid_post/00000000.json")
    changed = part(0)
    changed["resid_post"] = changed["resid_post"] ^ 1
    (new, _) = ActivationCache.open(root, cache.digest).write_shard(0, changed)
    assert new.sha256 == old.sha256
    assert np.array_equal(cache.read_layer("resid_post", 2, 0), part(0)["resid_post"][:, 0])


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b"", lambda b: bytes([b[0] ^ 1]) + b[1:]]
)
def test_a_damaged_shard_without_record_is_replaced(root, damage):
    cache = create(root)
    key = A.shard_key(0)
    cache.write_shard(0, part(0))
    whole = cache.location.get(key)
    cache.location.delete("_commits/resid_post/00000000.json")
    cache.location.replace(key, damage(whole))
    cache.write_shard(0, part(0))
    assert cache.location.get(key) == whole
    assert cache.committed() == {0}


def test_wrong_values_are_refused(root):
    cache = create(root)
    good = part(0)
    for bad in (
        {"z": good["z"]},
        {**good, "more": good["z"]},
        {**good, "z": good["z"][1:]},
        {**good, "z": good["z"].astype(np.float64)},
        {**good, "z": good["z"][:, :, 1:]},
    ):
        with pytest.raises(InvalidInput) as caught:
            cache.write_shard(0, bad)
        assert caught.value.kind == "values"
    with pytest.raises(InvalidInput):
        cache.write_shard(2, good)  # the last shard is short
    with pytest.raises(NotFound):
        cache.write_shard(3, good)


def test_twins_writing_the_same_shards(root):
    create(root)
    caches = [create(root) for _ in range(4)]

    def write(number):
        return caches[number % 4].write_shard(number // 4, part(number // 4))

    with ThreadPoolExecutor(4) as executor:
        records = list(executor.map(write, range(12)))
    for shard in range(3):
        assert len({r[0].sha256 for r in records[4 * shard : 4 * shard + 4]}) == 1
    cache = create(root)
    cache.seal()
    assert list(cache.verify()) == []


def damaged(cache, key, change):
    cache.location.replace(key, change(cache.location.get(key)))
    return ActivationCache.open(cache._root, cache.digest)


def test_a_changed_byte_is_found(root):
    cache = fill(root)
    key = A.shard_key(1)
    offset = 2 * A.stored_chunk_nbytes + 3  # first chunk of the second layer
    cache = damaged(cache, key, lambda b: b[:offset] + bytes([b[offset] ^ 4]) + b[offset + 1 :])
    assert len(cache.read_layer("resid_post", 2, 1)) == 64  # the other layer is whole
    for call in (
        lambda: cache.read_layer("resid_post", 5, 1),
        lambda: cache.read_rows("resid_post", 5, [64]),
        lambda: list(cache.scan("resid_post", [5])),
    ):
        with pytest.raises(Corrupt, match="resid_post/c/1/0/0: crc32c of chunk 0 of layer 5") as c:
            call()
        assert c.value.kind == "shard_checksum"
    (problem,) = cache.verify()
    assert (problem.stream, problem.shard, problem.kind) == ("resid_post", 1, "shard_checksum")
    assert "chunk 0 of layer 5" in problem.detail


def test_a_cut_shard_is_found(root):
    cache = damaged(fill(root), B.shard_key(0), lambda b: b[:-10])
    with pytest.raises(Corrupt, match="z/c/0/0/0") as caught:
        cache.read_layer("z", 0, 0)
    assert caught.value.kind == "shard_index"
    assert [(p.stream, p.shard, p.kind) for p in cache.verify()] == [("z", 0, "shard_size")]


def test_a_shard_without_its_front_is_found(root):
    cache = damaged(fill(root), B.shard_key(0), lambda b: b[100:])  # the index is whole
    with pytest.raises(Corrupt, match="z/c/0/0/0"):
        cache.read_layer("z", 0, 0)


def test_a_shard_that_is_gone_is_found(root):
    cache = fill(root)
    cache.location.delete(B.shard_key(2))
    cache = ActivationCache.open(root, cache.digest)
    with pytest.raises(Corrupt, match="recorded but gone") as caught:
        cache.read_layer("z", 0, 2)
    assert caught.value.kind == "shard_missing"
    assert [(p.stream, p.shard, p.kind) for p in cache.verify()] == [("z", 2, "shard_missing")]


def test_another_valid_shard_in_its_place_is_found(root):
    cache = fill(root)
    cache = damaged(cache, B.shard_key(0), lambda _: cache.location.get(B.shard_key(1)))
    assert [(p.stream, p.shard, p.kind) for p in cache.verify()] == [("z", 0, "shard_checksum")]


def test_damaged_records_are_found(root):
    cache = fill(root)
    key = "_commits/z/00000001.json"
    cache = damaged(cache, key, lambda b: b.replace(b'"shard":1', b'"shard":0'))
    with pytest.raises(Corrupt) as caught:
        cache.read_layer("z", 0, 1)
    assert caught.value.kind == "record"
    cache = damaged(cache, key, lambda _: b"{")
    assert {(p.stream, p.shard, p.kind) for p in cache.verify()} == {
        ("z", 1, "record"),
        ("", -1, "record"),
    }
    cache.location.delete(key)
    assert ("z", 1, "not_committed") in {(p.stream, p.shard, p.kind) for p in cache.verify()}


def test_a_false_marker_is_found(root):
    cache = damaged(
        fill(root), "_COMPLETE", lambda b: b.replace(b'"num_shards":3', b'"num_shards":4')
    )
    assert [(p.shard, p.kind) for p in cache.verify()] == [(-1, "complete_marker")]
    with pytest.raises(Conflict):
        cache.seal()


def test_edited_metadata_is_refused(root):
    cache = fill(root)
    for key, kind, change in (
        ("capture.json", "capture_digest", lambda b: b + b" "),
        ("zarr.json", "array_metadata", lambda _: b"{}"),
        ("z/zarr.json", "array_metadata", lambda b: b.replace(b"NaN", b"0.0")),
    ):
        whole = cache.location.get(key)
        cache.location.replace(key, change(whole))
        with pytest.raises(Corrupt) as caught:
            ActivationCache.open(root, cache.digest)
        assert caught.value.kind == kind
        cache.location.replace(key, whole)
    cache.location.delete("z/zarr.json")
    with pytest.raises(Corrupt):
        ActivationCache.open(root, cache.digest)


def test_pickles(root):
    cache = fill(root)
    again = pickle.loads(pickle.dumps(cache))
    assert again.digest == cache.digest
    assert np.array_equal(again.read_layer("z", 0, 0), cache.read_layer("z", 0, 0))


def test_records_are_small_readable_json(root):
    cache = fill(root)
    record = json.loads(cache.location.get("_commits/z/00000002.json"))
    assert record["rows"] == [128, 150]
    assert record["seconds"] == {"forward": 0.5}
    assert set(record) == {
        *("schema_version", "capture", "stream", "shard"),
        *("rows", "num_bytes", "sha256", "seconds"),
    }
