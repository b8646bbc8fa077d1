"""Work on many objects with a few threads: a bucket answers one request slowly and many not."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from store.reading import NUM_READERS

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result]:
    """Results of `function` in the order of `items`, computed by `NUM_READERS` threads, at most
    twice as many ahead of the reader. What it raises is raised where its result would be.
    """
    following = iter(items)
    ahead: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(NUM_READERS) as executor:
        try:
            while True:
                for item in islice(following, 2 * NUM_READERS - len(ahead)):
                    ahead.append(executor.submit(function, item))
                if not ahead:
                    return
                yield ahead.popleft().result()
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
