"""The bytes of one shard of a Zarr v3 array (codec `sharding_indexed`), built and read by hand.

A shard is inner chunks, each followed by its crc32c, then an index. Zarr lets the chunks lie in any
order; here they lie layer by layer, so that one layer of one shard is one contiguous range.
Building the bytes ourselves costs one copy and the checksums, about what writing the file costs:
half of what tensorstore takes for the same bytes, less than that of zarr-python
(docs/adr/0002-shard-bytes-of-our-own.md).

Shapes: R rows of the shard, L layers, W width, C chunks a layer in a full shard, P of them present.
"""

from __future__ import annotations

from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from store.bfloat16 import QUIET_NAN_BITS
from store.errors import REPAIR, Corrupt, InvalidInput
from store.layout import StreamLayout

_MISSING = np.uint64(2**64 - 1)
_STORED_DTYPE: dict[str, np.dtype[Any]] = {"bfloat16": np.dtype("<u2"), "float32": np.dtype("<f4")}
_FILL = {"bfloat16": np.uint16(QUIET_NAN_BITS), "float32": np.float32("nan")}

Index = npt.NDArray[np.uint64]
"""A shard index, [C, L, 2]: offset and stored bytes of each inner chunk, both 2^64 - 1 where it is
not stored.
"""


def stored_dtype(layout: StreamLayout) -> np.dtype[Any]:
    """The numpy dtype of a stream's values: float32, or uint16 for the bits of bfloat16."""
    return _STORED_DTYPE[layout.dtype]


