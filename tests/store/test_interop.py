"""Other Zarr libraries read the cache bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tensorstore as ts
import zarr

from store.activations import ActivationCache
from store.bfloat16 import from_float32
from store.layout import StreamLayout
from store.location import Location
from store.zarr_dtype import BFloat16Bits, register

ROOT = Path(__file__).parents[2]
NUM_ROWS = 150
LAYOUTS = [
    StreamLayout("resid_post", NUM_ROWS, (2, 5, 7), 24, "bfloat16", 64),
    StreamLayout("z", NUM_ROWS, (0, 1), 16, "float32", 64, num_heads=4),
]


def special(shape, seed):
    """Random floats with NaN, infinities, 70000 (too large for float16), -0.0 and a denormal."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    values.reshape(-1)[: 6 * 7 : 7] = [np.nan, np.inf, -np.inf, 70000.0, -0.0, 1e-40]
    values[-1] = np.nan
    return values


VALUES = {
    "resid_post": from_float32(special((NUM_ROWS, 3, 24), 0)),
    "z": special((NUM_ROWS, 2, 16), 1),
}


def fill(root):
    index = pa.table({"prompt": np.arange(NUM_ROWS)})
    cache = ActivationCache.create(root, {"model": "m"}, LAYOUTS, index)
    for shard in cache.missing():
        rows = LAYOUTS[0].shard_rows(shard)
        cache.write_shard(shard, {name: v[rows.start : rows.stop] for name, v in VALUES.items()})
    cache.seal()
    return cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return fill(Location.open(tmp_path_factory.mktemp("cache")))


def assert_same_bits(found, name, index=...):
    wanted = VALUES[name][index]
    assert found.shape == wanted.shape
    assert np.asarray(found).tobytes() == np.ascontiguousarray(wanted).tobytes()


@pytest.mark.parametrize("name", VALUES)
def test_plain_zarr_python(cache, name):
    register()
    array = zarr.open_array(cache.location.local_path(name), mode="r")
    assert_same_bits(array[:], name)
    assert_same_bits(array[70:140, 1:], name, np.s_[70:140, 1:])
    assert array.attrs["layers"] == list(cache.streams[name].layers)
    assert array.metadata.dimension_names == ("row", "layer", "width")
    assert (
        json.loads(json.dumps(array.metadata.to_dict()))["data_type"] == cache.streams[name].dtype
    )


@pytest.mark.parametrize("name", VALUES)
def test_tensorstore(cache, name):
    kvstore = {"driver": "file", "path": f"{cache.location.local_path(name)}/"}
    array = ts.open({"driver": "zarr3", "kvstore": kvstore}).result()
    assert array.dtype.name == cache.streams[name].dtype
    assert_same_bits(array.read().result(), name)
    assert_same_bits(array[100:, :2].read().result(), name, np.s_[100:, :2])


@pytest.mark.parametrize("name", VALUES)
def test_open_zarr_on_disk_and_in_a_bucket(cache, name):
    for group in (cache.open_zarr(), fill(Location.open("memory://").child("x")).open_zarr()):
        assert_same_bits(group[name][:], name)


def test_zarr_reads_a_missing_shard_as_nan(tmp_path):
    index = pa.table({"prompt": np.arange(NUM_ROWS)})
    empty = ActivationCache.create(Location.open(tmp_path), {}, LAYOUTS, index).open_zarr()
    assert np.isnan(empty["z"][:]).all()
    assert (empty["resid_post"][:] == 0x7FC0).all()


def test_zarr_python_writes_bfloat16_that_tensorstore_reads(tmp_path):
    register()
    bits = VALUES["resid_post"]
    array = zarr.create_array(
        tmp_path / "a",
        shape=bits.shape,
        chunks=(32, 1, 24),
        dtype=BFloat16Bits(),
        fill_value=0x7FC0,
    )
    array[:] = bits
    kvstore = {"driver": "file", "path": f"{tmp_path}/a/"}
    assert (
        ts.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result().tobytes()
        == bits.tobytes()
    )


def test_plain_uint16_arrays_stay_usable(tmp_path):
    register()
    array = zarr.create_array(tmp_path / "u", shape=(4,), dtype=np.uint16)
    assert array.metadata.to_dict()["data_type"] == "uint16"


@pytest.mark.parametrize(
    ("json_scalar", "bits"),
    [
        ("NaN", 0x7FC0),
        ("Infinity", 0x7F80),
        ("-Infinity", 0xFF80),
        (1.5, 0x3FC0),
        ("0x7fc1", 0x7FC1),
    ],
)
def test_fill_values(json_scalar, bits):
    dtype = BFloat16Bits()
    assert dtype.from_json_scalar(json_scalar, zarr_format=3) == bits
    assert dtype.to_json_scalar(np.uint16(bits), zarr_format=3) == json_scalar


def test_store_works_without_zarr(tmp_path):
    script = """
import sys
sys.modules["zarr"] = None  # any import of it fails
import numpy as np, pyarrow as pa
from store.activations import ActivationCache
from store.layout import StreamLayout
from store.location import Location
layout = StreamLayout("z", 3, (0,), 4, "float32", 32)
cache = ActivationCache.create(Location.open(sys.argv[1]), {}, [layout], pa.table({"a": [1, 2, 3]}))
cache.write_shard(0, {"z": np.ones((3, 1, 4), np.float32)})
cache.seal()
assert cache.read_layer("z", 0, 0).sum() == 12
for name in ("torch", "transformers", "ray", "grpc"):
    assert name not in sys.modules, name
"""
    subprocess.run([sys.executable, "-c", script, tmp_path], cwd=ROOT, check=True)
