"""Identities: the policy file as it is now. Who is who by it, reread when it changes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

from steering_service.core.errors import InvalidInput
from steering_service.server import metrics
from steering_service.server.access import ChannelRule, Identity, Unauthenticated, listed
from steering_service.server.policy import (
    MAX_POLICY_BYTES,
    IdentityEntry,
    Limits,
    Patterns,
    PolicyFile,
    Role,
    parse_policy,
)

log = logging.getLogger(__name__)

# How often a changed policy file is looked for. A change counts when the file is the same at two
# looks, so that one being written is not taken for a shorter policy.
LOOK_S: Final = 1.0
# Kinds of credentials, apart: no certificate passes for a token by being issued for its sha256.
_TOKEN: Final = "token "
_CERTIFICATE: Final = "certificate "
# A signature that no file has.
_NONE: Final = (-1,)


class _Unreadable(InvalidInput):
    """The file could not be read, which says nothing of what is in it."""


class _Policy:
    """One reading of the file, ready to be asked. Never changes."""

    def __init__(self, file: PolicyFile, source: Identities) -> None:
        self.identities: dict[str, Identity] = {}  # by credential
        self.names: dict[str, Identity] = {}
        self._rules = [(Patterns([entry.name]), entry) for entry in file.channel]
        for entry in file.identity:
            identity = self.names[entry.name] = _identity(entry, file.limits, source)
            if entry.certificate is not None:
                self._add(identity, _CERTIFICATE + entry.certificate)
            if entry.token_sha256 is not None:
                self._add(identity, _TOKEN + entry.token_sha256)

    def _add(self, identity: Identity, credential: str) -> None:
        self.identities[credential] = replace(identity, credential=credential)

    def rule(self, channel: str) -> ChannelRule:
        """Of several entries for one channel the strictest counts, whatever their order."""
        asking = [e for name, e in self._rules if e.two_person and name.match(channel)]
        if not asking:
            return ChannelRule()
        return ChannelRule(True, frozenset.intersection(*(frozenset(e.alone) for e in asking)))


class Identities:
    """The policy file: who is who by it. Reread when it changes.

    A new file that is broken is logged, and the old policy stays until the file is good.
    One event loop owns it; a changed file is read in a thread of its own, since one of ten thousand
    identities takes a second.

    Args:
        path: The file. None: everybody may do everything, which is for loopback only.

    Raises:
        InvalidInput: The file cannot be read or is no policy.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._anybody = Identity("", frozenset(Role), self)
        self._policy: _Policy | None = None
        self._look_at = 0.0
        self._refused: str | None = None  # why the file was not taken over, as logged last
        if path is None:
            return
        self._loaded: tuple[int, ...] = _signature(path)
        self._pending = self._loaded
        self._policy = _Policy(_read(path), self)
        self._look_at = time.monotonic() + LOOK_S

    @property
    def known(self) -> bool:
        """Whether there is a policy, so that callers have to say who they are."""
        return self._path is not None

    def anybody(self) -> Identity:
        """Whoever calls on loopback without a policy."""
        return self._anybody

    def by_token(self, token: str) -> Identity:
        """The identity of a bearer token.

        Raises:
            Unauthenticated: Nobody's (kind "token_unknown").
        """
        shown = _TOKEN + hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
        identity = self._current().identities.get(shown)
        # What a dict finds was compared without care for time, though only as a digest.
        if identity is None or not hmac.compare_digest(identity.credential, shown):
            raise Unauthenticated(
                "the bearer token is nobody's in the access policy; get a new one, or ask whoever "
                "keeps the policy to add its sha256",
                kind="token_unknown",
            )
        return identity

    def by_certificate(self, names: Iterable[str], expires: float) -> Identity:
        """The identity of a client certificate that the handshake has verified.

        Args:
            names: What the certificate is for.
            expires: When it expires, in seconds since 1970.

        Raises:
            Unauthenticated: Nobody's, or of several (kinds "certificate_unknown",
                "certificate_ambiguous").
        """
        names = list(names)
        policy = self._current()
        found = {i.name: i for name in names if (i := policy.identities.get(_CERTIFICATE + name))}
        if not found:
            raise Unauthenticated(
                f"the certificate is good, and it is for {listed(n[:200] for n in names[:5])}: "
                "nobody in the access policy; ask whoever keeps it",
                kind="certificate_unknown",
            )
        if len(found) > 1:
            raise Unauthenticated(
                f"the certificate is for {listed(found)}, who are different identities in the "
                "access policy; use a certificate for one",
                kind="certificate_ambiguous",
            )
        return replace(next(iter(found.values())), expires=expires)

    def operates(self, name: str, channel: str) -> bool:
        """Whether the present policy lets whoever has this name change a channel. Without a policy
        everybody may.
        """
        if self._path is None:
            return True
        identity = self._current().names.get(name)
        return (
            identity is not None
            and Role.OPERATOR in identity.roles
            and identity.allows_channel(channel)
        )

    def still_valid(self, identity: Identity) -> bool:
        """See the function of this name."""
        if self._path is None:
            return True
        now = self._current().identities.get(identity.credential)
        return now == identity and time.time() < identity.expires

    def rule(self, channel: str) -> ChannelRule:
        """See `two_person`."""
        return ChannelRule() if self._path is None else self._current().rule(channel)

    def version(self, now: float) -> object:
        """Something that is another object after every reading of the file.

        Args:
            now: `time.monotonic()`, which the caller has read anyway.
        """
        if now >= self._look_at:
            self._current()
        return self._policy

    def _current(self) -> _Policy:
        if self._policy is None:
            raise AssertionError("only asked where there is a policy")
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._look()
        return self._policy

    def _look(self) -> None:
        """Take a changed file over, once it has been the same at two looks."""
        if self._path is None:
            return
        seen = _signature(self._path)
        settled, self._pending = seen == self._pending, seen
        if settled and seen != self._loaded:
            self._loaded = seen
            self._look_at = float("inf")  # until it is read
            try:
                threading.Thread(target=self._reread, args=(self._path,), daemon=True).start()
            except RuntimeError as error:  # there is no thread to be had
                self._refuse(_Unreadable(f"access policy: {error}", kind="access_policy"))
                self._look_at = time.monotonic() + LOOK_S

    def _reread(self, path: Path) -> None:
        try:
            fresh = _Policy(_read(path), self)
        except InvalidInput as error:
            self._refuse(error)
        else:
            self._policy = fresh
            self._refused = None
            metrics.RELOADS.labels("policy", "ok").inc()
            extra = {"path": str(path), "credentials": len(fresh.identities)}
            log.info("access policy reread", extra=extra)
        finally:
            self._look_at = time.monotonic() + LOOK_S

    def _refuse(self, error: InvalidInput) -> None:
        """Say that the file is not taken over; one that could not be read is tried again."""
        metrics.RELOADS.labels("policy", "error").inc()
        again = isinstance(error, _Unreadable)
        if not again or self._refused != str(error):  # not every second
            extra = {"path": str(self._path), "kind": error.kind, "detail": str(error)}
            extra |= {"effect": "the old one stays"}
            log.error("access policy not taken over", extra=extra)
        self._refused = str(error)
        if again:
            self._loaded = _NONE


def _signature(path: Path) -> tuple[int, ...]:
    """What changes when a file does; empty when it cannot be looked at."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read(path: Path) -> PolicyFile:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_POLICY_BYTES + 1)
    except OSError as error:
        raise _Unreadable(
            f"access policy {path}: {error.strerror}; it has to be there and readable",
            kind="access_policy",
        ) from error
    try:
        return parse_policy(data)
    except InvalidInput as error:
        raise InvalidInput(f"access policy {path}: {error}", kind=error.kind) from error


def _identity(entry: IdentityEntry, limits: Limits, source: Identities) -> Identity:
    own = {"calls_per_s": entry.calls_per_s, "burst": entry.burst}
    return Identity(
        entry.name,
        entry.roles,
        source,
        Patterns(entry.channels),
        Patterns(entry.models),
        Patterns(entry.nodes),
        limits.model_copy(update={k: v for k, v in own.items() if v is not None}),
    )
