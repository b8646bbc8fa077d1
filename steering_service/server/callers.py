"""Callers: from what a call shows (metadata, peer) to the identity that makes it.

What was shown before is remembered with what it was worth, so that a call costs a few microseconds.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, TypeAlias

from cryptography import x509

from steering_service.server.access import ROLES, Identity, Unauthenticated
from steering_service.server.identities import Identities
from steering_service.server.limits import Meter, too_fast
from steering_service.server.status import Context, host_of
from steering_service.server.throttle import Bucket

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]
AuthContext: TypeAlias = Mapping[str, Iterable[bytes]]

_AUTHORIZATION: Final = "authorization"
_SCHEME: Final = "bearer "
# Tokens and certificates remembered; only good ones are.
_MAX_REMEMBERED: Final = 20_000


class Standing:
    """An identity, and what its calls are checked against."""

    __slots__ = ("_bucket", "_expires_at", "_limits", "_methods", "identity")

    def __init__(self, identity: Identity, bucket: Bucket | None) -> None:
        self.identity = identity
        self._bucket = bucket
        self._limits = identity.limits
        self._methods = frozenset(
            method for method, roles in ROLES.items() if not roles.isdisjoint(identity.roles)
        )
        self._expires_at = time.monotonic() + (identity.expires - time.time())

    def admit(self, method: str, now: float) -> None:
        """Count a call and check the role for it.

        Args:
            method: As in `ROLES`.
            now: `time.monotonic()`.

        Raises:
            Unauthenticated: The certificate has expired since.
            Limited: One call too many.
            Denied: Not of a role for this method.
        """
        if now >= self._expires_at:
            self.identity.check_expiry()
        limits = self._limits
        if limits is not None and self._bucket is not None:
            wait_s = self._bucket.take(limits.calls_per_s, limits.burst, now)
            if wait_s:
                raise too_fast(self.identity.name, limits, wait_s)
        if method not in self._methods:
            self.identity.check_method(method)


class Callers:
    """Finds who calls. One event loop owns it.

    Args:
        identities: Who is who.
        meter: Counts their calls.
        tls: Whether connections are encrypted, so that peers may have certificates.
    """

    def __init__(self, identities: Identities, meter: Meter, *, tls: bool) -> None:
        self._identities = identities
        self._meter = meter
        self._tls = tls
        self._version: object = None
        self._remembered: OrderedDict[str | bytes, Standing] = OrderedDict()
        self._anybody = None if identities.known else Standing(identities.anybody(), None)

    def find(self, metadata: Metadata, context: Context, now: float) -> Standing:
        """The standing of whoever makes a call.

        Args:
            metadata: Of the call.
            context: Of the call.
            now: `time.monotonic()`.

        Raises:
            Unauthenticated: Nobody's (kinds "no_credentials", "token_format" and those of
                `Identities`).
            Limited: Nobody's, and too often so.
        """
        if self._anybody is not None:
            return self._anybody
        if (version := self._identities.version(now)) is not self._version:
            self._version = version
            self._remembered.clear()
        try:
            return self._known(metadata, context)
        except Unauthenticated:
            self._meter.take_unknown(host_of(context))
            raise

    def _known(self, metadata: Metadata, context: Context) -> Standing:
        header = _header(metadata)
        if header is not None:
            standing = self._remembered.get(header)
            if standing is None:
                identity = self._identities.by_token(header[len(_SCHEME) :].strip())
                standing = self._remember(header, identity)
            return standing
        if self._tls:
            shown: AuthContext = context.auth_context()
            for pem in shown.get("x509_pem_cert", ()):
                standing = self._remembered.get(pem)
                if standing is None:
                    identity = self._identities.by_certificate(_names(shown), _expires(pem))
                    standing = self._remember(pem, identity)
                return standing
        raise Unauthenticated(
            "the call shows neither a client certificate nor a bearer token; give the client one "
            "of them",
            kind="no_credentials",
        )

    def _remember(self, shown: str | bytes, identity: Identity) -> Standing:
        standing = Standing(identity, self._meter.bucket(identity))
        self._remembered[shown] = standing
        if len(self._remembered) > _MAX_REMEMBERED:
            self._remembered.popitem(last=False)
        return standing


def _header(metadata: Metadata) -> str | None:
    """The `authorization` of a call, if it is one bearer token."""
    found = None
    for key, value in metadata:
        if key == _AUTHORIZATION:
            if (
                found is not None
                or not isinstance(value, str)
                or value[: len(_SCHEME)].lower() != _SCHEME
            ):
                raise Unauthenticated(
                    "expected one `authorization` in the metadata, `Bearer TOKEN`",
                    kind="token_format",
                )
            found = value
    return found


def _expires(pem: bytes) -> float:
    try:
        return x509.load_pem_x509_certificate(pem).not_valid_after_utc.timestamp()
    except ValueError as error:
        raise Unauthenticated(
            f"the client certificate cannot be read, although the handshake let it pass: {error}",
            kind="certificate_unreadable",
        ) from error


def _names(shown: AuthContext) -> Iterator[str]:
    """What a certificate is for. Its common name only if it has no other, as for servers."""
    for key in ("peer_uri", "peer_dns", "peer_email"):
        for name in shown.get(key, ()):
            yield name.decode("utf-8", "replace")
    if not shown.get("x509_subject_alternative_name"):
        for name in shown.get("x509_common_name", ()):
            text = name.decode("utf-8", "replace")
            # An authority that is careful about URIs and addresses may let common names be free.
            if "://" not in text and "@" not in text:
                yield text
