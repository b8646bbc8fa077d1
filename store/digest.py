"""Canonical JSON and sha256: how things get their names."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

import rfc8785

from store.errors import InvalidInput

if TYPE_CHECKING:
    from typing_extensions import Buffer

_DIGEST = re.compile(r"[0-9a-f]{64}")


def canonical_json(obj: Any) -> bytes:
    """The one byte form of a JSON value (RFC 8785), so that equal values have equal digests.

    Raises:
        InvalidInput: not a JSON value: NaN or infinity, an integer beyond ±(2^53 - 1), a key that
            is not a string, a lone surrogate, or an object of another type.
    """
    try:
        return rfc8785.dumps(obj)
    except (rfc8785.CanonicalizationError, UnicodeEncodeError) as error:
        message = (
            f"value cannot be written as canonical JSON: {error}; use finite numbers, integers "
            "within 2^53, strings, lists and dicts with string keys"
        )
        raise InvalidInput(message, kind="json") from error


def sha256_hex(data: Buffer) -> str:
    """Lowercase hexadecimal sha256 of `data`, 64 characters. Large buffers release the GIL."""
    return hashlib.sha256(data).hexdigest()


def check_digest(digest: str) -> str:
    """Return `digest` unchanged if it is 64 lowercase hexadecimal digits.

    Raises:
        InvalidInput: it is not; the message shows what was given.
    """
    if not isinstance(digest, str) or _DIGEST.fullmatch(digest) is None:
        message = f"a digest is 64 lowercase hexadecimal digits (sha256), got {digest!r}"
        raise InvalidInput(message, kind="digest")
    return digest
