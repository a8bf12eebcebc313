"""Stages of a stream that overlap: nothing changes but the time it takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import count, islice

from hypothesis import given
from hypothesis import strategies as st

from fsvfm.threads import ahead, in_parallel


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("ahead", "in_parallel"))]


@given(st.lists(st.integers(), max_size=20), st.integers(1, 5), st.integers(0, 25))
def test_items_drawn_ahead_are_the_same(items: list[int], depth: int, wanted: int) -> None:
    drawn = 0

    def source() -> Iterator[int]:
        nonlocal drawn
        for item in items:
            drawn += 1
            yield item
        raise KeyError("at the end")

    found, error = [], None
    with closing(ahead(source(), depth)) as several:
        try:
            for item in islice(several, wanted):
                found.append(item)
                assert drawn <= len(found) + depth  # memory stays bounded
        except KeyError as raised:
            error = raised
    assert found == items[:wanted]
    assert (error is not None) == (wanted > len(items))
    assert _threads() == []


def test_drawing_ahead_overlaps_with_what_is_done_with_the_items() -> None:
    taken, drawn = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        yield 1
        assert taken.wait(30)  # the first one is being dealt with …
        drawn.set()
        yield 2

    with closing(ahead(source(), 1)) as several:
        assert next(several) == 1
        taken.set()
        assert drawn.wait(30)  # … while the second one is made
        assert list(several) == [2]


@given(st.lists(st.integers(-5, 5), max_size=20), st.integers(1, 4), st.integers(1, 6), st.integers(0, 25))
def test_items_dealt_with_in_parallel_keep_their_order(items: list[int], threads: int, depth: int, wanted: int) -> None:
    drawn = 0

    def source() -> Iterator[int]:
        nonlocal drawn
        for item in items:
            drawn += 1
            yield item

    def inverse(item: int) -> float:
        time.sleep(0.001 * (item % 3))  # later items may be finished first
        return 1 / item

    found, error = [], None
    with closing(in_parallel(inverse, source(), threads, depth)) as several:
        try:
            for value in islice(several, wanted):
                found.append(value)
                assert drawn <= len(found) + depth  # memory stays bounded
        except ZeroDivisionError as raised:
            error = raised
    good = items[: items.index(0)] if 0 in items else items
    assert found == [1 / item for item in good[:wanted]]
    assert (error is not None) == (0 in items and wanted > len(good))
    assert _threads() == []


def test_items_are_dealt_with_in_parallel() -> None:
    together = threading.Barrier(3, timeout=30)
    with closing(in_parallel(lambda item: together.wait() * 0 + item, range(6), 3, 3)) as several:
        assert list(several) == list(range(6))


def test_no_more_is_drawn_ahead_than_asked_for() -> None:
    drawn = count()
    with closing(ahead(drawn, 3)) as several:
        assert next(several) == 0
        time.sleep(0.2)  # to go too far, if it would
    assert next(drawn) <= 4
