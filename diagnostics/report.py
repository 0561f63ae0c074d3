"""One self-contained HTML page per run."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.files import write_bytes

from . import plots
from .compare import EXACT, summary
from .metrics import METRICS
from .rundir import RunDirectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from xarray import Dataset

__all__ = ["number", "report", "table", "telling"]


def number(value: float) -> str:
    """Three significant digits, and words for what is no number."""
    if math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "-inf" if value < 0 else "inf"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 1e-4 else "0"


def telling(comparison: Dataset) -> Dataset:
    """Without the metrics that say nothing of any guide, such as those of discrete latents."""
    return comparison.sel(metric=comparison.value.notnull().any(["guide", "problem"]))


def table(comparison: Dataset) -> tuple[list[str], list[list[dict[str, Any]]]]:
    """Guides and cells of the metric table: text, standard error, state and reason.

    The state is "floor" for the exact posterior against itself, "at" or "above" the floor for
    guides, and "plain" where there is nothing to judge.
    """
    means = summary(comparison)
    guides = [str(g) for g in means.guide.values]
    rows = []
    for guide in guides:
        row = []
        for name in means.metric.values:
            cell = means.sel(guide=guide, metric=name)
            judged = guide != EXACT and not math.isnan(float(cell.excess_se))
            state = "floor" if guide == EXACT else "plain"
            state = ("at" if bool(cell.at_floor) else "above") if judged else state
            error = float(cell.se)
            row.append(
                {
                    "text": number(float(cell.value)),
                    "se": "" if math.isnan(error) else f"± {number(float(f'{error:.1g}'))}",
                    "state": state,
                    "reason": str(cell.reason.values),
                }
            )
        rows.append(row)
    return guides, rows


def report(path: str | Path) -> Path:
    """Write report.html into a run directory; nothing it shows needs a network.

    Args:
        path: a directory that `neuroguide compare` or `neuroguide fit` has written.

    Returns:
        The page's path.

    Raises:
        BadCheckpoint: not a run, or not a finished one.
        OutputError: the page cannot be written.
    """
    from jinja2 import Environment, PackageLoader

    run = RunDirectory.open(path)
    losses = run.losses()
    content = _compared(run) if run.path.joinpath("draws.nc").exists() else {}
    pictures = content.pop("pictures", {})
    if losses:
        pictures["losses"] = plots.losses(losses)
    environment = Environment(loader=PackageLoader("diagnostics", "."), autoescape=True)
    page = environment.get_template("report.html.j2").render(
        run=run, pictures={name: _png(figure) for name, figure in pictures.items()}, **content
    )
    target = run.path / "report.html"
    write_bytes(target, page.encode())
    return target


def _compared(run: RunDirectory) -> dict[str, Any]:
    """What a run with draws has to show: pictures and the metric table."""
    draws, comparison = run.draws(), telling(run.comparison())
    children = dict(draws.children)
    trees = {EXACT: children.pop(EXACT)} | children
    pictures = {"marginals": plots.marginals(trees), "correlations": plots.correlations(trees)}
    if shape := [int(n) for n in str(draws.attrs.get("image_shape", "")).split(",") if n]:
        pictures["reconstructions"] = plots.reconstructions(trees, tuple(shape))
    guides, rows = table(comparison)
    return {
        "pictures": pictures,
        "attrs": comparison.attrs,
        "sizes": {**trees[EXACT]["posterior"].sizes},
        "guides": list(zip(guides, [plots.colour(g) for g in guides], rows, strict=True)),
        "metrics": [METRICS[str(m)] for m in comparison.metric.values],
        "reasons": sorted({c["reason"] for row in rows for c in row} - {""}),
    }


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
