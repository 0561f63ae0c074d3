"""What many runs found: a row for each guide of each run, kept as one table beside the runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inference import checkpoint as files
from inference.errors import BadCheckpoint, BadInput
from inference.files import write_bytes, write_netcdf

from .calibration import sbc_test
from .compare import summary
from .report import trees_of
from .rundir import RunDirectory
from .verdict import verdicts

if TYPE_CHECKING:
    from xarray import DataArray, Dataset, DataTree

__all__ = ["DONE", "FAILED", "FORMAT", "OWN", "UNFIT", "Results", "Row", "is_store", "read_row",
           "rows_of",
           "write_row"]  # fmt: skip

FORMAT = 1  # of the table and of its rows
OWN = "own"  # stands for the objective that a guide was published with
DONE, FAILED, UNFIT = "done", "failed", "does not apply"
WORDS = ("cell", "model", "data", "guide", "objective", "status", "verdict", "calibration",
         "warnings", "error", "path")  # fmt: skip
NUMBERS = ("seed", "fit_seconds", "cell_seconds", "draws_per_second", "energy", "calibration_p")
FIELDS = ("value", "se", "floor", "excess", "excess_se", "at_floor")

Row = dict[str, Any]


def rows_of(run: RunDirectory) -> list[Row]:
    """A row for each guide of a run with draws: what it is, how right, at what cost.

    Args:
        run: of `neuroguide compare`, or a cell of `neuroguide sweep`.

    Returns:
        Of each guide `verdict`, `calibration` in words and its smallest p-value, `fit_seconds`,
        `draws_per_second`, `energy` of circuits that pay for reliability (entropic price, mean over
        problems, nats), and `metrics`: by name the fields of :func:`diagnostics.summary`.

    Raises:
        BadCheckpoint: not a finished run.
        BadInput: a run that fitted a guide and compared nothing.
    """
    if not (run.path / "draws.nc").exists() and run.config.get("command") == "fit":
        raise BadInput(
            f"run {str(run.path)!r}", expected="a run of `neuroguide compare`",
            got="one of `neuroguide fit`", fix="Leave it out, or compare its guide.",
        )  # fmt: skip
    comparison, trees = run.comparison(), trees_of(run.draws())
    means, said = summary(comparison), verdicts(trees, comparison)
    return [
        {
            "model": run.config["model"],
            "data": run.config.get("data") or "",
            "guide": guide,
            "objective": run.config.get("objective") or OWN,
            "seed": run.config["seed"],
            "status": DONE,
            "verdict": sentence,
            "path": str(run.path),
            "draws_per_second": _speed(trees[guide]),
            "fit_seconds": _seconds(run.checkpoint(guide)),
            "energy": _energy(trees[guide]),
            **_calibration(run),
            "metrics": _metrics(means.sel(guide=guide)),
        }
        for guide, sentence in said.items()
    ]


def _metrics(means: Dataset) -> dict[str, dict[str, Any]]:
    return {
        str(name): {f: float(means[f].sel(metric=name)) for f in FIELDS}
        | {"reason": str(means.reason.sel(metric=name).values)}
        for name in means.metric.values
    }


def _speed(tree: DataTree) -> float:
    """Draws of one problem's latents per second, over all problems and chains."""
    sizes = tree["posterior"].sizes
    drawn = sizes["draw"] * sizes["chain"] * sizes["problem"]
    return drawn / max(float(tree.attrs["seconds"]), 1e-9)


def _seconds(checkpoint: Path) -> float:
    """Wall time of the fit; 0 of a guide with nothing to learn."""
    return float(files.read(checkpoint)[1]["seconds"]) if checkpoint.exists() else 0.0


def _energy(tree: DataTree) -> float:
    if "reliability" not in tree.children or "energy" not in tree["reliability"].dataset:
        return math.nan
    return float(tree["reliability"].dataset["energy"].mean())


def _calibration(run: RunDirectory) -> dict[str, Any]:
    if (reason := run.config.get("calibration")) in (None, 0):
        return {"calibration": "not asked", "calibration_p": math.nan}
    tree = run.calibration()
    if tree is None:
        return {"calibration": "no simulations", "calibration_p": math.nan}
    found = sbc_test(tree)
    smallest = min(1.0, float(found.p_value.min()) * found.sizes["quantity"])
    words = "calibrated" if found.attrs["calibrated"] else "not calibrated"
    return {"calibration": f"{words}, {reason} problems", "calibration_p": smallest}


def write_row(path: Path, row: Row) -> None:
    """row.json of a finished cell, atomically: with it the cell counts as done."""
    kept = {"format": FORMAT, "versions": files.versions(), **row}
    write_bytes(path / "row.json", json.dumps(kept, indent=1).encode())


def read_row(path: Path) -> Row | None:
    """A cell's row; None where there is none that can be read, so that the cell has to be run.

    The row of an older format is made again from the cell's own files.
    """
    try:
        row: Row = json.loads((path / "row.json").read_text())
    except (OSError, ValueError):
        return None
    if row.get("format") == FORMAT:
        return row
    if row.get("status") != DONE:
        return None
    try:
        (fresh,) = rows_of(RunDirectory.open(path))
    except (BadCheckpoint, ValueError, KeyError):
        return None
    return row | fresh | {"format": FORMAT, "path": row["path"]}


