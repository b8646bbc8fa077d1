"""Limits: how fast a caller may be, and how many Watch streams it may have open.

Each replica counts for itself. Callers that the service knows are counted by identity, others (who
showed no good credential) by the host they call from.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from steering_service.core.errors import Unavailable
from steering_service.server.access import Identity
from steering_service.server.policy import Limits
from steering_service.server.throttle import Bucket

# For those who fail to say who they are: enough for a fleet behind one address that comes with a
# token not yet in the policy, little for guessing (a token has 256 bits anyhow).
UNKNOWN: Final = Limits(calls_per_s=10, burst=100)
# Hosts remembered. Forgetting one gives it a full bucket, which is harmless: it was the one not
# heard of for longest. Identities are as many as the policy has.
_MAX_HOSTS: Final = 10_000


class Limited(Unavailable):
    """Too many calls or streams.

    Attributes:
        retry_s: When it is worth trying again, in seconds.
    """

    def __init__(self, message: str, *, kind: str, retry_s: float = 1.0) -> None:
        super().__init__(message, kind=kind)
        self.retry_s = retry_s


class Meter:
    """The buckets of all callers. One event loop owns it."""

    def __init__(self) -> None:
        self._identities: dict[str, Bucket] = {}
        self._hosts: OrderedDict[str, Bucket] = OrderedDict()
        self._watches: dict[str, int] = {}

    def bucket(self, identity: Identity) -> Bucket:
        """The bucket of an identity, whatever it showed."""
        bucket = self._identities.get(identity.name)
        if bucket is None:
            limits = identity.limits or UNKNOWN
            bucket = self._identities[identity.name] = Bucket(limits.burst, time.monotonic())
        return bucket

    def take_unknown(self, host: str) -> None:
        """Count a call from a host that did not say who it is.

        Raises:
            Limited: It is one too many (kind "rate_limited").
        """
        now = time.monotonic()
        bucket = self._hosts.get(host)
        if bucket is None:
            bucket = self._hosts[host] = Bucket(UNKNOWN.burst, now)
            if len(self._hosts) > _MAX_HOSTS:
                self._hosts.popitem(last=False)
        else:
            self._hosts.move_to_end(host)
        if wait_s := bucket.take(UNKNOWN.calls_per_s, UNKNOWN.burst, now):
            raise too_fast(host, UNKNOWN, wait_s)

    @contextmanager
    def watching(self, identity: Identity) -> Iterator[None]:
        """Count a Watch stream while the body runs.

        Raises:
            Limited: It is one too many (kind "rate_limited").
        """
        limits, name = identity.limits, identity.name
        if limits is None:
            yield
            return
        open_now = self._watches.get(name, 0)
        if open_now >= limits.watches:
            raise Limited(
                f"{name!r} has {open_now} Watch streams open on this replica, and may have "
                f"{limits.watches}; close some, or raise watches in the access policy",
                kind="rate_limited",
                retry_s=10.0,
            )
        self._watches[name] = open_now + 1
        try:
            yield
        finally:
            self._watches[name] -= 1
            if not self._watches[name]:
                del self._watches[name]


def too_fast(name: str, limits: Limits, wait_s: float) -> Limited:
    """The error for whoever makes too many calls."""
    return Limited(
        f"{name!r} makes too many calls; at most {limits.calls_per_s:g} a second and "
        f"{limits.burst} at once are answered; try again in {wait_s:.3g} s",
        kind="rate_limited",
        retry_s=wait_s,
    )
