"""Progress of a long step: a bar on a terminal, elsewhere a line now and then, both with rate and time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

# Between lines: a step of days must not fill a log with ten thousand of them.
_SECONDS, _SECONDS_AT_MOST, _SHARE = 10.0, 600.0, 0.05


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "–/s")


@contextmanager
def progress(name: str, total: int) -> Iterator[Callable[[], None]]:
    """Show how far `total` things are; the yielded function is called once after each."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(name, total=total)
            yield lambda: bar.advance(task)
        return
    first = said = time.monotonic()
    done = 0

    def advance() -> None:
        nonlocal done, first, said
        done += 1
        now = time.monotonic()
        if done == 1:  # the first one also waited for processes to start and models to load
            first = said = now
        if done > 1 and (now - said >= min(max(_SECONDS, _SHARE * (now - first)), _SECONDS_AT_MOST) or done == total):
            said = now
            rate = (done - 1) / max(now - first, 1e-9)
            left = timedelta(seconds=round((total - done) / rate))
            print(f"{name}: {done}/{total}, {rate:.1f}/s, {left} left", file=sys.stderr, flush=True)

    yield advance
