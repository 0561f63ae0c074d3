"""A matrix of models, guides, objectives and seeds, as written in a TOML file, and its cells."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import inference
import zoo
from diagnostics import METRICS
from diagnostics.compare import EXACT
from diagnostics.results import OWN
from inference.errors import BadCheckpoint, BadInput
from zoo.data import DATA

__all__ = ["Cell", "Matrix"]

SIZES = {
    "steps": 2000, "model_steps": 2000, "batch_size": 256, "lr": 5e-3, "problems": 10,
    "draws": 1000, "chains": 4, "calibration": 200,
}  # fmt: skip
AXES = ("models", "guides", "objectives", "seeds")
EXTRAS = (
    "data",
    "device",
    "metrics",
    "reports",
    "sizes",
    "model",
    "guide",
)  # what else a file may have


@dataclass(frozen=True)
class Cell:
    """One fit of the matrix.

    Attributes:
        name: of its directory, MODEL-GUIDE-OBJECTIVE-SEED.
        config: as of a run directory.
        device: where it is run; no part of what it is.
    """

    name: str
    config: dict[str, Any]
    device: str


@dataclass(frozen=True)
class Matrix:
    """What a sweep has to do.

    Attributes:
        cells: in the order of the file: for each seed every model with every guide.
    """

    cells: list[Cell]

    @classmethod
    def read(cls, path: str | Path) -> Matrix:
        """Read a matrix.

        The file has lists of names, of patterns such as "gaussian_*", or "all", and sizes:

            models = ["factor_analysis", "banana"]
            guides = ["flow", "reservoir_sampler"]
            objectives = ["own"]              # or names of `neuroguide list`
            seeds = 3                         # or a list
            metrics = ["c2st", "elbo_gap"]    # by default all of them
            data = "digits"                   # learn the models on it; by default on nothing
            device = "cpu"                    # or "cuda"; by default a GPU where there is one
            reports = true                    # a page with pictures for each cell

            [sizes]                           # of every cell
            steps = 2000
            calibration = 200                 # simulated problems of SBC, 0 for none

            [guide.reservoir_sampler]         # sizes and knobs of one guide; [model.NAME] likewise
            steps = 4000
            knobs = { neurons = 1000 }

        Raises:
            BadCheckpoint: the file cannot be read.
            BadInput: a name or key that there is not, or a value of the wrong kind.
        """
        try:
            found = tomllib.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise BadCheckpoint(
                f"matrix {str(path)!r}", expected="a TOML file", got=str(error),
                fix="Name a file such as the one in docs/how_to/sweep.md.",
            ) from error  # fmt: skip
        return cls.of(found)

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Matrix:
        """The cells of a matrix in memory, with the keys of the file."""
        _known("matrix", found, (*AXES, *EXTRAS))
        models = _names("models", found, zoo.MODELS)
        guides = [g for g in _names("guides", found, inference.GUIDES) if g != EXACT]
        goals = _names(
            "objectives", {"objectives": [OWN], **found}, {OWN: 0, **inference.OBJECTIVES}
        )
        data = found.get("data")
        if data is not None:
            DATA[data]
        common = {"data": data, "metrics": _metrics(found), "reports": _reports(found)}
        _known("model", found.get("model", {}), zoo.MODELS)
        _known("guide", found.get("guide", {}), inference.GUIDES)
        cells = []
        for seed, model, guide, goal in itertools.product(_seeds(found), models, guides, goals):
            sizes = _sizes(found, model, guide)
            config = {
                "command": "sweep", "model": model, "guides": [guide],
                "objective": None if goal == OWN else goal, "seed": seed, **common, **sizes,
            }  # fmt: skip
            name = f"{model}-{guide}-{goal}-{seed}"
            cells.append(Cell(name, config, str(found.get("device", "auto"))))
        return cls(cells)


def _known(where: str, found: Mapping[str, Any], names: Iterable[str]) -> None:
    for key in found:
        if key not in (known := list(names)):
            raise BadInput(
                f"{where}.{key}" if where != "matrix" else key,
                expected=f"one of {', '.join(known)}", got=repr(key), fix="Correct the matrix.",
            )  # fmt: skip


def _names(axis: str, found: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
    """Names of a table that a list of names and patterns stands for."""
    asked = found.get(axis, [])
    asked = ["*"] if asked == "all" else asked
    if not isinstance(asked, list) or not asked or not all(isinstance(a, str) for a in asked):
        raise BadInput(
            axis, expected='a list of names or "all"', got=repr(asked), fix=f'{axis} = "all"'
        )
    chosen: list[str] = []
    for pattern in asked:
        matching = [name for name in table if fnmatchcase(name, pattern)]
        if not matching:
            raise inference.UnknownName(table, pattern, axis)
        chosen += matching
    return list(dict.fromkeys(chosen))


def _seeds(found: Mapping[str, Any]) -> list[int]:
    asked = found.get("seeds", 1)
    seeds = list(range(asked)) if type(asked) is int else asked
    if not isinstance(seeds, list) or not seeds or any(type(s) is not int or s < 0 for s in seeds):
        raise BadInput(
            "seeds",
            expected="how many, or a list of integers >= 0",
            got=repr(asked),
            fix="seeds = 3",
        )
    return seeds


def _reports(found: Mapping[str, Any]) -> bool:
    asked = found.get("reports", True)
    if type(asked) is not bool:
        raise BadInput("reports", expected="true or false", got=repr(asked), fix="reports = true")
    return asked


def _metrics(found: Mapping[str, Any]) -> list[str] | None:
    return _names("metrics", found, METRICS) if "metrics" in found else None


def _sizes(found: Mapping[str, Any], model: str, guide: str) -> dict[str, Any]:
    """Sizes of a cell: those of its guide over those of its model over those of all."""
    layers = {
        "sizes": found.get("sizes", {}),
        f"model.{model}": found.get("model", {}).get(model, {}),
        f"guide.{guide}": found.get("guide", {}).get(guide, {}),
    }
    sizes: dict[str, Any] = dict(SIZES)
    for where, layer in layers.items():
        _known(where, layer, (*SIZES, "knobs") if where.startswith("guide") else SIZES)
        for key, value in layer.items():
            if key != "knobs" and (type(value) not in (int, float) or value < 0):
                raise BadInput(f"{where}.{key}", expected="a number >= 0", got=repr(value),
                               fix=f"{key} = {SIZES[key]}")  # fmt: skip
        sizes |= layer
    return sizes
