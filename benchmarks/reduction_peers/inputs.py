"""A cache to reduce, the same rows in the formats of others, and an empty page cache.

Shapes: A array rows, L layers, W width.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from store.activations import ActivationCache
from store.bfloat16 import to_float32
from store.layout import StreamLayout, choose_rows_per_shard
from store.location import Location

STREAM: Final = "resid_post"
LAYERS: Final = 32
WIDTH: Final = 4096
"""Those of a model of 8B."""
BYTES_PER_ROW: Final = LAYERS * WIDTH * 2
_CHUNK_NBYTES: Final = 64 << 20


def write_cache(store: Path, num_rows: int) -> ActivationCache:
    """A cache of pairs that lie side by side, all of them for training.

    Every shard has the same values, moved along by a few places: noise takes longer to draw than
    to write, and nobody here compresses.
    """
    layout = StreamLayout(
        STREAM,
        num_rows,
        tuple(range(LAYERS)),
        WIDTH,
        "bfloat16",
        choose_rows_per_shard(LAYERS, WIDTH, 2),
    )
    index = pa.table(
        {
            "pair": pa.array(np.arange(num_rows) // 2).cast(pa.string()),
            "label": label_of(num_rows),
            "split": pa.repeat(pa.scalar("train"), num_rows),
        }
    )
    cache = ActivationCache.create(Location.open(store), {"rows": num_rows}, [layout], index)
    random = np.random.default_rng(0)
    normal = random.standard_normal((layout.rows_per_shard, LAYERS, WIDTH), np.float32)
    normal += random.standard_normal((LAYERS, WIDTH), np.float32) * 10
    bits_RLW = (normal.view(np.uint32) >> 16).astype(np.uint16)
    for shard in cache.missing():
        rows = len(layout.shard_rows(shard))
        cache.write_shard(shard, {STREAM: np.roll(bits_RLW, 7 * shard, axis=2)[:rows]})
    cache.seal()
    return cache


def label_of(num_rows: int) -> NDArray[np.bool_]:
    """Bool [A], the class of each row."""
    return np.asarray(np.arange(num_rows) % 2 == 0)


def write_npy(cache: ActivationCache, path: Path, dtype: str) -> None:
    """The same rows as one [A, L, W] array in a file that numpy can map.

    Args:
        dtype: ``uint16``, the bits of bfloat16, as numpy has no such numbers; or ``float32``.
    """
    values_ALW = np.lib.format.open_memmap(path, "w+", np.dtype(dtype), cache.streams[STREAM].shape)
    for rows, layer, values_RW in _layers(cache):
        values_ALW[rows.start : rows.stop, layer] = _as(values_RW, dtype)
    values_ALW.flush()


def write_zarr(cache: ActivationCache, path: Path, dtype: str) -> None:
    """The same rows as one [A, L, W] zarr array of large chunks of all layers, not compressed:
    what dask is fastest on.

    Args:
        dtype: As for `write_npy`.
    """
    import zarr

    num_rows = max(_CHUNK_NBYTES // (LAYERS * WIDTH * np.dtype(dtype).itemsize), 1)
    array: Any = zarr.create_array(
        str(path),
        shape=cache.streams[STREAM].shape,
        chunks=(num_rows, LAYERS, WIDTH),
        dtype=dtype,
        compressors=None,
        zarr_format=3,
    )
    shard_RLW = np.empty((cache.streams[STREAM].rows_per_shard, LAYERS, WIDTH), dtype)
    for rows, layer, values_RW in _layers(cache):
        shard_RLW[: len(rows), layer] = _as(values_RW, dtype)
        if layer == LAYERS - 1:
            array[rows.start : rows.stop] = shard_RLW[: len(rows)]


def files(folder: Path) -> list[Path]:
    """All files in a folder, or the file itself."""
    return sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else [folder]


def forget(paths: Sequence[Path]) -> None:
    """Take files out of the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            # Pages that are not written yet would stay.
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _layers(cache: ActivationCache) -> Iterator[tuple[range, int, NDArray[Any]]]:
    for shard, layer, values_RW in cache.scan(STREAM):
        yield cache.streams[STREAM].shard_rows(shard), layer, values_RW


def _as(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    return values if dtype == "uint16" else to_float32(values)
