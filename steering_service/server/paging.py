"""Pages: how many entries a caller gets at once."""

from __future__ import annotations

from typing import Final

from steering_service.core.errors import InvalidInput

# The store's listings give at most 1000.
MAX_PAGE: Final = 500
DEFAULT_PAGE: Final = 100


def page_size(asked: int) -> int:
    """Entries on a page: the default for 0.

    Raises:
        InvalidInput: Above the maximum.
    """
    if asked > MAX_PAGE:
        raise InvalidInput(f"page_size {asked}; at most {MAX_PAGE}", kind="page_size")
    return asked or DEFAULT_PAGE
