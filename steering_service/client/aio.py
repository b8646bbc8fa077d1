"""AsyncSubscription: a `Subscription` for asyncio programs.

    async with AsyncSubscription("127.0.0.1:8780", "prod", "node-1", ...) as subscription:
        deployment = subscription.active.current          # never waits
        newer = await subscription.changed(deployment.revision)

The work is done by the same threads, so that verifying and writing never hold up the event loop.
For `Operator` use `asyncio.to_thread`: its calls are few.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from typing import Self

from steering_service.client.active import Active, Deployment
from steering_service.client.credentials import Credentials
from steering_service.client.subscription import TELEMETRY_S, Subscription, SubscriptionStatus
from steering_service.client.telemetry import Telemetry
from steering_service.core.artifact import Artifact
from steering_service.core.signing import TrustRoots


class AsyncSubscription:
    """Follows a channel while the context is open. It belongs to the loop that enters it.

    Args:
        address: See `Subscription`, as for all of them.
    """

    def __init__(
        self,
        address: str,
        channel: str,
        node_id: str,
        cache_dir: str | os.PathLike[str],
        trust_roots: TrustRoots,
        model_fingerprint: str | None = None,
        *,
        check: Callable[[Artifact], None] | None = None,
        credentials: Credentials | None = None,
        telemetry_s: float = TELEMETRY_S,
    ) -> None:
        self._subscription = Subscription(
            address,
            channel,
            node_id,
            cache_dir,
            trust_roots,
            model_fingerprint,
            check=check,
            credentials=credentials,
            telemetry_s=telemetry_s,
        )
        self._swapped = asyncio.Event()
        self._open = AsyncExitStack()

    @property
    def active(self) -> Active:
        """What to run now. `active.current` never waits; `active.wait_for` does, see `changed`."""
        return self._subscription.active

    @property
    def telemetry(self) -> Telemetry:
        """Where whoever runs it counts; counting never waits."""
        return self._subscription.telemetry

    @property
    def status(self) -> SubscriptionStatus:
        """A snapshot."""
        return self._subscription.status

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()

        def swapped() -> None:
            # A loop that was closed with this open has nobody left to tell.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._wake)

        # The last good artifact is read from the disk and verified, perhaps for seconds.
        try:
            await asyncio.to_thread(self._subscription.__enter__)
        except BaseException:
            # Cancelled: the thread goes on, and then finds that it is to stop.
            self._subscription.close()
            raise
        self._open.push_async_callback(asyncio.to_thread, self._subscription.close)
        self._open.enter_context(self.active.listening(swapped))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop following. `active` keeps answering with what it has."""
        await self._open.aclose()

    async def changed(self, after: int | Deployment = 0) -> Deployment:
        """Wait for news; for a time limit use `asyncio.timeout`.

        Args:
            after: A revision: wait until the node runs a later one. Or a Deployment: wait until it
                runs another one, which also happens without a new revision when what runs is
                revoked.

        Returns:
            What it runs then: the latest, perhaps after several changes.
        """
        while True:
            # In this order: a swap after the look sets the event that is waited for.
            swapped, current = self._swapped, self.active.current
            news = (
                current is not after if isinstance(after, Deployment) else current.revision > after
            )
            if news:
                return current
            await swapped.wait()

    def _wake(self) -> None:
        """Wake everyone who waits now; whoever comes later waits for the next swap."""
        self._swapped.set()
        self._swapped = asyncio.Event()
