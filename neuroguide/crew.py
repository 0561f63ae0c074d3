"""Local processes that run cells, each one at a time; one that dies takes no cell with it."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from diagnostics.results import Row

from .cell import give_up, run_cell
from .matrix import Cell

__all__ = ["DEATHS", "crew"]

DEATHS = 3  # after which a cell is not tried again
SPAWN = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork


def crew(cells: Sequence[Cell], folder: Path, *, workers: int) -> Iterator[Row]:
    """Run cells in `workers` processes of one thread each; their rows, as they are done.

    A process that dies, for want of memory or by a signal, is replaced, and its cell is taken up
    from its checkpoint; a cell at which three have died has failed. If this process dies, its
    workers end.

    Raises:
        OutputError: a worker could not write.
    """
    waiting, deaths = deque(cells), Counter[str]()
    hands = [_Hand(folder) for _ in range(min(workers, len(cells)))]
    try:
        while waiting or any(h.cell for h in hands):
            for hand in hands:
                if hand.cell is None and waiting:
                    hand.take(waiting.popleft())
            for pipe in wait([h.pipe for h in hands if h.cell]):
                hand = next(h for h in hands if h.pipe is pipe)
                cell = hand.cell
                assert cell is not None
                try:
                    row = hand.result()
                except EOFError:
                    hands[hands.index(hand)] = _Hand(folder)
                    deaths[cell.name] += 1
                    if deaths[cell.name] < DEATHS:
                        waiting.append(cell)
                        continue
                    why = f"its process died {DEATHS} times, as one does that is out of memory"
                    row = give_up(folder / cell.name, cell.name, cell.config, why)
                yield row
    finally:
        for hand in hands:
            hand.stop()


class _Hand:
    """A process and what it is at."""

    def __init__(self, folder: Path) -> None:
        self.pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=_work, args=(theirs, folder), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is seen here
        self.cell: Cell | None = None

    def take(self, cell: Cell) -> None:
        """Begin a cell; a process that is gone already is noticed when its result is asked for."""
        self.cell = cell
        with suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(cell)

    def result(self) -> Row:
        """The row of its cell; EOFError if it has died, its own error if it could not write."""
        try:
            found: Any = self.pipe.recv()
        except (ConnectionResetError, OSError) as error:
            raise EOFError from error
        self.cell = None
        if isinstance(found, Exception):
            raise found
        row: Row = found
        return row

    def stop(self) -> None:
        """End the process: at once where it waits, else after its handling of the interrupt."""
        self.pipe.close()
        self.process.join(5.0 if self.cell else 1.0)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


def _work(pipe: Connection, folder: Path) -> None:
    """Cells until the pipe is closed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            cell = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        found: Any
        try:
            found = run_cell(folder / cell.name, cell.name, cell.config, cell.device)
        except KeyboardInterrupt:
            return
        except Exception as error:
            found = error
        try:
            pipe.send(found)
        except (BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
            return  # nobody waits for it; the row is on disk


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
