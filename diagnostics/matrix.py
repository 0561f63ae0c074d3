"""One page of many runs: models by guides, what each cell found, and at what cost."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from . import plots
from .page import number, write_page
from .results import DONE, FAILED, OWN, UNFIT, Results, Row, is_store, rows_of
from .rundir import RunDirectory
from .verdict import AT_FLOOR

__all__ = ["QUANTITIES", "Quantity", "overview"]

ALPHA = 0.05  # of the calibration test, for the colour


@dataclass(frozen=True)
class Quantity:
    """What can be shown of each cell.

    Attributes:
        title: with units.
        why: one sentence.
        value: of a row; NaN where it has none.
        text: of a value.
        right: whether a row is right by it; None where that is no question.
    """

    title: str
    why: str
    value: Callable[[Row], float]
    text: Callable[[float], str]
    right: Callable[[Row], bool] | None = None


def _excess(metric: str) -> Callable[[Row], float]:
    return lambda row: float(row["metrics"].get(metric, {}).get("excess", math.nan))


def _at_floor(metric: str) -> Callable[[Row], bool]:
    return lambda row: bool(row["metrics"][metric]["at_floor"])


def _field(name: str) -> Callable[[Row], float]:
    return lambda row: float(row.get(name, math.nan))


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"


QUANTITIES: Mapping[str, Quantity] = {
    "c2st": Quantity(
        "C2ST above floor",
        "how much better than on exact draws a classifier tells a guide's draws from exact ones, "
        "mean over problems", _excess("c2st"), "{:+.3f}".format, _at_floor("c2st"),
    ),
    "calibration": Quantity(
        "calibration, p-value",
        "simulation-based calibration: the smallest p-value of any quantity, times their number",
        _field("calibration_p"), lambda p: f"{p:.2g}",
        lambda row: row["calibration_p"] >= ALPHA,
    ),
    "elbo_gap": Quantity(
        "ELBO gap / nats", "log p(x) - ELBO = KL(q || p) above its floor, of guides with a density",
        _excess("elbo_gap"), number, _at_floor("elbo_gap"),
    ),
    "fit": Quantity("fit time", "seconds of all training steps", _field("fit_seconds"), _seconds),
    "speed": Quantity(
        "draws / s",
        "draws per second, over problems and chains, correlated ones included",
        _field("draws_per_second"), number,
    ),
    "energy": Quantity(
        "energy / nats", "price of a circuit's reliability, -sum log sd of its noise up to a "
        "constant, of circuits with Gaussian noise", _field("energy"), number,
    ),
}  # fmt: skip


def overview(paths: Sequence[str | Path], out: str | Path) -> Path:
    """Write one page of several runs or of a results store: models by guides, sortable.

    Seeds of a cell are shown as their mean and its standard error over seeds. A cell links to its
    run's report, relative to the page.

    Args:
        paths: directories of `neuroguide compare`, with their reports, or of `neuroguide sweep`.
        out: the page.

    Returns:
        The page's path.

    Raises:
        BadCheckpoint: a directory is no run or store, or not a finished one.
        BadInput: a run has fitted a guide and compared nothing.
        OutputError: the page cannot be written.
    """
    target = Path(out)
    rows = [row for path in paths for row in _rows(Path(path), target.parent)]
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((_line(row), _column(row)), []).append(row)
    lines, columns = (list(dict.fromkeys(key[k] for key in cells)) for k in (0, 1))
    shown = {name: q for name, q in QUANTITIES.items() if any(_known(q, r) for r in rows)}
    write_page(
        target, "matrix.html.j2", quantities=shown, lines=lines,
        columns={c: plots.colour(c.split(" · ")[0].replace(" ", "_")) for c in columns},
        cells={key: _cell(found, shown) for key, found in cells.items()},
        rows=[_entry(row, shown) for row in rows if row["status"] == DONE],
        failed=[r for r in rows if r["status"] == FAILED],
        counts={s: sum(r["status"] == s for r in rows) for s in (DONE, FAILED, UNFIT)},
    )  # fmt: skip
    return target


def _rows(path: Path, beside: Path) -> list[Row]:
    """Rows of a store or of a run, with links relative to the page."""
    if is_store(path):
        found = [(row, path / row["path"]) for row in Results.open(path).rows]
    else:
        found = [(row, path) for row in rows_of(RunDirectory.open(path))]
    return [row | {"link": _link(where / "report.html", beside)} for row, where in found]


def _link(report: Path, beside: Path) -> str:
    """Where the page finds a report; "" where there is none."""
    if not report.exists():
        return ""
    return quote(Path(os.path.relpath(report, beside)).as_posix())


def _line(row: Row) -> str:
    data = f" on {row['data']}" if row["data"] else ""
    return str(row["model"]).replace("_", " ") + data


def _column(row: Row) -> str:
    goal = "" if row["objective"] == OWN else f" · {row['objective'].replace('_', ' ')}"
    return str(row["guide"]).replace("_", " ") + goal


def _known(quantity: Quantity, row: Row) -> bool:
    return row["status"] == DONE and not math.isnan(quantity.value(row))


def _cell(rows: Sequence[Row], shown: Mapping[str, Quantity]) -> dict[str, Any]:
    """What the matrix shows of the seeds of one model, guide and objective."""
    done = [r for r in rows if r["status"] == DONE]
    if not done:
        worst = next((r for r in rows if r["status"] == FAILED), rows[0])
        return {"state": worst["status"], "error": worst["error"], "values": {}, "seeds": []}
    return {
        "state": DONE,
        "verdict": done[0]["verdict"],
        "seeds": [(r["seed"], r["link"]) for r in done],
        "missing": len(rows) - len(done),
        "values": {name: _value(done, quantity) for name, quantity in shown.items()},
    }


def _value(rows: Sequence[Row], quantity: Quantity) -> dict[str, Any]:
    values = [quantity.value(r) for r in rows if _known(quantity, r)]
    if not values:
        return {"text": "n/a", "state": "plain", "sort": ""}
    known = [r for r in rows if _known(quantity, r)]
    spread = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {
        "text": quantity.text(float(np.mean(values))),
        "se": "" if math.isnan(spread) else f"± {number(float(f'{spread:.1g}'))}",
        "state": _state(known, quantity),
        "sort": float(np.mean(values)),
    }


def _state(rows: Sequence[Row], quantity: Quantity) -> str:
    """Whether all seeds are right by it."""
    if quantity.right is None:
        return "plain"
    return "at" if all(quantity.right(r) for r in rows) else "above"


def _entry(row: Row, shown: Mapping[str, Quantity]) -> dict[str, Any]:
    """A line of the list of all runs."""
    values = {name: _value([row], quantity) for name, quantity in shown.items()}
    return row | {
        "line": _line(row), "column": _column(row), "values": values,
        "said": "at" if row["verdict"] == AT_FLOOR else "above",
    }  # fmt: skip
