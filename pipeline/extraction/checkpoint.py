"""Checkpoint: a model folder's safetensors files, mapped read-only and read tensor by tensor.

`safetensors.safe_open` maps files privately and writable, so that the kernel reserves memory for
all of them: a model larger than the limit of its worker would not even open. A shared, read-only
mapping is page cache only, which costs nothing that the kernel cannot take back.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from pipeline.errors import InvalidInput, NotFound

_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SINGLE: Final = "model.safetensors"


@dataclass(frozen=True, slots=True)
class _MappedFile:
    pages: mmap.mmap
    contents: Tensor  # uint8, the whole file


@dataclass(frozen=True, slots=True)
class _Stored:
    file: _MappedFile
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a model folder by name, as views of the mapped files (never write to them).

    A view begins at the same offset of a page as transformers' own would, so that kernels whose
    rounding depends on alignment compute the same bits from both.
    """

    def __init__(self, stored: Mapping[str, _Stored]) -> None:
        self._stored = stored
        self._mapped = {t.file.contents.untyped_storage().data_ptr() for t in stored.values()}

    @classmethod
    def open(cls, folder: Path, weights: str | None = None) -> Checkpoint:
        """Map the files of a folder.

        Args:
            weights: File or index to read in place of those that `save_pretrained` writes; the
                configuration's ``transformers_weights``.

        Raises:
            NotFound: No such folder, no safetensors weights in it, or a shard is missing.
            InvalidInput: A file is not safetensors, is truncated, or names a tensor twice.
        """
        stored: dict[str, _Stored] = {}
        for path in weight_files(folder, weights):
            for name, tensor in _read(path).items():
                if name in stored:
                    raise _broken(path, f"its tensor {name} is in another file too")
                stored[name] = tensor
        return cls(stored)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._stored[name]
        contents = tensor.file.contents[tensor.start : tensor.stop]
        if tensor.start % tensor.dtype.itemsize:
            # Files need not align their tensors; torch must have them so.
            contents = contents.clone()
        return contents.view(tensor.dtype).view(tensor.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def on_meta(self, name: str) -> Tensor:
        """A tensor's shape and dtype, without its values."""
        tensor = self._stored[name]
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    def is_view(self, tensor: Tensor) -> bool:
        """Whether a tensor's values are the mapped files' own pages."""
        return tensor.untyped_storage().data_ptr() in self._mapped

    def release(self, names: Iterable[str]) -> None:
        """Take some tensors' pages out of this process; they stay in the page cache while it can.

        Views stay valid: the next read maps the pages again.
        """
        if (advice := getattr(mmap, "MADV_DONTNEED", None)) is None:
            return  # Windows, which takes pages out by itself.
        for name in names:
            tensor = self._stored[name]
            start = tensor.start // mmap.PAGESIZE * mmap.PAGESIZE
            if tensor.stop > tensor.start:
                tensor.file.pages.madvise(advice, start, tensor.stop - start)


def touch(view: Tensor) -> None:
    """Read one byte of every page of a view, so that its pages are in memory.

    `MADV_WILLNEED` reads only the first megabyte or so of a range on Linux.
    """
    if view.numel():
        view.detach().reshape(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()


def check_folder(folder: Path) -> None:
    """Refuse a model folder that is not there.

    Raises:
        NotFound: It does not exist. (transformers would take it for the name of a repository.)
    """
    if not folder.is_dir():
        raise NotFound(
            f"model folder {os.fspath(folder)!r} does not exist; expected a folder as "
            "save_pretrained writes it",
            kind="model_folder",
        )


def weight_files(folder: Path, weights: str | None = None) -> list[Path]:
    check_folder(folder)
    names = [weights] if weights else [_SINGLE, f"{_SINGLE}.index.json"]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise NotFound(
            f"model {os.fspath(folder)!r} has no {' or '.join(names)}; expected safetensors "
            "weights as save_pretrained writes them (pickled weights are never read)",
            kind="model_folder",
        )
    if found.suffix != ".json":
        return [found]
    try:
        shards = sorted(set(json.loads(found.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _broken(found, f"it has no weight_map ({error!r})") from error
    absent = [name for name in shards if not (folder / name).is_file()]
    if absent:
        raise NotFound(
            f"model {os.fspath(folder)!r}: {found.name} names {len(shards)} files, and "
            f"{len(absent)} of them are not there, such as {absent[0]}; copy the folder again",
            kind="model_folder",
        )
    return [folder / name for name in shards]


def _read(path: Path) -> dict[str, _Stored]:
    with path.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        begin = 8 + int.from_bytes(opened.read(8), "little")
        if size < 8 or begin > size:
            raise _broken(path, f"its header ends at byte {begin} of {size}")
        try:
            header: dict[str, Any] = json.loads(opened.read(begin - 8))
            header.pop("__metadata__", None)
        except (ValueError, AttributeError) as error:
            raise _broken(path, f"its header is not a JSON object ({error})") from error
        pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        # torch warns that it has no read-only tensors; nothing here writes to weights.
        warnings.filterwarnings("ignore", message=".*not writable.*", category=UserWarning)
        file = _MappedFile(pages, torch.frombuffer(pages, dtype=torch.uint8))
    stored: dict[str, _Stored] = {}
    for name, entry in header.items():
        try:
            start, stop = (begin + int(offset) for offset in entry["data_offsets"])
            shape, dtype = tuple(int(n) for n in entry["shape"]), _DTYPES[entry["dtype"]]
        except (KeyError, TypeError, ValueError) as error:
            raise _broken(path, f"its entry for {name} cannot be read ({error!r})") from error
        expected = math.prod(shape) * dtype.itemsize
        if not begin <= start <= stop <= size or stop - start != expected:
            raise _broken(
                path,
                f"{name} {list(shape)} takes {expected} bytes and is said to be at bytes "
                f"{start} to {stop} of {size}",
            )
        stored[name] = _Stored(file, dtype, shape, start, stop)
    return stored


def _broken(path: Path, what: str) -> InvalidInput:
    return InvalidInput(
        f"{os.fspath(path)!r} is not a whole safetensors file: {what}; copy or save the model "
        "again",
        kind="model_load",
    )
