"""The same cells on the workers of a Dask cluster, on one machine or on many."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diagnostics.results import Row
from inference.checkpoint import versions
from inference.errors import BadInput
from inference.files import write_bytes

from .cell import give_up, run_cell
from .matrix import Cell

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["away", "cluster"]


def cluster(cells: Sequence[Cell], folder: Path, *, address: str) -> Iterator[Row]:
    """Run cells on a cluster; their rows, as they are done.

    Workers need neuroguide installed in the versions of this machine, and no view of the store:
    each sends a cell's files back, row last. A cell whose worker dies is run anew by another, by
    default up to three times (Dask's `distributed.scheduler.allowed-failures`).

    Args:
        cells: what to run.
        folder: where their directories are made, on this machine.
        address: of the scheduler, "tcp://host:8786", or the path of its scheduler file.

    Raises:
        BadInput: Dask is not installed, no scheduler answers, or workers have other versions.
        OutputError: files could not be written here.
    """
    client = _connect(address)
    try:
        _same_versions(client)
        yield from _run(client, cells, folder)
    finally:
        client.close()


def _run(client: Client, cells: Sequence[Cell], folder: Path) -> Iterator[Row]:
    from distributed import as_completed

    futures = {client.submit(away, c, key=f"neuroguide-{c.name}", pure=False): c for c in cells}
    done = as_completed(futures)
    for future in done:
        cell = futures[future]
        if future.status == "finished":
            row, contents = future.result()
            for name in sorted(contents, key="row.json".__eq__):  # the row last
                write_bytes(folder / cell.name / name, contents[name])
        else:  # a worker that died too often, or an error of Dask's own
            error = f"{type(future.exception()).__name__}: {future.exception()}"
            row = give_up(folder / cell.name, cell.name, cell.config, error)
        future.release()  # its files need not stay on the cluster
        yield row


def away(cell: Cell) -> tuple[Row, dict[str, bytes]]:
    """Run a cell on a worker, which need not see the store; returns its row and all its files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / cell.name
        row = run_cell(path, cell.name, cell.config, cell.device)
        kept = [p for p in sorted(path.rglob("*")) if p.is_file()]
        return row, {p.relative_to(path).as_posix(): p.read_bytes() for p in kept}


def _connect(address: str) -> Client:
    try:
        from distributed import Client
    except ImportError as error:
        raise BadInput(
            "scheduler", expected="Dask's distributed", got="no such package",
            fix="pip install 'neuroguide[cluster]'.",
        ) from error  # fmt: skip
    try:
        if Path(address).is_file():
            return Client(scheduler_file=address, timeout=10)
        return Client(address, timeout=10)
    except (OSError, ValueError) as error:
        raise BadInput(
            "scheduler", expected="the address or file of a running Dask scheduler",
            got=f"{address!r} ({type(error).__name__}: {error})",
            fix="Start one with `dask scheduler`, or leave --scheduler out.",
        ) from error  # fmt: skip


def _same_versions(client: Client) -> None:
    """Numbers would differ with versions; workers that come later are not asked."""
    here = versions()
    for worker, there in client.run(versions, on_error="return").items():
        if there != here:
            raise BadInput(
                f"worker {worker}", expected=str(here), got=str(there),
                fix="Install the same versions there: pip install -c constraints.txt neuroguide.",
            )  # fmt: skip
