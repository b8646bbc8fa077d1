"""Deadlines: one timer for all calls, instead of one each, which was half of what a call cost."""

from __future__ import annotations

import asyncio
from typing import Any


class Deadlines:
    """Cancels the tasks that take longer than a limit, the same for all. One event loop owns it.

        task = deadlines.begin()
        try:
            ...
        except asyncio.CancelledError:
            if not deadlines.missed(task):
                raise  # somebody else's reason
            ...
        finally:
            deadlines.end(task)

    Args:
        limit_s: Seconds that a task gets.
    """

    __slots__ = ("_missed", "_running", "_timer", "limit_s")

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._running: dict[asyncio.Task[Any], float] = {}  # loop times, ascending
        self._missed: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> asyncio.Task[Any]:
        """From now on the present task's time runs; returns that task."""
        task = asyncio.current_task()
        assert task is not None  # it is called by one
        loop = task.get_loop()
        self._running[task] = loop.time() + self.limit_s
        if self._timer is None:
            self._timer = loop.call_later(self.limit_s, self._look, loop)
        return task

    def end(self, task: asyncio.Task[Any]) -> None:
        """The task is done."""
        self._running.pop(task, None)
        self._missed.discard(task)

    def missed(self, task: asyncio.Task[Any]) -> bool:
        """Whether a task was cancelled for taking too long; then it is no more."""
        if task not in self._missed:
            return False
        return task.uncancel() == 0

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        self._timer = None
        for task, deadline in list(self._running.items()):
            if deadline > now:
                self._timer = loop.call_at(deadline, self._look, loop)
                return
            del self._running[task]
            self._missed.add(task)
            task.cancel()
