"""bfloat16 for zarr-python, which has none: on disk the registered name "bfloat16", in numpy the
uint16 bits.

`register()` makes zarr-python open this store's arrays; installed packages may name `BFloat16Bits`
in the entry point group `zarr.data_type` instead. Only this module imports zarr, so that nothing
else needs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import zarr
import zarr.storage
from zarr.core.dtype import data_type_registry
from zarr.core.dtype.common import DataTypeValidationError, HasEndianness, HasItemSize
from zarr.core.dtype.wrapper import ZDType

from store.bfloat16 import QUIET_NAN_BITS, from_float32, to_float32
from store.location import Location

ZarrFormat = Literal[2, 3]

_WORDS = {"NaN": QUIET_NAN_BITS, "Infinity": 0x7F80, "-Infinity": 0xFF80}


@dataclass(frozen=True, kw_only=True)
class BFloat16Bits(ZDType[np.dtypes.UInt16DType, np.uint16], HasEndianness, HasItemSize):  # type: ignore[misc]
    """Zarr data type "bfloat16" over uint16 bits."""

    dtype_cls: ClassVar[type[np.dtypes.UInt16DType]] = np.dtypes.UInt16DType
    _zarr_v3_name: ClassVar[Literal["bfloat16"]] = "bfloat16"

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        # Never inferred: claiming numpy's uint16 would make every plain uint16 array ambiguous to
        # zarr.
        raise DataTypeValidationError(
            f"pass dtype=BFloat16Bits() explicitly; {dtype} is not taken for bfloat16"
        )

    def to_native_dtype(self) -> np.dtypes.UInt16DType:
        # The bytes codec asks for the order on disk, and takes it from here.
        order: Literal["<", ">"] = "<" if self.endianness == "little" else ">"
        return cast("np.dtypes.UInt16DType", np.dtypes.UInt16DType().newbyteorder(order))

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        raise DataTypeValidationError(f"bfloat16 exists in Zarr v3 only, got {data!r}")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data == cls._zarr_v3_name:
            return cls()
        raise DataTypeValidationError(f"expected {cls._zarr_v3_name!r}, got {data!r}")

    def to_json(self, zarr_format: ZarrFormat) -> Any:
        if zarr_format == 2:
            raise ValueError("bfloat16 exists in Zarr v3 only")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, int | np.integer)

    def cast_scalar(self, data: object) -> np.uint16:
        if not self._check_scalar(data):
            raise TypeError(f"a bfloat16 scalar is given as its 16 bits, got {data!r}")
        return np.uint16(cast("int", data))

    def default_scalar(self) -> np.uint16:
        return np.uint16(0)

    def from_json_scalar(self, data: Any, *, zarr_format: ZarrFormat) -> np.uint16:
        if isinstance(data, str):
            return np.uint16(_WORDS[data] if data in _WORDS else int(data, 16))
        return cast("np.uint16", from_float32(np.array([data], np.float32))[0])

    def to_json_scalar(self, data: object, *, zarr_format: ZarrFormat) -> Any:
        bits = self.cast_scalar(data)
        value = float(to_float32(np.array([bits], np.uint16))[0])
        if np.isfinite(value):
            return value
        words = {number: word for word, number in _WORDS.items()}
        return words.get(
            int(bits), f"0x{int(bits):04x}"
        )  # other NaNs keep their payload as hexadecimal

    @property
    def item_size(self) -> int:
        return 2


def register() -> None:
    """Make zarr-python in this process open bfloat16 arrays; calling it again changes nothing."""
    data_type_registry.register("bfloat16", BFloat16Bits)


def open_group(location: Location) -> zarr.Group:
    """A group that lies at a location, read-only, its bfloat16 as bits."""
    register()
    if remote := location.obstore_and_prefix():
        store = zarr.storage.ObjectStore(remote[0], read_only=True)
        return zarr.open_group(store, path=remote[1], mode="r", zarr_format=3)
    local = zarr.storage.LocalStore(str(location.local_path()), read_only=True)
    return zarr.open_group(local, mode="r", zarr_format=3)
