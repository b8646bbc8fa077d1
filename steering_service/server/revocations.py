"""RevocationList: the present one, followed in the store and checked before anything relies on it.

Nodes check it themselves; here it keeps the service from pointing channels at what nodes would
refuse. A list that the service cannot verify itself stops changes rather than counting as none: it
may be that its key was taken from the trust roots, and what it revokes is as bad as before.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeAlias

from steering_service.core.errors import Conflict, InvalidInput, Refused, SteeringError
from steering_service.core.revocation import Revocations, parse_revocations
from steering_service.core.signing import MAX_ENVELOPE_BYTES, TrustRoots
from steering_service.server import metrics
from steering_service.server.store_calls import store_call
from steering_service.v1 import watch_pb2

if TYPE_CHECKING:
    from store.revocations import RevocationLog

log = logging.getLogger(__name__)

# A revocation list travels in one message, beside nothing else.
_MAX_ENVELOPE_BYTES: Final = MAX_ENVELOPE_BYTES

Allow: TypeAlias = Callable[[Revocations, Revocations | None], Awaitable[None]]


class RevocationList:
    """What is revoked now. One event loop owns it; `check` may be called in its threads.

    Args:
        stored: The log of all lists.
        trust_roots: Keys that may sign one. None: lists are passed on to the nodes unread, nothing
            is checked against them, and none is accepted.

    Attributes:
        serial: Of the present list; 0 before the first.
        envelope: The present list as it was signed; empty before the first.
        frame: A serialised WatchResponse with it.
        newest: Serial and envelope of the store's newest list. Another one than the present if no
            trust root signed it; nodes are not told of it, but whoever signs the next one needs it.
    """

    def __init__(self, stored: RevocationLog, trust_roots: TrustRoots | None) -> None:
        self._stored = stored
        self._trust_roots = trust_roots
        self._present: Revocations | None = None
        self._refusal: Refused | None = None
        self._taking = asyncio.Lock()
        self._listeners: list[Callable[[], None]] = []
        self._first: asyncio.Task[None] | None = None
        self._followed = False
        self.serial = 0
        self.envelope = b""
        self.frame = b""
        self.newest: tuple[int, bytes] = (0, b"")

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call this whenever there is a new list."""
        self._listeners.append(listener)

    async def ready(self) -> None:
        """Wait until the store was asked once. At no cost afterwards.

        Raises:
            StoreError: The store cannot answer.
        """
        while not self._followed:
            if self._first is None or self._first.done():
                self._first = asyncio.create_task(self.follow())
            await asyncio.shield(self._first)

    async def follow(self) -> None:
        """Take the newest list of the store.

        Raises:
            StoreError: The store cannot answer.
        """
        head = await store_call(self._stored.head)
        if head is not None:
            await self._take(*head)
        self._followed = True
        if self._refusal is not None:
            metrics.STORE_ERRORS.labels(self._refusal.kind).inc()

    async def append(self, envelope: bytes, allow: Allow) -> int:
        """Check and store the next list; its serial.

        Args:
            envelope: The list, signed.
            allow: Called with it and the present one before it is stored; it raises where the
                caller may not revoke what is new.

        Raises:
            Refused: kind "no_trust_roots", this service has no keys to check it with;
                "revocations_untrusted", the present one cannot be read at all; or the list is not
                signed by one of the trust roots, or leaves out what the present one revokes.
            InvalidInput: It is no revocation list.
            Conflict: kind "serial_taken", its serial is not the next one.
        """
        if self._trust_roots is None:
            raise Refused(
                "this service has no trust roots to check a revocation list with; start it with "
                "`steerage serve --trust`",
                kind="no_trust_roots",
            )
        if len(envelope) > _MAX_ENVELOPE_BYTES:
            raise InvalidInput(
                f"revocation list of {len(envelope)} bytes; at most {_MAX_ENVELOPE_BYTES}",
                kind="revocations_size",
            )
        await self.follow()
        serial, stored = self.newest
        present = self._present
        before = [] if present is None else [present]
        if self._refusal is not None:
            # Its key is not trusted any more, so its content proves nothing. But who signs it anew
            # answers for all of it, and nothing that was revoked is forgotten.
            before.append(await asyncio.to_thread(_content, stored, self._refusal))
        revoked = {key for older in before for key in older.keys}
        wanted = await asyncio.to_thread(
            self._trust_roots.verify_revocations, envelope, revoked=revoked
        )
        if wanted.serial != serial + 1:
            raise Conflict(
                f"revocation list of serial {wanted.serial}, while the present one has {serial}; "
                f"add to that one, and sign the result as {serial + 1}",
                kind="serial_taken",
            )
        if not all(wanted.covers(older) for older in before):
            raise Refused(
                f"revocation list {wanted.serial} leaves out what {serial} revokes; a revocation "
                "cannot be taken back, so add to the present list",
                kind="revocations_shrink",
            )
        # What a list that is not trusted says is new to this service, all of it.
        await allow(wanted, present)
        await store_call(self._stored.append, wanted.serial, envelope)
        await self._take(wanted.serial, envelope, wanted)
        return wanted.serial

    def check(self, digest: str, manifest: bytes, signature: bytes) -> None:
        """Refuse an artifact that nodes would refuse. Nothing is checked without trust roots.

        With a large manifest this takes a second: call it in a thread.

        Raises:
            Refused: kind "artifact_revoked" or "key_revoked"; "revocations_untrusted", it is not
                known what is revoked.
        """
        if self._refusal is not None:
            raise self._refused()
        present = self._present
        if self._trust_roots is not None and present is not None:
            present.check_artifact(digest, self._trust_roots.signers(signature, manifest))

    def check_revision(self, channel: str, revision: int) -> None:
        """Refuse a revision of a channel that nodes would refuse.

        Raises:
            Refused: kind "revision_revoked", or "revocations_untrusted" as `check`.
        """
        if self._refusal is not None:
            raise self._refused()
        if self._present is not None:
            self._present.check_revision(channel, revision)

    def has_floor(self, channel: str) -> bool:
        """Whether some revisions of a channel may not run."""
        return self._present is not None and channel in self._present.floors

    def _refused(self) -> Refused:
        assert self._refusal is not None
        return Refused(str(self._refusal), kind=self._refusal.kind)

    def _revoked(self) -> tuple[str, ...]:
        return self._present.keys if self._present is not None else ()

    async def _take(
        self, serial: int, envelope: bytes, verified: Revocations | None = None
    ) -> None:
        """A list is in the store: let it count, or nothing that has to be checked against it."""
        async with self._taking:
            if serial <= self.newest[0]:
                return
            if self._trust_roots is not None:
                try:
                    present = verified
                    if present is None:
                        present = await asyncio.to_thread(
                            self._trust_roots.verify_revocations, envelope, revoked=self._revoked()
                        )
                    if present.serial != serial:
                        raise Refused(
                            f"the revocation list of serial {present.serial} lies in the store as "
                            f"{serial}",
                            kind="serial_taken",
                        )
                except SteeringError as error:
                    self.newest = serial, envelope
                    self._refusal = _untrusted(serial, error)
                    log.error(  # noqa: TRY400
                        "revocation list refused",
                        extra={
                            "serial": serial,
                            "kind": self._refusal.kind,
                            "cause": error.kind,
                            "why": str(self._refusal),
                        },
                    )
                    return
                self._present = present
            self._refusal = None
            self.newest = serial, envelope
            self.serial, self.envelope = serial, envelope
            self.frame = watch_pb2.WatchResponse(
                revocations=watch_pb2.Revocations(serial=serial, envelope=envelope)
            ).SerializeToString()
        log.info("revocation list in force", extra={"serial": serial})
        for listener in self._listeners:
            listener()


def _untrusted(serial: int, error: SteeringError) -> Refused:
    return Refused(
        f"revocation list {serial} of the store cannot be relied on ({error}), so it is not known "
        "what is revoked, and nothing but off is accepted. If its key was taken from --trust, add "
        "that public key back, or sign the list anew with a trusted key (`steerage revoke`, with "
        f"--trust OLD.pub). If somebody wrote it past the service, remove "
        f"revocations/{serial:08d}.json and start the service again",
        kind="revocations_untrusted",
    )


def _content(envelope: bytes, refusal: Refused) -> Revocations:
    """The list in an envelope, whoever signed it.

    Raises:
        Refused: There is none; the refusal given says what to do.
    """
    try:
        return parse_revocations(base64.b64decode(json.loads(envelope)["payload"], validate=True))
    except (InvalidInput, ValueError, TypeError, KeyError, RecursionError) as error:
        raise Refused(str(refusal), kind=refusal.kind) from error