def build_shard(
    values_RLW: npt.NDArray[Any],
    layout: StreamLayout,
    *,
    buffer: npt.NDArray[np.uint8] | None = None,
) -> memoryview:
    """The bytes of a shard; the same values always give the same bytes.

    Rows that fill up the last chunk are NaN; chunks past it are marked as not stored.

    Args:
        values_RLW: 1 to rows_per_shard rows; uint16 bits for bfloat16, else float32. Any strides.
        layout: The stream's layout.
        buffer: Scratch memory of at least the shard's size, to be reused from shard to shard: fresh
            memory costs about as much as the copy into it. The result is a view of it.

    Returns:
        A one-dimensional memoryview of bytes.

    Raises:
        InvalidInput: kind "values", wrong dtype or shape.
    """
    dtype = stored_dtype(layout)
    num_rows, num_layers = _check_values(values_RLW, layout, dtype)
    rows_per_chunk, chunk_nbytes = layout.rows_per_chunk, layout.chunk_nbytes
    stored_nbytes = layout.stored_chunk_nbytes
    present = -(-num_rows // rows_per_chunk)
    total = present * num_layers * stored_nbytes + layout.index_nbytes
    shard = np.empty(total, np.uint8) if buffer is None else buffer[:total]
    offset = 0
    for layer in range(num_layers):
        for start in range(0, num_rows, rows_per_chunk):
            body = shard[offset : offset + chunk_nbytes]
            chunk_RW = body.view(dtype).reshape(rows_per_chunk, layout.width)
            rows_RW = values_RLW[start : start + rows_per_chunk, layer]
            chunk_RW[: len(rows_RW)] = rows_RW
            chunk_RW[len(rows_RW) :] = _FILL[layout.dtype]
            # The chunk is still in the processor's cache, so its checksum costs next to nothing
            # here.
            shard[offset + chunk_nbytes : offset + stored_nbytes] = np.frombuffer(
                _checksum(body), np.uint8
            )
            offset += stored_nbytes
    index = np.ascontiguousarray(expected_index(layout, present)).view(np.uint8).reshape(-1)
    shard[offset:-4] = index
    shard[-4:] = np.frombuffer(_checksum(index), np.uint8)
    return shard.data


def expected_index(layout: StreamLayout, present_chunks: int) -> Index:
    """The index of a shard in which each layer has `present_chunks` chunks, laid layer by layer."""
    num_layers = len(layout.layers)
    index_CLE = np.full((layout.chunks_per_layer, num_layers, 2), _MISSING, dtype="<u8")
    order_PL = np.arange(num_layers) * present_chunks + np.arange(present_chunks)[:, None]
    index_CLE[:present_chunks, :, 0] = order_PL * layout.stored_chunk_nbytes
    index_CLE[:present_chunks, :, 1] = layout.stored_chunk_nbytes
    return index_CLE


def read_index(tail: bytes, layout: StreamLayout, shard: int, *, where: str) -> Index:
    """Parse and check a shard's index.

    Args:
        tail: The last `layout.index_nbytes` bytes of the object.
        layout: The stream's layout.
        shard: Which shard, as the last one has fewer chunks.
        where: What to call the shard in errors.

    Raises:
        Corrupt: kind "shard_index", the object is cut off or damaged, or another writer laid it out
            differently.
    """
    if len(tail) != layout.index_nbytes:
        message = (
            f"shard {where}: index of {layout.index_nbytes} bytes expected, the object has "
            f"{len(tail)}"
        )
        raise Corrupt(f"{message}; it is cut off, {REPAIR}", kind="shard_index")
    body, stored = tail[:-4], tail[-4:]
    if (actual := _checksum(body)) != stored:
        message = (
            f"shard {where}: crc32c of the index is {actual[::-1].hex()}, stored is "
            f"{stored[::-1].hex()}; "
            f"it is cut off or damaged, {REPAIR}"
        )
        raise Corrupt(message, kind="shard_index")
    index_CLE = np.frombuffer(body, "<u8").reshape(layout.chunks_per_layer, len(layout.layers), 2)
    if not np.array_equal(index_CLE, expected_index(layout, layout.present_chunks(shard))):
        message = (
            f"shard {where}: its chunks do not lie layer by layer, so this store did not write it; "
            f"{REPAIR}"
        )
        raise Corrupt(message, kind="shard_index")
    return index_CLE


def layer_range(index: Index, layout: StreamLayout, layer_position: int) -> tuple[int, int]:
    """Where one layer's chunks lie in the shard: (start, length) in bytes, checksums included."""
    present = int((index[:, layer_position, 0] != _MISSING).sum())
    return int(index[0, layer_position, 0]), present * layout.stored_chunk_nbytes


def chunk_range(index: Index, layer_position: int, chunk: int) -> tuple[int, int]:
    """Where one inner chunk lies in the shard: (start, length) in bytes, checksum included."""
    offset, nbytes = index[chunk, layer_position]
    return int(offset), int(nbytes)


def decode_chunks(
    stored: bytes | memoryview,
    layout: StreamLayout,
    *,
    where: str,
    layer: int,
    first_chunk: int = 0,
) -> npt.NDArray[Any]:
    """Check and unwrap consecutive chunks of one layer.

    Args:
        stored: Chunks with their checksums, as from `layer_range` or `chunk_range`.
        layout: The stream's layout.
        where: What to call the shard in errors.
        layer: Model layer, for errors.
        first_chunk: Number of the first chunk within the layer, for errors.

    Returns:
        [chunks * rows_per_chunk, W], the padding of a last chunk included; uint16 bits or float32.

    Raises:
        Corrupt: kind "shard_checksum", naming the chunk.
    """
    chunks_PB = np.frombuffer(stored, np.uint8).reshape(-1, layout.stored_chunk_nbytes)
    dtype = stored_dtype(layout)
    values_RW = np.empty((len(chunks_PB) * layout.rows_per_chunk, layout.width), dtype)
    bytes_PB = values_RW.view(np.uint8).reshape(len(chunks_PB), layout.chunk_nbytes)
    for number, chunk_B in enumerate(chunks_PB):
        bytes_PB[number] = chunk_B[:-4]
        _check_chunk(bytes_PB[number], chunk_B[-4:], where, layer, first_chunk + number)
    return values_RW


def layer_parts(
    values_RW: npt.NDArray[Any], checksums_P4: npt.NDArray[np.uint8]
) -> list[memoryview]:
    """The memory into which a `layer_range` is to be read, part by part: chunks without what lies
    between them, and that elsewhere. So the values need no copy.

    Args:
        values_RW: Contiguous [P * rows_per_chunk, W].
        checksums_P4: Contiguous [P, 4].
    """
    bytes_PB = values_RW.view(np.uint8).reshape(len(checksums_P4), -1)
    return [part.data for pair in zip(bytes_PB, checksums_P4, strict=True) for part in pair]


def check_layer(
    values_RW: npt.NDArray[Any], checksums_P4: npt.NDArray[np.uint8], *, where: str, layer: int
) -> None:
    """Compare the chunks of a layer with their checksums; arguments and errors as for
    `layer_parts` and `decode_chunks`.
    """
    bytes_PB = values_RW.view(np.uint8).reshape(len(checksums_P4), -1)
    for number, (chunk_B, checksum_4) in enumerate(zip(bytes_PB, checksums_P4, strict=True)):
        _check_chunk(chunk_B, checksum_4, where, layer, number)


def check_chunks(
    stored: bytes, layout: StreamLayout, shard: int, *, where: str, first_chunk: int
) -> None:
    """Check consecutive chunks of a shard, of one layer or of several, without unwrapping them.

    Args:
        stored: Chunks with their checksums, in the order in which they lie in the shard.
        layout: The stream's layout.
        shard: Which shard, as the last one has fewer chunks.
        where: What to call the shard in errors.
        first_chunk: Number of the first chunk within the shard.

    Raises:
        Corrupt: kind "shard_checksum", naming layer and chunk.
    """
    present = layout.present_chunks(shard)
    chunks_PB = np.frombuffer(stored, np.uint8).reshape(-1, layout.stored_chunk_nbytes)
    for number, chunk_B in enumerate(chunks_PB, start=first_chunk):
        layer = layout.layers[number // present]
        _check_chunk(chunk_B[:-4], chunk_B[-4:], where, layer, number % present)


def decode_layer(
    stored: bytes | memoryview, layout: StreamLayout, shard: int, *, where: str, layer: int
) -> npt.NDArray[Any]:
    """One layer of a shard, [rows, W], from the bytes of its `layer_range`. Errors as for
    `decode_chunks`.
    """
    return decode_chunks(stored, layout, where=where, layer=layer)[: len(layout.shard_rows(shard))]


def decode_shard(
    data: bytes | memoryview, layout: StreamLayout, shard: int, *, where: str
) -> npt.NDArray[Any]:
    """A whole shard, [rows, L, W], with every checksum verified.

    Raises:
        Corrupt: kind "shard_size", "shard_index" or "shard_checksum".
    """
    if len(data) != layout.shard_nbytes(shard):
        message = (
            f"shard {where}: {layout.shard_nbytes(shard)} bytes expected, it has {len(data)}; "
            f"{REPAIR}"
        )
        raise Corrupt(message, kind="shard_size")
    view = memoryview(data)
    index = read_index(bytes(view[-layout.index_nbytes :]), layout, shard, where=where)
    num_rows = len(layout.shard_rows(shard))
    values_RLW = np.empty((num_rows, len(layout.layers), layout.width), stored_dtype(layout))
    for position, layer in enumerate(layout.layers):
        start, length = layer_range(index, layout, position)
        stored = view[start : start + length]
        values_RLW[:, position] = decode_layer(stored, layout, shard, where=where, layer=layer)
    return values_RLW


def _check_chunk(
    body_B: npt.NDArray[np.uint8],
    stored_B: npt.NDArray[np.uint8],
    where: str,
    layer: int,
    chunk: int,
) -> None:
    actual, expected = _checksum(body_B), stored_B.tobytes()
    if actual != expected:
        message = (
            f"shard {where}: crc32c of chunk {chunk} of layer {layer} is {actual[::-1].hex()}, "
            f"stored is {expected[::-1].hex()}; the bytes are damaged, {REPAIR}"
        )
        raise Corrupt(message, kind="shard_checksum")


def _check_values(
    values_RLW: npt.NDArray[Any], layout: StreamLayout, dtype: np.dtype[Any]
) -> tuple[int, int]:
    if values_RLW.dtype != dtype:
        hint = "; view bfloat16 tensors as uint16" if layout.dtype == "bfloat16" else ""
        message = (
            f"stream {layout.stream!r}: expected dtype {dtype.name}, got {values_RLW.dtype}{hint}"
        )
        raise InvalidInput(message, kind="values")
    _, num_layers, width = layout.shape
    shape = values_RLW.shape
    if (
        len(shape) != 3
        or shape[1:] != (num_layers, width)
        or not 1 <= shape[0] <= layout.rows_per_shard
    ):
        message = (
            f"stream {layout.stream!r}: expected shape [1 to {layout.rows_per_shard}, "
            f"{num_layers}, {width}] "
            f"(row, layer, width), got {list(shape)}"
        )
        raise InvalidInput(message, kind="values")
    return shape[0], num_layers


def _checksum(data: bytes | npt.NDArray[np.uint8]) -> bytes:
    # The library's C code takes numpy arrays as they are, but refuses memoryviews.
    crc: int = google_crc32c.value(data)
    return crc.to_bytes(4, "little")
