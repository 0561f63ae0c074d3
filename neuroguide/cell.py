"""One cell of a sweep: fit, draw, compare, calibrate, and say what was found, in its directory."""

from __future__ import annotations

import math
import threading
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

import diagnostics
import inference
from diagnostics.report import report
from diagnostics.results import FAILED, OWN, UNFIT, Row, rows_of, write_row
from diagnostics.rundir import RunDirectory
from inference.errors import BadInput, Incompatible, NoDensity, NoExactPosterior, OutputError
from inference.files import write_bytes

from . import pipeline

__all__ = ["give_up", "run_cell"]

REFUSED = (BadInput, Incompatible, NoDensity, NoExactPosterior)  # the parts do not fit together
ALONE = threading.Lock()  # torch has one generator per process: one cell at a time


def run_cell(path: Path, name: str, config: Mapping[str, Any], device: str) -> Row:
    """Run a cell where it stands, or take it up again, and write its row last of all.

    Everything is computed with one thread, so that the numbers depend on no machine's load.

    Returns:
        The row. A cell that failed says how, with its traceback in error.txt; one whose parts do
        not fit together says why.

    Raises:
        OutputError: the row or a file before it could not be written.
    """
    began = time.perf_counter()
    with ALONE, threadpool_limits(1), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            row = _measure(RunDirectory.create(path, config), device)
        except OutputError:
            raise
        except REFUSED as error:
            row = _without(config, UNFIT, str(error))
        except Exception as error:  # whatever a user's guide or a sampler may raise
            write_bytes(path / "error.txt", traceback.format_exc().encode())
            row = _without(config, FAILED, f"{type(error).__name__}: {error}")
        finally:
            torch.set_num_threads(threads)
    said = dict.fromkeys(
        str(w.message) for w in warned if w.category.__module__ == "inference.errors"
    )
    row |= {"cell": name, "warnings": " ".join(said), "path": f"cells/{name}"}
    row["cell_seconds"] = time.perf_counter() - began
    write_row(path, row)
    return row


def give_up(path: Path, name: str, config: Mapping[str, Any], error: str) -> Row:
    """The row of a cell that could not be run to its end by anybody, written where it stands."""
    row = _without(config, FAILED, error) | {"cell": name, "path": f"cells/{name}"}
    write_row(path, row)
    return row


def _measure(run: RunDirectory, device: str) -> Row:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RuntimeError(f"no GPU here for device = {device!r}")  # another machine may have one
    model, held_out, fits = pipeline.learn_model(run, device, show=False)
    guides = pipeline.fit_guides(run, model, held_out, fits, device, show=False)
    run.write_losses(fits)
    run.write_health(fits)
    pipeline.compare(run, model, guides, held_out, fits, show=False)
    (guide,) = guides.values()
    _calibrate(run, model, guide)
    (row,) = rows_of(run)
    if run.config["reports"]:
        report(run.path)
    return row


def _calibrate(run: RunDirectory, model: Any, guide: inference.Guide) -> None:
    """Simulation-based calibration; of guides that answer one problem there is none."""
    problems = run.config["calibration"]
    if not problems or not (guide.amortised and guide.latents.plated):
        return
    kept = run.path / "checkpoints" / "calibration.nc"
    found = diagnostics.sbc(
        model, guide, problems=problems, seed=run.config["seed"], progress=False, checkpoint=kept
    )
    run.write_calibration(found)


def _without(config: Mapping[str, Any], status: str, error: str) -> Row:
    """The row of a cell that has no numbers."""
    return {
        "model": config["model"],
        "data": config["data"] or "",
        "guide": config["guides"][0],
        "objective": config["objective"] or OWN,
        "seed": config["seed"],
        "status": status,
        "error": error,
        "calibration_p": math.nan,
    }
