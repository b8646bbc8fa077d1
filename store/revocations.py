"""Revocation lists: which artifacts, keys and revisions no node may run any more.

    revocations/00000001.json, 00000002.json, ...

Each is a signed envelope under its serial, created once. The highest one counts; its content and
signature are for `steering_service` to judge, and for every node.
"""

from __future__ import annotations

import re

from store.errors import Conflict, InvalidInput, NotFound
from store.location import Location

_MAX_SERIAL = 99_999_999  # eight digits, so that key order is the order of serials
_OBJECT = re.compile(r"revocations/([0-9]{8})\.json")


class RevocationLog:
    """Reads and appends revocation lists; safe to share between threads and processes.

    Args:
        root: Where `revocations` lies.
    """

    def __init__(self, root: Location) -> None:
        self.location = root
        # Lists never change and serials only grow, so the last one seen is where to look on.
        self._last_seen: tuple[int, bytes] | None = None
        self._has_listed = False

    def head(self) -> tuple[int, bytes] | None:
        """Serial and envelope of the newest list; None before the first. After the first call, one
        small read while nothing has changed.
        """
        found = self._last_seen
        if not self._has_listed:
            serials = self.serials()
            if serials:
                found = serials[-1], self.get(serials[-1])
        while True:
            serial = found[0] if found else 0
            try:
                found = serial + 1, self.get(serial + 1)
            except NotFound:
                self._last_seen, self._has_listed = found, True
                return found

    def get(self, serial: int) -> bytes:
        """One envelope.

        Raises:
            NotFound: kind "no_revocations".
        """
        try:
            return self.location.get(revocation_key(serial))
        except NotFound as error:
            message = f"no revocation list {serial} in {self.location.url}"
            raise NotFound(message, kind="no_revocations") from error

    def serials(self) -> list[int]:
        """Serials that are there, ascending; other files do not count. One listing."""
        found = (_OBJECT.fullmatch(info.key) for info in self.location.list("revocations"))
        return [int(match[1]) for match in found if match]

    def append(self, serial: int, envelope: bytes) -> None:
        """Store the next list. The same one may be appended again, after a lost reply.

        Raises:
            InvalidInput: kind "out_of_range", the serial is not 1 to 99,999,999.
            Conflict: kind "serial_taken", the present list's serial is not one below; read it,
                decide again.
        """
        key = revocation_key(serial)
        present = self.head()
        latest = present[0] if present else 0
        if serial > latest + 1:
            raise self._taken(serial, latest)
        try:
            self.location.put_same(key, envelope)
        except Conflict as error:
            present = self.head()
            raise self._taken(serial, present[0] if present else serial) from error

    def _taken(self, serial: int, latest: int) -> Conflict:
        message = (
            f"revocation list {serial}: {self.location.url} is at serial {latest}, so the next one "
            f"is {latest + 1}; read the present list, and sign one that has all of it and this "
            "serial"
        )
        return Conflict(message, kind="serial_taken")


def revocation_key(serial: int) -> str:
    """Key of a list.

    Raises:
        InvalidInput: kind "out_of_range", the serial is not 1 to 99,999,999.
    """
    if not 1 <= serial <= _MAX_SERIAL:
        message = f"serials of revocation lists are 1 to {_MAX_SERIAL}, got {serial}"
        raise InvalidInput(message, kind="out_of_range")
    return f"revocations/{serial:08d}.json"
