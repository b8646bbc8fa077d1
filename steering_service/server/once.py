"""Once: what many ask for at the same time is read once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Once(Generic[T]):
    """One read at a time of each key: whoever asks meanwhile gets the same answer."""

    __slots__ = ("_reading",)

    def __init__(self) -> None:
        self._reading: dict[str, asyncio.Task[T]] = {}

    async def __call__(self, key: str, read: Callable[[], Coroutine[Any, Any, T]]) -> T:
        task = self._reading.get(key)
        if task is None:
            task = self._reading[key] = asyncio.create_task(read())
            task.add_done_callback(lambda done: self._forget(key, done))
        # A caller that goes away must not end the read of the others.
        return await asyncio.shield(task)

    def _forget(self, key: str, task: asyncio.Task[T]) -> None:
        del self._reading[key]
        if not task.cancelled():
            task.exception()  # it was raised in those who waited, if any still do
