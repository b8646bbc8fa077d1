"""Digests of artifacts as people give them: whole, or their first digits."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from pipeline.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from steering_service.client.operator import Operator

MIN_DIGITS: Final = 8
_PREFIX: Final = re.compile(r"[0-9a-f]{8,64}")
_WHOLE: Final = 64


def looks_like_digest(text: str) -> bool:
    """Whether it is 8 to 64 lowercase hex digits."""
    return _PREFIX.fullmatch(text) is not None


def resolve(operator: Operator, text: str) -> str:
    """The digest of the one published artifact that begins with `text`.

    A whole digest is returned as it is: whether it exists is for the service to say. For less, the
    list of artifacts is read.

    Raises:
        InvalidInput: Not 8 to 64 lowercase hex digits, or several artifacts begin so.
        NotFound: None does.
    """
    if not looks_like_digest(text):
        hint = f"`steerage list` shows them; the first {MIN_DIGITS} digits are enough"
        raise InvalidInput(
            f"artifact {text[:80]!r}: expected {MIN_DIGITS} to 64 lowercase hex digits; {hint}",
            kind="digest",
        )
    if len(text) == _WHOLE:
        return text
    found = []
    for entry in operator.list():
        if entry.digest.startswith(text):
            found.append(entry.digest)
        elif entry.digest > text:
            # They come in ascending order: none of the rest begins so.
            break
    if not found:
        raise NotFound(
            f"no artifact that you may see begins with {text}; `steerage list` shows them",
            kind="no_artifact",
        )
    if len(found) > 1:
        raise InvalidInput(
            f"{len(found)} artifacts begin with {text}: {', '.join(found[:5])}; give more digits",
            kind="ambiguous_digest",
        )
    return found[0]
