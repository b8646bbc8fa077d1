"""Calls of the store: what waits is counted, whatever becomes of it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from steering_service.core.errors import Unavailable
from steering_service.server import store_calls
from steering_service.server.store_calls import store_call


def test_a_call_that_gets_no_thread_does_not_wait_for_ever(monkeypatch):
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    monkeypatch.setattr(store_calls, "_MAX_WAITING", store_calls._waiting + 1)
    with monkeypatch.context() as without:
        without.setattr(store_calls, "_pool", pool)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="shutdown"):
                asyncio.run(store_call(int, 7))
    assert asyncio.run(store_call(int, 7)) == 7


def test_calls_beyond_what_may_wait_are_refused(monkeypatch):
    monkeypatch.setattr(store_calls, "_MAX_WAITING", 0)
    with pytest.raises(Unavailable) as caught:
        asyncio.run(store_call(int, 7))
    assert caught.value.kind == "store_busy"
