"""Canonical JSON (RFC 8785): whether bytes are it."""

from __future__ import annotations

import json
from typing import Any, Final

import rfc8785

# Integers of fewer characters are below 2^53, where RFC 8785 ends.
_MAX_PLAIN_CHARS: Final = 15


def read_canonical(data: bytes) -> tuple[Any, bool]:
    """The value of a JSON text, and whether the text is its canonical form.

    Most texts have no number that Python writes otherwise than RFC 8785 does, and no characters
    outside of ASCII; Python's own encoder, in C, tells for these. The reference tells for the rest.

    Raises:
        ValueError: It is not JSON.
        RecursionError: It is nested too deeply.
        rfc8785.CanonicalizationError: It holds a value that has no canonical form.
    """
    is_plain = data.isascii()

    def number(text: str) -> float:
        nonlocal is_plain
        # 1.0 is written 1, and 1e-05 is written 0.00001.
        is_plain = is_plain and text[-2:] != ".0" and "e" not in text and "E" not in text
        value = float(text)
        is_plain = is_plain and repr(value) == text
        return value

    def integer(text: str) -> int:
        nonlocal is_plain
        is_plain = is_plain and len(text) <= _MAX_PLAIN_CHARS
        return int(text)

    def constant(text: str) -> float:
        nonlocal is_plain
        is_plain = False
        return float(text)

    value = json.loads(data, parse_float=number, parse_int=integer, parse_constant=constant)
    if is_plain:
        text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        if text.encode("utf-8", "surrogatepass") == data:
            return value, True
    return value, rfc8785.dumps(value) == data
