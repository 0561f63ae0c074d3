"""One way to show progress, in terminals and in notebooks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

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
PATIENCE = 0.5  # seconds before there is a bar: what is done by then needs none
WIDTH = 160  # columns of a line in a notebook: gauges of games are long


class Advance(Protocol):
    """Moves a bar by one step."""

    def __call__(self, note: str = "") -> None:
        """One more step done; the note stands at the end of the bar."""


class _NotebookProgress(Progress):
    """The same bar as a line of text that is written over: no widgets, and the last line stays."""

    handle: Any = None

    def start(self) -> None:
        """Show the line."""
        from IPython.display import display

        self.handle = display(self._line(), raw=True, display_id=True)

    def refresh(self) -> None:
        """Write the line anew."""
        if self.handle is not None:
            self.handle.update(self._line(), raw=True)

    def stop(self) -> None:
        """Nothing runs that could be stopped: write the line a last time."""
        self.refresh()

    def _line(self) -> dict[str, str]:
        console = Console(width=WIDTH, force_jupyter=False, color_system=None)
        with console.capture() as text:
            console.print(self.get_renderable())
        return {"text/plain": text.get().rstrip()}


@contextmanager
def bar(title: str, total: int, *, start: int = 0, show: bool = True) -> Iterator[Advance]:
    """A progress bar on standard error with time left; yields the function that moves it.

    It comes once the work has taken half a second.
    """
    columns = (
        TextColumn("{task.description:<26}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console = Console(stderr=True)
    kind = _NotebookProgress if console.is_jupyter else Progress
    progress = kind(*columns, console=console, disable=not show)
    task = progress.add_task(title, total=total, completed=start, note="")
    began = time.perf_counter()
    done, last, text, shown = start, began, "", False

    def advance(note: str = "") -> None:
        nonlocal done, last, text, shown
        done, text = done + 1, note or text
        now = time.perf_counter()
        if show and not shown and now - began > PATIENCE:
            shown = True
            progress.start()
        if now - last > REFRESH:
            last = now
            progress.update(task, completed=done, note=text, refresh=console.is_jupyter)

    try:
        yield advance
    finally:
        if shown:
            progress.update(task, completed=done, note=text)
            progress.stop()
