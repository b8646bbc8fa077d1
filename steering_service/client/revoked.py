"""RevocationFile: the revocation list that a node holds, in memory and on its disk.

It only ever goes forward: a list of a lower serial, another one of the same serial and one that
allows what was revoked are refused, also from a service that is in the wrong hands. Where there is
a list on the disk that cannot be read or believed, nothing passes until one that can be is there.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from steering_service.client.disk import locked, replace_file
from steering_service.core.errors import Corrupt, InvalidInput, Refused, Unavailable
from steering_service.core.revocation import Revocations
from steering_service.core.signing import MAX_ENVELOPE_BYTES, TrustRoots


class RevocationFile:
    """One envelope in a file, verified whenever it is read. Safe to use from several threads.

    Args:
        path: The file; its folder is made when missing. Several processes may share it, if they
            follow the same service.
        trust_roots: Keys that may sign lists.
    """

    def __init__(self, path: Path, trust_roots: TrustRoots) -> None:
        self.path = path
        self._trust_roots = trust_roots
        self._lock = threading.Lock()
        self._envelope = b""
        self._current: Revocations | None = None
        self._restored = False
        self._kept = True

    @property
    def current(self) -> Revocations | None:
        """The list that counts now; None: none yet."""
        return self._current

    @property
    def serial(self) -> int:
        """Of the present list; 0: none yet."""
        return self._current.serial if self._current else 0

    def restore(self) -> None:
        """Read the file, unless that has succeeded, or `offer` has taken a list. The checks do it
        too, so that without a list that counts nothing passes.

        Raises:
            Corrupt, Refused: It is there, and cannot be believed (kinds ``revocations_file`` and
                ``revocations_untrusted``).
            Unavailable: The disk refused (kind ``cache_disk``).
        """
        with self._lock:
            self._restore()

    def _restore(self) -> None:
        if self._restored:
            return
        envelope = self._read()
        if envelope is not None:
            self._current, self._envelope = self._verified(envelope), envelope
        self._restored = True

    def offer(self, envelope: bytes) -> bool:
        """Take a list that the service sent, if it goes forward. It counts at once; see `keep`.

        Returns:
            Whether it is new.

        Raises:
            Refused: No trusted key signed it, or only keys that are revoked; or it goes back.
            InvalidInput: It is not a revocation list.
            Unavailable: The disk refused to say what this one has to go forward from.
        """
        with self._lock:
            # What cannot be believed is no reason not to believe this one.
            with suppress(Corrupt, Refused):
                self._restore()
            if self._envelope and envelope == self._envelope:
                return False
            present = self._current
            revocations = self._trust_roots.verify_revocations(
                envelope, revoked=present.keys if present else ()
            )
            if present is not None:
                if revocations == present:
                    return False  # the same list in another envelope
                _check_forward(present, revocations)
            self._current, self._envelope = revocations, envelope
            self._restored, self._kept = True, False
            return True

    def keep(self) -> bool:
        """Write what `offer` took to the disk; or else take the later list that is there, from
        another process, which may forbid what was checked before.

        Returns:
            False: there was nothing new to keep.

        Raises:
            Unavailable: The disk refused; the list counts in this process all the same.
        """
        with self._lock:
            if self._kept:
                return False
            try:
                with locked(self.path.with_name(f".{self.path.name}.lock")):
                    if not self._adopt_later():
                        replace_file(self.path, self._envelope)
            except OSError as error:
                raise self._disk_error(error) from error
            self._kept = True
            return True

    def check_artifact(self, digest: str, key_ids: Sequence[str]) -> None:
        """See `core.revocation.Revocations`, and `restore`; where there is no list, all passes."""
        self.restore()
        if self._current is not None:
            self._current.check_artifact(digest, key_ids)

    def check_revision(self, channel: str, revision: int) -> None:
        """See `core.revocation.Revocations`, and `restore`; where there is no list, all passes."""
        self.restore()
        if self._current is not None:
            self._current.check_revision(channel, revision)

    def _read(self) -> bytes | None:
        try:
            with self.path.open("rb") as file:
                return file.read(MAX_ENVELOPE_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._disk_error(error) from error

    def _verified(self, envelope: bytes) -> Revocations:
        try:
            return self._trust_roots.verify_revocations(envelope)
        except InvalidInput as error:
            raise Corrupt(
                f"{str(self.path)!r} is not a revocation list: {error}; this node steers nothing "
                "until the service sends its list, which replaces this one",
                kind="revocations_file",
            ) from error
        except Refused as error:
            raise Refused(
                f"the revocation list in {str(self.path)!r} cannot be believed: {error}; this node "
                "steers nothing until the service sends a list that a key signed that it trusts. "
                "Put the missing key back among its trust roots, or sign the list again with a "
                "trusted one (`steerage revoke`)",
                kind="revocations_untrusted",
            ) from error

    def _adopt_later(self) -> bool:
        """Whether a later list is on the disk, which counts from now on, if it goes forward.

        What is there and cannot be believed is to be replaced.
        """
        present, envelope = self._current, self._read()
        if present is None or envelope is None:
            return False
        try:
            later = self._trust_roots.verify_revocations(envelope, revoked=present.keys)
        except (InvalidInput, Refused):
            return False
        if later.serial < present.serial:
            return False
        if later.covers(present):
            self._current, self._envelope = later, envelope
        return True

    def _disk_error(self, error: OSError) -> Unavailable:
        return Unavailable(f"revocation list {str(self.path)!r}: {error}", kind="cache_disk")


def _check_forward(present: Revocations, offered: Revocations) -> None:
    if offered.serial < present.serial:
        raise Refused(
            f"revocation list {offered.serial} is older than {present.serial}, which this node "
            "has; a replica may be late, or somebody replays old lists",
            kind="revocations_order",
        )
    if offered.serial == present.serial:
        raise Refused(
            f"revocation list {offered.serial} is another one than the list of this serial that "
            "this node has; sign a list with the next serial that revokes all that either does",
            kind="revocations_forked",
        )
    if not offered.covers(present):
        raise Refused(
            f"revocation list {offered.serial} allows what list {present.serial} revokes; lists "
            "only grow: sign one that revokes all that the one before does",
            kind="revocations_shrunk",
        )
