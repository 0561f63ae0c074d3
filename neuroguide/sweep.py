"""Run a matrix of cells, wherever, and keep what they find in one store that can be resumed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from diagnostics.results import FAILED, Results, Row, read_row
from diagnostics.rundir import RunDirectory
from inference.checkpoint import plain
from inference.errors import BadCheckpoint, BadInput, OutputError
from inference.progress import bar

from .cluster import cluster
from .crew import crew
from .matrix import Cell, Matrix

__all__ = ["Run", "sweep", "where"]

SAVE_EVERY = 5.0  # seconds between updates of the table
Run = Callable[[Sequence[Cell], Path], Iterator[Row]]


def sweep(
    matrix: Matrix, out: str | Path, run: Run, *, retry: bool = False, progress: bool = True
) -> Results:
    """Run the cells of a matrix that are not done, and write the results store.

    A cell counts as done once its row is written; a stopped sweep goes on with the others, each
    from its checkpoint. A matrix may grow between sweeps of one store; cells that it no longer has
    stay in the table.

    Args:
        matrix: what to run.
        out: the store.
        run: runs cells in a directory: :func:`crew` or :func:`cluster`.
        retry: run cells anew that failed.
        progress: show a bar with time left.

    Raises:
        BadInput: the store has cells of other settings, or a sweep is at work in it.
        OutputError: it cannot be written.
    """
    path = Path(out)
    folder = path / "cells"
    with _alone(path):
        rows = _found(folder, matrix.cells, retry=retry)
        left = [c for c in matrix.cells if c.name not in rows]
        total, saved = len(matrix.cells), time.perf_counter()
        try:
            with bar("sweep", total, start=total - len(left), show=progress) as advance:
                for row in run(left, folder) if left else ():
                    rows[row["cell"]] = row
                    advance(_state(rows))
                    if time.perf_counter() - saved > SAVE_EVERY:
                        Results(path, list(rows.values())).write()
                        saved = time.perf_counter()
        finally:
            results = Results(path, _ordered(rows, matrix.cells))
            results.write()
    return results


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """The store for this process only; free again when it ends, however it ends."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock", blocking=False)
        lock.acquire()
    except Timeout as error:
        raise BadInput(
            f"out {str(path)!r}", expected="a store that no other sweep is at work in",
            got="one in use", fix="Wait for that sweep, or choose another --out.",
        ) from error  # fmt: skip
    except OSError as error:
        raise OutputError(
            str(path), expected="a directory that can be written", got=str(error),
            fix="Choose another --out.",
        ) from error  # fmt: skip
    try:
        yield
    finally:
        lock.release()


def where(workers: int, scheduler: str | None) -> Run:
    """What runs the cells: local processes, or a Dask cluster.

    Args:
        workers: local processes; 0 for one on each core.
        scheduler: address or file of a Dask scheduler, or None.
    """
    if workers < 0:
        raise BadInput("workers", expected="a number >= 0", got=str(workers), fix="--workers 2")
    if scheduler is not None:
        return partial(cluster, address=scheduler)
    return partial(crew, workers=workers or os.cpu_count() or 1)


def _found(folder: Path, cells: Sequence[Cell], *, retry: bool) -> dict[str, Row]:
    """Rows of the cells that are done, others of the store included."""
    rows = {}
    for path in sorted(folder.glob("*/")):
        row = read_row(path)
        if row is not None and not (retry and row["status"] == FAILED):
            rows[path.name] = row
    for cell in cells:
        _same_settings(folder / cell.name, cell)
    return rows


def _same_settings(path: Path, cell: Cell) -> None:
    with suppress(BadCheckpoint):  # a cell that was never begun, or whose config is damaged
        saved, wanted = RunDirectory.open(path).config, plain(cell.config)
        differ = [k for k in wanted if saved.get(k) != wanted[k]]
        if differ:
            raise BadInput(
                f"out {str(path.parent.parent)!r}",
                expected=f"{cell.name} with " + ", ".join(f"{k}={wanted[k]!r}" for k in differ),
                got=", ".join(f"{k}={saved.get(k)!r}" for k in differ),
                fix="Choose another --out for other settings, or delete that cell's directory.",
            )


def _ordered(rows: dict[str, Row], cells: Sequence[Cell]) -> list[Row]:
    """In the order of the matrix, whatever order they were done in; then what it no longer has."""
    names = [c.name for c in cells if c.name in rows]
    return [rows[n] for n in names] + [rows[n] for n in sorted(rows.keys() - set(names))]


def _state(rows: dict[str, Row]) -> str:
    failed = sum(row["status"] == FAILED for row in rows.values())
    return f"{failed} failed" if failed else ""
