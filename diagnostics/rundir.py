"""Run directories: what a run was, what it learned and what it found, on disk."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inference.arguments import check_call
from inference.checkpoint import plain, versions
from inference.errors import BadCheckpoint, BadInput
from inference.files import write_bytes, write_netcdf
from inference.fit import Fit

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

__all__ = ["RunDirectory"]

Losses = dict[str, dict[str, np.ndarray[Any, Any]]]
Health = dict[str, np.ndarray[Any, Any]]


class RunDirectory:
    """One run: config.json, checkpoints/, losses.csv, health.csv, draws.nc, comparison.nc,
    report.html and, of a cell of a sweep, calibration.nc and row.json.

    Args:
        path: the directory.
        config: as read from config.json.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path, self.config = path, config

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any]) -> RunDirectory:
        """Make the directory, or take up the unfinished or finished run of the same config.

        A run that was refused before it kept anything is no other run: its config is replaced.

        Raises:
            BadInput: it holds another run, or files that are no run of ours.
            OutputError: it cannot be written.
        """
        check_call(cls.create, locals())
        path, wanted = Path(path), plain(config)
        for left in path.rglob(".*.part"):  # of a process that was killed as it wrote
            left.unlink(missing_ok=True)
        if (path / "config.json").exists():
            saved = cls.open(path).config
            differ = [k for k in {**saved, **wanted} if saved.get(k) != wanted.get(k)]
            differ = [k for k in differ if k != "versions"]
            kept = any(p.is_file() and p.name != "config.json" for p in path.rglob("*"))
            if differ and kept:
                raise BadInput(
                    f"out {str(path)!r}",
                    expected=", ".join(f"{k}={wanted.get(k)!r}" for k in differ),
                    got="another run, " + ", ".join(f"{k}={saved.get(k)!r}" for k in differ),
                    fix="Choose another --out, or repeat that run's options to resume it.",
                )
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise BadInput(
                f"out {str(path)!r}",
                expected="a new, empty or run directory",
                got="a file" if path.is_file() else "a directory with other files",
                fix="Choose another --out.",
            )
        run = cls(path, wanted | {"versions": versions()})
        write_bytes(path / "config.json", json.dumps(run.config, indent=1).encode())
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """An existing run.

        Raises:
            BadCheckpoint: no readable config.json.
        """
        check_call(cls.open, locals())
        try:
            return cls(Path(path), json.loads((Path(path) / "config.json").read_text()))
        except (OSError, ValueError) as error:
            raise BadCheckpoint(
                f"run {str(path)!r}",
                expected="a run directory with config.json",
                got=f"{type(error).__name__}: {error}",
                fix="Name a directory that `neuroguide compare` or `fit` has written.",
            ) from error

    @property
    def title(self) -> str:
        """Model and data set, for people."""
        data = self.config.get("data")
        return str(self.config["model"]).replace("_", " ") + (f" on {data}" if data else "")

    def checkpoint(self, name: str) -> Path:
        """Where the fit of that name is kept."""
        return self.path / "checkpoints" / f"{name}.safetensors"

    def write_losses(self, fits: Mapping[str, Fit]) -> None:
        """losses.csv: fit, player, step, loss."""
        rows = (
            [name, player, k, f"{v:.6g}"]
            for name, fit in fits.items()
            for player, values in fit.losses.items()
            for k, v in enumerate(values)
        )
        self._write_table("losses.csv", ["fit", "player", "step", "loss"], rows)

    def losses(self) -> Losses:
        """What :meth:`write_losses` wrote: fit, player, losses."""
        found: dict[str, dict[str, list[float]]] = {}
        with self._existing("losses.csv").open() as file:
            for row in csv.DictReader(file):
                players = found.setdefault(row["fit"], {})
                players.setdefault(row["player"], []).append(float(row["loss"]))
        return {f: {p: np.array(v) for p, v in players.items()} for f, players in found.items()}

    def write_health(self, fits: Mapping[str, Fit]) -> None:
        """health.csv: fit, quantity, step, value."""
        rows = (
            [name, quantity, int(k), f"{v:.6g}"]
            for name, fit in fits.items()
            for quantity, values in fit.health.items()
            if quantity != "step"
            for k, v in zip(fit.health["step"], values, strict=True)
        )
        self._write_table("health.csv", ["fit", "quantity", "step", "value"], rows)

    def health(self) -> dict[str, Health]:
        """`Fit.health` by fit, as :meth:`write_health` wrote it; empty where it did not."""
        if not (self.path / "health.csv").exists():
            return {}
        found: dict[str, dict[str, dict[int, float]]] = {}
        with (self.path / "health.csv").open() as file:
            for row in csv.DictReader(file):
                gauge = found.setdefault(row["fit"], {}).setdefault(row["quantity"], {})
                gauge[int(row["step"])] = float(row["value"])
        return {
            fit: {"step": np.array([*next(iter(gauges.values()))])}
            | {name: np.array([*gauge.values()]) for name, gauge in gauges.items()}
            for fit, gauges in found.items()
        }

    def write_draws(self, trees: Mapping[str, DataTree], **attrs: Any) -> None:
        """draws.nc: one group per guide, each an ArviZ DataTree.

        Without scores, which may be three times as large as the draws.
        """
        from xarray import DataTree

        kept = {name: tree.drop_nodes("scores", errors="ignore") for name, tree in trees.items()}
        whole = DataTree.from_dict(kept)
        whole.attrs = attrs
        write_netcdf(self.path / "draws.nc", whole)

    def draws(self) -> DataTree:
        """What :meth:`write_draws` wrote."""
        import xarray

        return xarray.open_datatree(self._existing("draws.nc"), engine="h5netcdf").load()

    def write_comparison(self, comparison: Dataset) -> None:
        """comparison.nc: the dataset of `diagnostics.compare`."""
        write_netcdf(self.path / "comparison.nc", comparison)

    def comparison(self) -> Dataset:
        """What :meth:`write_comparison` wrote."""
        import xarray

        return xarray.load_dataset(self._existing("comparison.nc"), engine="h5netcdf")

    def write_calibration(self, ranks: DataTree) -> None:
        """calibration.nc: the ranks of `diagnostics.sbc`."""
        write_netcdf(self.path / "calibration.nc", ranks)

    def calibration(self) -> DataTree | None:
        """What :meth:`write_calibration` wrote; None where it did not."""
        import xarray

        path = self.path / "calibration.nc"
        return xarray.open_datatree(path, engine="h5netcdf").load() if path.exists() else None

    def _write_table(self, name: str, header: list[str], rows: Iterable[list[Any]]) -> None:
        text = io.StringIO()
        csv.writer(text).writerows([header, *rows])
        write_bytes(self.path / name, text.getvalue().encode())

    def _existing(self, name: str) -> Path:
        path = self.path / name
        if not path.exists():
            raise BadCheckpoint(
                str(path),
                expected="a finished run",
                got="no such file",
                fix="Repeat the command that made the directory: it goes on where it stopped.",
            )
        return path
