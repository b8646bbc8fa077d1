"""What a DSSE envelope says, for people to look at. Not verified: `TrustRoots` does that."""

from __future__ import annotations

import base64
import json

from pipeline.errors import InvalidInput


def signers_of(envelope: bytes) -> list[str]:
    """Sorted ids of the keys that an envelope names; none where it is no envelope."""
    try:
        return sorted({str(item["keyid"]) for item in json.loads(envelope)["signatures"]})
    except (ValueError, KeyError, TypeError):
        return []


def payload_of(envelope: bytes) -> bytes:
    """What an envelope is around.

    Raises:
        InvalidInput: It is no envelope.
    """
    try:
        return base64.b64decode(json.loads(envelope)["payload"], validate=True)
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(
            f"not a DSSE envelope in JSON: {error!r}; the service's store may be damaged, "
            "`steerage verify` says",
            kind="envelope",
        ) from error
