"""One way to show progress."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["Advance", "bar"]

REFRESH = 0.1  # seconds between updates: keeps the bar out of the loop's way


class Advance(Protocol):
    """Moves a bar by one step."""

    def __call__(self, note: str = "") -> None:
        """One more step done; the note stands at the end of the bar."""


@contextmanager
def bar(title: str, total: int, *, start: int = 0, show: bool = True) -> Iterator[Advance]:
    """A progress bar on standard error with time left; yields the function that moves it."""
    columns = (
        TextColumn("{task.description:<26}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not show) as progress:
        task = progress.add_task(title, total=total, completed=start, note="")
        done, last, text = start, 0.0, ""

        def advance(note: str = "") -> None:
            nonlocal done, last, text
            done, text = done + 1, note or text
            now = time.perf_counter()
            if now - last > REFRESH:
                last = now
                progress.update(task, completed=done, note=text)

        try:
            yield advance
        finally:
            progress.update(task, completed=done, note=text)
