"""Atomic files: whole or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import OutputError

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

__all__ = ["atomic_path", "write_bytes", "write_netcdf"]


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends without error.

    Raises:
        OutputError: the file could not be written; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(
            str(path),
            expected="room and permission to write it",
            got=str(error),
            fix="Free some space or choose another directory; earlier files are intact.",
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Write data to path, atomically and flushed to the disk."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_netcdf(path: Path, data: Dataset | DataTree, **options: Any) -> None:
    """Write a netCDF file, atomically: made in memory, for HDF5 on a full disk ends the process.

    Args:
        path: the file.
        data: what to write.
        options: of xarray's `to_netcdf`, such as `encoding`.
    """
    with _unlocked():
        made = data.to_netcdf(engine="h5netcdf", **options)
    assert made is not None  # as there is no path
    write_bytes(path, bytes(made))


def _unlocked() -> AbstractContextManager[Any]:
    """Beside a Dask cluster xarray would ask it for a lock, which a file in memory has not."""
    if "dask" not in sys.modules:
        return nullcontext()
    import dask

    locked: AbstractContextManager[Any] = dask.config.set(scheduler="synchronous")
    return locked
