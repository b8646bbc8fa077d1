"""Slots: how much of something that costs memory may be open, and by whom.

Whoever keeps what it opened open for ever is not stopped, since gRPC cannot take back a message
that it was given to send. It gets its share, and then waits, and nobody else does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Final

from steering_service.core.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

# Of one caller and host; each is a call that is open, of some 20 kB.
_MAX_WAITING: Final = 4096


class _Share(asyncio.Semaphore):
    """A semaphore, and how many hold it or wait for it."""

    users = 0


class Slots:
    """Slots of callers on hosts. Who waits is served in order. One event loop owns it.

    Args:
        what: What takes them, such as "downloads", for errors.
        total: That are taken at the same time.
        per_caller: Of them by one caller, from all its hosts.
        per_host: Of these from one host.
    """

    def __init__(self, what: str, total: int, *, per_caller: int, per_host: int) -> None:
        self._what = what
        self._total = asyncio.Semaphore(total)
        self._per_caller = per_caller
        self._per_host = per_host
        self._shares: dict[Hashable, _Share] = {}

    @asynccontextmanager
    async def taken(self, caller: str, host: str, wait_s: float) -> AsyncIterator[None]:
        """Take a slot while the body runs.

        Args:
            caller: Name of its identity.
            host: Where it calls from.
            wait_s: Seconds to wait for one.

        Raises:
            Unavailable: kind "downloads_busy" (or whatever takes them), there was none in time,
                or too many wait already.
        """
        with (
            self._share((caller, host), self._per_host) as of_host,
            self._share(caller, self._per_caller) as of_caller,
        ):
            if of_host.users > self._per_host + _MAX_WAITING:
                raise self._busy(
                    f"{_MAX_WAITING} {self._what} of this caller and host wait already"
                )
            async with AsyncExitStack() as held:
                try:
                    async with asyncio.timeout(wait_s) as limit:
                        # Always in this order, so that nobody waits for somebody who waits for it;
                        # the narrow ones first, so that one caller's wait is not the others'.
                        for share in (of_host, of_caller, self._total):
                            await held.enter_async_context(share)
                except TimeoutError as error:
                    if not limit.expired():
                        raise
                    raise self._busy(
                        f"no room within {wait_s:.3g} s; at most {self._per_host} {self._what} go "
                        "on at the same time for one caller and host"
                    ) from error
                yield

    @contextmanager
    def _share(self, key: Hashable, size: int) -> Iterator[_Share]:
        """Those of one key, kept as long as anybody uses them."""
        share = self._shares.get(key)
        if share is None:
            share = self._shares[key] = _Share(size)
        share.users += 1
        try:
            yield share
        finally:
            share.users -= 1
            if not share.users:
                del self._shares[key]

    def _busy(self, why: str) -> Unavailable:
        return Unavailable(f"{why}; try again later", kind=f"{self._what}_busy")
