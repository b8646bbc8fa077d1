"""Pure arithmetic of one stream's array: which rows are in which shard, and the Zarr v3 metadata
that says so.

Shapes: R rows of a shard, L layers of the stream, W width; the array is [num_rows, L, W].
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from store.errors import Corrupt, InvalidInput, NotFound

DType = Literal["bfloat16", "float32"]

_ITEMSIZE = {"bfloat16": 2, "float32": 4}
_STREAM = re.compile(r"[a-z][a-z0-9_]{0,62}")
_CHECKSUM_NBYTES = 4
_INDEX_ENTRY_NBYTES = 16


@dataclass(frozen=True, slots=True)
class StreamLayout:
    """How the activations of one stream are cut into shards and chunks.

    A shard holds `rows_per_shard` rows of every layer; an inner chunk holds `rows_per_chunk` rows
    of one layer. Shards have one writer each, so this class hands out shard ranges and never
    smaller ones.

    Attributes:
        stream: Name of the stream, for example "resid_post"; also the name of its array.
        num_rows: Rows in all; the last shard may be short.
        layers: Model layer numbers of axis 1, increasing.
        width: Values a row and layer.
        dtype: As stored. Never float16: real activations overflow it.
        rows_per_shard: A multiple of `rows_per_chunk`.
        rows_per_chunk: Rows that one random read fetches.
        num_heads: Heads that `width` divides into (stream `z`), if any.

    Raises:
        InvalidInput: kind "layout", a field is out of range; the message names it.
    """

    stream: str
    num_rows: int
    layers: tuple[int, ...]
    width: int
    dtype: DType
    rows_per_shard: int
    rows_per_chunk: int = 32
    num_heads: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        if problem := self._problem():
            raise InvalidInput(f"stream {self.stream!r}: {problem}", kind="layout")

    def _problem(self) -> str | None:
        if _STREAM.fullmatch(self.stream) is None:
            return "a stream's name is of lowercase letters, digits and _, a letter first"
        if self.dtype not in _ITEMSIZE:
            return f"dtype must be bfloat16 or float32 (float16 overflows), got {self.dtype!r}"
        for name in ("num_rows", "width", "rows_per_chunk", "rows_per_shard"):
            if getattr(self, name) < 1:
                return f"{name} must be at least 1, got {getattr(self, name)}"
        if self.rows_per_shard % self.rows_per_chunk:
            per_shard, per_chunk = self.rows_per_shard, self.rows_per_chunk
            return f"rows_per_shard {per_shard} is not a multiple of rows_per_chunk {per_chunk}"
        if not self.layers or self.layers[0] < 0 or list(self.layers) != sorted(set(self.layers)):
            return f"layers must be increasing numbers from 0, at least one, got {self.layers}"
        if self.num_heads is not None and (self.num_heads < 1 or self.width % self.num_heads):
            return f"num_heads {self.num_heads} does not divide width {self.width}"
        return None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.num_rows, len(self.layers), self.width

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.rows_per_shard)

    @property
    def itemsize(self) -> int:
        """Bytes a value."""
        return _ITEMSIZE[self.dtype]

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of an inner chunk's values, without its checksum."""
        return self.rows_per_chunk * self.width * self.itemsize

    @property
    def stored_chunk_nbytes(self) -> int:
        """Bytes of an inner chunk in the shard, with its crc32c."""
        return self.chunk_nbytes + _CHECKSUM_NBYTES

    @property
    def chunks_per_layer(self) -> int:
        """Inner chunks a layer in a full shard, those past the last row included."""
        return self.rows_per_shard // self.rows_per_chunk

    @property
    def index_nbytes(self) -> int:
        """Bytes of the shard index at a shard's end, with its crc32c."""
        return self.chunks_per_layer * len(self.layers) * _INDEX_ENTRY_NBYTES + _CHECKSUM_NBYTES

    def shard_rows(self, shard: int) -> range:
        """Rows of the array that a shard holds.

        Raises:
            NotFound: no such shard.
        """
        self._check_shard(shard)
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.num_rows))

    def shard_of_row(self, row: int) -> int:
        """The shard that holds a row.

        Raises:
            InvalidInput: no such row.
        """
        if not 0 <= row < self.num_rows:
            message = f"stream {self.stream!r} has rows 0 to {self.num_rows - 1}, asked for {row}"
            raise InvalidInput(message, kind="rows")
        return row // self.rows_per_shard

    def present_chunks(self, shard: int) -> int:
        """Inner chunks a layer with at least one row of this shard; the others are not stored."""
        return -(-len(self.shard_rows(shard)) // self.rows_per_chunk)

    def shard_nbytes(self, shard: int) -> int:
        """Bytes of the finished shard object."""
        return (
            self.present_chunks(shard) * len(self.layers) * self.stored_chunk_nbytes
            + self.index_nbytes
        )

    def shard_key(self, shard: int) -> str:
        """Key of the shard under the cache, for example "resid_post/c/3/0/0"."""
        self._check_shard(shard)
        return f"{self.stream}/c/{shard}/0/0"

    def layer_position(self, layer: int) -> int:
        """Place of a model layer on axis 1.

        Raises:
            NotFound: the layer was not captured.
        """
        if layer not in self.layers:
            message = (
                f"stream {self.stream!r} holds layers {list(self.layers)}, asked for layer {layer}"
            )
            raise NotFound(message, kind="no_layer")
        return self.layers.index(layer)

    def array_metadata(self) -> dict[str, Any]:
        """The array's zarr.json (Zarr v3): sharded, little-endian, crc32c on chunks and index,
        missing reads as NaN.
        """
        checked = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {
                "name": "regular",
                "configuration": {
                    "chunk_shape": [self.rows_per_shard, len(self.layers), self.width]
                },
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": "NaN",
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": [self.rows_per_chunk, 1, self.width],
                        "codecs": checked,
                        "index_codecs": checked,
                        "index_location": "end",
                    },
                }
            ],
            "dimension_names": ["row", "layer", "width"],
            "attributes": {
                "stream": self.stream,
                "layers": list(self.layers),
                "num_heads": self.num_heads,
            },
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> StreamLayout:
        """The layout that wrote this zarr.json.

        Raises:
            Corrupt: kind "array_metadata", it is not one of ours, or was edited.
        """
        try:
            attributes = metadata["attributes"]
            layout = cls(
                stream=attributes["stream"],
                num_rows=metadata["shape"][0],
                layers=tuple(attributes["layers"]),
                width=metadata["shape"][2],
                dtype=cast("DType", metadata["data_type"]),
                rows_per_shard=metadata["chunk_grid"]["configuration"]["chunk_shape"][0],
                rows_per_chunk=metadata["codecs"][0]["configuration"]["chunk_shape"][0],
                num_heads=attributes["num_heads"],
            )
        except (KeyError, IndexError, TypeError, ValueError, InvalidInput) as error:
            message = f"zarr.json is not one that this store writes: {error!r}"
            raise Corrupt(message, kind="array_metadata") from error
        if layout.array_metadata() != dict(metadata):
            message = (
                f"zarr.json of stream {layout.stream!r} differs from what this store writes; it "
                "was edited"
            )
            raise Corrupt(message, kind="array_metadata")
        return layout

    def _check_shard(self, shard: int) -> None:
        if not 0 <= shard < self.num_shards:
            message = (
                f"stream {self.stream!r} has shards 0 to {self.num_shards - 1}, asked for {shard}"
            )
            raise NotFound(message, kind="no_shard")


def choose_rows_per_shard(
    num_layers: int,
    width: int | Sequence[int],
    itemsize: int,
    target_bytes: int = 128 << 20,
    *,
    rows_per_chunk: int = 32,
) -> int:
    """Rows a shard so that the widest stream's shard comes nearest to `target_bytes` without
    passing it.

    Args:
        num_layers: Layers a stream.
        width: Values a row and layer, of one stream or of each.
        itemsize: Bytes a value.
        target_bytes: 64 to 256 MiB suits buckets: fewer requests than small objects, cheap to lose
            and redo.
        rows_per_chunk: The result is a multiple of this, and at least this.
    """
    widest = width if isinstance(width, int) else max(width)
    if min(num_layers, widest, itemsize, target_bytes, rows_per_chunk) < 1:
        raise InvalidInput(
            "choose_rows_per_shard: every argument must be at least 1", kind="layout"
        )
    rows = target_bytes // (num_layers * widest * itemsize)
    return max(rows // rows_per_chunk, 1) * rows_per_chunk
