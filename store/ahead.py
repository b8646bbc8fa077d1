"""Work on many objects with a few threads: a bucket answers one request slowly and many not."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Final, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

NUM_READERS: Final = 8


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int = 2 * NUM_READERS - 1
) -> Generator[Result]:
    """Results of `function` in the order of `items`, computed by `NUM_READERS` threads, at most
    `ahead` of them ahead of the one that is read. What it raises is raised where its result would
    be.
    """
    following = iter(items)
    begun: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(NUM_READERS) as executor:
        try:
            while True:
                for item in islice(following, 1 + ahead - len(begun)):
                    begun.append(executor.submit(function, item))
                if not begun:
                    return
                yield begun.popleft().result()
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
