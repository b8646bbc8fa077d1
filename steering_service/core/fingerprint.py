"""Which model is this: a digest of the files that decide what its activations mean."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Final

import rfc8785

from steering_service.core.errors import NotFound

_CHUNK: Final = 1 << 22


def model_fingerprint(folder: str | os.PathLike[str]) -> str:
    """Digest of a model folder's weights.

    The sha256 of the canonical JSON {file name: sha256 of its bytes} over every ``*.safetensors``
    file. Names count, since shards are found by name. config.json does not: it differs between
    library versions that load the same weights.

    Args:
        folder: A folder as ``save_pretrained`` writes it.

    Returns:
        64 lowercase hex digits.

    Raises:
        NotFound: The folder does not exist or holds no safetensors file.
    """
    path = Path(folder)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        what = "has no *.safetensors file" if path.is_dir() else "is not a folder"
        raise NotFound(
            f"model {str(path)!r} {what}; expected a folder written by save_pretrained with "
            "safetensors weights (pickled weights are never read)",
            kind="model_folder",
        )
    return hashlib.sha256(rfc8785.dumps({f.name: _sha256_of(f) for f in files})).hexdigest()


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
