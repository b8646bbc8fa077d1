"""Requests from their bytes, within a size and a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable
from typing import Any

from google.protobuf.message import DecodeError

from steering_service.core.errors import InvalidInput, Unavailable


def parser(parse: Any, method: str, limit: int) -> Callable[[bytes], Any]:
    """What makes a message of its bytes, or raises InvalidInput.

    Args:
        parse: Of the message's class.
        method: Named in errors.
        limit: Bytes that are parsed at most.
    """

    def parsed(data: bytes) -> object:
        if len(data) > limit:
            raise InvalidInput(
                f"a request of {len(data)} bytes; {method} takes at most {limit}",
                kind="message_size",
            )
        try:
            return parse(data)
        except DecodeError as error:
            raise InvalidInput(
                f"the request of {len(data)} bytes is not the message that {method} takes: {error}",
                kind="message_syntax",
            ) from error

    return parsed


class Messages:
    """Messages of a request stream.

    Args:
        requests: The bytes of each.
        parse: From bytes to message.
        idle_s: Seconds to wait for the next one; None for ever.
    """

    __slots__ = ("_bytes", "_idle_s", "_parse")

    def __init__(
        self,
        requests: AsyncIterable[bytes],
        parse: Callable[[bytes], object],
        idle_s: float | None,
    ) -> None:
        self._bytes = aiter(requests)
        self._parse = parse
        self._idle_s = idle_s

    def __aiter__(self) -> Messages:
        return self

    async def __anext__(self) -> object:
        """The next message.

        Raises:
            InvalidInput: It is too large, or none.
            Unavailable: It did not come in time (kind "stream_idle").
        """
        if self._idle_s is None:
            return self._parse(await anext(self._bytes))
        try:
            async with asyncio.timeout(self._idle_s) as limit:
                data = await anext(self._bytes)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise Unavailable(
                f"nothing came for {self._idle_s:g} s; send the rest of the stream sooner",
                kind="stream_idle",
            ) from error
        return self._parse(data)
