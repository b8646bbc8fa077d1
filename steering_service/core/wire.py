"""What client and server must agree on beyond the protos."""

from __future__ import annotations

import re
from typing import Final

from steering_service.core.errors import InvalidInput

# Trailing metadata of a failed call: the stable code of the error.
KIND_METADATA: Final = "steerage-error-kind"
# A manifest of 4 MiB, its signature of 5.4 MiB (base64), and room.
MAX_MESSAGE_BYTES: Final = 12 << 20

_NODE_ID: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


def check_node_id(node_id: str) -> str:
    """Return a node id if it is one; such ids are also safe as file names.

    Raises:
        InvalidInput: It is not.
    """
    if _NODE_ID.fullmatch(node_id) is None:
        raise InvalidInput(
            f"node id {node_id[:140]!r}: expected 1 to 128 characters of A-Z a-z 0-9 . _ - , the "
            "first not a dot",
            kind="node_id",
        )
    return node_id
