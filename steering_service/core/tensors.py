"""Tensors of a payload, without copying them.

The safetensors library copies every tensor out of the bytes that it is given. Payloads as we write
them are read in place instead; whatever is not exactly such a payload is left to the library, which
says what is wrong with it.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

_LENGTH_BYTES: Final = 8
# What the library accepts.
_MAX_HEADER_BYTES: Final = 100_000_000
_FLOAT32: Final = np.dtype("<f4")
_METADATA: Final = "__metadata__"


def load_tensors(data: bytes) -> dict[str, NDArray[Any]]:
    """Tensors by name; float32 ones are views of `data`, which cannot be written to.

    Args:
        data: A safetensors file.

    Raises:
        safetensors.SafetensorError, ValueError, KeyError, TypeError: It is none, or holds a dtype
            that numpy does not know.
    """
    views = _views(data)
    return dict(safetensors.numpy.load(data)) if views is None else views


def is_immutable(array: NDArray[Any]) -> bool:
    """Whether nobody can change its values any more: a view of bytes."""
    base: object = array
    while isinstance(base, np.ndarray):
        if base.flags.writeable:
            return False
        base = base.base
    return isinstance(base, bytes)


def _views(data: bytes) -> dict[str, NDArray[Any]] | None:
    """None: not float32 throughout, or not a file of safetensors."""
    header_bytes = int.from_bytes(data[:_LENGTH_BYTES], "little")
    start = _LENGTH_BYTES + header_bytes
    if header_bytes > _MAX_HEADER_BYTES or not _LENGTH_BYTES < start <= len(data) or start % 4:
        return None
    try:
        header = json.loads(data[_LENGTH_BYTES:start].decode())
        records = [
            (*record["data_offsets"], name, tuple(record["shape"]))
            for name, record in header.items()
            if record["dtype"] == "F32" and record.keys() == {"dtype", "shape", "data_offsets"}
        ]
        if len(records) != len(header) or not all(_is_record(*record) for record in records):
            return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    views: dict[str, NDArray[Any]] = {}
    end = 0
    for first, last, name, shape in sorted(records):
        count = math.prod(shape)
        if first != end or last - first != 4 * count:
            return None
        if not count:
            return None  # numpy has no view of nothing
        views[name] = np.frombuffer(data, _FLOAT32, count, start + first).reshape(shape)
        end = last
    return views if start + end == len(data) else None


def _is_record(first: object, last: object, name: object, shape: tuple[object, ...]) -> bool:
    numbers = (first, last, *shape)
    return name != _METADATA and all(type(number) is int and number >= 0 for number in numbers)
