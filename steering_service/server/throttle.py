"""Throttle: how often something may happen, and the token buckets that count it."""

from __future__ import annotations

import time


class Bucket:
    """A token bucket: `burst` at once, `rate` a second after that."""

    __slots__ = ("_at", "_left")

    def __init__(self, burst: float, now: float) -> None:
        self._left = burst
        self._at = now

    def take(self, rate: float, burst: float, now: float) -> float:
        """Take one; returns 0, or how many seconds until there is one, having taken none."""
        left = self._refill(rate, burst, now)
        if left < 1.0:
            return (1.0 - left) / rate
        self._left = left - 1.0
        return 0.0

    def owe(self, rate: float, burst: float, now: float) -> float:
        """Take one, if need be one that is yet to come; returns in how many seconds it does."""
        self._left = self._refill(rate, burst, now) - 1.0
        return max(0.0, -self._left / rate)

    def _refill(self, rate: float, burst: float, now: float) -> float:
        self._left = min(burst, self._left + (now - self._at) * rate)
        self._at = now
        return self._left


class Throttle:
    """A bucket with a rate of its own.

    Args:
        per_s: How often in the long run.
        burst: How often at once.
    """

    __slots__ = ("_bucket", "_burst", "_per_s")

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s = per_s
        self._burst = burst
        self._bucket = Bucket(burst, time.monotonic())

    def delay_s(self) -> float:
        """Take a token; how long to wait before using it."""
        return self._bucket.owe(self._per_s, self._burst, time.monotonic())

    def passes(self) -> bool:
        """Take a token if there is one."""
        return not self._bucket.take(self._per_s, self._burst, time.monotonic())
