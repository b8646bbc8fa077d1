"""The board on which replicas of the service lay down what they observe.

    replicas/ID.json

Each replica replaces its own object now and then. These are observations for people, not state:
losing them costs a few seconds' knowledge.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from store.errors import InvalidInput, NotFound
from store.location import Location

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9_-])?")
_OBJECT = re.compile(r"replicas/(.+)\.json")


class ReplicaBoard:
    """Reads and writes the board; safe to share between threads and processes.

    Args:
        root: Where `replicas` lies.
    """

    def __init__(self, root: Location) -> None:
        self.location = root

    def write(self, replica: str, data: bytes) -> None:
        """Replace what a replica says.

        Raises:
            InvalidInput: kind "key", the replica's name is not 1 to 128 of A-Z a-z 0-9 . _ - , or
                begins or ends badly.
        """
        self.location.replace(_key(replica), data)

    def others(self, replica: str, newer_than_s: float) -> dict[str, bytes]:
        """What the other replicas said within the last `newer_than_s` seconds, by their names.

        Ages are taken by the store's clock where this replica has written too: then they are
        relative to its own last word.

        Raises:
            InvalidInput: kind "key", a bad name.
        """
        own = _key(replica)
        infos = {info.key: info for info in self.location.list("replicas")}
        now = infos[own].modified if own in infos else datetime.now(UTC)
        found = {}
        for key, info in infos.items():
            match = _OBJECT.fullmatch(key)
            if key == own or not match or now - info.modified > timedelta(seconds=newer_than_s):
                continue
            try:
                found[match[1]] = self.location.get(key)
            except NotFound:  # it has left since the listing
                continue
        return found

    def remove(self, replica: str) -> None:
        """Take down what a replica said, if anything.

        Raises:
            InvalidInput: kind "key", a bad name.
        """
        try:
            self.location.delete(_key(replica))
        except NotFound:
            return


def _key(replica: str) -> str:
    if not isinstance(replica, str) or not _NAME.fullmatch(replica):
        message = (
            f"bad replica name {replica!r}: expected 1 to 128 of A-Z, a-z, 0-9, dot, underscore "
            "and hyphen, beginning with a letter or digit, not ending in a dot"
        )
        raise InvalidInput(message, kind="key")
    return f"replicas/{replica}.json"