def is_store(path: Path) -> bool:
    """Whether a directory is a results store, however damaged, and not a run."""
    return (path / "results.nc").exists() or (path / "cells").is_dir()


class Results:
    """The results store of a sweep: results.nc, a table with a row per cell, and cells/.

    Each cell is a run directory with draws, comparison and report of its own.

    Args:
        path: the directory.
        rows: what its cells found.
    """

    def __init__(self, path: Path, rows: Sequence[Row]) -> None:
        self.path, self.rows = path, list(rows)

    @classmethod
    def open(cls, path: str | Path) -> Results:
        """A store that `neuroguide sweep` has written.

        Raises:
            BadCheckpoint: none, damaged, or written in another format.
        """
        import xarray

        target = Path(path) / "results.nc"
        try:
            table = xarray.load_dataset(target, engine="h5netcdf")
            kept = table.attrs.get("format", 0)
        except Exception as error:  # HDF5 has errors of its own
            raise BadCheckpoint(
                str(target),
                expected="a results store",
                got="no such file" if not target.exists() else f"{type(error).__name__}: {error}",
                fix="Run the sweep again: finished cells are kept, and the table is made of them.",
            ) from error
        if kept != FORMAT:
            raise BadCheckpoint(
                str(target),
                expected=f"format {FORMAT}",
                got=f"format {kept}, by neuroguide {table.attrs.get('version', 'unknown')}",
                fix="Run the sweep again: finished cells are kept, and the table is made of them.",
            )
        return cls(Path(path), _rows(table))

    def table(self) -> Dataset:
        """All rows as arrays.

        Returns:
            Dimension `cell`: words such as `model`, `guide`, `objective`, `status`, `verdict` and
            `error`; numbers such as `seed`, `fit_seconds` and `draws_per_second`; and of the
            metrics `value`, `se`, `floor`, `excess`, `excess_se`, `at_floor` and `reason` (cell,
            metric), means over problems. What a cell does not have is NaN or "".
        """
        import xarray

        names = list(dict.fromkeys(m for row in self.rows for m in row.get("metrics", {})))
        words = {w: ("cell", np.array([str(r.get(w, "")) for r in self.rows])) for w in WORDS[1:]}
        numbers = {n: ("cell", [float(r.get(n, math.nan)) for r in self.rows]) for n in NUMBERS}

        def field(name: str, missing: Any) -> tuple[tuple[str, str], Any]:
            cells = [r.get("metrics", {}) for r in self.rows]
            values = [[c.get(m, {}).get(name, missing) for m in names] for c in cells]
            return ("cell", "metric"), np.array(values).reshape(len(cells), len(names))

        metrics = {f: field(f, math.nan) for f in FIELDS} | {"reason": field("reason", "")}
        return xarray.Dataset(
            {**words, **numbers, **metrics},
            coords={"cell": [str(r["cell"]) for r in self.rows], "metric": names},
            attrs={"format": FORMAT, "version": files.versions()["neuroguide"]},
        )

    def matrix(self, metric: str = "c2st", field: str = "excess") -> DataArray:
        """One number of each cell, dims (model, guide, objective, seed); NaN where there is none.

        Args:
            metric: a name in `METRICS`.
            field: `value`, `excess` over the floor, or another of :func:`diagnostics.summary`.
        """
        import xarray

        table = self.table()
        if metric not in table.metric.values:
            names = ", ".join(map(str, table.metric.values)) or "none"
            raise BadInput("metric", expected=f"one of {names}", got=repr(metric),
                           fix="Name a metric that the sweep has computed.")  # fmt: skip
        keys = ("model", "guide", "objective", "seed")
        axes = [list(dict.fromkeys(table[k].values.tolist())) for k in keys]
        values = np.full([len(a) for a in axes], math.nan)
        for k, value in enumerate(table[field].sel(metric=metric).values):
            where = [a.index(table[key].values[k]) for key, a in zip(keys, axes, strict=True)]
            values[tuple(where)] = value
        return xarray.DataArray(values, coords=dict(zip(keys, axes, strict=True)), name=metric)

    def run(self, cell: str) -> RunDirectory:
        """The run directory of a cell: its checkpoint, comparison and report."""
        return RunDirectory.open(self.path / "cells" / cell)

    def draws(self, cell: str) -> DataTree:
        """The draws of a cell: groups `exact` and the guide's name, each an ArviZ DataTree."""
        return self.run(cell).draws()

    def write(self) -> None:
        """Write results.nc, atomically."""
        write_netcdf(self.path / "results.nc", self.table())


def _rows(table: Dataset) -> list[Row]:
    """Undo :meth:`Results.table`."""
    return [_one(table.isel(cell=k)) for k in range(table.sizes["cell"])]


def _one(cell: Dataset) -> Row:
    row: Row = {w: str(cell[w].values) for w in WORDS} | {n: float(cell[n]) for n in NUMBERS}
    metrics: Mapping[str, Any] = {
        str(m): {f: float(cell[f].sel(metric=m)) for f in FIELDS}
        | {"reason": str(cell.reason.sel(metric=m).values)}
        for m in cell.metric.values
    }
    return row | {"seed": int(row["seed"]), "metrics": metrics if row["status"] == DONE else {}}
