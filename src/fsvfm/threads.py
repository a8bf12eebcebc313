"""Overlapping the stages of a stream: items in order, errors in their places, and never many of them in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(items: Iterable[T], depth: int) -> Generator[T]:
    """The same items in the same order, drawn in a thread of their own, up to `depth` before they are asked for.

    What goes wrong there is raised here, in the place of the item. Closing this ends the thread, after the item that
    it is at; `items` stay as they are.
    """
    source, end = iter(items), object()
    pool = ThreadPoolExecutor(1, "ahead")
    try:
        waiting = deque(pool.submit(next, source, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, source, end))
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(cancel_futures=True)


def in_parallel(function: Callable[[T], R], items: Iterable[T], threads: int, depth: int) -> Generator[R]:
    """What a function gives for each of the items, in their order, made by so many threads.

    Up to `depth` results are made, or being made, before they are asked for. What goes wrong is raised here, in the
    place of the item; closing this ends the threads, each after the item that it is at.
    """
    pool = ThreadPoolExecutor(threads, "in_parallel")
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
