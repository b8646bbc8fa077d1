"""Calls of the store, which blocks, from the event loop: in threads of their own, with a deadline.

A store that hangs must cost the service these threads only: what is answered from memory goes on,
and what needs the store is refused quickly instead of waiting behind what hangs already.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, ParamSpec, TypeVar

from steering_service.core.errors import Unavailable
from steering_service.server import metrics
from store.errors import InvalidInput

STORE_S: Final = 8.0
"""Seconds that one call of the store may take, all its requests together: less than callers wait,
so that they learn why.
"""
PATIENCE_S: Final = 4.0
"""Seconds for which a bucket that does not answer is asked again; see `Location.open`."""

# Threads wait for the store's replies and for disks; they compute little.
_THREADS: Final = 32
# Beyond this many calls that wait for a thread, the store does not keep up.
_MAX_WAITING: Final = 512
# Of the store's InvalidInput, what no caller of the service has given.
_OF_THE_STORE: Final = frozenset({"permission_denied", "not_a_directory", "url"})

P = ParamSpec("P")
T = TypeVar("T")

_pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="steerage-store")
_lock = threading.Lock()
_waiting = 0


async def store_call(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The function's result, from a thread, within `STORE_S`.

    Raises:
        Unavailable: kind "store_timeout", it took longer; a write may yet happen. Kind
            "store_busy", too many calls wait already. Kinds of the store, it refuses this service.
        StoreError: The function's own.
    """
    return await store_call_within(STORE_S, function, *args, **kwargs)


async def store_call_within(
    timeout_s: float, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """As `store_call`, for calls that move many bytes."""
    global _waiting
    if _waiting >= _MAX_WAITING:
        raise Unavailable(
            f"{_waiting} calls of this replica wait for the store already; try again later",
            kind="store_busy",
        )
    with _lock:
        _waiting += 1
    try:
        future = _pool.submit(function, *args, **kwargs)
    except BaseException:
        _left()  # no thread could be started for it
        raise
    future.add_done_callback(_done)
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            # What has not begun when the time is over never will; what has cannot be stopped.
            return await asyncio.wrap_future(future)
    except TimeoutError as error:
        if not deadline.expired():
            raise  # the function's own
        metrics.STORE_ERRORS.labels("store_timeout").inc()
        raise Unavailable(
            f"the store gave no answer within {timeout_s:g} s; a change may yet have been made: "
            "look, then try again",
            kind="store_timeout",
        ) from error
    except InvalidInput as error:
        if error.kind not in _OF_THE_STORE:
            raise
        raise Unavailable(f"the store refuses this service: {error}", kind=error.kind) from error


def _done(_: Future[Any]) -> None:
    _left()


def _left() -> None:
    global _waiting
    with _lock:
        _waiting -= 1
